"""The only writer of nodes: one call, one transaction."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import Connection

from gamenode.domain.access import SYSTEM, Actor, ActorKind, Role
from gamenode.domain.audit import AuditEntry, AuditOutcome
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.domain.event import EventType, NewEvent
from gamenode.domain.inventory import (
    Collection,
    InventoryVersion,
    content_hash,
    with_parts_of,
)
from gamenode.domain.inventory_diff import Change, describe, diff, is_loss
from gamenode.domain.node import (
    EPOCHS_PER_GENERATION,
    ConditionType,
    Drain,
    DrainThen,
    Link,
    Maintenance,
    Node,
    NodePatch,
    Registration,
    RegistrationOutcome,
    Session,
    StateChange,
    sources_of,
)
from gamenode.lib.clock import Instant
from gamenode.server.db.database import Database
from gamenode.server.events import audit
from gamenode.server.events import store as events
from gamenode.server.nodes import inventory, store

_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9_])?")
_LABEL_LENGTH_MAX: Final = 256
_LABELS_MAX: Final = 64
_TOLD_LENGTH_MAX: Final = 200


def session_is_newest(conn: Connection, node_id: str, epoch: int) -> bool:
    """Return whether `epoch` is the node's newest session (P3)."""
    return store.session_is_newest(conn, node_id, epoch)


def use_stream(conn: Connection, session: Session, stream_number: int) -> bool:
    """Let a stream act for its node from this transaction on; False if a newer one does (RL2)."""
    return store.use_stream(conn, session.node_id, epoch=session.epoch, stream_number=stream_number)


def is_simple(conn: Connection, node_id: str) -> bool:
    """Return whether a node registered without the fields that fence (rule RL4)."""
    return not store.boot_id(conn, node_id)


def boot_id(conn: Connection, node_id: str) -> str:
    """Return the boot that a node's host was in at its registration; empty for a simple client."""
    return store.boot_id(conn, node_id)


def continuity_epoch(conn: Connection, node_id: str) -> int:
    """Return the oldest epoch that the node's newest session continues (rule RL3)."""
    return store.continuity_epoch(conn, node_id)


def lock_place(conn: Connection, node_id: str) -> store.Place | None:
    """Return a node's row, which stays as it is until the commit that places work there (RC5)."""
    return store.lock_place(conn, node_id)


def place(conn: Connection, node_id: str) -> store.Place | None:
    """Return what decides whether a node takes work, as it is now."""
    return store.place(conn, node_id)


def values_of(node: Node) -> dict[str, tuple[str, ...]]:
    """Return what a selector can ask of a node."""
    return store.values_of(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class InventorySettings:
    """Bounds of inventories."""

    versions_max: int = 500
    """How many versions of a node are kept; older ones are dropped."""
    changes_told_max: int = 20
    """How many changes an event names; the diff has them all."""
    collect_s_max: float = 5.0
    """How long an inventory may take that an operator asks for."""
    query_nodes: int = 50
    """How many nodes a query over the fleet looks at in one go."""
    retry_after_s: float = 30.0
    """When a node registers again whose parts could not all be collected."""


class GameNodeService:
    """The state of nodes (L1)."""

    def __init__(self, database: Database, inventories: InventorySettings) -> None:
        """Keep the rows in `database`."""
        self._db = database
        self._inventories = inventories

    async def every(self) -> list[Node]:
        """Return every node, by id."""
        return await self._db.read(store.every)

    async def get(self, node_id: str) -> Node:
        """Return a node.

        Raises:
            GameNodeError: NODE_NOT_FOUND.
        """
        node = await self._db.read(lambda conn: store.get(conn, node_id))
        if node is None:
            raise not_found(node_id)
        return node

    async def register(
        self, registration: Registration, *, session_id: str, now: Instant
    ) -> RegistrationOutcome:
        """Open a session for a node, new or known (A3); an older session changes nothing from now.

        Its epoch is higher than any before. The session that the agent names is continued if it
        is the newest, or the one before while the newest was never used (rule RL3).
        """
        node_id = registration.node_id
        base = self._db.generation * EPOCHS_PER_GENERATION
        collection = Collection(
            inventory=registration.inventory,
            collected_at=now,
            failed=registration.failed,
            hash=registration.inventory_hash,
        )

        def record(conn: Connection) -> RegistrationOutcome:
            row = store.lock(conn, node_id)
            if row is None:
                removed = store.removed(conn, node_id)
                if removed is not None and registration.last_session_epoch:
                    raise GameNodeError(
                        ErrorCode.CONFLICT,
                        f"node {node_id} was removed by {removed.removed_by}",
                        hint="an agent with an empty data folder may join under this id again",
                    )
                epoch = max(base, removed.session_epoch if removed is not None else 0) + 1
                store.insert_registered(
                    conn, registration, session_id=session_id, epoch=epoch, now=now
                )
                _append(conn, EventType.NODE_REGISTERED, node_id, now)
                _append(conn, EventType.NODE_ONLINE, node_id, now, status="online")
                self._take(conn, node_id, collection, now)
                return RegistrationOutcome(
                    session=Session(node_id=node_id, session_id=session_id, epoch=epoch),
                    maintenance=Maintenance.NORMAL,
                    state_version=store.FIRST_STATE_VERSION,
                    continuation=False,
                )
            epoch = max(row.session_epoch, base) + 1
            named = registration.last_session_epoch
            continuation = bool(registration.boot_id) and (
                named == row.session_epoch
                or (named == row.previous_epoch and not row.session_used and bool(named))
            )
            store.update_registered(
                conn,
                registration,
                session_id=session_id,
                epoch=epoch,
                # What continues an unused session continues the one before that, too.
                previous_epoch=row.session_epoch if row.session_used else row.previous_epoch,
                continuity_epoch=row.continuity_epoch if continuation else epoch,
                online_since=row.online_since if row.online else now,
                now=now,
            )
            _clear_condition(conn, node_id, ConditionType.FENCED, now)
            _append(conn, EventType.NODE_REGISTERED, node_id, now)
            if not row.online:
                _append(conn, EventType.NODE_ONLINE, node_id, now, status="online")
            self._take(conn, node_id, collection, now)
            return RegistrationOutcome(
                session=Session(node_id=node_id, session_id=session_id, epoch=epoch),
                maintenance=Maintenance(row.maintenance),
                state_version=row.state_version,
                continuation=continuation,
            )

        return await self._db.write(record)

    async def set_online(
        self, node_id: str, *, epoch: int, online: bool, cause: str, link: Link, now: Instant
    ) -> bool:
        """Flip `online` of a node's newest session; False if there was nothing to flip."""

        def record(conn: Connection) -> bool:
            flipped = store.set_online(
                conn,
                node_id,
                epoch=epoch,
                online=online,
                since=now if online else None,
                link=link,
                cause=cause,
                now=now,
            )
            if flipped:
                kind = EventType.NODE_ONLINE if online else EventType.NODE_OFFLINE
                status = "online" if online else "offline"
                _append(conn, kind, node_id, now, status=status, message=cause)
            if flipped and online:
                # A simple client comes back without a registration.
                _clear_condition(conn, node_id, ConditionType.FENCED, now)
            return flipped

        return await self._db.write(record)

    async def set_link(
        self,
        node_id: str,
        *,
        epoch: int,
        stream_number: int,
        link: Link,
        cause: str,
        now: Instant,
    ) -> bool:
        """Record the link of a node; False for a superseded session or stream."""
        return await self._db.write(
            lambda conn: store.set_link(
                conn,
                node_id,
                epoch=epoch,
                stream_number=stream_number,
                link=link,
                cause=cause,
                now=now,
            )
        )

    async def set_last_heartbeats(self, beats: Sequence[tuple[str, Instant]]) -> None:
        """Write down when nodes were last heard."""
        await self._db.write(lambda conn: store.set_last_heartbeats(conn, beats))

    # Maintenance: wanted, pushed, confirmed

    async def change_state(
        self,
        node_id: str,
        target: Maintenance,
        *,
        drain: Drain | None,
        by: Actor,
        reason: str,
        now: Instant,
    ) -> StateChange | None:
        """Record the state that a node shall have; the same state again changes nothing (E2).

        Returns the change that stands: the new one, or the one before (None where the node never
        was in another state). It is pushed afterwards, and again until the agent confirms it.

        Raises:
            GameNodeError: NODE_NOT_FOUND; CONFLICT where E2 does not allow the change.
        """

        def record(conn: Connection) -> StateChange | None:
            row = store.lock(conn, node_id)
            if row is None:
                raise not_found(node_id)
            if row.maintenance == target:
                return store.newest_change(conn, node_id, row.state_version)
            return _record_change(
                conn,
                node_id,
                target,
                sources=sources_of(target),
                before=row.maintenance,
                drain=drain,
                by=by,
                reason=reason,
                now=now,
            )

        return await self._db.write(record)

    async def end_running(self, change: StateChange, *, now: Instant) -> StateChange | None:
        """Follow a drain's deadline up: end what runs, or disable; None if it is overtaken."""
        disable = change.drain.then is DrainThen.DISABLE
        target = Maintenance.DISABLED if disable else Maintenance.MAINTENANCE

        def record(conn: Connection) -> StateChange | None:
            row = store.lock(conn, change.node_id)
            if row is None or row.state_version != change.version:
                return None
            if change.drain.then is DrainThen.KEEP:
                store.clear_deadline(conn, change.node_id, change.version)
                return None
            return _record_change(
                conn,
                change.node_id,
                target,
                sources=frozenset({change.target}),
                before=row.maintenance,
                drain=Drain(until=change.drain.until),
                by=SYSTEM,
                reason=f"{change.reason} (its deadline has passed)",
                now=now,
                end_running=not disable,
            )

        return await self._db.write(record)

    async def unconfirmed_changes(self, limit: int) -> Sequence[StateChange]:
        """Return the newest change of every node that has not confirmed it."""
        return await self._db.read(lambda conn: store.unconfirmed(conn, limit))

    async def due_changes(self, now: Instant, limit: int) -> Sequence[StateChange]:
        """Return the newest changes whose deadline or end has come."""
        return await self._db.read(lambda conn: store.due(conn, now, limit))

    async def state_changes(self, node_id: str, limit: int) -> Sequence[StateChange]:
        """Return a node's newest changes, newest first."""
        return await self._db.read(lambda conn: store.changes(conn, node_id, limit))

    async def state_pushed(self, change: StateChange, *, now: Instant) -> bool:
        """Note when a change was first sent; False if that stands there already."""
        if change.pushed_at is not None:
            return False
        values = {"pushed_at": now}
        return await self._db.write(
            lambda conn: store.set_change(conn, change.node_id, change.version, values)
        )

    async def confirm_state(
        self, change: StateChange, *, confirmed_at: Instant, remaining: int | None, now: Instant
    ) -> bool:
        """Take the agent's word that it obeys a change; it counts for that version only (RM1)."""

        def record(conn: Connection) -> bool:
            values = {"confirmed_at": confirmed_at, "remaining": remaining, "error": ""}
            if not store.set_change(conn, change.node_id, change.version, values):
                return False
            _append(
                conn,
                EventType.NODE_STATE_CONFIRMED,
                change.node_id,
                now,
                status=change.target,
                message=change.reason,
            )
            audit.append(conn, _audit_of(change, AuditOutcome.CONFIRMED, now))
            return True

        return await self._db.write(record)

    async def obeys(self, session: Session, state_version: int) -> bool:
        """Take an agent's statement of the state that it obeys; False if that is an older one.

        Then its journal is not the one in which it confirmed the newest (a host set up anew, a
        restored copy): that is pushed again, and counts once it is confirmed again (RM1).
        """

        def record(conn: Connection) -> bool:
            row = store.lock(conn, session.node_id)
            if row is None or row.session_epoch != session.epoch:
                return True  # a later session says what it obeys
            if row.state_version <= state_version:
                return True
            return not store.unconfirm(conn, session.node_id, row.state_version)

        return await self._db.write(record)

    async def state_failed(self, change: StateChange, error: str, *, now: Instant) -> None:
        """Note that a change was not confirmed in time; it is tried on, and said once (E4)."""
        if change.error:
            return

        def record(conn: Connection) -> None:
            if store.set_change(conn, change.node_id, change.version, {"error": error}):
                _append(
                    conn,
                    EventType.NODE_STATE_FAILED,
                    change.node_id,
                    now,
                    status=change.target,
                    message=error,
                )
                audit.append(conn, _audit_of(change, AuditOutcome.FAILED, now))

        await self._db.write(record)

    # What operators say, and what holds

    async def describe(self, node_id: str, patch: NodePatch, *, by: Actor, now: Instant) -> None:
        """Change a node's display name, note and labels (N2).

        Raises:
            GameNodeError: NODE_NOT_FOUND; INVALID_REQUEST for a label that the host owns, or that
                is none.
        """
        _check_labels(patch.labels)

        def record(conn: Connection) -> None:
            row = store.lock(conn, node_id)
            if row is None:
                raise not_found(node_id)
            labels = {key: value for key, value in row.labels.items() if key not in patch.labels}
            labels.update({key: value for key, value in patch.labels.items() if value is not None})
            values: dict[str, object] = {"labels": labels}
            if patch.display_name is not None:
                values["display_name"] = patch.display_name or node_id
            if patch.note is not None:
                values["note"] = patch.note
            store.set_described(conn, node_id, values)
            changed = {
                name: str(value) for name, value in values.items() if value != getattr(row, name)
            }
            _append(conn, EventType.NODE_UPDATED, node_id, now, data={**changed, "by": by.name})
            audit.append(
                conn,
                AuditEntry(
                    at=now,
                    actor=by,
                    action="node.update",
                    target=node_id,
                    before=str({name: getattr(row, name) for name in changed}),
                    after=str(changed),
                ),
            )

        await self._db.write(record)

    async def set_conditions(
        self, node_id: str, holding: Mapping[ConditionType, str], *, now: Instant
    ) -> None:
        """Write down which conditions hold; an event for each that comes or goes (N3)."""

        def record(conn: Connection) -> None:
            node = store.get(conn, node_id)
            if node is None:
                return
            before = {condition.type for condition in node.conditions}
            for kind in before - holding.keys():
                _clear_condition(conn, node_id, kind, now)
            for kind in holding.keys() - before:
                _set_condition(conn, node_id, kind, holding[kind], now)

        await self._db.write(record)

    # Inventories

    async def update_inventory(
        self, session: Session, collection: Collection, *, now: Instant
    ) -> InventoryVersion | None:
        """Take what a node collected; None if its session is not the newest any more (P3).

        A new version is made, and an event says what changed, only if the stable content is
        another one (B4). A part that could not be collected stays as it was.

        Raises:
            GameNodeError: NODE_NOT_FOUND.
        """

        def record(conn: Connection) -> InventoryVersion | None:
            row = store.lock(conn, session.node_id)
            if row is None:
                raise not_found(session.node_id)
            if row.session_epoch != session.epoch:
                return None
            return self._take(conn, session.node_id, collection, now)

        return await self._db.write(record)

    async def inventory(
        self, node_id: str, *, version: int | None = None, at: Instant | None = None
    ) -> InventoryVersion:
        """Return a version of a node's inventory, or what was newest `at` a time, or is now.

        Raises:
            GameNodeError: NODE_NOT_FOUND; NOT_FOUND, there is no such version (any more).
        """
        return await self._db.read(lambda conn: _inventory(conn, node_id, version, at))

    async def inventory_before(self, found: InventoryVersion) -> InventoryVersion | None:
        """Return the version before `found`, None if it is the oldest that there is."""
        return await self._db.read(
            lambda conn: inventory.newest(conn, found.node_id, below=found.version)
        )

    async def inventory_versions(
        self, node_id: str, *, limit: int, before: int | None
    ) -> Sequence[InventoryVersion]:
        """Return the versions of a node's inventory, newest first, from behind `before` on."""
        return await self._db.read(
            lambda conn: inventory.versions(conn, node_id, limit=limit, before=before)
        )

    async def inventories(
        self, node_ids: Sequence[str], *, at: Instant | None, changed_since: Instant | None
    ) -> Sequence[InventoryVersion]:
        """Return the newest inventory (`at` a time) of each of some nodes, by node.

        With `changed_since`, only of those whose newest version has been there since then.
        """
        return await self._db.read(
            lambda conn: inventory.of_nodes(conn, node_ids, at=at, changed_since=changed_since)
        )

    def _take(
        self, conn: Connection, node_id: str, collection: Collection, now: Instant
    ) -> InventoryVersion:
        """Make a new version of what was collected, or find the newest one in it again."""
        last = inventory.newest(conn, node_id)
        given_hash = collection.hash or content_hash(collection.inventory)
        if last is None:
            first = _first_version(node_id, collection, now)
            inventory.add(conn, first, given_hash=given_hash)
            return first
        failed = frozenset(failure.part for failure in collection.failed)
        current = with_parts_of(collection.inventory, last.inventory, failed)
        seen = replace(
            last,
            seen_at=now,
            hash=content_hash(current),
            inventory=current,
            failed=collection.failed,
        )
        # A later program may hash the same content otherwise; only the difference decides.
        changes = diff(last.inventory, current) if seen.hash != last.hash else ()
        if not changes:
            inventory.refresh(conn, seen, given_hash=given_hash)
            return seen
        told_max = self._inventories.changes_told_max
        changed = replace(
            seen,
            version=last.version + 1,
            # A node's clock may be off; no version began in the future, or before the last one.
            collected_at=max(last.collected_at, min(collection.collected_at, now)),
            summary=_summary(changes, told_max),
        )
        inventory.add(conn, changed, given_hash=given_hash)
        inventory.trim(conn, node_id, up_to=changed.version - self._inventories.versions_max)
        _append(
            conn,
            EventType.NODE_INVENTORY_CHANGED,
            node_id,
            now,
            message=changed.summary,
            data={
                "from": str(last.version),
                "to": str(changed.version),
                "count": str(len(changes)),
                "changes": json.dumps([_told(change) for change in changes[:told_max]]),
            },
        )
        # It holds until the parts are back, or until the node is changed otherwise.
        _clear_condition(conn, node_id, ConditionType.INVENTORY_SHRANK, now)
        if lost := [change for change in changes if is_loss(change)]:
            reason = f"version {changed.version}: {_summary(lost, told_max)}"
            _set_condition(conn, node_id, ConditionType.INVENTORY_SHRANK, reason, now)
        return changed


def _set_condition(
    conn: Connection, node_id: str, kind: ConditionType, reason: str, now: Instant
) -> None:
    store.set_condition(conn, node_id, kind, reason, now=now)
    _append(
        conn,
        EventType.NODE_CONDITION,
        node_id,
        now,
        status="holds",
        message=reason,
        data={"type": kind},
    )


def _clear_condition(conn: Connection, node_id: str, kind: ConditionType, now: Instant) -> None:
    if store.clear_condition(conn, node_id, kind):
        _append(
            conn,
            EventType.NODE_CONDITION,
            node_id,
            now,
            status="cleared",
            message=f"{kind} is over",
            data={"type": kind},
        )


def remove_node(conn: Connection, node_id: str, *, by: Actor, reason: str, now: Instant) -> None:
    """Remove a node, within the transaction of a service that knows that nothing runs on it (N1).

    Raises:
        GameNodeError: NODE_NOT_FOUND.
    """
    row = store.lock(conn, node_id)
    if row is None:
        raise not_found(node_id)
    store.remove(conn, node_id, epoch=row.session_epoch, by=by.name, now=now)
    _append(conn, EventType.NODE_REMOVED, node_id, now, message=reason, data={"by": by.name})
    audit.append(
        conn,
        AuditEntry(at=now, actor=by, action="node.remove", target=node_id, reason=reason),
    )


def fence(
    conn: Connection, node_id: str, *, session_id: str, by: Actor, reason: str, now: Instant
) -> bool:
    """Take an operator's word that a host is dead; False if it was taken before (RA1).

    From here the node has a session that nobody holds, and what registers under its id continues
    nothing. The condition lasts until it does.

    Raises:
        GameNodeError: NODE_NOT_FOUND; CONFLICT while the node is online.
    """
    row = store.lock(conn, node_id)
    if row is None:
        raise not_found(node_id)
    if row.online:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"node {node_id} is online, and only a host that is dead can be fenced",
            hint=f"to end what runs on it: gamenode nodes disable {node_id}",
        )
    if store.holds(conn, node_id, ConditionType.FENCED):
        return False
    store.supersede(conn, node_id, session_id=session_id, epoch=row.session_epoch + 1)
    _set_condition(conn, node_id, ConditionType.FENCED, reason, now)
    _append(
        conn,
        EventType.NODE_FENCED,
        node_id,
        now,
        status="fenced",
        message=reason,
        data={"by": by.name},
    )
    audit.append(
        conn,
        AuditEntry(at=now, actor=by, action="node.fence", target=node_id, reason=reason),
    )
    return True


def is_away(conn: Connection, node_id: str) -> bool:
    """Return whether a node is known and not online."""
    row = store.lock(conn, node_id)
    return row is not None and not row.online


def _inventory(
    conn: Connection, node_id: str, version: int | None, at: Instant | None
) -> InventoryVersion:
    if version is None:
        found = inventory.newest(conn, node_id, at=at)
    else:
        found = inventory.get(conn, node_id, version)
    if found is not None:
        return found
    kept = inventory.newest(conn, node_id)
    if kept is None:
        raise not_found(node_id)
    what = f"no version {version}" if version is not None else "none from that time"
    raise GameNodeError(
        ErrorCode.NOT_FOUND,
        f"node {node_id} has {what} of its inventory; the newest is {kept.version}",
        hint=f"gamenode inventory versions {node_id} lists what is kept",
    )


def _first_version(node_id: str, collection: Collection, now: Instant) -> InventoryVersion:
    return InventoryVersion(
        node_id=node_id,
        version=1,
        collected_at=min(collection.collected_at, now),
        seen_at=now,
        hash=content_hash(collection.inventory),
        inventory=collection.inventory,
        failed=collection.failed,
        summary="",
    )


def _summary(changes: Sequence[Change], told_max: int) -> str:
    told = "; ".join(_cut(describe(change)) for change in changes[:told_max])
    rest = len(changes) - told_max
    return f"{told}; and {rest} more" if rest > 0 else told


def _told(change: Change) -> dict[str, str]:
    return {"op": change.op, "path": _cut(change.path), "text": _cut(describe(change))}


def _cut(text: str) -> str:
    return text if len(text) <= _TOLD_LENGTH_MAX else text[: _TOLD_LENGTH_MAX - 1] + "…"


def _check_labels(labels: Mapping[str, str | None]) -> None:
    problems = []
    for key, value in labels.items():
        if key.startswith("host/"):
            problems.append(Violation(field=f"labels.{key}", reason="is set by the host itself"))
        elif not _LABEL.fullmatch(key):
            problems.append(
                Violation(
                    field=f"labels.{key}",
                    reason="is no label",
                    advice="use 1 to 63 letters, digits, dots, dashes, underscores and slashes",
                )
            )
        elif value is not None and (len(value) > _LABEL_LENGTH_MAX or not value.isprintable()):
            problems.append(
                Violation(
                    field=f"labels.{key}",
                    reason=f"must be at most {_LABEL_LENGTH_MAX} printable characters",
                )
            )
    if len(labels) > _LABELS_MAX:
        problems.append(Violation(field="labels", reason=f"more than {_LABELS_MAX} at once"))
    if problems:
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            "; ".join(f"{problem.field} {problem.reason}" for problem in problems),
            violations=problems,
        )


def _record_change(
    conn: Connection,
    node_id: str,
    target: Maintenance,
    *,
    sources: frozenset[Maintenance],
    before: str,
    drain: Drain | None,
    by: Actor,
    reason: str,
    now: Instant,
    end_running: bool = False,
) -> StateChange:
    version = store.set_maintenance(conn, node_id, target, sources=sources)
    if version is None:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"node {node_id} is {before} and cannot become {target}",
            hint="a disabled node becomes normal first" if before == "disabled" else "",
        )
    change = StateChange(
        node_id=node_id,
        version=version,
        target=target,
        reason=reason,
        requested_by=by.name,
        requested_at=now,
        pushed_at=None,
        confirmed_at=None,
        remaining=None,
        error="",
        draining=drain is not None,
        drain=drain or Drain(),
        end_running=end_running,
    )
    store.insert_change(conn, change)
    _append(
        conn,
        EventType.NODE_STATE_REQUESTED,
        node_id,
        now,
        status=target,
        message=reason,
        data={"by": by.name, "before": before, "version": str(version)},
    )
    audit.append(
        conn,
        AuditEntry(
            at=now,
            actor=by,
            action="node.state",
            target=node_id,
            reason=reason,
            before=before,
            after=target,
        ),
    )
    return change


def _audit_of(change: StateChange, outcome: AuditOutcome, now: Instant) -> AuditEntry:
    agent = Actor(kind=ActorKind.NODE, name=change.node_id, role=Role.NODE)
    return AuditEntry(
        at=now,
        actor=agent if outcome is AuditOutcome.CONFIRMED else SYSTEM,
        action="node.state",
        target=change.node_id,
        reason=change.reason,
        outcome=outcome,
        after=change.target,
    )


def not_found(node_id: str) -> GameNodeError:
    """Return the error for a node that is not known."""
    return GameNodeError(
        ErrorCode.NODE_NOT_FOUND,
        f"no node {node_id}",
        hint="list the nodes: gamenode nodes list",
    )


def _append(
    conn: Connection,
    kind: EventType,
    node_id: str,
    now: Instant,
    *,
    status: str = "",
    message: str = "",
    data: Mapping[str, str] | None = None,
) -> None:
    events.append(
        conn,
        NewEvent(
            type=kind, at=now, node_id=node_id, status=status, message=message, data=data or {}
        ),
    )
