"""What differs between the two databases: connecting, beginning, and what an error means."""

from __future__ import annotations

from contextlib import suppress
from enum import Enum, auto
from typing import Any, Protocol

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError


class Failure(Enum):
    """What an error says about the database, as far as the group commit must know."""

    FULL = auto()
    """There is no room; the connection is sound."""
    AGAIN = auto()
    """The connection is sound, and the same statement may work later: a lock, a deadlock."""
    BROKEN = auto()
    """The connection cannot be trusted any more."""
    OWN = auto()
    """The statement's own fault, such as a violated constraint."""


class DatabaseEngine(Protocol):
    """One of the two databases.

    The driver is in autocommit mode in both, and every BEGIN and COMMIT is said by the group
    commit itself: nothing opens or ends a transaction behind its back.
    """

    begin_write: str
    begin_read: str

    def connect(self, *, read_only: bool) -> Connection:
        """Return a new connection, outside of any transaction."""

    def in_transaction(self, raw: Any) -> bool:
        """Return whether a transaction is open and sound enough to go on in it."""

    def lock_migrations(self, conn: Connection) -> None:
        """Keep every other server from migrating until this transaction ends."""

    def lock_commits(self, conn: Connection) -> None:
        """Keep every other server from committing events until this transaction ends."""

    def judge(self, error: BaseException) -> Failure:
        """Return what `error` says about the database."""


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's own error, where SQLAlchemy has wrapped it."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig
    return error


def raw_of(conn: Connection) -> Any:
    """Return the driver's connection: it takes a transaction's own words without ceremony."""
    raw = conn.connection.dbapi_connection
    assert raw is not None
    return raw


def close_quietly(conn: Connection) -> None:
    """Close a connection that is given up, perhaps because it is broken."""
    with suppress(Exception):
        conn.close()
