"""Events in the database: collected by every service, numbered by the commit, read by cursor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    bindparam,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    update,
)

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event, EventFilter, NewEvent
from gamenode.lib.clock import Instant
from gamenode.server.db.database import collect
from gamenode.server.db.schema import database_meta, events

# Built once: building a statement takes several times as long as running it.
_INSERT: Final = insert(events).returning(events.c.id, sort_by_parameter_order=True)
_NEWEST: Final = select(func.max(events.c.id))
_PURGED_TO: Final = select(database_meta.c.events_purged_to)


def append(conn: Connection, event: NewEvent) -> None:
    """Let `event` happen with the running transaction; the commit gives it its id (rule RC4)."""
    collect(conn, event)


def insert_all(conn: Connection, happened: Sequence[NewEvent]) -> list[Event]:
    """Store what a group has collected, in order; for the commit hook alone."""
    if not happened:
        return []
    rows = [
        {
            "type": event.type.value,
            "at": event.at,
            "node_id": event.node_id,
            "entity_id": event.entity_id,
            "status": event.status,
            "message": event.message,
            "data": dict(event.data),
        }
        for event in happened
    ]
    ids = conn.execute(_INSERT, rows).scalars().all()
    return [
        Event(
            id=number,
            type=event.type,
            at=event.at,
            node_id=event.node_id,
            entity_id=event.entity_id,
            status=event.status,
            message=event.message,
            data=event.data,
        )
        for number, event in zip(ids, happened, strict=True)
    ]


def head(conn: Connection) -> int:
    """Return the id of the newest event: the cursor of a reader that wants only later ones."""
    newest: int | None = conn.scalar(_NEWEST)
    return oldest(conn) if newest is None else newest


def oldest(conn: Connection) -> int:
    """Return the oldest cursor that still works: the id of the last event purged, or 0."""
    purged_to: int = conn.execute(_PURGED_TO).scalar_one()
    return purged_to


def read_after(
    conn: Connection,
    after: int,
    *,
    wanted: EventFilter,
    limit: int,
) -> list[Event]:
    """Return at most `limit` events that `wanted` names, oldest first, with ids above `after`.

    Raises:
        GameNodeError: CURSOR_EXPIRED; retention has passed `after`, or no event had that id yet.

    Source: H2, H4.
    """
    check_cursor(conn, after)
    rows = conn.execute(_read_after(wanted), {"after": after, "limit_to": limit})
    return [_event(row) for row in rows.mappings()]


@lru_cache(maxsize=256)
def _read_after(wanted: EventFilter) -> Select[Any]:
    """Return the statement of one filter: who follows runs the same one over and over."""
    return (
        select(events)
        .where(events.c.id > bindparam("after"), *_conditions(wanted))
        .order_by(events.c.id)
        .limit(bindparam("limit_to"))
    )


def check_cursor(conn: Connection, after: int) -> None:
    """Raise CURSOR_EXPIRED if reading after `after` would not be complete."""
    purged_to = oldest(conn)
    if after < purged_to:
        raise GameNodeError(
            ErrorCode.CURSOR_EXPIRED,
            f"events up to {purged_to} are past retention, and the cursor {after} is before that",
            hint=f"go on after {purged_to}, and read the present state of what you follow",
        )
    newest = head(conn)
    if after > newest:
        raise GameNodeError(
            ErrorCode.CURSOR_EXPIRED,
            f"the cursor {after} is ahead of the newest event, {newest}",
            hint="it comes from another database, or from before a restore; start without it",
        )


def purge(conn: Connection, before: Instant) -> int:
    """Remove the oldest events, up to the first that is not before `before`; return how many.

    The cursor that they end at is remembered, so an older one is refused, even with none left.

    Source: H4.
    """
    first_kept = conn.scalar(select(func.min(events.c.id)).where(events.c.at >= before))
    last = conn.scalar(
        select(func.max(events.c.id)).where(
            events.c.at < before, *([] if first_kept is None else [events.c.id < first_kept])
        )
    )
    if last is None:
        return 0
    conn.execute(update(database_meta).values(events_purged_to=last))
    return conn.execute(delete(events).where(events.c.id <= last)).rowcount


def _conditions(wanted: EventFilter) -> list[ColumnElement[bool]]:
    """Return what `EventFilter.matches` says, in SQL."""
    conditions: list[ColumnElement[bool]] = []
    if wanted.node_id:
        conditions.append(events.c.node_id == wanted.node_id)
    if wanted.entity_id:
        conditions.append(
            or_(
                events.c.entity_id == wanted.entity_id,
                _begins(events.c.entity_id, f"{wanted.entity_id}/"),
            )
        )
    if wanted.types:
        families = [kind for kind in wanted.types if kind.endswith(".")]
        conditions.append(
            or_(
                false(),
                events.c.type.in_(sorted(wanted.types)),
                *(_begins(events.c.type, family) for family in sorted(families)),
            )
        )
    return conditions


def _begins(column: ColumnElement[str], prefix: str) -> ColumnElement[bool]:
    # Not LIKE, which takes upper and lower case for the same in SQLite.
    return func.substr(column, 1, len(prefix)) == prefix


def _event(row: RowMapping) -> Event:
    return Event(**row)
