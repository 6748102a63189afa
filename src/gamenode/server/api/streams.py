"""Responses without an end in sight: events and logs as they come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.server.api import problem

SSE_MEDIA_TYPE: Final = "text/event-stream"
NDJSON_MEDIA_TYPE: Final = "application/x-ndjson"

_POSITION: Final = re.compile(r"[0-9]{1,19}")
_POSITION_MAX: Final = 2**63 - 1

T = TypeVar("T")


class Streams:
    """Makes streaming responses, and bounds how many are open at once."""

    def __init__(self, *, streams_max: int, heartbeat_s: float, retry_after_s: float) -> None:
        """Open no stream yet.

        Args:
            streams_max: How many may be open at once.
            heartbeat_s: How often a server-sent stream says that it is alive.
            retry_after_s: When somebody who found no place should come back.
        """
        self._streams_max = streams_max
        self._heartbeat_s = heartbeat_s
        self._retry_after_s = retry_after_s
        self._open = 0

    def respond(
        self,
        chunks: AsyncIterator[bytes],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> ASGIApp:
        """Return the response that sends `chunks` until they end or the reader leaves.

        A slow reader is waited for, so it holds no more than one chunk. Raises RESOURCE_EXHAUSTED
        when it is sent and too many are open.
        """
        raw_headers = [
            (b"content-type", media_type.encode()),
            (b"cache-control", b"no-store"),
            # Proxies must pass on what comes, when it comes.
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ]
        serves_events = media_type == SSE_MEDIA_TYPE

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            async with self._place(), closing(chunks):
                await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
                if scope["method"] != "HEAD":
                    sender = _Sender(chunks, send, serves_events=serves_events)
                    work = self._with_heartbeat(sender) if serves_events else sender.run()
                    await unless_gone(receive, work)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        return stream

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._open >= self._streams_max:
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"{self._streams_max} streams are open already",
                retry_after_s=self._retry_after_s,
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _with_heartbeat(self, sender: _Sender) -> None:
        beat = asyncio.ensure_future(sender.beat(self._heartbeat_s))
        try:
            await sender.run()
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)


class _Sender:
    """Sends the chunks of one response."""

    def __init__(self, chunks: AsyncIterator[bytes], send: Send, *, serves_events: bool) -> None:
        self._chunks = chunks
        self._send = send
        self._serves_events = serves_events
        self._sent = False

    async def run(self) -> None:
        """Send every chunk."""
        try:
            async for chunk in self._chunks:
                self._sent = True
                await self._send(_body(chunk))
        except GameNodeError as error:
            if not self._serves_events:
                raise  # the reader sees a response that breaks off
            await self._send(_body(b"event: problem\ndata: " + problem.encode(error) + b"\n\n"))

    async def beat(self, period_s: float) -> None:
        """Say every `period_s` in which nothing was sent that the stream is alive."""
        await self._send(_body(b": here\n\n"))
        while True:
            await asyncio.sleep(period_s)
            if not self._sent:
                await self._send(_body(b": here\n\n"))
            self._sent = False


def accepts_events(request: Request) -> bool:
    """Return whether a request asks for server-sent events."""
    return SSE_MEDIA_TYPE in request.headers.get("accept", "")


@asynccontextmanager
async def closing(source: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Close `source` at the end, if it is one that can be closed."""
    try:
        yield
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


def read_last_event_id(request: Request) -> int | None:
    """Return the position after which a reader of events goes on, or None.

    Raises:
        GameNodeError: INVALID_REQUEST; it is no number that we gave.
    """
    text = request.headers.get("last-event-id", "")
    if not text:
        return None
    if not _POSITION.fullmatch(text) or int(text) > _POSITION_MAX:
        raise invalid("last-event-id", "is no position in this stream")
    return int(text)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; end it if the caller leaves before.

    The request's body must have been read, or be empty.

    Raises:
        ClientDisconnect: The caller left; `work` has ended.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(chunk: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": True}
