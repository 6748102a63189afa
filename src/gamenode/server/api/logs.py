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

from gamenode.domain.log import LogSlice, LogStream
from gamenode.domain.quantity import parse_time
from gamenode.lib.clock import Clock
from gamenode.server.api.decode import QueryReader
from gamenode.server.api.operation import Call, Operation
from gamenode.server.api.streams import (
    NDJSON_MEDIA_TYPE,
    SSE_MEDIA_TYPE,
    Streams,
    accepts_events,
    closing,
    read_last_event_id,
)
from gamenode.server.logs.manager import LogManager
from gamenode.server.logs.streamer import From
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
    """Which part of a log, and how. Of several places to begin at, the latest counts."""

    follow: Annotated[bool, Meta(description="Go on until the log ends.")] = False
    offset: Annotated[
        Offset, Meta(description="Begin with the first line at or behind this stored byte.")
    ] = 0
    tail: Annotated[
        Lines | None, Meta(description="Begin where the last lines do, those of `stream` if given.")
    ] = None
    since: Annotated[
        str, Meta(description="Begin at this time: RFC 3339, or `10m` for ten minutes ago.")
    ] = ""
    attempt: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Which try; 0 is the newest.")] = 0
    stream: Annotated[
        LogStream | None, Meta(description="This stream only; `cri` still has them all.")
    ] = None
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
        key = await self._logs.open(call.path["pipeline"], call.path["step"], query.attempt)
        # Found before the response begins: then an error can still have its status.
        offset = await self._logs.start(key, self._start(call, as_events=as_events))
        slices = self._logs.read(key, From(offset=offset), follow=query.follow)
        chunks = (
            _translated(slices, partial(_to_events, stream=query.stream))
            if as_events
            else _in_format(slices, query)
        )
        return self._streams.respond(
            chunks,
            media_type=SSE_MEDIA_TYPE if as_events else _MEDIA_TYPES[query.format],
            headers={OFFSET_HEADER: str(offset)},
        )

    def _start(self, call: Call[LogQuery, None], *, as_events: bool) -> From:
        last_id = read_last_event_id(call.request) if as_events else None
        if last_id is not None:
            return From(offset=last_id)
        query = call.query
        since = parse_time(query.since, self._clock.now(), field="since") if query.since else None
        return From(offset=query.offset, tail=query.tail, stream=query.stream, since=since)


def _in_format(slices: AsyncIterator[LogSlice], query: LogQuery) -> AsyncIterator[bytes]:
    match query.format:
        case LogFormat.CRI:
            # Whole, whatever stream is asked for: whoever counts what arrives, to go on from
            # there, would count wrong.
            return _translated(slices, lambda lines: lines.data)
        case LogFormat.RAW:
            return _translated(slices, partial(_to_raw, stream=query.stream))
        case LogFormat.TEXT:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return _translated(slices, partial(_to_text, stream=query.stream, decoder=decoder))
        case LogFormat.JSON:
            return _translated(slices, partial(_to_json, stream=query.stream))


async def _translated(
    slices: AsyncIterator[LogSlice], translate: Callable[[LogSlice], bytes]
) -> AsyncIterator[bytes]:
    async with closing(slices):
        async for lines in slices:
            if len(lines.data) > _INLINE_BYTES_MAX:
                chunk = await asyncio.to_thread(translate, lines)
            else:
                chunk = translate(lines)
            if chunk:
                yield chunk


def _to_raw(lines: LogSlice, *, stream: LogStream | None) -> bytes:
    return cri.strip(cri.select(lines.data, stream) if stream else lines.data)


def _to_text(
    lines: LogSlice, *, stream: LogStream | None, decoder: codecs.IncrementalDecoder
) -> bytes:
    chosen = cri.select(lines.data, stream) if stream else lines.data
    # Incremental, since a character may be parted where a long line was.
    return decoder.decode(cri.strip(chosen, records=True)).encode()


def _to_json(lines: LogSlice, *, stream: LogStream | None) -> bytes:
    return b"".join(
        b"%b\n" % _encode_json(http.encode_log_line(line))
        for line in cri.parse(lines.data, lines.offset, stream=stream)
    )


def _to_events(lines: LogSlice, *, stream: LogStream | None) -> bytes:
    return b"".join(
        b"id: %d\ndata: %b\n\n" % (line.next_offset, _encode_json(http.encode_log_line(line)))
        for line in cri.parse(lines.data, lines.offset, stream=stream)
    )
