"""A client for an ASGI application in this process, down to single chunks of a response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Scope

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Stream:
    """An open response: `leave` is what a reader does that closes its connection."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    chunks: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self) -> bytes | None:
        """Return the next chunk; None at the end."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.chunks.get()

    async def until(self, part: bytes) -> bytes:
        """Return everything up to the chunk that completes `part`."""
        seen = b""
        while part not in seen:
            chunk = await self.next()
            assert chunk is not None, f"ended after {seen!r}"
            seen += chunk
        return seen

    async def rest(self) -> bytes:
        seen = b""
        while (chunk := await self.next()) is not None:
            seen += chunk
        return seen

    def leave(self) -> None:
        self.left.set()


def scope_of(
    method: str, target: str, headers: Mapping[str, str] | Iterable[tuple[str, str]]
) -> Scope:
    path, _, query = target.partition("?")
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    if not any(name == b"host" for name, _ in raw):
        raw.append((b"host", b"127.0.0.1:8080"))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": raw,
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8080),
    }


@asynccontextmanager
async def opened(
    app: ASGIApp,
    method: str,
    target: str,
    *,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes | Iterable[bytes] = b"",
) -> AsyncIterator[Stream]:
    """Send a request; yield the response once it has begun, and leave it at the end."""
    stream = Stream()
    parts = iter([body] if isinstance(body, bytes) else body)
    begun = asyncio.Event()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            part = next(parts, None)
            if part is not None:
                return {"type": "http.request", "body": part, "more_body": True}
            sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await stream.left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            stream.status = message["status"]
            stream.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            begun.set()
        else:
            if message.get("body"):
                await stream.chunks.put(message["body"])
            if not message.get("more_body"):
                await stream.chunks.put(None)

    async def run() -> None:
        try:
            await app(scope_of(method, target, headers), receive, send)
        finally:
            await stream.chunks.put(None)

    task = asyncio.ensure_future(run())
    waiting = asyncio.ensure_future(begun.wait())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield stream
    finally:
        waiting.cancel()
        stream.leave()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(task, waiting, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, at most a few seconds."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody that it changed
            await asyncio.sleep(0)


async def ask(
    app: ASGIApp,
    method: str,
    target: str,
    *,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes | Iterable[bytes] = b"",
) -> Answer:
    """Send a request and return the whole response."""
    async with opened(app, method, target, headers=headers, body=body) as stream:
        content = await stream.rest()
        return Answer(status=stream.status, headers=stream.headers, body=content)
