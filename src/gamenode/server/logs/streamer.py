"""Gives a stored log to a reader: from a place in it, and on as it grows.

A reader is a generator that holds an offset and a file. It reads what is committed, so it can be as
slow as it likes: nobody waits for it, and nothing is kept for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.domain.log import LogKey, LogSlice, LogStream, StoredLog
from gamenode.lib.clock import Clock, Instant
from gamenode.lib.tasks import Wake
from gamenode.server.logs.media.files import LogFiles, LogReader
from gamenode.server.logs.service import LogService
from gamenode.wire import cri

_Result = TypeVar("_Result")

_SEARCH_BYTES: Final = 4096
_TAIL_BYTES: Final = 256 * 1024
_LINE: Final = re.compile(rb"[^\n]*\n|[^\n]+\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamerSettings:
    """The bounds of reading logs."""

    block_bytes_max: int = 512 * 1024
    """How much is read at once: what a reader holds in memory."""
    line_bytes_max: int = 2 * 1024 * 1024
    """The longest line that is given as a whole."""
    sweep_s: float = 2.0
    """How often a follower looks for an end that nobody told it of (rule RC3)."""
    incomplete_s: float = 10.0
    """How long a follower waits for the rest of a log whose step has ended."""
    stopping_retry_s: float = 1.0
    """The advice to a follower when the server stops."""
    threads: int = 4
    """Threads that read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class From:
    """Where to begin: at the latest of these places.

    `offset`: the first line that begins there or later. `tail`: the last so many lines, those of
    `stream` alone if given. `since`: the first line read at that instant or later.
    """

    offset: int = 0
    tail: int | None = None
    stream: LogStream | None = None
    since: Instant | None = None


class LogStreamer:
    """Reads logs. Source: G2, G3, G4."""

    def __init__(
        self, service: LogService, files: LogFiles, *, clock: Clock, settings: StreamerSettings
    ) -> None:
        """Read from `files` what `service` says is stored."""
        self._service = service
        self._files = files
        self._clock = clock
        self._settings = settings
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="log-reader")
        self._following: set[Wake] = set()
        self._stopping = False

    async def start(self, key: LogKey, start: From) -> int:
        """Return the offset of the first line that a reading from `start` gives, or would give.

        Raises:
            GameNodeError: INVALID_REQUEST, `start` lies behind the end; INTERNAL, damage.
        """
        reader = self._files.reader(key)
        try:
            return await self._begin(reader, _length(await self._service.refresh(key)), start)
        finally:
            reader.close()

    async def slices(self, key: LogKey, start: From) -> AsyncGenerator[LogSlice, None]:
        """Yield what is stored now.

        Raises:
            GameNodeError: INVALID_REQUEST, `start` lies behind the end; INTERNAL, damage.
        """
        reader = self._files.reader(key)
        try:
            stored = await self._service.refresh(key)
            offset = await self._begin(reader, _length(stored), start)
            async for piece in self._pieces(reader, offset, stored):
                yield piece
        finally:
            reader.close()

    async def follow(
        self, key: LogKey, start: From, is_finished: Callable[[LogKey], Awaitable[bool]]
    ) -> AsyncGenerator[LogSlice, None]:
        """Yield what is stored, then what comes, each byte once and in order, until the log ends.

        It ends when it is complete; when `is_finished` says that the step has ended without giving
        a length; or when the rest of a finished log has not come for `incomplete_s`.

        Raises:
            GameNodeError: as `slices` does; UNAVAILABLE, the server stops, so that nobody takes
                this end for the log's.
        """
        reader = self._files.reader(key)
        try:
            with self._service.watch(key) as wake, self._followed(wake):
                stored = await self._service.refresh(key)
                offset = await self._begin(reader, _length(stored), start)
                end = _End(key, is_finished, self._clock, self._settings.incomplete_s)
                while True:
                    quiet = True
                    async for piece in self._pieces(reader, offset, stored):
                        yield piece
                        offset = piece.next_offset
                        quiet = False
                    if stored is not None and stored.complete:
                        return
                    if self._stopping:
                        raise GameNodeError(
                            ErrorCode.UNAVAILABLE,
                            "the server is stopping",
                            retry_after_s=self._settings.stopping_retry_s,
                        )
                    # A busy log is not asked whether it has ended.
                    if quiet and await end.reached(stored):
                        latest = await self._service.refresh(key)
                        if _length(latest) == _length(stored):
                            return
                        stored = latest
                    elif await wake.wait(self._settings.sweep_s):
                        stored = await self._service.stored(key)
                    else:
                        stored = await self._service.refresh(key)
        finally:
            reader.close()

    def end_followers(self) -> None:
        """End every follower, and every one to come: the server is stopping."""
        self._stopping = True
        for wake in self._following:
            wake.ring()

    @contextmanager
    def _followed(self, wake: Wake) -> Iterator[None]:
        self._following.add(wake)
        try:
            yield
        finally:
            self._following.discard(wake)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    async def _begin(self, reader: LogReader, length: int, start: From) -> int:
        if not 0 <= start.offset <= length:
            raise invalid("offset", f"the log has {length} bytes")
        return await self._in_thread(lambda: _place(reader, length, start))

    async def _pieces(
        self, reader: LogReader, offset: int, stored: StoredLog | None
    ) -> AsyncGenerator[LogSlice, None]:
        length = _length(stored)
        while offset < length:
            at = offset
            data = await self._in_thread(
                lambda: _whole_lines(reader, at, length, self._settings)  # noqa: B023 - awaited
            )
            yield LogSlice(offset, data)
            offset += len(data)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class _End:
    """Judges whether a log that is not complete will get no more."""

    def __init__(
        self,
        key: LogKey,
        is_finished: Callable[[LogKey], Awaitable[bool]],
        clock: Clock,
        incomplete_s: float,
    ) -> None:
        self._key = key
        self._is_finished = is_finished
        self._clock = clock
        self._incomplete_s = incomplete_s
        self._missed_s: float | None = None

    async def reached(self, stored: StoredLog | None) -> bool:
        """Return whether it is time to stop waiting."""
        if stored is None or stored.final_length_bytes is None:
            return await self._is_finished(self._key)
        if self._missed_s is None:
            self._missed_s = self._clock.monotonic_s()
        return self._clock.monotonic_s() - self._missed_s >= self._incomplete_s


def _length(stored: StoredLog | None) -> int:
    return stored.length_bytes if stored is not None else 0


def _read(reader: LogReader, offset: int, length_bytes: int) -> bytes:
    data = reader.read(offset, length_bytes)
    if len(data) < length_bytes:
        raise GameNodeError(
            ErrorCode.INTERNAL,
            f"the log is damaged: its file ends at byte {offset + len(data)}",
            hint="restore the file from a backup",
        )
    return data


def _whole_lines(reader: LogReader, offset: int, length: int, settings: StreamerSettings) -> bytes:
    """Return one block of lines; a part of one only where it is too long, or the log ends in it.

    Chunks of our agent end where a line ends, so a log does too.
    """
    size = min(settings.block_bytes_max, length - offset)
    data = _read(reader, offset, size)
    end = data.rfind(b"\n") + 1
    if not end and size < length - offset:
        data = _read(reader, offset, min(settings.line_bytes_max, length - offset))
        end = data.find(b"\n") + 1
    return data[:end] if end else data


def _place(reader: LogReader, length: int, start: From) -> int:
    place = _line_start(reader, start.offset, length)
    if start.tail is not None:
        place = max(place, _tail_start(reader, length, start.tail, start.stream))
    if start.since is not None:
        place = max(place, _since_start(reader, length, cri.stamp(start.since)))
    return place


def _line_start(reader: LogReader, offset: int, length: int) -> int:
    """Return where the first line begins that begins at `offset` or later."""
    if offset == 0:
        return 0
    offset -= 1
    while offset < length:
        data = _read(reader, offset, min(_SEARCH_BYTES, length - offset))
        end = data.find(b"\n") + 1
        if end:
            return offset + end
        offset += len(data)
    return length


def _since_start(reader: LogReader, length: int, stamp: bytes) -> int:
    """Return where the first line begins that is not older than `stamp`; times ascend."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        line = _line_start(reader, middle, length)
        if line >= high or reader.read(line, len(stamp)) >= stamp:
            high = middle
        else:
            low = line + 1
    return _line_start(reader, low, length)


def _tail_start(reader: LogReader, length: int, lines: int, stream: LogStream | None) -> int:
    """Return where the last `lines` lines begin: behind the one before them."""
    left = lines
    last = True
    place = length
    carry = b""
    while place > 0:
        size = min(_TAIL_BYTES, place)
        place -= size
        block = _read(reader, place, size) + carry
        # The first line may have begun before this block.
        head = block.find(b"\n") + 1 if place else 0
        carry = block[:head] if head else block
        if place and not head:
            continue
        end = place + len(block)
        for line in reversed(_LINE.findall(block, head)):
            if _counts(line, stream, last=last):
                if left == 0:
                    return end
                left -= 1
                last = False
            end -= len(line)
    return 0


def _counts(line: bytes, stream: LogStream | None, *, last: bool) -> bool:
    """Return whether a stored line counts as one: of its stream, and ended unless `last`."""
    _, line_stream, tag, *_ = [*line.split(b" ", 3), b"", b""]
    wanted = stream is None or line_stream == stream.encode()
    return wanted and (last or tag != b"P")
