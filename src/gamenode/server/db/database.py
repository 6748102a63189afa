"""The database: reads on a few threads, writes in group commits on one.

A caller hands in a function of a connection. Such a function is pure but for its connection: it may
run twice, and on another thread (rule RC2). It never begins, commits or rolls back, and lets a
database error pass: what follows an error is decided here (rule RC1).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, make_url, select
from sqlalchemy.exc import ArgumentError

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.lib.clock import Clock
from gamenode.lib.groups import GroupWorker, QueueFullError
from gamenode.server.db import migrations, schema
from gamenode.server.db.engines import DatabaseEngine, Failure, close_quietly, driver_error, raw_of
from gamenode.server.db.group_commit import CommitHook, GroupCommit, Work, collect
from gamenode.server.db.sqlite import SqliteEngine

__all__ = ["CommitHook", "Database", "DatabaseSettings", "collect"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """Where the database is, and its bounds."""

    url: str = ""
    """`sqlite:///path/to/file` or `postgresql://user@host/database`; empty: in the data folder."""
    group_max: int = 64
    """Writes in one commit. PostgreSQL is quick with at most 64 savepoints a transaction."""
    queue_max: int = 10_000
    """Writes that may wait for their group; more are refused."""
    readers: int = 4
    """Reads that run at the same time."""
    reads_max: int = 10_000
    """Reads that may run or wait; more are refused."""
    busy_s: float = 10.0
    """The longest wait for a lock or a statement."""
    retry_s: float = 1.0
    """The advice to a caller whose write could not be done now."""
    full_retry_s: float = 30.0
    """The advice to a caller when the disk is full."""
    slow_s: float = 1.0
    """A group that takes longer than this is logged."""


class Database:
    """Runs functions of a connection: reads at the same time, writes in group commits."""

    generation: int
    """Raised by a restore; the high part of every epoch, cursor and state version (rule RC6)."""

    def __init__(
        self, engine: DatabaseEngine, generation: int, settings: DatabaseSettings, *, clock: Clock
    ) -> None:
        """Serve an engine whose schema is current; `open` makes sure of that."""
        self.generation = generation
        self._engine = engine
        self._settings = settings
        self._commits = GroupCommit(
            engine,
            told=self._told,
            retry_s=settings.retry_s,
            slow_s=settings.slow_s,
            clock=clock,
        )
        self._writes: GroupWorker[Work, Any] = GroupWorker(
            self._commits.run,
            name="database-writer",
            group_max=settings.group_max,
            queue_max=settings.queue_max,
            finished=self._commits.announce,
        )
        self._readers = ThreadPoolExecutor(settings.readers, thread_name_prefix="database-reader")
        self._idle: deque[Connection] = deque()
        self._reads = 0
        self._closed = False

    @classmethod
    def open(cls, settings: DatabaseSettings, *, clock: Clock) -> Database:
        """Connect, migrate to the newest schema and return the database. Blocking.

        Raises:
            GameNodeError: INVALID_REQUEST, the URL names no database of ours; CONFLICT, a newer
                program wrote it, or no GameNode did; UNAVAILABLE, it cannot be reached.
        """
        engine = _engine_of(settings)
        try:
            conn = engine.connect(read_only=False)
            try:
                migrations.migrate(conn, engine)
                generation = conn.execute(select(schema.database_meta.c.generation)).scalar_one()
            finally:
                conn.close()
        except GameNodeError:
            raise
        except Exception as error:
            if engine.judge(error) is Failure.OWN:
                raise
            if engine.judge(error) is Failure.BROKEN:
                reason = str(driver_error(error)).partition("\n")[0]
                raise GameNodeError(
                    ErrorCode.UNAVAILABLE, f"the database cannot be opened: {reason}"
                ) from error
            raise _translated(error, engine, settings) from error
        return cls(engine, generation, settings, clock=clock)

    def on_commit(self, hook: CommitHook) -> None:
        """Add `hook` to every commit, after those added before. Before the first write."""
        self._commits.on_commit(hook)

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Return what `fn` reads; it sees one moment, and every commit that was answered before.

        Raises:
            GameNodeError: RESOURCE_EXHAUSTED, too many reads wait; UNAVAILABLE, no connection.
            Exception: what `fn` raised.
        """
        self._refuse_if_closed()
        if self._reads >= self._settings.reads_max:
            raise self._too_many("reads")
        self._reads += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, self._read_now, fn)
        finally:
            self._reads -= 1

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Return what `fn` returns, when its work is durable.

        A caller that is cancelled does not undo its write (rule RC3). An error undoes the work of
        this caller alone.

        Raises:
            GameNodeError: STORAGE_FULL, nothing was written; UNAVAILABLE, no connection, or the
                outcome is not known: the write may have landed; RESOURCE_EXHAUSTED, too many
                writes wait. All with `retry_after_s`.
            Exception: what `fn` raised; nothing of it was written.
        """
        self._refuse_if_closed()
        try:
            return cast("T", await self._writes.submit(fn))
        except QueueFullError:
            raise self._too_many("writes") from None

    async def aclose(self) -> None:
        """Carry out what waits, then disconnect. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        await self._writes.close()
        await asyncio.to_thread(self._disconnect)

    def lock_commits(self, conn: Connection) -> None:
        """Let no other server give out event ids until this transaction ends (rule RC4)."""
        self._engine.lock_commits(conn)

    # Reading, on the readers' threads

    def _read_now(self, fn: Callable[[Connection], T]) -> T:
        try:
            return self._read_once(self._idle_connection(), fn)
        except Exception as error:
            if self._engine.judge(error) is not Failure.BROKEN:
                raise self._told(error) from error
        # The database may only have restarted. A read may run twice, so one more try is free.
        self._close_idle()
        try:
            return self._read_once(None, fn)
        except Exception as error:
            raise self._told(error) from error

    def _read_once(self, conn: Connection | None, fn: Callable[[Connection], T]) -> T:
        if conn is None:
            conn = self._engine.connect(read_only=True)
        sound = False
        try:
            raw = raw_of(conn)
            raw.execute(self._engine.begin_read)
            try:
                return fn(conn)
            finally:
                raw.rollback()
                sound = True
        finally:
            if sound:
                self._idle.append(conn)
            else:
                close_quietly(conn)

    def _idle_connection(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _close_idle(self) -> None:
        while (conn := self._idle_connection()) is not None:
            close_quietly(conn)

    # Answers

    def _told(self, error: BaseException) -> BaseException:
        """Return what a caller is told of `error`."""
        return _translated(error, self._engine, self._settings)

    def _too_many(self, what: str) -> GameNodeError:
        return GameNodeError(
            ErrorCode.RESOURCE_EXHAUSTED,
            f"too many {what} wait for the database",
            retry_after_s=self._settings.retry_s,
        )

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise GameNodeError(
                ErrorCode.UNAVAILABLE,
                "the server is shutting down",
                retry_after_s=self._settings.retry_s,
            )

    def _disconnect(self) -> None:
        self._readers.shutdown()
        self._close_idle()
        self._commits.close()


def _engine_of(settings: DatabaseSettings) -> DatabaseEngine:
    advice = "use sqlite:///path/to/file or postgresql://user@host/database"
    try:
        url = make_url(settings.url)
    except ArgumentError as error:
        raise invalid("database url", "is not a URL", advice=advice) from error
    match url.get_backend_name():
        case "sqlite":
            return SqliteEngine(url, busy_s=settings.busy_s)
        case "postgresql":
            # Its driver costs a start on SQLite a third of its time.
            from gamenode.server.db.postgres import PostgresEngine  # noqa: PLC0415

            return PostgresEngine(url, busy_s=settings.busy_s)
        case other:
            raise invalid("database url", f"{other} is not supported", advice=advice)


def _translated(
    error: BaseException, engine: DatabaseEngine, settings: DatabaseSettings
) -> BaseException:
    """Return `error` as callers know it; one that is not the database's own stays as it is."""
    failure = engine.judge(error)
    if failure is Failure.OWN:
        return error
    if failure is Failure.FULL:
        told = GameNodeError(
            ErrorCode.STORAGE_FULL,
            "the database has no room left; nothing was written",
            hint="free space on the disk of the database",
            retry_after_s=settings.full_retry_s,
        )
    else:
        told = GameNodeError(
            ErrorCode.UNAVAILABLE,
            "the database is busy with somebody else's work"
            if failure is Failure.AGAIN
            else "the database cannot be reached",
            retry_after_s=settings.retry_s,
        )
    told.__cause__ = error
    return told
