"""PostgreSQL, for more than one server."""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Connection, NullPool, create_engine

from gamenode.server.db.engines import Failure, driver_error


class PostgresEngine:
    """A PostgreSQL server, shared by several GameNode servers."""

    begin_write = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
    # One snapshot for all statements of a read, so none sees half a commit.
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

    # Any two numbers that no other program on this database uses; all servers must agree on them.
    _MIGRATIONS_LOCK: Final = 0x67616D656E6F6401
    _COMMITS_LOCK: Final = 0x67616D656E6F6402

    _FULL: Final = frozenset({"53100"})
    # Deadlock, serialization failure, lock not available, statement timeout, out of memory,
    # too many connections.
    _AGAIN: Final = frozenset({"40P01", "40001", "55P03", "57014", "53200", "53300"})

    def __init__(self, url: URL, *, busy_s: float) -> None:
        """Use the server that `url` names; no statement may take longer than `busy_s`."""
        busy_ms = round(busy_s * 1000)
        options = {
            "synchronous_commit": "on",
            "statement_timeout": busy_ms,
            # A server that froze inside a transaction must not hold the others' lock for ever.
            "idle_in_transaction_session_timeout": busy_ms,
        }
        self._engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
            connect_args={
                "application_name": "gamenode",
                "connect_timeout": max(2, round(busy_s)),
                "tcp_user_timeout": busy_ms,
                "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
            },
        )

    def connect(self, *, read_only: bool) -> Connection:  # noqa: ARG002 - begin_read says it
        """Connect to the server."""
        return self._engine.connect()

    def in_transaction(self, raw: Any) -> bool:
        """Return whether a transaction is open and no statement in it failed."""
        return raw.info.transaction_status in {TransactionStatus.INTRANS, TransactionStatus.ACTIVE}

    def lock_migrations(self, conn: Connection) -> None:
        """Take an advisory lock, held until the transaction ends."""
        conn.exec_driver_sql(f"SELECT pg_advisory_xact_lock({self._MIGRATIONS_LOCK})")

    def lock_commits(self, conn: Connection) -> None:
        """Take an advisory lock, held until the transaction ends."""
        conn.exec_driver_sql(f"SELECT pg_advisory_xact_lock({self._COMMITS_LOCK})")

    def judge(self, error: BaseException) -> Failure:
        """Read the SQLSTATE; an operational error without one is a lost connection."""
        raw = driver_error(error)
        if not isinstance(raw, psycopg.Error):
            return Failure.OWN
        state = raw.sqlstate
        if state in self._FULL:
            return Failure.FULL
        if state in self._AGAIN:
            return Failure.AGAIN
        if state is None:
            lost = isinstance(raw, (psycopg.OperationalError, psycopg.InterfaceError))
            return Failure.BROKEN if lost else Failure.OWN
        # 08: the connection; 57P: the server shut down or ended this session; 25P03: idle too long.
        return Failure.BROKEN if state.startswith(("08", "57P", "25P03")) else Failure.OWN
