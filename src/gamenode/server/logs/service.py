"""Stores what steps print: the file first, then the row, then the answer (rule RG2).

Each log is a lane: its chunks are taken in the order they came, as many at once as wait, so that a
busy log needs one fdatasync and one commit for several chunks.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from sqlalchemy import Connection

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.domain.log import (
    AppendAnswer,
    LogEnd,
    LogKey,
    LogPosition,
    LogStream,
    StoredLog,
    relative_path,
)
from gamenode.lib.clock import Instant
from gamenode.lib.tasks import Supervisor, Wake
from gamenode.server.db.database import Database
from gamenode.server.logs import store
from gamenode.server.logs.media.files import DamagedLogError, LogFile, LogFiles
from gamenode.wire import cri

_log = logging.getLogger(__name__)

_HASH_BYTES: Final = 1024 * 1024
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """The bounds of storing logs."""

    chunk_bytes_max: int = 1024 * 1024
    """A longer chunk is refused."""
    waiting_bytes_max: int = 64 * 1024 * 1024
    """How much may wait to be written, over all logs."""
    log_bytes_max: int = 32 * 1024 * 1024 * 1024
    """What is beyond it is refused, and its agent told to stop."""
    open_max: int = 256
    """How many logs are kept open, with their running hashes."""
    group_chunks_max: int = 16
    """Chunks of one log that are written at once."""
    threads: int = 4
    """Threads that write."""
    retry_s: float = 1.0
    """The advice to a sender whose chunk could not be taken now."""
    full_retry_s: float = 10.0
    """The advice to a sender when the disk is full."""


def set_final(
    conn: Connection, key: LogKey, *, node_id: str, length_bytes: int, sha256: bytes, now: Instant
) -> None:
    """Set a log's final length and hash, once; a part of the transaction that ends its step.

    After the commit, `LogService.ended` tells who follows.
    """
    store.set_final(conn, key, node_id=node_id, length_bytes=length_bytes, sha256=sha256, now=now)


def remove(conn: Connection, pipeline_ids: Collection[str]) -> None:
    """Remove every log of pipelines; a part of the transaction that removes them.

    After the commit, `LogService.remove_files` removes the bytes.
    """
    store.remove(conn, pipeline_ids)


class LogService:
    """The only writer of logs. Source: G1, G4, P6, P13."""

    def __init__(self, database: Database, files: LogFiles, *, settings: LogSettings) -> None:
        """Keep bytes in `files` and what is durable of them in `database`."""
        self._database = database
        self._files = files
        self._settings = settings
        self._lanes: OrderedDict[LogKey, _Lane] = OrderedDict()
        self._watches: dict[LogKey, set[Wake]] = {}
        self._waiting_bytes = 0
        self._supervisor = Supervisor()
        self._full = False
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="log-writer")

    async def append(
        self,
        key: LogKey,
        *,
        node_id: str,
        offset: int,
        chunk: bytes,
        checksum: int,
        position: LogPosition,
        now: Instant,
    ) -> AppendAnswer:
        """Store `chunk` at `offset` and return where to go on; an empty chunk only asks.

        Durable on return. Bytes that are stored already are skipped. A chunk that would leave a gap
        is not stored: the answer is then less than `offset`, and the sender goes on from there.

        Raises:
            GameNodeError: INVALID_REQUEST, the checksum or a bound does not hold; CONFLICT, the
                bytes lie beyond the log's final length; PERMISSION_DENIED, another node's log;
                STORAGE_FULL, RESOURCE_EXHAUSTED, UNAVAILABLE, all with `retry_after_s`. Nothing of
                the chunk was stored.
        """
        relative_path(key)  # refuses names that are none
        if offset < 0:
            raise invalid("offset", "is negative")
        if len(chunk) > self._settings.chunk_bytes_max:
            raise invalid("chunk", f"is larger than {self._settings.chunk_bytes_max} bytes")
        if chunk and cri.checksum(chunk) != checksum:
            raise invalid("checksum", "the chunk has another one: send it again")
        if self._waiting_bytes + len(chunk) > self._settings.waiting_bytes_max:
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                "too many log bytes wait to be written",
                retry_after_s=self._settings.retry_s,
            )
        arrival = _Arrival(node_id, offset, chunk, position, now)
        lane = self._lane(key)
        lane.arrivals.append(arrival)
        self._waiting_bytes += len(chunk)
        if not lane.busy:
            lane.work = self._supervisor.start(
                f"log {key.pipeline_id}/{key.step}", self._work(lane)
            )
        # Shielded: what was taken is carried out, whatever becomes of the caller (rule RC3).
        return await asyncio.shield(arrival.answer)

    async def store_inline(self, key: LogKey, node_id: str, log: bytes, *, now: Instant) -> LogEnd:
        """Store the whole log of a step whose node does not append in chunks, as standard output.

        Safe to repeat, also with more of the same log: what is stored is not stored again.
        """
        answer = await self.append(
            key,
            node_id=node_id,
            offset=0,
            chunk=b"",
            checksum=0,
            position=LogPosition(),
            now=now,
        )
        start = answer.position.stdout_bytes
        while start < len(log):
            end, framed = cri.frame_piece(
                LogStream.STDOUT, now, log, start, self._settings.chunk_bytes_max
            )
            answer = await self.append(
                key,
                node_id=node_id,
                offset=answer.next_offset,
                chunk=framed,
                checksum=cri.checksum(framed),
                position=cri.advance(answer.position, LogStream.STDOUT, end - start, framed),
                now=now,
            )
            start = end
        return LogEnd(length_bytes=answer.next_offset, hash=answer.hash, complete=True)

    async def stored(self, key: LogKey) -> StoredLog | None:
        """Return what is stored of a log; None: nothing is known of it."""
        lane = self._lanes.get(key)
        if lane is not None and lane.log is not None and lane.log.stored.length_bytes:
            return lane.log.stored
        return await self._database.read(lambda conn: store.get(conn, key))

    async def refresh(self, key: LogKey) -> StoredLog | None:
        """Return what is stored of a log by its row, for what another transaction has set."""
        row = await self._database.read(lambda conn: store.get(conn, key))
        lane = self._lanes.get(key)
        if row is None or lane is None or lane.log is None:
            return row
        lane.log.stored = replace(
            lane.log.stored,
            final_length_bytes=row.final_length_bytes,
            final_hash=row.final_hash,
        )
        self._compare_hash(lane)
        return lane.log.stored

    async def ended(self, key: LogKey) -> None:
        """Tell who follows that the step has ended, after the transaction that says so."""
        if key not in self._lanes and key not in self._watches:
            return
        await self.refresh(key)
        self._ring(key)

    async def remove_files(self, limit: int) -> int:
        """Remove the files of pipelines whose rows are gone, at most `limit`; return of how many.

        Files that cannot be removed now are tried again with the next call (rule RC3).
        """
        gone = await self._database.read(lambda conn: store.removed(conn, limit))
        for key in [key for key in self._lanes if key.pipeline_id in gone]:
            if not self._lanes[key].busy:
                self._lanes.pop(key).drop()
        loop = asyncio.get_running_loop()
        removed: list[str] = []
        for pipeline_id in gone:
            try:
                await loop.run_in_executor(self._pool, self._files.remove, pipeline_id)
            except OSError as error:
                _log.warning(
                    "a removed pipeline's logs are still there: %s",
                    error,
                    extra={"event": "log.not_removed", "pipeline_id": pipeline_id},
                )
            else:
                removed.append(pipeline_id)
        if removed:
            await self._database.write(lambda conn: store.forget_removed(conn, removed))
        return len(removed)

    @contextmanager
    def watch(self, key: LogKey) -> Iterator[Wake]:
        """Give a bell that rings after each commit of this log's bytes, and at its end."""
        wake = Wake()
        watches = self._watches.setdefault(key, set())
        watches.add(wake)
        try:
            yield wake
        finally:
            watches.discard(wake)
            if not watches:
                self._watches.pop(key, None)

    async def close(self) -> None:
        """Carry out what was taken, then let go of the files."""
        while busy := [lane.work for lane in self._lanes.values() if lane.work and lane.busy]:
            await asyncio.wait(busy)
        await self._supervisor.close()
        for lane in self._lanes.values():
            lane.drop()
        self._pool.shutdown()

    def _lane(self, key: LogKey) -> _Lane:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key)
            idle = [old for old, lane in self._lanes.items() if old != key and not lane.busy]
            for old in idle[: max(0, len(self._lanes) - self._settings.open_max)]:
                self._lanes.pop(old).drop()
        self._lanes.move_to_end(key)
        return lane

    async def _work(self, lane: _Lane) -> None:
        """Take what arrives for one log, until nothing waits."""
        most = self._settings.group_chunks_max
        while lane.arrivals:
            group = [lane.arrivals.popleft() for _ in range(min(most, len(lane.arrivals)))]
            outcomes = await self._outcomes(lane, group)
            for arrival, outcome in zip(group, outcomes, strict=True):
                self._waiting_bytes -= len(arrival.chunk)
                arrival.resolve(outcome)

    async def _outcomes(self, lane: _Lane, group: Sequence[_Arrival]) -> Sequence[_Outcome]:
        try:
            return await self._take(lane, group)
        except Exception as error:  # noqa: BLE001 - each sender gets it, and the lane goes on
            # What is in the file beyond the row is cut when it is opened again.
            lane.drop()
            return [self._refusal(lane.key, error)] * len(group)

    async def _take(self, lane: _Lane, group: Sequence[_Arrival]) -> Sequence[_Outcome]:
        log = lane.log
        if log is None:
            log = lane.log = await self._open(lane.key)
        if log.file is None:
            # Nothing can stand behind a hole, and a sender must not wait for ever.
            return [_answer(log.stored, b"", stop=True)] * len(group)
        before = log.stored
        loop = asyncio.get_running_loop()
        written = await loop.run_in_executor(self._pool, self._write, log, log.file, group)
        after = written.stored
        if self._full and after.length_bytes > before.length_bytes:
            self._full = False
            _log.info("the disk for logs has room again", extra={"event": "logs.writable"})
        if after.length_bytes != before.length_bytes:
            key, now = lane.key, group[0].now
            moved = await self._database.write(
                lambda conn: store.advance(
                    conn, key, after, from_bytes=before.length_bytes, now=now
                )
            )
            if not moved:
                raise GameNodeError(
                    ErrorCode.UNAVAILABLE,
                    "the log was changed from elsewhere meanwhile",
                    retry_after_s=self._settings.retry_s,
                )
            log.stored = replace(
                log.stored,
                node_id=after.node_id,
                length_bytes=after.length_bytes,
                position=after.position,
            )
            self._ring(key)
            self._compare_hash(lane)
        return written.outcomes

    def _write(self, log: _OpenLog, file: LogFile, group: Sequence[_Arrival]) -> _Written:
        """Decide about each chunk in turn and write what is new; on a thread."""
        stored = log.stored
        running = log.hash  # after a failure the log is opened anew
        pieces: list[memoryview] = []
        outcomes: list[_Outcome] = []
        for arrival in group:
            length = stored.length_bytes
            end = arrival.offset + len(arrival.chunk)
            final = stored.final_length_bytes
            if stored.node_id not in {"", arrival.node_id}:
                message = f"the log belongs to another node than {arrival.node_id}"
                outcomes.append(GameNodeError(ErrorCode.PERMISSION_DENIED, message))
                continue
            if final is not None and end > final:
                message = f"the log has ended with {final} bytes"
                outcomes.append(GameNodeError(ErrorCode.CONFLICT, message))
                continue
            too_long = end > self._settings.log_bytes_max
            if arrival.offset <= length < end and not too_long:
                piece = memoryview(arrival.chunk)[length - arrival.offset :]
                pieces.append(piece)
                running.update(piece)
                stored = replace(
                    stored,
                    node_id=arrival.node_id,
                    length_bytes=end,
                    position=arrival.position,
                )
            outcomes.append(_answer(stored, running.digest(), stop=too_long))
        if pieces:
            file.append(pieces)
        return _Written(stored, outcomes)

    async def _open(self, key: LogKey) -> _OpenLog:
        row = await self._database.read(lambda conn: store.get(conn, key))
        stored = row or StoredLog(node_id="", length_bytes=0, position=LogPosition())
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, _open, self._files, key, stored)
        except DamagedLogError as error:
            _log.error(
                "a log is damaged: %s",
                error,
                extra={"event": "log.damaged", "pipeline_id": key.pipeline_id, "step": key.step},
            )
            return _OpenLog(None, stored, hashlib.sha256())

    def _refusal(self, key: LogKey, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        if error.errno in _NO_ROOM:
            if not self._full:
                _log.error("the disk for logs is full", extra={"event": "logs.full"})
            self._full = True
            return GameNodeError(
                ErrorCode.STORAGE_FULL,
                "the disk for logs is full: free some room",
                retry_after_s=self._settings.full_retry_s,
            )
        _log.error(
            "a log cannot be written",
            exc_info=error,
            extra={"event": "log.write_failed", "pipeline_id": key.pipeline_id},
        )
        return GameNodeError(
            ErrorCode.UNAVAILABLE,
            "the log cannot be written now",
            retry_after_s=self._settings.retry_s,
        )

    def _ring(self, key: LogKey) -> None:
        for wake in self._watches.get(key, ()):
            wake.ring()

    def _compare_hash(self, lane: _Lane) -> None:
        log = lane.log
        if log is None or log.file is None:
            return
        told = log.stored.final_hash
        if log.stored.complete and told and log.hash.digest() != told:
            _log.error(
                "a log's hash is not the one that its node has",
                extra={
                    "event": "log.hash_differs",
                    "pipeline_id": lane.key.pipeline_id,
                    "step": lane.key.step,
                },
            )


_Outcome = AppendAnswer | Exception


class _Arrival:
    """A chunk that waits for its turn."""

    def __init__(
        self, node_id: str, offset: int, chunk: bytes, position: LogPosition, now: Instant
    ) -> None:
        self.node_id = node_id
        self.offset = offset
        self.chunk = chunk
        self.position = position
        self.now = now
        self.answer: asyncio.Future[AppendAnswer] = asyncio.get_running_loop().create_future()

    def resolve(self, outcome: _Outcome) -> None:
        """Answer the sender."""
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


@dataclass(slots=True)
class _OpenLog:
    """A log as of its last commit. Without a file it is damaged: nothing can be appended."""

    file: LogFile | None
    stored: StoredLog
    hash: hashlib._Hash


@dataclass(frozen=True, slots=True)
class _Written:
    """What a group of chunks comes to, once it is committed."""

    stored: StoredLog
    outcomes: Sequence[_Outcome]


@dataclass(slots=True, eq=False)
class _Lane:
    """One log's queue. `log` is None until it is opened, and after a failure."""

    key: LogKey
    arrivals: deque[_Arrival] = field(default_factory=deque)
    log: _OpenLog | None = None
    work: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether chunks are being taken."""
        return self.work is not None and not self.work.done()

    def drop(self) -> None:
        """Let go of the file; the next chunk opens it again."""
        if self.log is not None and self.log.file is not None:
            self.log.file.close()
        self.log = None


def _open(files: LogFiles, key: LogKey, stored: StoredLog) -> _OpenLog:
    file = files.open(key, stored.length_bytes)
    running = hashlib.sha256()
    offset = 0
    while read := file.read(offset, _HASH_BYTES):
        running.update(read)
        offset += len(read)
    return _OpenLog(file, stored, running)


def _answer(stored: StoredLog, sha256: bytes, *, stop: bool) -> AppendAnswer:
    return AppendAnswer(
        next_offset=stored.length_bytes, position=stored.position, hash=sha256, stop=stop
    )
