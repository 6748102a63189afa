"""SQLite, the default: one file, nothing to install."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine

from gamenode.domain.errors import invalid
from gamenode.server.db.engines import Failure, driver_error


class SqliteEngine:
    """One file: WAL, and an fsync with every commit."""

    # IMMEDIATE: a transaction that upgrades its lock half-way can fail where nobody expects it.
    begin_write = "BEGIN IMMEDIATE"
    begin_read = "BEGIN"

    # A full disk also shows when the shared memory file cannot grow.
    _FULL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
    _AGAIN: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
    _BROKEN: Final = frozenset(
        {
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
            sqlite3.SQLITE_NOMEM,
            sqlite3.SQLITE_PROTOCOL,
        }
    )

    def __init__(self, url: URL, *, busy_s: float) -> None:
        """Use the file that `url` names; wait at most `busy_s` for another process's lock."""
        if url.database is None or url.database in {"", ":memory:"}:
            raise invalid(
                "database url",
                "a database in memory is lost with its connection",
                advice="name a file: sqlite:///path/to/file",
            )
        self._path = Path(url.database)
        self._busy_s = busy_s
        self._writers = self._engine(read_only=False)
        self._readers = self._engine(read_only=True)

    def connect(self, *, read_only: bool) -> Connection:
        """Open the file, or create it."""
        return (self._readers if read_only else self._writers).connect()

    def in_transaction(self, raw: Any) -> bool:
        """Return whether a transaction is open; a full disk ends it without a word."""
        return bool(raw.in_transaction)

    def lock_migrations(self, conn: Connection) -> None:
        """Do nothing: one writer at a time is SQLite's own rule."""

    def lock_commits(self, conn: Connection) -> None:
        """Do nothing: one writer at a time is SQLite's own rule."""

    def judge(self, error: BaseException) -> Failure:
        """Read SQLite's extended result code."""
        code: int = getattr(driver_error(error), "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code in self._FULL:
            return Failure.FULL
        primary = code & 0xFF
        if primary in self._AGAIN:
            return Failure.AGAIN
        return Failure.BROKEN if primary in self._BROKEN else Failure.OWN

    def _engine(self, *, read_only: bool) -> Engine:
        def connect() -> sqlite3.Connection:
            # check_same_thread: the connections move between threads, but two never share one.
            raw = sqlite3.connect(
                self._path, timeout=self._busy_s, isolation_level=None, check_same_thread=False
            )
            try:
                raw.execute("PRAGMA journal_mode = WAL")
                raw.execute("PRAGMA synchronous = FULL")
                if read_only:
                    raw.execute("PRAGMA query_only = ON")
            except BaseException:
                raw.close()
                raise
            return raw

        return create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)
