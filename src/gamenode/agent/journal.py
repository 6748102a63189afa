"""What an agent must still know after a crash: its session, what it accepted and may have started.

One SQLite file, written in groups, each durable before its callers go on (rule RA2).
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gamenode.domain.command import CancelOrder, Dispatch, ExecuteOrder, ExtendOrder
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogKey
from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import Reason, Status
from gamenode.lib.clock import Instant
from gamenode.lib.groups import GroupWorker, QueueFullError
from gamenode.wire.codec import pack_order, unpack_order

_SCHEMA = """
CREATE TABLE session (
    id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, host_id TEXT NOT NULL
);
CREATE TABLE state (
    id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, maintenance TEXT NOT NULL
);
CREATE TABLE held (
    pipeline_id TEXT, attempt INTEGER, work BLOB, cancel_reason TEXT, cancel_message TEXT,
    cancel_force INTEGER NOT NULL, accepted_at INTEGER, abandoned INTEGER NOT NULL,
    extended_s REAL NOT NULL,
    PRIMARY KEY (pipeline_id, attempt)
) WITHOUT ROWID;
CREATE TABLE tries (
    pipeline_id TEXT, dispatch INTEGER, step TEXT, attempt INTEGER, run INTEGER,
    after_cancel INTEGER NOT NULL, after_timeout INTEGER NOT NULL,
    started_at INTEGER, status TEXT, reason TEXT, message TEXT, exit_code INTEGER, signal INTEGER,
    ended_at INTEGER,
    PRIMARY KEY (pipeline_id, step, attempt, run)
) WITHOUT ROWID;
CREATE TABLE services (
    pipeline_id TEXT, step TEXT, attempt INTEGER, run INTEGER, instance_id TEXT, grace_s REAL,
    PRIMARY KEY (pipeline_id, step, attempt, run)
) WITHOUT ROWID;
"""
_SCHEMA_ID: Final = zlib.crc32(_SCHEMA.encode()) >> 1
"""Kept in the file: whose tables it holds. SQLite has 31 bits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a try at a step ended."""

    status: Status
    reason: Reason = Reason.NONE
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None
    started_at: Instant | None = None
    ended_at: Instant | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """A try that was journaled before anything was created; without an outcome it may run."""

    key: LogKey
    outcome: Outcome | None = None
    started_at: Instant | None = None
    """When it was started; None: nobody knows that it was."""
    after_cancel: bool = False
    """Begun when the pipeline's cancel was known already: a clean-up that it leaves alone."""
    after_timeout: bool = False
    """The same, for the pipeline's timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One dispatch that the server has not released yet."""

    dispatch: Dispatch
    order: ExecuteOrder | None
    """None: a cancel that came before its Execute, kept so that the Execute finds it (RL2)."""
    accepted_at: Instant | None
    cancel: CancelOrder | None
    tries: tuple[Try, ...]
    abandoned: bool = False
    """Whether the journal may be older than what has happened to it (rule RL3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptService:
    """A service that lives on after its pipeline."""

    key: LogKey
    instance_id: str
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledTry:
    """What the journal tells of a try to somebody who compares it with other records."""

    started_at: Instant | None
    ended_at: Instant | None
    ending: bool
    """Whether the end of its dispatch is wanted."""


_Write = Callable[[sqlite3.Connection], object]
_UNWRITTEN: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY})


def certainly_unwritten(error: Exception) -> bool:
    """Return whether a failed write has left nothing that a later start could find.

    After a failed fsync that is not known: the bytes may have reached the disk all the same.
    """
    if isinstance(error, QueueFullError):
        return True
    # The low byte is the primary code.
    return isinstance(error, sqlite3.Error) and error.sqlite_errorcode & 0xFF in _UNWRITTEN


class Journal:
    """The agent's durable memory. Every method returns when it is on disk."""

    def __init__(
        self,
        path: Path | None,
        *,
        host_id: str = "",
        group_max: int = 256,
        queue_max: int = 10_000,
        pool: Executor | None = None,
    ) -> None:
        """Open or create the file at `path`; None: keep it in memory, for as long as this lives.

        `host_id` names the machine, where that can be told: on another one, a copied journal
        continues nothing. Writes run in `pool`, which stays open; without one, on a thread of their
        own.

        Raises:
            GameNodeError: CONFLICT, another build's tables are in it; UNAVAILABLE, it cannot be
                written.
        """
        self._host_id = host_id
        if path is not None:
            _make_private(path)
        self._connection = sqlite3.connect(
            path or ":memory:", isolation_level=None, check_same_thread=False
        )
        if path is None:
            # Most of its pages hold next to nothing, and there may be thousands of journals.
            self._connection.execute("PRAGMA page_size=512")
        try:
            self._prepare(path)
        except sqlite3.Error as error:
            self._connection.close()
            raise GameNodeError(
                ErrorCode.UNAVAILABLE, f"the agent's journal {path} cannot be used: {error}"
            ) from error
        except GameNodeError:
            self._connection.close()
            raise
        self._worker: GroupWorker[_Write, object] = GroupWorker(
            self._run_group, name="journal", group_max=group_max, queue_max=queue_max, pool=pool
        )

    def _prepare(self, path: Path | None) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        (held,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and held != _SCHEMA_ID:
            raise GameNodeError(
                ErrorCode.CONFLICT,
                f"the agent's journal {path} was made by another build of GameNode",
                hint="go on with that build until nothing runs here, then remove the file",
            )
        if not tables:
            self._connection.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_ID}; COMMIT;"
            )

    async def close(self) -> None:
        """Finish what waits and close the file."""
        await self._worker.close()
        self._connection.close()

    # Read once, at start, before the loop has other work.

    def last_session_epoch(self) -> int | None:
        """Return the newest session that was opened, or None: none was, or not on this host."""
        row = self._connection.execute("SELECT epoch, host_id FROM session").fetchone()
        if row is None or (row[1] and self._host_id and row[1] != self._host_id):
            return None
        return int(row[0])

    def state(self) -> tuple[int, Maintenance]:
        """Return the maintenance state that the agent obeys, and its version."""
        row = self._connection.execute("SELECT version, maintenance FROM state").fetchone()
        return (row[0], Maintenance(row[1])) if row else (0, Maintenance.NORMAL)

    def held(self) -> list[Held]:
        """Return every dispatch that is held, with its tries, oldest first."""
        return [
            Held(
                dispatch=(dispatch := Dispatch(pipeline_id, attempt)),
                order=(
                    replace(unpack_order(work), extended_s=extended_s) if work is not None else None
                ),
                accepted_at=accepted_at,
                cancel=(
                    CancelOrder(
                        dispatch=dispatch,
                        reason=Reason(reason),
                        message=message,
                        force=bool(force),
                    )
                    if reason is not None
                    else None
                ),
                tries=self._tries(dispatch),
                abandoned=bool(abandoned),
            )
            for (
                pipeline_id,
                attempt,
                work,
                reason,
                message,
                force,
                accepted_at,
                abandoned,
                extended_s,
            ) in self._connection.execute(
                "SELECT pipeline_id, attempt, work, cancel_reason, cancel_message, cancel_force,"
                " accepted_at, abandoned, extended_s FROM held ORDER BY pipeline_id, attempt"
            ).fetchall()
        ]

    def services(self) -> list[KeptService]:
        """Return the services that live on."""
        return [
            KeptService(
                key=LogKey(pipeline_id, step, attempt, run),
                instance_id=instance_id,
                grace_s=grace_s,
            )
            for pipeline_id, step, attempt, run, instance_id, grace_s in self._connection.execute(
                "SELECT pipeline_id, step, attempt, run, instance_id, grace_s FROM services"
            )
        ]

    async def tries(self) -> Mapping[LogKey, JournaledTry]:
        """Return every try and every service that lives on, as they are on disk now.

        Raises:
            Exception: the journal cannot be used now.
        """
        rows: list[tuple[str, str, int, int, Instant | None, Instant | None, int]] = []

        def read(connection: sqlite3.Connection) -> None:
            # In its turn among the writes: what it finds is committed, or about to be.
            rows[:] = connection.execute(
                "SELECT t.pipeline_id, t.step, t.attempt, t.run, t.started_at, t.ended_at,"
                " h.cancel_reason IS NOT NULL FROM tries t LEFT JOIN held h"
                " ON h.pipeline_id = t.pipeline_id AND h.attempt = t.dispatch"
                " UNION ALL SELECT pipeline_id, step, attempt, run, NULL, NULL, 0 FROM services"
            ).fetchall()

        await self._worker.submit(read)
        return {
            LogKey(pipeline_id, step, attempt, run): JournaledTry(
                started_at=started_at, ended_at=ended_at, ending=bool(ending)
            )
            for pipeline_id, step, attempt, run, started_at, ended_at, ending in rows
        }

    # Written

    async def open_session(self, epoch: int, *, continued: bool) -> None:
        """Remember the newest session, to be named at the next registration (rule RL3).

        If it is not `continued` from the one before, what is held is abandoned with it: the next
        registration continues this session, and must not bring that back.
        """
        values = (epoch, self._host_id)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO session VALUES (1, ?, ?) ON CONFLICT (id) DO UPDATE"
                " SET epoch = excluded.epoch, host_id = excluded.host_id",
                values,
            )
            if not continued:
                connection.execute("UPDATE held SET abandoned = 1")

        await self._worker.submit(write)

    async def obey(self, version: int, maintenance: Maintenance) -> None:
        """Remember the maintenance state to obey, before it is confirmed (rule RM1)."""
        await self._write(
            "INSERT INTO state VALUES (1, ?, ?) ON CONFLICT (id) DO UPDATE"
            " SET version = excluded.version, maintenance = excluded.maintenance",
            (version, maintenance),
        )

    async def accept(self, order: ExecuteOrder, first_try: LogKey | None, *, now: Instant) -> None:
        """Hold a dispatch; `first_try` is journaled with it, which saves a second wait."""
        packed = pack_order(order)
        dispatch = order.dispatch

        def write(connection: sqlite3.Connection) -> None:
            # It may be there, from a write whose outcome was not known.
            connection.execute(
                "INSERT INTO held VALUES (?, ?, ?, NULL, NULL, 0, ?, 0, ?) ON CONFLICT DO UPDATE"
                " SET work = excluded.work, accepted_at = excluded.accepted_at,"
                " extended_s = excluded.extended_s",
                (dispatch.pipeline_id, dispatch.attempt, packed, now, order.extended_s),
            )
            if first_try is not None:
                _insert_try(connection, dispatch, Try(key=first_try))

        await self._worker.submit(write)

    async def cancel(self, order: CancelOrder) -> None:
        """Remember that a dispatch must end, also one that was never accepted (rule RL2)."""
        await self._write(
            "INSERT INTO held VALUES (?, ?, NULL, ?, ?, ?, NULL, 0, 0) ON CONFLICT DO UPDATE SET"
            " cancel_reason = excluded.cancel_reason, cancel_message = excluded.cancel_message,"
            " cancel_force = excluded.cancel_force",
            (
                order.dispatch.pipeline_id,
                order.dispatch.attempt,
                order.reason,
                order.message,
                order.force,
            ),
        )

    async def extend(self, order: ExtendOrder) -> None:
        """Remember how much longer a dispatch that is held may take, in all."""
        await self._write(
            "UPDATE held SET extended_s = max(extended_s, ?) WHERE pipeline_id = ? AND attempt = ?",
            (order.extended_s, order.dispatch.pipeline_id, order.dispatch.attempt),
        )

    async def begin_try(self, dispatch: Dispatch, begun: Try) -> None:
        """Record that a try may be created from now on; before anything is (rule RA2)."""
        await self._worker.submit(lambda connection: _insert_try(connection, dispatch, begun))

    async def start_try(self, key: LogKey, started_at: Instant) -> None:
        """Record that a try was started, so that nobody takes one that is gone for a new one."""
        await self._write(
            "UPDATE tries SET started_at = ?"
            " WHERE pipeline_id = ? AND step = ? AND attempt = ? AND run = ?",
            (started_at, *_columns(key)),
        )

    async def end_try(
        self, key: LogKey, outcome: Outcome, *, service: KeptService | None = None
    ) -> None:
        """Record how a try ended, and with it the service that lives on after it."""
        values = (
            outcome.status,
            outcome.reason,
            outcome.message,
            outcome.exit_code,
            outcome.signal,
            outcome.started_at,
            outcome.ended_at,
            *_columns(key),
        )

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE tries SET status = ?, reason = ?, message = ?, exit_code = ?, signal = ?,"
                " started_at = ?, ended_at = ?"
                " WHERE pipeline_id = ? AND step = ? AND attempt = ? AND run = ?",
                values,
            )
            if service is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO services VALUES (?, ?, ?, ?, ?, ?)",
                    (*_columns(service.key), service.instance_id, service.grace_s),
                )

        await self._worker.submit(write)

    async def forget_service(self, key: LogKey) -> None:
        """Forget a service that has ended."""
        await self._write(
            "DELETE FROM services WHERE pipeline_id = ? AND step = ? AND attempt = ? AND run = ?",
            _columns(key),
        )

    async def release(self, dispatch: Dispatch) -> None:
        """Forget a dispatch whose end the server has acknowledged; before its remains go."""
        values = (dispatch.pipeline_id, dispatch.attempt)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM tries WHERE pipeline_id = ? AND dispatch = ?", values)
            connection.execute("DELETE FROM held WHERE pipeline_id = ? AND attempt = ?", values)

        await self._worker.submit(write)

    async def _write(self, statement: str, values: Sequence[object]) -> None:
        await self._worker.submit(lambda connection: connection.execute(statement, values))

    def _run_group(self, writes: Sequence[_Write]) -> Sequence[object]:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for write in writes:
                write(connection)
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - one caller's odd value is not the others'
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            # Nobody is told that it is durable; a group of one already was the last resort.
            if len(writes) == 1:
                return [error]
            return [self._run_group([write])[0] for write in writes]
        return [None] * len(writes)

    def _tries(self, dispatch: Dispatch) -> tuple[Try, ...]:
        rows = self._connection.execute(
            "SELECT step, attempt, run, after_cancel, after_timeout, started_at, status, reason,"
            " message, exit_code, signal, ended_at FROM tries"
            " WHERE pipeline_id = ? AND dispatch = ? ORDER BY step, attempt, run",
            (dispatch.pipeline_id, dispatch.attempt),
        )
        return tuple(
            Try(
                key=LogKey(dispatch.pipeline_id, step, attempt, run),
                outcome=(
                    Outcome(
                        status=Status(status),
                        reason=Reason(reason),
                        message=message,
                        exit_code=exit_code,
                        signal=signal,
                        started_at=started_at,
                        ended_at=ended_at,
                    )
                    if status is not None
                    else None
                ),
                started_at=started_at,
                after_cancel=bool(after_cancel),
                after_timeout=bool(after_timeout),
            )
            for (
                step,
                attempt,
                run,
                after_cancel,
                after_timeout,
                started_at,
                status,
                reason,
                message,
                exit_code,
                signal,
                ended_at,
            ) in rows
        )


def _columns(key: LogKey) -> tuple[str, str, int, int]:
    return key.pipeline_id, key.step, key.attempt, key.run


def _insert_try(connection: sqlite3.Connection, dispatch: Dispatch, begun: Try) -> None:
    key = begun.key
    connection.execute(
        "INSERT INTO tries (pipeline_id, dispatch, step, attempt, run, after_cancel, after_timeout)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (
            key.pipeline_id,
            dispatch.attempt,
            key.step,
            key.attempt,
            key.run,
            begun.after_cancel,
            begun.after_timeout,
        ),
    )


def _make_private(path: Path) -> None:
    """Make the file for its owner alone, since orders hold values; SQLite's others follow it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise GameNodeError(
            ErrorCode.UNAVAILABLE, f"the agent's journal {path} cannot be used: {error.strerror}"
        ) from error
