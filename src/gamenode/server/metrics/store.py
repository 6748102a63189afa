"""Rows of the metric journal: functions of a connection."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, delete, func, insert, select

from gamenode.lib.clock import Instant
from gamenode.server.db import schema

_journal: Final = schema.metric_journal.c


def append(
    conn: Connection,
    *,
    node_id: str,
    spool_id: str,
    sequence: int,
    content_hash: bytes,
    report: bytes,
    now: Instant,
) -> None:
    """Keep one report as it came."""
    conn.execute(
        insert(schema.metric_journal).values(
            node_id=node_id,
            spool_id=spool_id,
            sequence=sequence,
            content_hash=content_hash,
            report=report,
            received_at=now,
        )
    )


def hash_of(conn: Connection, node_id: str, spool_id: str, sequence: int) -> bytes | None:
    """Return the content hash under which a numbered report is kept, or None."""
    found: bytes | None = conn.scalar(
        select(_journal.content_hash).where(
            _journal.node_id == node_id,
            _journal.spool_id == spool_id,
            _journal.sequence == sequence,
        )
    )
    return found


def size_bytes(conn: Connection) -> int:
    """Return how many bytes of reports are kept."""
    size: int = conn.scalar(select(func.coalesce(func.sum(func.length(_journal.report)), 0))) or 0
    return size


def purge(conn: Connection, before: Instant) -> int:
    """Drop reports that came before an instant; return how many."""
    rows: int = conn.execute(
        delete(schema.metric_journal).where(_journal.received_at < before)
    ).rowcount
    return rows
