"""Rows of nodes: functions of a connection, without rules or commits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import (
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    or_,
    select,
    update,
)

from gamenode.domain.inventory import Inventory
from gamenode.domain.node import (
    Condition,
    ConditionType,
    Drain,
    DrainThen,
    Link,
    Maintenance,
    Node,
    NodeType,
    Offer,
    Registration,
    StateChange,
    usable_as,
)
from gamenode.lib.clock import Instant
from gamenode.server.db import schema

_nodes: Final = schema.nodes.c
_changes: Final = schema.state_changes.c
_conditions: Final = schema.node_conditions.c
_removed: Final = schema.removed_nodes.c
_versions: Final = schema.inventory_versions.c

FIRST_STATE_VERSION: Final = 1
"""Of a node whose maintenance state was never changed."""


def get(conn: Connection, node_id: str) -> Node | None:
    """Return a node, or None."""
    row = conn.execute(_with_inventory().where(_nodes.id == node_id)).first()
    if row is None:
        return None
    found = conn.execute(select(schema.node_conditions).where(_conditions.node_id == node_id)).all()
    return _node(row, newest_change(conn, node_id, row.state_version), found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What decides whether a node takes work, as its row says."""

    usable_as: Maintenance
    state_version: int
    session_epoch: int
    boot_id: str

    @property
    def simple(self) -> bool:
        """Whether it is a simple client (rule RL4)."""
        return not self.boot_id


# Built once: every pipeline runs these.
_PLACE: Final = select(
    _nodes.maintenance, _nodes.state_version, _nodes.session_epoch, _nodes.boot_id
).where(_nodes.id == bindparam("of_node"))
_LOCK_PLACE: Final = _PLACE.with_for_update()
_UNCONFIRMED: Final = select(
    exists().where(
        _changes.node_id == bindparam("of_node"),
        _changes.version == bindparam("of_version"),
        _changes.confirmed_at.is_(None),
    )
)
_BOOT_ID: Final = select(_nodes.boot_id).where(_nodes.id == bindparam("of_node"))
_NEWEST_SESSION: Final = select(_nodes.session_epoch).where(_nodes.id == bindparam("of_node"))


def place(conn: Connection, node_id: str) -> Place | None:
    """Return what decides over a placement."""
    return _place(conn, _PLACE, node_id)


def lock_place(conn: Connection, node_id: str) -> Place | None:
    """Return what decides over a placement and keep others from changing it until the commit."""
    return _place(conn, _LOCK_PLACE, node_id)


def _place(conn: Connection, query: Select[Any], node_id: str) -> Place | None:
    row = conn.execute(query, {"of_node": node_id}).first()
    if row is None:
        return None
    # Asked apart, so that it is seen as it is once the lock is held; most were never changed.
    unconfirmed = row.state_version > FIRST_STATE_VERSION and conn.scalar(
        _UNCONFIRMED, {"of_node": node_id, "of_version": row.state_version}
    )
    return Place(
        usable_as=usable_as(Maintenance(row.maintenance), confirmed=not unconfirmed),
        state_version=row.state_version,
        session_epoch=row.session_epoch,
        boot_id=row.boot_id,
    )


def lock(conn: Connection, node_id: str) -> Row[Any] | None:
    """Return a node's row and keep others from changing it until the commit."""
    return conn.execute(select(schema.nodes).where(_nodes.id == node_id).with_for_update()).first()


def every(conn: Connection) -> list[Node]:
    """Return every node, by id."""
    changes = {
        row.node_id: _change(row)
        for row in conn.execute(
            select(schema.state_changes).where(
                _changes.node_id == _nodes.id, _changes.version == _nodes.state_version
            )
        )
    }
    conditions: dict[str, list[Row[Any]]] = {}
    for row in conn.execute(select(schema.node_conditions)):
        conditions.setdefault(row.node_id, []).append(row)
    rows = conn.execute(_with_inventory().order_by(_nodes.id))
    return [_node(row, changes.get(row.id), conditions.get(row.id, ())) for row in rows]


def newest_change(conn: Connection, node_id: str, version: int) -> StateChange | None:
    """Return the change that made a node's state what it is, or None."""
    row = conn.execute(
        select(schema.state_changes).where(_changes.node_id == node_id, _changes.version == version)
    ).first()
    return _change(row) if row is not None else None


def changes(conn: Connection, node_id: str, limit: int) -> list[StateChange]:
    """Return a node's newest changes, newest first."""
    rows = conn.execute(
        select(schema.state_changes)
        .where(_changes.node_id == node_id)
        .order_by(_changes.version.desc())
        .limit(limit)
    )
    return [_change(row) for row in rows]


def unconfirmed(conn: Connection, limit: int) -> list[StateChange]:
    """Return the newest change of every node that has not confirmed it."""
    rows = conn.execute(
        select(schema.state_changes)
        .where(
            _changes.confirmed_at.is_(None),
            _changes.node_id == _nodes.id,
            _changes.version == _nodes.state_version,
        )
        .limit(limit)
    )
    return [_change(row) for row in rows]


def due(conn: Connection, now: Instant, limit: int) -> list[StateChange]:
    """Return the newest changes whose deadline or end has come."""
    rows = conn.execute(
        select(schema.state_changes)
        .where(
            or_(_changes.deadline_at <= now, _changes.until <= now),
            _changes.node_id == _nodes.id,
            _changes.version == _nodes.state_version,
        )
        .limit(limit)
    )
    return [_change(row) for row in rows]


def set_maintenance(
    conn: Connection, node_id: str, target: Maintenance, *, sources: frozenset[Maintenance]
) -> int | None:
    """Set the wanted state; return its version, or None if the present one does not allow it."""
    version: int | None = conn.scalar(
        update(schema.nodes)
        .where(_nodes.id == node_id, _nodes.maintenance.in_(sources))
        .values(maintenance=target, state_version=_nodes.state_version + 1)
        .returning(_nodes.state_version)
    )
    return version


def insert_change(conn: Connection, change: StateChange) -> None:
    """Add a change of a node's state."""
    conn.execute(
        insert(schema.state_changes).values(
            node_id=change.node_id,
            version=change.version,
            target=change.target,
            reason=change.reason,
            requested_by=change.requested_by,
            requested_at=change.requested_at,
            error=change.error,
            drain=change.draining,
            end_running=change.end_running,
            deadline_at=change.drain.deadline_at,
            then=change.drain.then,
            until=change.drain.until,
        )
    )


def clear_deadline(conn: Connection, node_id: str, version: int) -> None:
    """Let a drain's deadline pass without a consequence."""
    conn.execute(
        update(schema.state_changes)
        .where(_changes.node_id == node_id, _changes.version == version)
        .values(deadline_at=None)
    )


def set_change(conn: Connection, node_id: str, version: int, values: Mapping[str, object]) -> bool:
    """Write to a change that is not confirmed; False if it is, or is not there."""
    return _changed(
        conn,
        update(schema.state_changes)
        .where(
            _changes.node_id == node_id,
            _changes.version == version,
            _changes.confirmed_at.is_(None),
        )
        .values(**values),
    )


def unconfirm(conn: Connection, node_id: str, version: int) -> bool:
    """Have a confirmed change pushed again; False if it is not confirmed, or was never made."""
    return _changed(
        conn,
        update(schema.state_changes)
        .where(
            _changes.node_id == node_id,
            _changes.version == version,
            _changes.confirmed_at.is_not(None),
        )
        .values(pushed_at=None, confirmed_at=None, remaining=None),
    )


def session_is_newest(conn: Connection, node_id: str, epoch: int) -> bool:
    """Return what guards every write that an agent causes (P3)."""
    newest: int | None = conn.scalar(_NEWEST_SESSION, {"of_node": node_id})
    return newest == epoch


def boot_id(conn: Connection, node_id: str) -> str:
    """Return the boot that a node's host was in at its registration; empty for a simple client."""
    return conn.scalar(_BOOT_ID, {"of_node": node_id}) or ""


def use_stream(conn: Connection, node_id: str, *, epoch: int, stream_number: int) -> bool:
    """Note which stream of which session acts; return False if a newer one does already."""
    return _changed(
        conn,
        update(schema.nodes)
        .where(
            _nodes.id == node_id,
            _nodes.session_epoch == epoch,
            _nodes.stream_number <= stream_number,
        )
        .values(stream_number=stream_number, session_used=True),
    )


def continuity_epoch(conn: Connection, node_id: str) -> int:
    """Return the oldest epoch that the node's newest session continues (rule RL3)."""
    epoch: int = conn.scalar(select(_nodes.continuity_epoch).where(_nodes.id == node_id)) or 0
    return epoch


def insert_registered(
    conn: Connection, registration: Registration, *, session_id: str, epoch: int, now: Instant
) -> None:
    """Add a node that was not known."""
    conn.execute(
        insert(schema.nodes).values(
            id=registration.node_id,
            display_name=registration.node_id,
            maintenance=Maintenance.NORMAL,
            state_version=FIRST_STATE_VERSION,
            online=True,
            online_since=now,
            last_heartbeat_at=now,
            link=Link.LOST,
            link_since=now,
            link_cause="registered",
            previous_epoch=0,
            continuity_epoch=epoch,
            stream_number=0,
            labels={},
            note="",
            inventory_version=0,  # its first version follows in the same transaction
            inventory_hash="",
            registered_at=now,
            **_stated(registration, session_id, epoch),
        )
    )


def update_registered(
    conn: Connection,
    registration: Registration,
    *,
    session_id: str,
    epoch: int,
    previous_epoch: int,
    continuity_epoch: int,
    online_since: Instant | None,
    now: Instant,
) -> None:
    """Take over what a known node says of itself, under its new session."""
    conn.execute(
        update(schema.nodes)
        .where(_nodes.id == registration.node_id, _nodes.session_epoch < epoch)
        .values(
            online=True,
            online_since=online_since,
            last_heartbeat_at=now,
            previous_epoch=previous_epoch,
            continuity_epoch=continuity_epoch,
            stream_number=0,
            **_stated(registration, session_id, epoch),
        )
    )


def set_online(
    conn: Connection,
    node_id: str,
    *,
    epoch: int,
    online: bool,
    since: Instant | None,
    link: Link,
    cause: str,
    now: Instant,
) -> bool:
    """Flip `online`; return False if the session is not the newest or nothing would change."""
    return _changed(
        conn,
        update(schema.nodes)
        .where(_nodes.id == node_id, _nodes.session_epoch == epoch, _nodes.online.is_(not online))
        .values(online=online, online_since=since, link=link, link_since=now, link_cause=cause),
    )


def set_link(
    conn: Connection,
    node_id: str,
    *,
    epoch: int,
    stream_number: int,
    link: Link,
    cause: str,
    now: Instant,
) -> bool:
    """Record the state of a node's link; guarded by session and stream (rule RL2)."""
    return _changed(
        conn,
        update(schema.nodes)
        .where(
            _nodes.id == node_id,
            _nodes.session_epoch == epoch,
            _nodes.stream_number <= stream_number,
        )
        .values(
            link=link,
            link_since=now,
            link_cause=cause,
            stream_number=stream_number,
            session_used=True,
        ),
    )


def set_last_heartbeats(conn: Connection, beats: Sequence[tuple[str, Instant]]) -> None:
    """Write down when nodes were last heard; not one row a heartbeat but all of some seconds."""
    conn.execute(
        update(schema.nodes)
        .where(_nodes.id == bindparam("heard_id"))
        .values(last_heartbeat_at=bindparam("heard_at")),
        [{"heard_id": node_id, "heard_at": at} for node_id, at in beats],
    )


def set_condition(
    conn: Connection, node_id: str, kind: ConditionType, reason: str, *, now: Instant
) -> None:
    """Note that a condition holds from now on."""
    conn.execute(
        insert(schema.node_conditions).values(node_id=node_id, type=kind, reason=reason, since=now)
    )


def holds(conn: Connection, node_id: str, kind: ConditionType) -> bool:
    """Return whether a condition holds."""
    return bool(
        conn.scalar(
            select(exists().where(_conditions.node_id == node_id, _conditions.type == kind))
        )
    )


def supersede(conn: Connection, node_id: str, *, session_id: str, epoch: int) -> None:
    """Give a node a session that continues nothing, and that nobody can continue (rule RL3)."""
    conn.execute(
        update(schema.nodes)
        .where(_nodes.id == node_id)
        .values(
            session_id=session_id,
            session_epoch=epoch,
            session_used=True,
            previous_epoch=0,
            continuity_epoch=epoch,
            stream_number=0,
        )
    )


def clear_condition(conn: Connection, node_id: str, kind: ConditionType) -> bool:
    """Note that a condition does not hold any more; return whether it did."""
    return _changed(
        conn,
        delete(schema.node_conditions).where(
            _conditions.node_id == node_id, _conditions.type == kind
        ),
    )


def set_described(conn: Connection, node_id: str, values: Mapping[str, object]) -> None:
    """Change what operators say of a node."""
    conn.execute(update(schema.nodes).where(_nodes.id == node_id).values(**values))


def remove(conn: Connection, node_id: str, *, epoch: int, by: str, now: Instant) -> None:
    """Drop a node and what belongs to it; remember that its agent must not come back."""
    for table in (schema.node_conditions, schema.state_changes, schema.inventory_versions):
        conn.execute(delete(table).where(table.c.node_id == node_id))
    conn.execute(delete(schema.nodes).where(_nodes.id == node_id))
    conn.execute(delete(schema.removed_nodes).where(_removed.id == node_id))
    conn.execute(
        insert(schema.removed_nodes).values(
            id=node_id, session_epoch=epoch, removed_at=now, removed_by=by
        )
    )


def removed(conn: Connection, node_id: str) -> Row[Any] | None:
    """Return who removed a node, and its last epoch; None for one that never was."""
    return conn.execute(select(schema.removed_nodes).where(_removed.id == node_id)).first()


def _with_inventory() -> Select[Any]:
    return select(schema.nodes, _versions.content.label("inventory")).join(
        schema.inventory_versions,
        and_(_versions.node_id == _nodes.id, _versions.version == _nodes.inventory_version),
    )


def _changed(conn: Connection, statement: Any) -> bool:
    rows: int = conn.execute(statement).rowcount
    return rows > 0


def _stated(registration: Registration, session_id: str, epoch: int) -> dict[str, object]:
    return {
        "type": registration.type,
        "session_id": session_id,
        "session_epoch": epoch,
        "session_used": False,
        "boot_id": registration.boot_id,
        "agent_version": registration.agent_version,
        "env_names": sorted(registration.env_names),
        "step_runtimes": sorted(registration.step_runtimes),
        "offer": msgspec.to_builtins(registration.offer),
        "host_labels": dict(registration.labels),
    }


def _change(row: Row[Any]) -> StateChange:
    return StateChange(
        node_id=row.node_id,
        version=row.version,
        target=Maintenance(row.target),
        reason=row.reason,
        requested_by=row.requested_by,
        requested_at=row.requested_at,
        pushed_at=row.pushed_at,
        confirmed_at=row.confirmed_at,
        remaining=row.remaining,
        error=row.error,
        draining=row.drain,
        drain=Drain(deadline_at=row.deadline_at, then=DrainThen(row.then), until=row.until),
        end_running=row.end_running,
    )


def _node(row: Row[Any], state_change: StateChange | None, conditions: Sequence[Row[Any]]) -> Node:
    host_labels = {f"host/{key}": value for key, value in row.host_labels.items()}
    return Node(
        id=row.id,
        display_name=row.display_name,
        type=NodeType(row.type),
        maintenance=Maintenance(row.maintenance),
        state_version=row.state_version,
        state_change=state_change,
        online=row.online,
        online_since=row.online_since,
        last_heartbeat_at=row.last_heartbeat_at,
        link=Link(row.link),
        link_since=row.link_since,
        link_cause=row.link_cause,
        session_id=row.session_id,
        session_epoch=row.session_epoch,
        boot_id=row.boot_id,
        agent_version=row.agent_version,
        env_names=frozenset(row.env_names),
        step_runtimes=frozenset(row.step_runtimes),
        offer=msgspec.convert(row.offer, Offer),
        labels={**row.labels, **host_labels},
        note=row.note,
        conditions=tuple(
            Condition(type=ConditionType(found.type), since=found.since, reason=found.reason)
            for found in sorted(conditions, key=lambda found: str(found.type))
        ),
        inventory=msgspec.convert(row.inventory, Inventory),
        inventory_version=row.inventory_version,
        inventory_hash=row.inventory_hash,
        registered_at=row.registered_at,
    )


def values_of(node: Node) -> dict[str, tuple[str, ...]]:
    """Return what a selector can ask of a node: labels, its fields, and inventory paths."""
    values: dict[str, tuple[str, ...]] = {
        "id": (node.id,),
        "name": (node.display_name,),
        "type": (node.type,),
        "state": (node.maintenance,),
        "online": (str(node.online).lower(),),
        "agent_version": (node.agent_version,),
    }
    for root in ("hardware", "software", "network"):
        _collect(getattr(node.inventory, root), "", values)
    values.update({key: (value,) for key, value in node.labels.items()})
    return values


def _collect(value: object, path: str, into: dict[str, tuple[str, ...]]) -> None:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = f"{path}.{field.name}" if path else field.name
            _collect(getattr(value, field.name), inner, into)
    elif isinstance(value, tuple):
        for item in value:
            _collect(item, path, into)
    elif value is not None:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        into[path] = (*into.get(path, ()), text)
