"""Clients that never come to the end of what they send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest
import uvicorn
from tests.support.api_fakes import Api
from tests.support.asgi import until

from gamenode.server.api.connection import BoundedConnection, ConnectionSettings

TIMEOUT_S = 5.0
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /api/v1/pipelines HTTP/1.1\r\nHost: localhost\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def served(**bounds: Any) -> AsyncIterator[int]:
    """Serve on loopback within `bounds`; yield the port."""
    protocol = partial(BoundedConnection, ConnectionSettings(**bounds))
    server = uvicorn.Server(
        uvicorn.Config(
            Api().app, port=0, lifespan="off", log_config=None, http=cast("Any", protocol)
        )
    )
    task = asyncio.ensure_future(server.serve())
    try:
        await until(lambda: server.started or task.done())
        yield int(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


async def said(streams: Streams) -> bytes:
    """Return what the server says until it closes, or answers a first request."""
    async with asyncio.timeout(TIMEOUT_S):
        return await streams[0].readline()


async def closed(streams: Streams) -> bool:
    """Wait until the server has closed the connection."""
    async with asyncio.timeout(TIMEOUT_S):
        try:
            await streams[0].read()
        except ConnectionError:
            return True
    return streams[0].at_eof()


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (GET, b"X-%d: " + b"a" * 4096 + b"\r\n"),
        (GET + b"X-One: ", b"%da" * 1024),
        (b"GET /", b"%da" * 1024),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
            b"X-Trailer-%d: " + b"a" * 4096 + b"\r\n",
        ),
    ],
    ids=["many headers", "a long header", "a long path", "trailers"],
)
async def test_a_head_without_end_is_refused(begin: bytes, more: bytes) -> None:
    async with served(head_bytes_max=64 * 1024) as port:
        streams = await asyncio.open_connection("127.0.0.1", port)
        streams[1].write(begin)
        with pytest.raises(ConnectionError):  # closed long before the end of this
            for number in range(100_000):
                streams[1].write(more.replace(b"%d", b"%d" % number))
                await streams[1].drain()
        streams[1].close()


async def test_a_head_within_the_bound_is_served() -> None:
    async with served(head_bytes_max=64 * 1024) as port:
        streams = await asyncio.open_connection("127.0.0.1", port)
        streams[1].write(GET + b"X-One: " + b"a" * 60_000 + b"\r\n\r\n")
        assert await said(streams) == b"HTTP/1.1 200 OK\r\n"
        streams[1].close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: loc",
        POST + b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
async def test_a_request_that_does_not_arrive_ends_its_connection(sent: bytes) -> None:
    async with served(request_s_max=0.05) as port:
        streams = await asyncio.open_connection("127.0.0.1", port)
        streams[1].write(sent)
        assert await closed(streams)
        streams[1].close()


async def test_the_second_request_of_a_connection_has_the_same_time() -> None:
    async with served(request_s_max=0.05) as port:
        streams = await asyncio.open_connection("127.0.0.1", port)
        streams[1].write(GET + b"\r\n")
        assert await said(streams) == b"HTTP/1.1 200 OK\r\n"
        streams[1].write(GET[:10])
        assert await closed(streams)
        streams[1].close()


async def test_one_connection_more_than_the_bound_is_refused() -> None:
    async with served(connections_max=2) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        one_more = await asyncio.open_connection("127.0.0.1", port)
        assert await said(one_more) == b"HTTP/1.1 503 Service Unavailable\r\n"
        held.pop()[1].close()
        while True:  # until the server has noticed
            again = await asyncio.open_connection("127.0.0.1", port)
            again[1].write(GET + b"\r\n")
            answer = await said(again)
            again[1].close()
            if answer == b"HTTP/1.1 200 OK\r\n":
                break
        for streams in (*held, one_more):
            streams[1].close()
