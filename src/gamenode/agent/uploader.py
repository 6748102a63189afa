"""Brings what steps print to the server: framed, spooled, and in order, whatever the network does.

Each log has a reader (source, framing, spool) and a sender (spool, chunks, answers). They share
offsets and nothing else: the reader is ahead as far as the spool's bound allows, the sender goes
back to wherever the server says (rule RG1).

Source: G1, G2, P6; architecture.md, section 7.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final, Protocol, TypeVar

from gamenode.agent.spool.logs import LogSpool, SpooledLog
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import AppendAnswer, LogEnd, LogKey, LogPosition, LogStream
from gamenode.lib.backoff import Backoff
from gamenode.lib.clock import Instant
from gamenode.lib.tasks import Supervisor, Wake
from gamenode.wire import cri

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_RECORD_BYTES_MAX: Final = 256
_CHUNK_BYTES_MIN: Final = 4096
"""A shorter bound would leave no room for a line."""
# A refusal that no repeat changes: the log is not wanted, like the answer `stop`.
_NEVER_WANTED: Final = frozenset(
    {
        ErrorCode.CONFLICT,
        ErrorCode.PERMISSION_DENIED,
        ErrorCode.NOT_FOUND,
        ErrorCode.PIPELINE_NOT_FOUND,
        ErrorCode.STEP_NOT_FOUND,
        ErrorCode.LOG_NOT_FOUND,
    }
)


class LogLink(Protocol):
    """The way to the server."""

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        """Send one chunk, with its checksum; an empty one asks where to go on.

        `position` is how far the streams had been read at the chunk's end. May be called again
        before it has answered.

        Raises:
            GameNodeError: the server's refusal, or UNAVAILABLE where there is no way to it.
        """


class Block(Protocol):
    """Bytes that were read together from one stream of a step."""

    @property
    def stream(self) -> LogStream:
        """The stream; `GAMENODE` for a record about the log, such as a gap."""

    @property
    def data(self) -> bytes:
        """The bytes."""

    @property
    def at(self) -> Instant:
        """When they were read."""

    @property
    def masked(self) -> Sequence[tuple[int, int]]:
        """Parts of `data`, in order, that no piece may end in: secrets that are masked."""


Source = Callable[[LogPosition, asyncio.Event], AsyncIterator[Block]]
"""A step's output from a position on; ends when the step has ended and all was read. While the
event is set, somebody waits for every line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploaderSettings:
    """The bounds of uploading logs."""

    idle_interval_s: float = 2.0
    """How long output may wait in the spool while nobody follows."""
    chunk_bytes_max: int = 1024 * 1024
    """The longest chunk that is sent; the server may want shorter ones."""
    window_chunks: int = 8
    """How many chunks of one log may be on their way."""
    in_flight_chunks_max: int = 32
    """How many chunks of all logs may be on their way; they are held in memory."""
    spool_bytes_max: int = 1024 * 1024 * 1024
    """How much may wait for the server; beyond it the steps' output is left where it is."""
    log_bytes_max: int = 16 * 1024 * 1024 * 1024
    """How long one log may get; the rest is dropped, and a record in the log says so."""
    threads: int = 2
    """Threads that write and read the spool."""
    retry_first_s: float = 0.2
    """The wait after a chunk that was not taken; it doubles with each in a row."""
    retry_most_s: float = 15.0
    """The longest such wait."""


class LogUploader:
    """Uploads the logs of an agent's steps."""

    def __init__(
        self,
        *,
        link: LogLink,
        spool: LogSpool,
        settings: UploaderSettings,
        random: Random | None = None,
        pool: Executor | None = None,
    ) -> None:
        """Upload through `link`. `random` spreads the retries of many agents.

        Files are read and written in `pool`, which stays open; without one, on threads of its own.
        """
        self._owns_pool = pool is None
        self._shared = _Shared(
            link=link,
            spool=spool,
            settings=settings,
            random=random or Random(),  # noqa: S311 - spreads retries, guards nothing
            pool=pool or ThreadPoolExecutor(settings.threads, thread_name_prefix="logs"),
            slots=asyncio.Semaphore(settings.in_flight_chunks_max),
            room=_Room(settings.spool_bytes_max),
            chunk_bytes_max=settings.chunk_bytes_max,
        )
        self._supervisor = Supervisor()
        self._uploads: dict[LogKey, _Upload] = {}
        self._live: set[tuple[str, str]] = set()

    def obey_chunk_bytes_max(self, bytes_max: int) -> None:
        """Send no longer chunks than the server takes, from now on; 0: it does not say."""
        own = self._shared.settings.chunk_bytes_max
        self._shared.chunk_bytes_max = (
            min(own, max(bytes_max, _CHUNK_BYTES_MIN)) if bytes_max else own
        )

    def begin(self, key: LogKey, source: Source, *, new: bool = False) -> None:
        """Start to read and upload a log, or go on after a restart. Safe to repeat.

        With `new` the caller has just started this run for the first time, so the server can have
        nothing of it and is not asked.
        """
        if key in self._uploads:
            return
        upload = _Upload(key, source, self._shared, new=new)
        upload.set_live(live=(key.pipeline_id, key.step) in self._live)
        self._uploads[key] = upload
        self._supervisor.keep(f"log {key.pipeline_id}/{key.step}", upload.run)

    async def finish(self, key: LogKey, timeout_s: float) -> LogEnd:
        """Upload what is left, at once; return what is known after at most `timeout_s`.

        What is not done by then goes on in the background. Call it when the step has ended.
        """
        upload = self._uploads[key]
        upload.hurry()
        await upload.completed(timeout_s)
        return upload.known()

    def set_live(self, pipeline_id: str, step: str, *, live: bool) -> None:
        """Say whether somebody follows this step's log now."""
        if live:
            self._live.add((pipeline_id, step))
        else:
            self._live.discard((pipeline_id, step))
        for key, upload in self._uploads.items():
            if (key.pipeline_id, key.step) == (pipeline_id, step):
                upload.set_live(live=live)

    async def forget(self, key: LogKey) -> None:
        """Drop the spool once the server has the whole log; wait for that.

        Afterwards the step's own output may go too. A log that never began is forgotten already.
        """
        upload = self._uploads.get(key)
        if upload is None:
            return
        upload.hurry()
        await upload.completed(None)
        await upload.remove()
        self._uploads.pop(key, None)
        if not any((k.pipeline_id, k.step) == (key.pipeline_id, key.step) for k in self._uploads):
            self._live.discard((key.pipeline_id, key.step))

    async def close(self) -> None:
        """Stop; what is spooled goes on after the next `begin`."""
        await self._supervisor.close()
        for upload in self._uploads.values():
            upload.close()
        if self._owns_pool:
            self._shared.pool.shutdown()


class _Room:
    """The spool's bound over all logs: bytes that are spooled and not acknowledged."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._freed = asyncio.Event()

    def add(self, change_bytes: int) -> None:
        self._bytes += change_bytes
        if self._bytes < self._bytes_max:
            self._freed.set()
        else:
            self._freed.clear()

    async def wait(self) -> None:
        if self._bytes >= self._bytes_max:
            await self._freed.wait()


@dataclass(slots=True, kw_only=True)
class _Shared:
    """What all uploads of an agent have in common."""

    link: LogLink
    spool: LogSpool
    settings: UploaderSettings
    random: Random
    pool: Executor
    slots: asyncio.Semaphore
    room: _Room
    chunk_bytes_max: int

    async def in_thread(
        self, work: Callable[[], _Result], then: Callable[[_Result], None] | None = None
    ) -> _Result:
        """Return `work()`, done on a thread; `then` gets it first, back on the loop.

        A cancelled caller waits until the thread is done, and `then` is called for it too.
        """
        future = asyncio.get_running_loop().run_in_executor(self.pool, work)
        if then is not None:
            future.add_done_callback(lambda done: done.exception() or then(done.result()))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place where a chunk may end: the position of the streams there is known."""

    end: int
    position: LogPosition


class _Upload:
    """One log's way. Its offsets: acknowledged <= sent <= end of what was read and spooled."""

    def __init__(
        self,
        key: LogKey,
        source: Source,
        shared: _Shared,
        *,
        new: bool,
    ) -> None:
        self._key = key
        self._source = source
        self._shared = shared
        self._settings = shared.settings
        self._backoff = Backoff(
            first_s=shared.settings.retry_first_s, most_s=shared.settings.retry_most_s
        )
        self._live = asyncio.Event()
        self._asked = new
        self._spooled = shared.spool.create(key)
        self._opened = new
        self._read = _Mark(0, LogPosition())
        self._marks: deque[_Mark] = deque()
        self._acknowledged = 0
        self._sent = 0
        self._hash: hashlib._Hash | None = hashlib.sha256()
        self._server_hash = b""
        self._exhausted = False
        self._hurried = False
        self._stopped = False
        self._spool_failed = False
        self._failures = 0
        self._pause_s = 0.0
        self._wake = Wake()
        self._complete = asyncio.Event()

    def set_live(self, *, live: bool) -> None:
        """Send each line at once, or no more."""
        if live:
            self._live.set()
            self._wake.ring()
        else:
            self._live.clear()

    def hurry(self) -> None:
        """Send without waiting for more, from now on."""
        self._hurried = True
        self._wake.ring()

    async def completed(self, timeout_s: float | None) -> None:
        """Wait until the server has the whole log, at most `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._complete.wait()

    def known(self) -> LogEnd:
        """Return what is known of the log's end."""
        complete = self._complete.is_set()
        if self._stopped:
            return LogEnd(length_bytes=self._acknowledged, hash=self._server_hash, complete=True)
        if not self._exhausted:
            return LogEnd(length_bytes=None, hash=b"", complete=False)
        if self._hash is not None:
            own_hash = self._hash.digest()
        else:
            # Lost with the agent's restart, and what it was made of is trimmed.
            own_hash = self._server_hash if complete else b""
        return LogEnd(length_bytes=self._read.end, hash=own_hash, complete=complete)

    async def remove(self) -> None:
        """Delete the spool."""
        await self._shared.in_thread(self._spooled.remove)

    def close(self) -> None:
        """Let go of the spool's files."""
        self._spooled.close()

    async def run(self) -> None:
        """Read and send until the server has the whole log. May be run again after a failure."""
        if not self._opened:
            await self._open()
        while (answer := await self._read_and_send()) is not None:
            await self._restart(answer)
        self._shared.room.add(self._acknowledged - self._read.end)
        self._complete.set()

    # Where to go on.

    async def _open(self) -> None:
        """Go on after an agent's restart, with the spool as far as it can be trusted."""
        spooled = await self._shared.in_thread(lambda: self._shared.spool.open(self._key))
        self._spooled = spooled
        if spooled.found:
            answer = await self._ask()
            self._asked = True
            if spooled.begin <= answer.next_offset <= spooled.end:
                scan = await self._shared.in_thread(
                    lambda: _scan(spooled, answer, self._shared.chunk_bytes_max)
                )
                self._acknowledged = answer.next_offset
                self._hash = scan.hash
                self._read = scan.marks[-1]
                self._marks.extend(scan.marks[1:])
                self._shared.room.add(self._read.end - self._acknowledged)
            else:
                await self._restart(answer)
        self._opened = True

    async def _restart(self, answer: AppendAnswer) -> None:
        """Drop the spool and read the step's output again, from where the server is (RG1)."""
        offset = answer.next_offset
        _log.warning(
            "the spool cannot go on from the server's offset: the output is read again from there",
            extra={
                "event": "log.reread",
                "pipeline_id": self._key.pipeline_id,
                "step": self._key.step,
                "offset": offset,
            },
        )
        await self._shared.in_thread(lambda: self._spooled.restart(offset))
        self._shared.room.add(self._acknowledged - self._read.end)
        self._acknowledged = offset
        self._read = _Mark(offset, answer.position)
        self._marks.clear()
        self._hash = hashlib.sha256() if offset == 0 else None
        self._exhausted = False
        self._spool_failed = False

    async def _read_and_send(self) -> AppendAnswer | None:
        """Return None when the log is complete, or the answer from which to start over."""
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read_all())
            answer = await self._send_all()
            reading.cancel()
        return answer

    # The reader.

    async def _read_all(self) -> None:
        most = self._settings.log_bytes_max
        if not self._exhausted and self._read.end < most:
            blocks = self._source(self._read.position, self._live)
            async for block in blocks:
                await self._store(block)
                if self._read.end >= most:
                    break
            if isinstance(blocks, AsyncGenerator):
                await blocks.aclose()
        self._exhausted = True
        self._wake.ring()

    async def _store(self, block: Block) -> None:
        """Spool a block, as far as the log's limit lets it; on a full disk, when there is room."""
        start, failures = 0, 0
        while start < len(block.data) and self._read.end < self._settings.log_bytes_max:
            await self._shared.room.wait()
            try:
                end, _ = await self._shared.in_thread(
                    partial(self._spool, block, start), self._spooled_up_to
                )
            except OSError as error:
                failures += 1
                if failures == 1:
                    _log.warning(
                        "the log spool cannot be written; the output waits where it is: %s",
                        error,
                        extra={"event": "log.spool_failed", "pipeline_id": self._key.pipeline_id},
                    )
                await asyncio.sleep(self._backoff.delay_s(failures, self._shared.random))
            else:
                start, failures = end, 0

    def _spool(self, block: Block, start: int) -> tuple[int, _Mark]:
        """Spool a piece of a block, at most one chunk; on a thread."""
        most = self._shared.chunk_bytes_max - _RECORD_BYTES_MAX
        end, framed = cri.frame_piece(block.stream, block.at, block.data, start, most)
        whole = _before_masked(block.masked, start, end)
        if whole < end:
            # Who goes on reading from a piece's end must meet a secret as a whole, to mask it.
            end, framed = whole, cri.frame(block.stream, block.at, block.data[start:whole])
        position = cri.advance(self._read.position, block.stream, end - start, framed)
        limit = self._settings.log_bytes_max
        if self._read.end + len(framed) >= limit:
            # In one write with what reaches the limit, so that a log over it has its record.
            record = b"what follows was dropped: the log's limit is %d bytes\n" % limit
            framed += cri.frame(LogStream.GAMENODE, block.at, record)
        self._spooled.append(framed)
        if self._hash is not None:
            self._hash.update(framed)
        return end, _Mark(self._read.end + len(framed), position)

    def _spooled_up_to(self, spooled: tuple[int, _Mark]) -> None:
        _, mark = spooled
        first = self._read.end == self._sent
        self._shared.room.add(mark.end - self._read.end)
        self._read = mark
        # Small pieces share a mark: what is kept in memory grows with the bytes, not the lines.
        marks = self._marks
        if len(marks) > 1 and mark.end - marks[-2].end <= self._shared.chunk_bytes_max // 2:
            marks.pop()
        marks.append(mark)
        if first or self._urgent():
            self._wake.ring()

    # The sender.

    async def _send_all(self) -> AppendAnswer | None:
        self._sent = self._acknowledged
        await self._due()
        if not self._asked and not self._done():
            answer = await self._ask()
            self._asked = True
            if answer.next_offset != self._acknowledged:
                return answer
        while not self._done():
            if not await self._send_due() and not self._done():
                # Nothing is on its way now, so this answer is the last word.
                answer = await self._ask()
                if self._stopped:
                    return None
                if self._spool_failed:
                    return answer
                if not self._acknowledged <= answer.next_offset <= self._read.end:
                    return answer
                self._acknowledge(answer)
                self._sent = answer.next_offset
            await self._due()
        return None

    def _done(self) -> bool:
        return self._stopped or (self._exhausted and self._acknowledged == self._read.end)

    def _urgent(self) -> bool:
        return (
            self._exhausted
            or self._hurried
            or self._live.is_set()
            or self._read.end - self._sent >= self._shared.chunk_bytes_max
        )

    async def _due(self) -> None:
        """Wait until there is something to send and it has waited long enough."""
        while self._sent == self._read.end and not self._done():
            await self._wake.wait(self._settings.idle_interval_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.idle_interval_s):
                # It also rings for the first bytes, which may wait.
                while not self._done() and not self._urgent():
                    await self._wake.wait(self._settings.idle_interval_s)

    async def _send_due(self) -> bool:
        """Send what there is, several chunks at once; return whether each was taken in turn."""
        until = self._read.end
        on_their_way: deque[tuple[_Mark, asyncio.Task[AppendAnswer | GameNodeError]]] = deque()
        async with asyncio.TaskGroup() as group:
            while True:
                # What comes meanwhile is for the next time, or a busy step would be sent in ever
                # so small chunks.
                goes_on = self._sent < until or self._urgent()
                mark = self._next_mark() if goes_on else None
                if mark is not None and len(on_their_way) < self._settings.window_chunks:
                    sending = await self._send_chunk(group, mark)
                    if sending is None:
                        break
                    on_their_way.append((mark, sending))
                    self._sent = mark.end
                elif on_their_way:
                    mark, sending = on_their_way.popleft()
                    if not self._taken(await sending, mark):
                        break
                    await self._pause()
                else:
                    return True
            for _, rest in on_their_way:
                rest.cancel()
        return False

    def _next_mark(self) -> _Mark | None:
        """Return the end of the next chunk: as far as one may reach."""
        found = None
        for mark in self._marks:
            if mark.end <= self._sent:
                continue
            if found and mark.end - self._sent > self._shared.chunk_bytes_max:
                break
            found = mark
        return found

    async def _send_chunk(
        self, group: asyncio.TaskGroup, mark: _Mark
    ) -> asyncio.Task[AppendAnswer | GameNodeError] | None:
        """Read the next chunk and send it off; return None if it cannot be read.

        The read is waited for here, since chunks must leave in order.
        """
        slots, offset = self._shared.slots, self._sent
        await slots.acquire()
        sending = None
        try:
            chunk = await self._shared.in_thread(lambda: self._read_chunk(offset, mark.end))
            sending = group.create_task(self._transmit(offset, chunk, mark.position))
            sending.add_done_callback(lambda _: slots.release())
        except (OSError, EOFError):
            _log.exception("the log spool cannot be read", extra={"event": "log.spool_unreadable"})
            self._spool_failed = True
        finally:
            if sending is None:
                slots.release()
        return sending

    def _read_chunk(self, offset: int, end: int) -> bytes:
        self._spooled.trim(self._acknowledged)
        return self._spooled.read(offset, end - offset)

    async def _transmit(
        self, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer | GameNodeError:
        try:
            return await self._shared.link.append_logs(self._key, offset, chunk, position)
        except GameNodeError as error:
            return error

    async def _ask(self) -> AppendAnswer:
        """Return the server's word on where to go on, as soon as there is one."""
        while True:
            await self._pause()
            answer = await self._transmit(self._acknowledged, b"", self._read.position)
            if isinstance(answer, AppendAnswer):
                if answer.stop:
                    self._stop(answer.next_offset, answer.hash)
                return answer
            self._failed(answer)
            if self._stopped:
                return AppendAnswer(
                    next_offset=self._acknowledged, position=self._read.position, hash=b""
                )

    def _taken(self, answer: AppendAnswer | GameNodeError, mark: _Mark) -> bool:
        if isinstance(answer, GameNodeError):
            self._failed(answer)
            return False
        if answer.stop:
            self._stop(answer.next_offset, answer.hash)
            return False
        if answer.next_offset != mark.end:
            self._failures += 1
            self._pause_s = self._backoff.delay_s(self._failures, self._shared.random)
            return False
        self._failures = 0
        self._pause_s = answer.retry_after_s
        self._acknowledge(answer)
        return True

    def _failed(self, error: GameNodeError) -> None:
        if error.code in _NEVER_WANTED:
            self._stop(self._acknowledged, b"")
            return
        self._failures += 1
        delay_s = self._backoff.delay_s(self._failures, self._shared.random)
        self._pause_s = max(delay_s, error.retry_after_s or 0.0)
        if self._failures == 1:
            _log.warning(
                "a log cannot be uploaded; it is tried again: %s",
                error,
                extra={"event": "log.upload_failed", "pipeline_id": self._key.pipeline_id},
            )

    async def _pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, 0.0
        if pause_s > 0:
            await asyncio.sleep(pause_s)

    def _acknowledge(self, answer: AppendAnswer) -> None:
        self._shared.room.add(self._acknowledged - answer.next_offset)
        self._acknowledged = answer.next_offset
        self._server_hash = answer.hash
        while self._marks and self._marks[0].end <= self._acknowledged:
            self._marks.popleft()

    def _stop(self, next_offset: int, stored_hash: bytes) -> None:
        self._shared.room.add(self._acknowledged - next_offset)
        self._acknowledged = next_offset
        self._server_hash = stored_hash
        self._stopped = True


def _before_masked(masked: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """Return the beginning of the masked part that `end` falls into, behind `start`; or `end`."""
    last = bisect_left(masked, (end,)) - 1
    if last >= 0 and start < masked[last][0] and end < masked[last][1]:
        return masked[last][0]
    return end


@dataclass(frozen=True, slots=True)
class _Scan:
    """What a spool holds behind the server's offset."""

    marks: list[_Mark]
    hash: hashlib._Hash | None


def _scan(spooled: SpooledLog, answer: AppendAnswer, chunk_bytes_max: int) -> _Scan:
    """Find how far the streams had been read at the spool's end; cut what is no whole line.

    Lines are at most one chunk long. The hash is None where the spool's beginning is trimmed.
    """
    hashed = hashlib.sha256() if spooled.begin == 0 else None
    offset = 0
    while hashed is not None and offset < answer.next_offset:
        read = spooled.read(offset, min(chunk_bytes_max, answer.next_offset - offset))
        hashed.update(read)
        offset += len(read)
    marks = [_Mark(answer.next_offset, answer.position)]
    while (end := marks[-1].end) < spooled.end:
        read = spooled.read(end, min(chunk_bytes_max, spooled.end - end))
        position, whole_bytes = cri.advance_framed(marks[-1].position, read)
        if whole_bytes == 0:
            break
        marks.append(_Mark(end + whole_bytes, position))
        if hashed is not None:
            hashed.update(read[:whole_bytes])
    if marks[-1].end < spooled.end:
        spooled.cut(marks[-1].end)
    return _Scan(marks, hashed)
