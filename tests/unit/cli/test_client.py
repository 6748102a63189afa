"""The HTTP client: one kept connection, and what it does when that breaks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gamenode.cli.client import ApiClient
from gamenode.cli.errors import SilentError, UnreachableError
from gamenode.cli.settings import CliSettings
from gamenode.cli.target import Target
from gamenode.lib.clock import SystemClock

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def listener(*connections: int) -> Iterator[tuple[str, list[bytes]]]:
    """Serve connections one after the other; each answers so many requests, then closes."""
    seen: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answers in connections:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                for _ in range(answers):
                    if head := connection.recv(65536):
                        seen.append(head)
                        connection.sendall(ANSWER)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def client_of(url: str, **settings: float) -> ApiClient:
    return ApiClient(
        Target(url=url),
        clock=SystemClock(),
        settings=CliSettings(**settings),  # type: ignore[arg-type] # only floats are set here
    )


def test_requests_share_a_connection() -> None:
    with listener(2) as (url, seen):
        client = client_of(url)
        client.get("/a")
        client.get("/b")
        client.close()
    assert len(seen) == 2


def test_a_kept_connection_that_was_closed_meanwhile_is_made_anew() -> None:
    with listener(1, 1) as (url, seen):
        client = client_of(url)
        client.get("/a")
        client.get("/b")
        client.close()
    assert len(seen) == 2


def test_a_post_without_a_key_is_never_sent_twice_and_with_one_it_may_be() -> None:
    with listener(1, 1, 1) as (url, _):
        client = client_of(url)
        client.get("/a")
        with pytest.raises(UnreachableError) as broken:
            client.post("/b", {})
        assert broken.value.sent
        client.get("/a")
        client.post("/b", {}, headers={"Idempotency-Key": "k"})
        client.close()


def test_no_answer_is_told_from_no_connection() -> None:
    with listener(0) as (url, _), socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        client = client_of(f"http://127.0.0.1:{port}", answer_s=0.05)
        with pytest.raises(SilentError):
            client.get("/a")
        client.close()
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
    with pytest.raises(UnreachableError) as refused:
        client_of(url).get("/a")
    assert not refused.value.sent
