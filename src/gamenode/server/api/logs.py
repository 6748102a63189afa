"""The route of a step's log, in each of the forms that a log can be read in."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from starlette.types import ASGIApp

from gamenode.domain.errors import invalid
from gamenode.domain.log import LogStream
from gamenode.domain.quantity import parse_time
from gamenode.lib.clock import Clock
from gamenode.server.api.decode import QueryReader
from gamenode.server.api.nouns import LogManager
from gamenode.server.api.operation import Call, Operation
from gamenode.server.api.streams import (
    NDJSON_MEDIA_TYPE,
    SSE_MEDIA_TYPE,
    Streams,
    accepts_events,
    closing,
    read_last_event_id,
)
from gamenode.wire import cri, http

OFFSET_HEADER: Final = "log-offset"
"""The response header that says at which offset of the stored bytes the reading begins."""

_INLINE_BYTES_MAX: Final = 16 * 1024
"""Above this a block is translated on a thread, so that a big log stalls nobody else."""

Offset = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Lines = Annotated[int, Meta(ge=0, le=10_000_000)]

_encode_json: Final = msgspec.json.Encoder().encode


class LogFormat(StrEnum):
    """How a log is written."""

    TEXT = "text"  # for people: UTF-8, records about the log among the lines
    JSON = "json"  # a line of JSON for each line
    RAW = "raw"  # the step's own bytes, and nothing else
    CRI = "cri"  # as it is stored: the form to resume at an offset


_MEDIA_TYPES: Final = {
    LogFormat.TEXT: "text/plain; charset=utf-8",
    LogFormat.JSON: NDJSON_MEDIA_TYPE,
    LogFormat.RAW: "application/octet-stream",
    LogFormat.CRI: "application/vnd.gamenode.cri",
}


class LogQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a log, and how."""

    follow: Annotated[bool, Meta(description="Go on until the log ends.")] = False
    offset: Annotated[
        Offset | None, Meta(description="Begin at this offset of the stored bytes, a line's start.")
    ] = None
    tail: Annotated[Lines | None, Meta(description="The last lines only.")] = None
    since: Annotated[
        str, Meta(description="Lines from this time on: RFC 3339, or `10m` for ten minutes ago.")
    ] = ""
    attempt: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Which try; 0 is the newest.")] = 0
    stream: Annotated[LogStream | None, Meta(description="This stream only.")] = None
    format: LogFormat = LogFormat.TEXT


class LogRoutes:
    """Reads logs."""

    def __init__(self, logs: LogManager, *, streams: Streams, clock: Clock) -> None:
        """Speak for `logs`."""
        self._logs = logs
        self._streams = streams
        self._clock = clock

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/pipelines/{pipeline}/steps/{step}/logs",
                summary="Read a step's log",
                handler=self._read,
                query=QueryReader(LogQuery),
                media_types=(*_MEDIA_TYPES.values(), SSE_MEDIA_TYPE),
                headers={"Last-Event-ID": "Go on at this offset of a stream of events."},
            ),
        )

    async def _read(self, call: Call[LogQuery, None]) -> ASGIApp:
        query = call.query
        as_events = accepts_events(call.request)
        _check_combination(query)
        key = await self._logs.open(call.path["pipeline"], call.path["step"], query.attempt)
        start = read_last_event_id(call.request) if as_events else None
        if start is None:
            since = (
                parse_time(query.since, self._clock.now(), field="since") if query.since else None
            )
            start = await self._logs.start(key, offset=query.offset, tail=query.tail, since=since)
        blocks = self._logs.read(key, offset=start, follow=query.follow)
        if as_events:
            chunks = _translated(blocks, start, partial(_to_events, stream=query.stream))
            media_type = SSE_MEDIA_TYPE
        else:
            chunks = _in_format(blocks, start, query)
            media_type = _MEDIA_TYPES[query.format]
        return self._streams.respond(
            chunks, media_type=media_type, headers={OFFSET_HEADER: str(start)}
        )


def _check_combination(query: LogQuery) -> None:
    if sum((query.offset is not None, query.tail is not None, bool(query.since))) > 1:
        raise invalid("offset", "does not go with tail or since", advice="give one of the three")
    if query.format is LogFormat.CRI and query.stream is not None:
        # Whoever counts what arrives, to go on from there, would count wrong.
        raise invalid("stream", "does not go with format=cri", advice="choose from the lines read")


def _in_format(blocks: AsyncIterator[bytes], start: int, query: LogQuery) -> AsyncIterator[bytes]:
    match query.format:
        case LogFormat.CRI:
            return blocks
        case LogFormat.RAW:
            return _translated(blocks, start, partial(_to_raw, stream=query.stream))
        case LogFormat.TEXT:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return _translated(
                blocks, start, partial(_to_text, stream=query.stream, decoder=decoder)
            )
        case LogFormat.JSON:
            return _translated(blocks, start, partial(_to_json, stream=query.stream))


async def _translated(
    blocks: AsyncIterator[bytes], start: int, translate: Callable[[bytes, int], bytes]
) -> AsyncIterator[bytes]:
    """Yield whole lines translated; `translate` gets them with the offset of the first."""
    offset = start
    rest = b""
    async with closing(blocks):
        async for block in blocks:
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block
                continue
            lines = rest + block[:end] if rest else block[:end]
            rest = block[end:]
            if len(lines) > _INLINE_BYTES_MAX:
                chunk = await asyncio.to_thread(translate, lines, offset)
            else:
                chunk = translate(lines, offset)
            offset += len(lines)
            if chunk:
                yield chunk


def _to_raw(lines: bytes, _offset: int, *, stream: LogStream | None) -> bytes:
    return cri.strip(cri.select(lines, stream) if stream else lines)


def _to_text(
    lines: bytes, _offset: int, *, stream: LogStream | None, decoder: codecs.IncrementalDecoder
) -> bytes:
    chosen = cri.select(lines, stream) if stream else lines
    # Incremental, since a character may be parted where a long line was.
    return decoder.decode(cri.strip(chosen, records=True)).encode()


def _to_json(lines: bytes, offset: int, *, stream: LogStream | None) -> bytes:
    return b"".join(
        b"%b\n" % _encode_json(http.encode_log_line(line))
        for line in cri.parse(lines, offset, stream=stream)
    )


def _to_events(lines: bytes, offset: int, *, stream: LogStream | None) -> bytes:
    return b"".join(
        b"id: %d\ndata: %b\n\n" % (line.next_offset, _encode_json(http.encode_log_line(line)))
        for line in cri.parse(lines, offset, stream=stream)
    )
