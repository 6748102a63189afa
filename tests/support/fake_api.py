"""A real HTTP server on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """An answer: a JSON body, bytes, or pieces that are sent one by one."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Cut(Exception):  # noqa: N818 - no error, but what a test does to a reader
    """Raised by a handler or between pieces: the connection breaks off."""


Handler = Callable[[Seen], Reply]


def problem(code: str, status: int, detail: str = "no", **members: Any) -> Reply:
    body = {
        "type": f"urn:gamenode:problem:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        "code": code,
        "details": [],
        "retry_after_s": None,
        "id": None,
        "hint": "",
        **members,
    }
    return Reply(body, status, {"Content-Type": "application/problem+json"})


def ndjson(items: Iterable[Any]) -> Iterator[bytes]:
    return (json.dumps(item).encode() + b"\n" for item in items)


class FakeApi:
    """Routes are regular expressions of paths below /api/v1, the newest first."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = []
        self._server = _start(self, 0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def on(self, method: str, path: str, reply: Reply | Handler) -> None:
        handler = reply if callable(reply) else lambda _seen: reply
        self._routes.insert(0, (method, re.compile(f"/api/v1{path}"), handler))

    def answer(self, seen: Seen) -> Reply:
        self.seen.append(seen)
        for method, pattern, handler in self._routes:
            if method == seen.method and pattern.fullmatch(seen.path):
                return handler(seen)
        return problem("NOT_FOUND", 404, f"no route {seen.method} {seen.path}")

    def requests(self, method: str, path: str) -> list[Seen]:
        return [
            seen
            for seen in self.seen
            if seen.method == method and re.fullmatch(f"/api/v1{path}", seen.path)
        ]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def start_again(self) -> None:
        """Listen on the same port as before."""
        self._server = _start(self, self.port)


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    api = FakeApi()
    try:
        yield api
    finally:
        api.stop()


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - as http.server calls them

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as it is called
        """Be quiet."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length", "0"))
        seen = Seen(
            self.command,
            parts.path,
            dict(parse_qsl(parts.query)),
            {name.lower(): value for name, value in self.headers.items()},
            self.rfile.read(length),
        )
        try:
            self._send(self.server.api.answer(seen))
        except Cut:
            self.close_connection = True

    def _send(self, reply: Reply) -> None:
        body = reply.body
        if isinstance(body, Iterator):
            self._send_head(reply, {"Transfer-Encoding": "chunked"})
            for piece in body:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._send_head(
            reply, {"Content-Type": "application/json", "Content-Length": str(len(content))}
        )
        self.wfile.write(content)

    def _send_head(self, reply: Reply, headers: Mapping[str, str]) -> None:
        self.send_response(reply.status)
        for name, value in {**headers, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, api: FakeApi, port: int) -> None:
        self.api = api
        super().__init__(("127.0.0.1", port), _Exchange)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: readers that leave are part of the tests."""


def _start(api: FakeApi, port: int) -> _Server:
    server = _Server(api, port)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
