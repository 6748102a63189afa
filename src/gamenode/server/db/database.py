"""The database: reads on a few threads, writes in group commits on one.

A caller hands in a function of a connection. Such a function is pure but for its connection: it may
run twice, and on another thread (rule RC2). It never begins, commits or rolls back, and lets a
database error pass: what follows an error is decided here (rule RC1).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast

from sqlalchemy import Connection, make_url, select
from sqlalchemy.exc import ArgumentError

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.lib.clock import Clock
from gamenode.lib.groups import GroupWorker, QueueFullError
from gamenode.server.db import migrations, schema
from gamenode.server.db.engines import DatabaseEngine, Failure
from gamenode.server.db.sqlite import SqliteEngine

_log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], Any]

_COLLECTED: Final = "gamenode.collected"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """Where the database is, and its bounds."""

    url: str
    """`sqlite:///path/to/file` or `postgresql://user@host/database`."""
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


class CommitHook(Protocol):
    """Something that belongs to every commit."""

    def before_commit(self, conn: Connection, collected: Sequence[object]) -> object:
        """Do the last work of a transaction, on the writer's thread; return what follows from it.

        `collected` is what the callers whose work stands have collected, in order. An error rolls
        the transaction back.
        """

    def after_commit(self, outcome: object) -> None:
        """Learn, on the event loop, that the transaction is durable; its callers are answered next.

        `outcome` is what `before_commit` returned. Called once for each commit, in commit order.
        """


def collect(conn: Connection, item: object) -> None:
    """Hand `item` to the commit hooks, unless the running caller's work is rolled back.

    Only inside a function given to `Database.write`.
    """
    conn.info[_COLLECTED].append(item)


class _RolledBackError(Exception):
    """A group's transaction is gone, and nothing of it was committed."""

    def __init__(self, cause: BaseException, culprit: int | None) -> None:
        """Tell what ended it, and in whose work, if in anybody's."""
        super().__init__(str(cause))
        self.cause = cause
        self.culprit = culprit


@dataclass(frozen=True, slots=True)
class _Writer:
    """The connection that writes. `raw` takes the transaction's own words, without ceremony."""

    conn: Connection
    raw: Any
    collected: list[object]


class Database:
    """Runs functions of a connection: reads at the same time, writes in group commits."""

    generation: int
    """Raised by a restore; the high part of every epoch, cursor and state version (rule RC6)."""
    shared: bool
    """Whether other servers may write to this database too."""

    def __init__(
        self, engine: DatabaseEngine, generation: int, settings: DatabaseSettings, *, clock: Clock
    ) -> None:
        """Serve an engine whose schema is current; `open` makes sure of that."""
        self.generation = generation
        self.shared = engine.shared
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._hooks: list[CommitHook] = []
        self._outcomes: deque[Sequence[object]] = deque()
        self._writer: _Writer | None = None
        self._writes: GroupWorker[Work, Any] = GroupWorker(
            self._run_group,
            name="database-writer",
            group_max=settings.group_max,
            queue_max=settings.queue_max,
            finished=self._announce,
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
            raise _translated(error, engine, settings) from error
        return cls(engine, generation, settings, clock=clock)

    def on_commit(self, hook: CommitHook) -> None:
        """Add `hook` to every commit, after those added before. Before the first write."""
        self._hooks.append(hook)

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
            raw = _raw_of(conn)
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
                _close_quietly(conn)

    def _idle_connection(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _close_idle(self) -> None:
        while (conn := self._idle_connection()) is not None:
            _close_quietly(conn)

    # Writing, on the writer's thread

    def _run_group(self, group: Sequence[Work]) -> Sequence[Any]:
        """Carry out `group`; return one result or exception for each of it."""
        began_s = self._clock.monotonic_s()
        waiting = dict(enumerate(group))
        results: dict[int, Any] = {}
        try:
            self._run_all(waiting, results)
        except Exception as error:  # noqa: BLE001 - no caller may be left without an answer
            self._abandon(error)
            results |= {index: self._told(error) for index in waiting}
        took_s = self._clock.monotonic_s() - began_s
        if took_s > self._settings.slow_s:
            _log.warning(
                "a commit was slow",
                extra={"event": "database.slow", "took_s": took_s, "writes": len(group)},
            )
        return [results[index] for index in range(len(group))]

    def _run_all(self, waiting: dict[int, Work], results: dict[int, Any]) -> None:
        """Answer all that wait: together, once more without a culprit, then each alone (RC1)."""

        def answer(answers: Mapping[int, Any]) -> None:
            results.update(answers)
            for index in answers:
                del waiting[index]

        for _ in range(2):
            if not waiting:
                return
            try:
                answer(self._transact(waiting))
            except _RolledBackError as end:
                if end.culprit is None:
                    break
                answer({end.culprit: self._told(end.cause)})
        for index, work in list(waiting.items()):
            try:
                answer(self._transact({index: work}))
            except _RolledBackError as end:
                answer({index: self._told(end.cause)})

    def _transact(self, group: Mapping[int, Work]) -> Mapping[int, Any]:
        """Run `group` in one transaction and commit it; return everybody's result or exception.

        Raises:
            _RolledBackError: nothing of the group was committed.
            Exception: no transaction could begin.
        """
        writer = self._begin()
        try:
            alone = len(group) == 1
            answers = {
                index: self._run_one(writer, index, work, alone=alone)
                for index, work in group.items()
            }
            outcomes = self._before_commit(writer)
        except _RolledBackError as end:
            self._abandon(end.cause)
            raise
        try:
            writer.raw.execute("COMMIT")
        except Exception as error:
            if self._engine.judge(error) is Failure.FULL and self._abandon(error):
                raise _RolledBackError(error, None) from error
            # Whether it landed is not known, and a failed fsync is never repeated by asking again.
            self._discard_writer()
            _log.exception("a commit failed", extra={"event": "database.commit_failed"})
            return {index: self._outcome_unknown(error) for index in group}
        self._outcomes.append(outcomes)
        return answers

    def _begin(self) -> _Writer:
        """Return the writer, in a new transaction; connect where the old connection is lost."""
        if self._writer is not None:
            try:
                self._writer.raw.execute(self._engine.begin_write)
            except Exception as error:
                if self._engine.judge(error) is not Failure.BROKEN:
                    raise
                self._discard_writer()
        if self._writer is None:
            conn = self._engine.connect(read_only=False)
            self._writer = _Writer(conn, _raw_of(conn), [])
            conn.info[_COLLECTED] = self._writer.collected
            self._writer.raw.execute(self._engine.begin_write)
        self._writer.collected.clear()
        return self._writer

    def _run_one(self, writer: _Writer, index: int, work: Work, *, alone: bool) -> Any:
        """Return what `work` returns or raises; its failure undoes its own statements alone."""
        mark = len(writer.collected)
        raw = writer.raw
        try:
            if not alone:
                raw.execute("SAVEPOINT caller")
            result = work(writer.conn)
            if not alone:
                # Fails if the transaction was lost on the way, even if `work` hid that.
                raw.execute("RELEASE SAVEPOINT caller")
            self._require_transaction(raw)
        except BaseException as error:
            # Alone, the transaction is the savepoint.
            if alone or self._engine.judge(error) is Failure.BROKEN:
                raise _RolledBackError(error, index) from error
            del writer.collected[mark:]
            try:
                raw.execute("ROLLBACK TO SAVEPOINT caller")
                raw.execute("RELEASE SAVEPOINT caller")
            except Exception:  # noqa: BLE001 - whatever it is, the transaction is lost
                raise _RolledBackError(error, index) from error
            return self._told(error)
        return result

    def _require_transaction(self, raw: Any) -> None:
        if not self._engine.in_transaction(raw):
            raise RuntimeError("a database function ended its own transaction")

    def _before_commit(self, writer: _Writer) -> Sequence[object]:
        try:
            outcomes = [
                hook.before_commit(writer.conn, tuple(writer.collected)) for hook in self._hooks
            ]
            self._require_transaction(writer.raw)
        except Exception as error:
            raise _RolledBackError(error, None) from error
        return outcomes

    def _abandon(self, cause: BaseException) -> bool:
        """Roll back what is open; return whether the connection is kept for the next write.

        A full disk costs no connection: opening another one may need room too.
        """
        if self._writer is None:
            return False
        if self._engine.judge(cause) is not Failure.BROKEN:
            try:
                self._writer.raw.rollback()
            except Exception:  # noqa: BLE001 - then the connection goes
                _log.warning("a rollback failed", extra={"event": "database.rollback_failed"})
            else:
                return True
        self._discard_writer()
        return False

    def _discard_writer(self) -> None:
        if self._writer is not None:
            _close_quietly(self._writer.conn)
            self._writer = None

    # Answers

    def _told(self, error: BaseException) -> BaseException:
        """Return what a caller is told of `error`."""
        if isinstance(error, StopIteration):  # no future can carry one
            told: BaseException = RuntimeError("StopIteration in a database function")
            told.__cause__ = error
            return told
        return _translated(error, self._engine, self._settings)

    def _outcome_unknown(self, error: Exception) -> GameNodeError:
        told = GameNodeError(
            ErrorCode.UNAVAILABLE,
            "the database did not confirm this write; it may have landed",
            hint="repeat it: a repeat of a write that landed changes nothing",
            retry_after_s=self._settings.retry_s,
        )
        told.__cause__ = error
        return told

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

    # On the event loop

    def _announce(self) -> None:
        """Tell the hooks about every commit that they do not know of yet."""
        while self._outcomes:
            for hook, outcome in zip(self._hooks, self._outcomes.popleft(), strict=True):
                try:
                    hook.after_commit(outcome)
                except Exception:  # noqa: BLE001 - the write is durable; its callers must hear that
                    _log.exception("a commit hook failed", extra={"event": "database.hook_failed"})

    def _disconnect(self) -> None:
        self._readers.shutdown()
        self._close_idle()
        self._discard_writer()


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


def _raw_of(conn: Connection) -> Any:
    raw = conn.connection.dbapi_connection
    assert raw is not None
    return raw


def _close_quietly(conn: Connection) -> None:
    with suppress(Exception):  # it is given up because it may be broken
        conn.close()
