"""Nodes while they live: sessions, heartbeats, streams, and the judgement of who is offline."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from gamenode.domain.access import Actor
from gamenode.domain.command import Closed, CloseReason, Statement
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.inventory import Collection, CollectionFailure, Inventory, with_parts_of
from gamenode.domain.node import (
    OF_THE_AGENT,
    ConditionType,
    Drain,
    Heartbeat,
    HeartbeatResult,
    Link,
    Maintenance,
    Node,
    NodePatch,
    NodeType,
    Registration,
    RegistrationAnswer,
    Session,
    StateChange,
)
from gamenode.domain.placement import Candidate, Capacity, Reserved, capacity_of
from gamenode.domain.registration import refusal
from gamenode.domain.selector import Lookup, Selector
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock, ClockWatch, Instant
from gamenode.lib.ids import Ids
from gamenode.server.nodes.connections import AgentConnection, ConnectionManager, Liveness
from gamenode.server.nodes.inventories import InventoryKeeper
from gamenode.server.nodes.service import (
    GameNodeService,
    InventorySettings,
    not_found,
    values_of,
)
from gamenode.server.nodes.states import StateKeeper, StateSettings

_log = logging.getLogger(__name__)
_SAID_BY_HEARTBEATS: Final = OF_THE_AGENT | {
    ConditionType.CLOCK_SKEW,
    ConditionType.AGENT_TOO_OLD,
    ConditionType.DUPLICATE_IDENTITY,
}
"""Conditions that a heartbeat says or ends; what does not hold with the next one is over."""
_NOTHING_RESERVED: Final = Reserved()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Intervals and bounds of nodes (C2)."""

    heartbeat_interval_s: float = 15.0
    """What agents are told: how often to send one."""
    heartbeat_timeout_s: float = 45.0
    """A node is offline this long after its last accepted one (P7)."""
    reconnect_grace_s: float = 5.0
    """How long a node stays online after its connection broke."""
    judge_interval_s: float = 1.0
    """How often it is looked who has fallen silent."""
    stall_s: float = 2.0
    """A loop that was late by more has not judged fairly: what arrived meanwhile comes first."""
    flush_interval_s: float = 5.0
    """How often the last heartbeats are written down."""
    words_max: int = 10_000
    """How many words may wait for an agent that does not read."""
    pipelines_per_node_max: int = 256
    """A node that has as many takes no more."""
    clock_skew_s_max: float = 5.0
    """A node whose clock is further off has the condition CLOCK_SKEW."""
    duplicate_hold_s: float = 60.0
    """How long a node has the condition DUPLICATE_IDENTITY after the last registration of another
    host under its id; agents come back sooner than that."""
    agent_version_min: str = "0.1.0"
    """A node whose agent is older has the condition AGENT_TOO_OLD."""


class NodeManager:
    """Registers nodes, hears them, and says when one is not heard any more (L3)."""

    def __init__(
        self,
        *,
        service: GameNodeService,
        clock: Clock,
        clock_watch: ClockWatch,
        ids: Ids,
        settings: NodeSettings,
        states: StateSettings,
        inventories: InventorySettings,
        log_chunk_bytes_max: int,
    ) -> None:
        """Know nobody until `load`. Agents are told how long a chunk of a log may be."""
        self._service = service
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._connections = ConnectionManager(
            clock=clock,
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
            reconnect_grace_s=settings.reconnect_grace_s,
        )
        self.states = StateKeeper(
            service=service,
            connections=self._connections,
            refresh=self._refresh,
            clock=clock,
            clock_watch=clock_watch,
            settings=states,
        )
        self._nodes: dict[str, Node] = {}
        self._log_chunk_bytes_max = log_chunk_bytes_max
        self._collection_retry_after_s = inventories.retry_after_s
        self.inventories = InventoryKeeper(
            service=service,
            connections=self._connections,
            nodes=self._nodes,
            clock=clock,
            settings=inventories,
        )
        self._values: dict[str, dict[str, tuple[str, ...]]] = {}
        self._capacities: dict[str, Capacity] = {}
        self._changed: list[Callable[[], None]] = []
        self._closed: Closed | None = None

    async def load(self) -> None:
        """Read every node; whoever was online gets the whole timeout from now (C6, P7)."""
        for node in await self._service.every():
            self._remember(node)
            if node.online:
                self._connections.heard(_session(node))

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever a node may have become able to take work."""
        self._changed.append(callback)

    # Signs of life

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Register a node and open a session (A).

        Raises:
            GameNodeError: CONFLICT if another host speaks for this node id right now.
        """
        node_id = registration.node_id
        standing = self._connections.alive(node_id)
        if standing is not None and self._is_another_host(standing, registration):
            await self._note_duplicate(standing, registration.boot_id)
            raise GameNodeError(
                ErrorCode.CONFLICT,
                f"another host is connected as node {node_id}",
                hint="give each host its own node id; a cloned data folder must not be used twice",
                retry_after_s=self._settings.heartbeat_timeout_s,
            )
        now = self._clock.now()
        outcome = await self._service.register(registration, session_id=self._ids.new(), now=now)
        self._remember(await self._service.get(node_id))
        # A later registration may have been faster; then nothing is heard of this one any more.
        if self._is_current(outcome.session):
            before = self._connections.get(node_id)
            self._connections.heard(outcome.session)
            if before is not None and before.connection is not None:
                before.connection.close(
                    Closed(reason=CloseReason.SUPERSEDED, message="the node registered again")
                )
        self._announce()
        disabled = outcome.maintenance is Maintenance.DISABLED
        return RegistrationAnswer(
            accepted=not disabled,
            message=(
                f"node {node_id} is disabled: it gets no work until it is enabled again"
                if disabled
                else f"welcome, {node_id}"
            ),
            maintenance=outcome.maintenance,
            session_id=outcome.session.session_id,
            session_epoch=outcome.session.epoch,
            continuation=outcome.continuation,
            state_version=outcome.state_version,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            heartbeat_timeout_s=self._settings.heartbeat_timeout_s,
            log_chunk_bytes_max=self._log_chunk_bytes_max,
        )

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatResult:
        """Count a heartbeat of the newest session; any other must register again (C5).

        Raises:
            GameNodeError: NODE_NOT_FOUND.
        """
        node = self._nodes.get(beat.node_id)
        if node is None:
            raise not_found(beat.node_id)
        if not self._is_newest(node, beat.session_id):
            return HeartbeatResult(
                counted=False, message="the session is unknown or superseded: register again"
            )
        known = self._connections.heard(_session(node), online=node.online)
        known.round_trip_s = beat.round_trip_s
        clock_skew_s = _note_skew(known, beat)
        if not known.online:
            await self._set_online(known, "heartbeat")
        change = node.state_change
        try:
            await self._note_conditions(node, known, beat.conditions, clock_skew_s)
            if node.simple and change is not None and change.confirmed_at is None:
                await self.states.seen(change)
        except GameNodeError as error:
            # The next heartbeat says it again, and this one counts all the same (RL5).
            _log.warning(
                "what came with a heartbeat was not written down: %s",
                error,
                extra={"event": "node.heartbeat_unwritten", "node_id": node.id},
            )
        return HeartbeatResult(
            counted=True,
            maintenance=node.maintenance,
            state_version=node.state_version,
            send_inventory=beat.inventory_hash not in ("", node.inventory_hash),
        )

    def session_of(self, node_id: str, session_id: str) -> Session | None:
        """Return the session if it is its node's newest, else None.

        An empty session id stands for the newest one of a simple client (rule RL4).
        """
        node = self._nodes.get(node_id)
        if node is None or not self._is_newest(node, session_id):
            return None
        return _session(node)

    # Streams

    async def attach(self, statement: Statement) -> AgentConnection | None:
        """Take a stream for the node's own; None for one of a session that must register again.

        The stream is used for nothing before the statement is reconciled (rule RL1).
        """
        session = self.session_of(statement.node_id, statement.session_id)
        if session is None or not statement.session_id:
            return None
        node = self._nodes[statement.node_id]
        connection = AgentConnection(
            session=session,
            stream_number=statement.stream_number,
            boot_id=statement.boot_id,
            words_max=self._settings.words_max,
        )
        known = self._connections.attach(connection, online=node.online)
        if known is None:
            return None
        if self._closed is not None:
            connection.close(self._closed)
        try:
            if not known.online:
                await self._set_online(known, "reconnected")
            await self._set_link(connection, Link.CONNECTED, "connected")
        except BaseException:
            # Its caller does not know it yet, so nobody else would note that it ended.
            self._connections.detach(connection)
            raise
        return connection

    async def hear_state(self, session: Session, state_version: int) -> None:
        """Hear which maintenance state an agent obeys; where it has lost the newest, tell it again.

        Raises:
            GameNodeError: it could not be written down.
        """
        node = self._nodes.get(session.node_id)
        if node is None or node.state_change is None or state_version >= node.state_version:
            return
        if not await self._service.obeys(session, state_version):
            await self._refresh(session.node_id)

    def opened(self) -> None:
        """Say that a stream was reconciled: its node can take work from now on."""
        self._announce()
        self.states.wake()

    async def detach(self, connection: AgentConnection, cause: str) -> None:
        """Note that a stream ended; its node has the reconnect grace from now."""
        if self._connections.detach(connection):
            await self._set_link(connection, Link.RECONNECTING, cause)

    async def goodbye(self, connection: AgentConnection, reason: str) -> None:
        """Take a node offline at once: it said that it leaves."""
        if not self._connections.detach(connection):
            return
        known = self._connections.get(connection.node_id)
        if known is not None:
            await self._set_offline(known, f"goodbye: {reason}" if reason else "goodbye")

    def connection(self, node_id: str) -> AgentConnection | None:
        """Return the stream of a node, if orders can be sent on it."""
        return self._connections.connection(node_id)

    def close_all(self, closed: Closed) -> None:
        """End every stream, and every one to come, with a word that says why."""
        self._closed = closed
        for _, known in self._connections.every():
            if known.connection is not None:
                known.connection.close(closed)

    # Maintenance

    async def change_state(
        self,
        node_id: str,
        target: Maintenance,
        *,
        drain: Drain | None,
        by: Actor,
        reason: str,
        wait_s: float = 0.0,
    ) -> Node:
        """Want a node's maintenance state, and wait for its agent's confirmation for a while (E).

        Raises:
            GameNodeError: NODE_NOT_FOUND; CONFLICT, a change that E2 does not allow.
        """
        change = await self._service.change_state(
            node_id, target, drain=drain, by=by, reason=reason, now=self._clock.now()
        )
        await self._refresh(node_id)
        self.states.wake()
        if change is not None and wait_s > 0:
            await self.states.wait_confirmed(node_id, change.version, wait_s)
        return await self.get(node_id)

    async def describe(self, node_id: str, patch: NodePatch, *, by: Actor) -> Node:
        """Change a node's display name, note and labels (N2)."""
        await self._service.describe(node_id, patch, by=by, now=self._clock.now())
        await self._refresh(node_id)
        return await self.get(node_id)

    def forget(self, node_id: str, reason: str) -> None:
        """Let go of a node that was removed; its agent is told so and does not come back."""
        known = self._connections.drop(node_id)
        self._nodes.pop(node_id, None)
        self._values.pop(node_id, None)
        self._capacities.pop(node_id, None)
        if known is not None and known.connection is not None:
            known.connection.close(Closed(reason=CloseReason.REGISTER_AGAIN, message=reason))

    async def fenced(self, node_id: str) -> Node:
        """Take over that a node was fenced: of its session before that nothing counts."""
        await self._refresh(node_id)
        node = await self.get(node_id)
        known = self._connections.get(node_id)
        if known is not None and known.session.epoch < node.session_epoch:
            self._connections.drop(node_id)
            if known.connection is not None:
                known.connection.close(
                    Closed(reason=CloseReason.SUPERSEDED, message="the node was fenced")
                )
        return node

    async def state_changes(self, node_id: str, *, limit: int) -> Sequence[StateChange]:
        """Return a node's newest state changes, newest first.

        Raises:
            GameNodeError: NODE_NOT_FOUND.
        """
        await self.get(node_id)
        return await self._service.state_changes(node_id, limit)

    async def _refresh(self, node_id: str) -> None:
        self._remember(await self._service.get(node_id))
        self._announce()

    # Loops

    async def judge(self) -> None:
        """Once a second: take for offline whoever was silent for too long (P7, P8)."""
        last_s = self._clock.monotonic_s()
        while True:
            await asyncio.sleep(self._settings.judge_interval_s)
            late_s = self._clock.monotonic_s() - last_s - self._settings.judge_interval_s
            last_s = self._clock.monotonic_s()
            if late_s > self._settings.stall_s:
                _log.warning("the loop stalled", extra={"event": "loop.stalled", "late_s": late_s})
                continue
            await self.judge_once()

    async def judge_once(self) -> None:
        """Take for offline whoever was silent for too long by now."""
        silent = self._connections.silent()
        # All together: one after the other, the last would be judged by what is long past.
        await asyncio.gather(*(self._set_offline(known, cause) for _, known, cause in silent))
        for _, known, _ in silent:
            if not known.online and known.connection is not None:
                # It may stand for hours after its host has lost its power.
                known.connection.close(
                    Closed(reason=CloseReason.PROTOCOL, message="no heartbeat came on it")
                )

    async def flush(self) -> None:
        """Every few seconds: write down when nodes were last heard."""
        while True:
            await asyncio.sleep(self._settings.flush_interval_s)
            beats = []
            for node_id, known in self._connections.every():
                if known.flushed_at != known.heard_at:
                    known.flushed_at = known.heard_at
                    beats.append((node_id, known.heard_at))
            if beats:
                await self._service.set_last_heartbeats(beats)

    # Queries

    async def get(self, node_id: str) -> Node:
        """Return a node, as fresh as memory knows it.

        Raises:
            GameNodeError: NODE_NOT_FOUND.
        """
        node = self._nodes.get(node_id)
        if node is None:
            raise not_found(node_id)
        return self._fresh(node)

    async def list(
        self,
        *,
        online: bool | None = None,
        maintenance: Maintenance | None = None,
        selector: Selector,
        q: str = "",
        limit: int,
        after: str = "",
    ) -> list[Node]:
        """Return nodes by id, from `after` on."""
        found = []
        for node_id in sorted(self._nodes):
            node = self._nodes[node_id]
            values = self._values[node_id]
            if (
                node_id > after
                and (online is None or node.online is online)
                and (maintenance is None or node.maintenance is maintenance)
                and (not q or q in node_id or q in node.display_name)
                and selector.matches(_lookup(values))
            ):
                found.append(self._fresh(node))
                if len(found) == limit:
                    break
        return found

    def ids(self) -> Sequence[str]:
        """Return the id of every registered node, in order."""
        return sorted(self._nodes)

    def candidates(self, reserved: Mapping[str, Reserved]) -> Sequence[Candidate]:
        """Return what placement needs to know of every node; `reserved` is what is taken there."""
        return [
            Candidate(
                node_id=node_id,
                online=node.online,
                connected=self._connections.connection(node_id) is not None,
                simple=node.simple,
                maintenance=node.usable_as,
                conditions=tuple(c.type for c in node.conditions if c.blocks_placement),
                values=self._values[node_id],
                env_names=node.env_names,
                runtimes=node.step_runtimes,
                load_max=self._settings.pipelines_per_node_max,
                capacity=self._capacities[node_id],
                reserved=reserved.get(node_id, _NOTHING_RESERVED),
            )
            for node_id, node in self._nodes.items()
        ]

    # Inventories

    def refusal(
        self,
        node_id: str,
        inventory: Inventory,
        node_type: NodeType | None,
        failed: Sequence[CollectionFailure],
    ) -> GameNodeError | None:
        """Return why what a node says of itself is refused, or None (A2).

        A part that could not be collected is taken as it was seen before, where it was.
        """
        known = self._nodes.get(node_id)
        if known is not None:
            parts = {failure.part for failure in failed}
            inventory = with_parts_of(inventory, known.inventory, parts)
            node_type = node_type or known.type
        return refusal(inventory, node_type, failed, retry_after_s=self._collection_retry_after_s)

    async def update_resource_info(self, session: Session, collection: Collection) -> bool:
        """Take what a node collected; False if its session is not the newest any more."""
        version = await self._service.update_inventory(session, collection, now=self._clock.now())
        if version is None:
            return False
        self._remember(await self._service.get(session.node_id))
        self.inventories.collected(version)
        self._announce()
        return True

    def _is_newest(self, node: Node, session_id: str) -> bool:
        return session_id == node.session_id or (not session_id and node.simple)

    def _is_current(self, session: Session) -> bool:
        node = self._nodes.get(session.node_id)  # it may have been removed meanwhile
        return node is not None and node.session_epoch == session.epoch

    def _remember(self, node: Node) -> None:
        """Take over what was read of a node, but for what memory knows better."""
        known = self._nodes.get(node.id)
        if known is not None and known.session_epoch > node.session_epoch:
            return  # a later read was faster
        if known is not None and known.session_epoch == node.session_epoch:
            node = replace(
                node,
                online=known.online,
                online_since=known.online_since,
                link=known.link,
                link_since=known.link_since,
                link_cause=known.link_cause,
            )
        if known is not None and known.inventory_version > node.inventory_version:
            node = replace(
                node,
                inventory=known.inventory,
                inventory_version=known.inventory_version,
                inventory_hash=known.inventory_hash,
            )
        if known is not None and known.state_version > node.state_version:
            node = replace(
                node,
                maintenance=known.maintenance,
                state_version=known.state_version,
                state_change=known.state_change,
            )
        self._nodes[node.id] = node
        self._values[node.id] = values_of(node)
        self._capacities[node.id] = capacity_of(node.inventory, node.offer)

    def _fresh(self, node: Node) -> Node:
        known = self._connections.get(node.id)
        if known is None or known.session.epoch != node.session_epoch:
            return node
        return replace(
            node,
            last_heartbeat_at=known.heard_at,
            heartbeat_latency_s=known.round_trip_s,
            clock_skew_s=known.clock_skew_s,
        )

    @staticmethod
    def _is_another_host(standing: Liveness, registration: Registration) -> bool:
        """Return whether a registration is not of the host whose stream stands (rule RL3)."""
        connection = standing.connection
        return (
            connection is not None
            and bool(registration.boot_id)
            and connection.boot_id not in ("", registration.boot_id)
        )

    async def _note_duplicate(self, standing: Liveness, boot_id: str) -> None:
        """Say on the node that another host wants to be it; heartbeats end that, in time."""
        node = self._nodes[standing.session.node_id]
        standing.duplicate_s = self._clock.monotonic_s()
        if any(found.type is ConditionType.DUPLICATE_IDENTITY for found in node.conditions):
            return
        holding = {found.type: found.reason for found in node.conditions}
        holding[ConditionType.DUPLICATE_IDENTITY] = (
            f"another host (its boot is {boot_id:.64}) registers under this id and is refused:"
            " a cloned data folder, or a node id that was given twice"
        )
        try:
            await self._service.set_conditions(node.id, holding, now=self._clock.now())
            await self._refresh(node.id)
        except GameNodeError as error:
            # Refused it is all the same; it registers again, and then this is said.
            _log.warning(
                "a duplicate identity was not written down: %s",
                error,
                extra={"event": "node.duplicate_unwritten", "node_id": node.id},
            )

    async def _note_conditions(
        self,
        node: Node,
        known: Liveness,
        said: Mapping[ConditionType, str],
        clock_skew_s: float,
    ) -> None:
        """Write down what has come or gone; not one row a heartbeat."""
        holding = dict(said)
        duplicate_s = known.duplicate_s
        for condition in node.conditions:
            if (
                condition.type is ConditionType.DUPLICATE_IDENTITY
                and duplicate_s is not None
                and self._clock.monotonic_s() - duplicate_s < self._settings.duplicate_hold_s
            ):
                holding[condition.type] = condition.reason
        if abs(clock_skew_s) > self._settings.clock_skew_s_max:
            holding[ConditionType.CLOCK_SKEW] = (
                f"its clock is {clock_skew_s:+.1f} s off the server's"
            )
        needed = self._settings.agent_version_min
        if node.agent_version and _version(node.agent_version) < _version(needed):
            holding[ConditionType.AGENT_TOO_OLD] = (
                f"its agent is {node.agent_version}; {needed} is needed"
            )
        for condition in node.conditions:
            if condition.type not in _SAID_BY_HEARTBEATS:
                holding[condition.type] = condition.reason
        if holding.keys() != {condition.type for condition in node.conditions}:
            await self._service.set_conditions(node.id, holding, now=self._clock.now())
            await self._refresh(node.id)

    async def _set_online(self, known: Liveness, cause: str) -> None:
        now = self._clock.now()
        link = Link.CONNECTED if known.connection is not None else Link.LOST
        node_id = known.session.node_id
        if await self._flip(known, online=True, cause=cause, link=link, now=now):
            known.online = True
            self._patch(
                node_id,
                online=True,
                online_since=now,
                link=link,
                link_since=now,
                link_cause=cause,
            )
            if ConditionType.FENCED in {c.type for c in self._nodes[node_id].conditions}:
                await self._refresh(node_id)  # it is over
            self._announce()

    async def _set_offline(self, known: Liveness, cause: str) -> None:
        node_id = known.session.node_id
        signs, now = known.signs, self._clock.now()
        if not await self._flip(known, online=False, cause=cause, link=Link.LOST, now=now):
            return
        known.online = False
        known.broken_s = None
        self._patch(
            node_id,
            online=False,
            online_since=None,
            link=Link.LOST,
            link_since=now,
            link_cause=cause,
        )
        _log.info("node offline: %s", cause, extra={"event": "node.offline", "node_id": node_id})
        if known.signs != signs:
            # It was heard while that was being written down.
            await self._set_online(known, "heartbeat")

    async def _flip(
        self, known: Liveness, *, online: bool, cause: str, link: Link, now: Instant
    ) -> bool:
        """Write a flip down; return whether it holds for the node's newest session.

        Where that fails it is tried again at the next sign of life or judgement.
        """
        session = known.session
        try:
            await self._service.set_online(
                session.node_id,
                epoch=session.epoch,
                online=online,
                cause=cause,
                link=link,
                now=now,
            )
        except GameNodeError as error:
            _log.warning(
                "a node's flip was not written down: %s",
                error,
                extra={"event": "node.flip_unwritten", "node_id": session.node_id},
            )
            return False
        # A newer session says for itself what it is.
        return self._connections.get(session.node_id) is known and self._is_current(session)

    async def _set_link(self, connection: AgentConnection, link: Link, cause: str) -> None:
        now: Instant = self._clock.now()
        try:
            current = await self._service.set_link(
                connection.node_id,
                epoch=connection.session.epoch,
                stream_number=connection.stream_number,
                link=link,
                cause=cause,
                now=now,
            )
        except GameNodeError as error:
            # The stream of a known session needs no write to be accepted: a full disk must take
            # nobody offline (rule RL5).
            current = self._connections.is_newest(connection)
            _log.warning(
                "the link's state was not written down: %s",
                error,
                extra={"event": "node.link_unwritten", "node_id": connection.node_id},
            )
        if current and self._is_current(connection.session):
            self._patch(connection.node_id, link=link, link_since=now, link_cause=cause)

    def _patch(self, node_id: str, **changes: object) -> None:
        node = self._nodes[node_id]
        self._nodes[node_id] = replace(node, **changes)  # type: ignore[arg-type] # names are Node's
        self._values[node_id]["online"] = (str(self._nodes[node_id].online).lower(),)

    def _announce(self) -> None:
        for callback in self._changed:
            callback()


def _note_skew(known: Liveness, beat: Heartbeat) -> float:
    """Keep how far a node's clock is off; return by how much it certainly is, in seconds.

    A heartbeat that was held up on its way looks like a clock that is behind, so two in a row have
    to say it.
    """
    if beat.sent_at is None:
        return 0.0
    one_way_s = (beat.round_trip_s or 0.0) / 2
    skew_s = (beat.sent_at - known.heard_at) / NANOSECONDS_PER_S + one_way_s
    before_s, known.clock_skew_s = known.clock_skew_s, skew_s
    return skew_s if before_s is None else min(before_s, skew_s, key=abs)


@lru_cache(maxsize=256)
def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _lookup(values: Mapping[str, Sequence[str]]) -> Lookup:
    return lambda key: values.get(key, ())


def _session(node: Node) -> Session:
    return Session(node_id=node.id, session_id=node.session_id, epoch=node.session_epoch)
