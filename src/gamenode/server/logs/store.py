"""The table of logs: functions of a connection."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from sqlalchemy import Connection, and_, bindparam, delete, insert, or_, select, update

from gamenode.domain.log import LogKey, LogPosition, StoredLog
from gamenode.lib.clock import Instant
from gamenode.server.db import schema

_log: Final = schema.logs.c

# Built once: building a statement takes several times as long as running it.
_IS: Final = and_(
    _log.pipeline_id == bindparam("of_pipeline"),
    _log.step == bindparam("of_step"),
    _log.attempt == bindparam("of_attempt"),
    _log.run == bindparam("of_run"),
)
_GET: Final = select(schema.logs).where(_IS)
_ADVANCE: Final = update(schema.logs).where(
    _IS,
    _log.length_bytes == bindparam("from_bytes"),
    or_(
        _log.final_length_bytes.is_(None),
        _log.final_length_bytes >= bindparam("to_bytes"),
    ),
)
_SET_FINAL: Final = update(schema.logs).where(_IS, _log.final_length_bytes.is_(None))
_INSERT: Final = insert(schema.logs)


def get(conn: Connection, key: LogKey) -> StoredLog | None:
    """Return a log, or None if nothing is known of it."""
    row = conn.execute(_GET, _of(key)).one_or_none()
    if row is None:
        return None
    return StoredLog(
        node_id=row.node_id,
        length_bytes=row.length_bytes,
        position=LogPosition(
            stdout_bytes=row.stdout_bytes,
            stdout_lines=row.stdout_lines,
            stderr_bytes=row.stderr_bytes,
            stderr_lines=row.stderr_lines,
        ),
        final_length_bytes=row.final_length_bytes,
        final_hash=row.final_hash or b"",
    )


def advance(
    conn: Connection, key: LogKey, log: StoredLog, *, from_bytes: int, now: Instant
) -> bool:
    """Set length and position to those of `log`; return False if the guard refused.

    The guard: the length is `from_bytes` (a log that is not known has none), and the new one is
    within the final one.
    """
    position = {
        "stdout_bytes": log.position.stdout_bytes,
        "stdout_lines": log.position.stdout_lines,
        "stderr_bytes": log.position.stderr_bytes,
        "stderr_lines": log.position.stderr_lines,
    }
    guard = {**_of(key), "from_bytes": from_bytes, "to_bytes": log.length_bytes}
    updated = conn.execute(_ADVANCE, {**guard, "length_bytes": log.length_bytes, **position})
    if updated.rowcount:
        return True
    if from_bytes or get(conn, key) is not None:
        return False
    conn.execute(
        _INSERT,
        {
            **_values(key),
            "node_id": log.node_id,
            "length_bytes": log.length_bytes,
            "created_at": now,
            **position,
        },
    )
    return True


def set_final(
    conn: Connection, key: LogKey, *, node_id: str, length_bytes: int, sha256: bytes, now: Instant
) -> None:
    """Set the final length and hash, once: a repeat changes nothing."""
    if get(conn, key) is None:
        conn.execute(
            _INSERT,
            {
                **_values(key),
                "node_id": node_id,
                "length_bytes": 0,
                "stdout_bytes": 0,
                "stdout_lines": 0,
                "stderr_bytes": 0,
                "stderr_lines": 0,
                "final_length_bytes": length_bytes,
                "final_hash": sha256,
                "created_at": now,
            },
        )
        return
    conn.execute(_SET_FINAL, {**_of(key), "final_length_bytes": length_bytes, "final_hash": sha256})


def remove(conn: Connection, pipeline_ids: Collection[str]) -> None:
    """Remove every log of these pipelines, and note that their files are to follow."""
    conn.execute(delete(schema.logs).where(_log.pipeline_id.in_(pipeline_ids)))
    conn.execute(insert(schema.removed_logs), [{"pipeline_id": it} for it in pipeline_ids])


def removed(conn: Connection, limit: int) -> Sequence[str]:
    """Return pipelines that are gone, and whose files may still be there."""
    return conn.scalars(select(schema.removed_logs.c.pipeline_id).limit(limit)).all()


def forget_removed(conn: Connection, pipeline_ids: Collection[str]) -> None:
    """Note that the files of these pipelines are gone."""
    conn.execute(
        delete(schema.removed_logs).where(schema.removed_logs.c.pipeline_id.in_(pipeline_ids))
    )


def _of(key: LogKey) -> dict[str, object]:
    return {
        "of_pipeline": key.pipeline_id,
        "of_step": key.step,
        "of_attempt": key.attempt,
        "of_run": key.run,
    }


def _values(key: LogKey) -> dict[str, str | int]:
    return {
        "pipeline_id": key.pipeline_id,
        "step": key.step,
        "attempt": key.attempt,
        "run": key.run,
    }
