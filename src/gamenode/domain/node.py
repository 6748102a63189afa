"""A node: a host that runs our agent (or a client that speaks for one)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from gamenode.domain.container import PortRange
from gamenode.domain.inventory import CollectionFailure, Inventory
from gamenode.lib.clock import Instant

GPU_SLOTS_MAX: Final = 64
"""As many a GPU has at most."""


class NodeType(StrEnum):
    """What kind of machine a node is."""

    PHYSICAL = "physical"
    VIRTUAL = "virtual"
    CONTAINER = "container"


def node_id_of(host_name: str) -> str:
    """Return the node id that a host has unless it is given another."""
    return re.sub(r"[^a-z0-9.-]", "-", host_name.lower()).strip("-.")[:63] or "node"


class Maintenance(StrEnum):
    """What a node may be used for."""

    NORMAL = "normal"
    MAINTENANCE = "maintenance"  # nothing new starts; what runs goes on
    DISABLED = "disabled"  # nothing runs; heartbeats only


MAINTENANCE_TRANSITIONS: Final[Mapping[Maintenance, frozenset[Maintenance]]] = {
    Maintenance.NORMAL: frozenset({Maintenance.MAINTENANCE, Maintenance.DISABLED}),
    Maintenance.MAINTENANCE: frozenset({Maintenance.NORMAL, Maintenance.DISABLED}),
    Maintenance.DISABLED: frozenset({Maintenance.NORMAL}),
}


def sources_of(target: Maintenance) -> frozenset[Maintenance]:
    """Return the states from which a node may enter `target`; SQL guards use it too."""
    return frozenset(s for s, targets in MAINTENANCE_TRANSITIONS.items() if target in targets)


def usable_as(wanted: Maintenance, *, confirmed: bool) -> Maintenance:
    """Return what a node can be used for now: work only once it has said that it takes some again.

    Until its agent has heard that it is enabled, it refuses (rule RM1).
    """
    if wanted is Maintenance.NORMAL and not confirmed:
        return Maintenance.MAINTENANCE
    return wanted


class DrainThen(StrEnum):
    """What happens to what still runs when a drain's deadline has passed (E7)."""

    KEEP = "keep"
    END = "end"
    DISABLE = "disable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """How a node is emptied: until when, what then, and when it works again by itself."""

    deadline_at: Instant | None = None
    then: DrainThen = DrainThen.KEEP
    until: Instant | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChange:
    """One change of what a node may be used for: wanted, pushed, confirmed (E1)."""

    node_id: str
    version: int
    target: Maintenance
    reason: str
    requested_by: str
    requested_at: Instant
    pushed_at: Instant | None
    confirmed_at: Instant | None
    remaining: int | None
    """How many pipelines went on when the agent confirmed."""
    error: str
    draining: bool
    drain: Drain
    end_running: bool


class Link(StrEnum):
    """How the server reaches a node right now (C7)."""

    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    LOST = "lost"


class ConditionType(StrEnum):
    """What an operator should know of a node (N3)."""

    ENGINE_DOWN = "ENGINE_DOWN"
    DISK_PRESSURE = "DISK_PRESSURE"
    INODE_PRESSURE = "INODE_PRESSURE"
    GPU_ERRORS = "GPU_ERRORS"
    CLOCK_SKEW = "CLOCK_SKEW"
    CLOCK_JUMP = "CLOCK_JUMP"
    AGENT_TOO_OLD = "AGENT_TOO_OLD"
    INVENTORY_SHRANK = "INVENTORY_SHRANK"
    DUPLICATE_IDENTITY = "DUPLICATE_IDENTITY"
    FENCED = "FENCED"


BLOCKING: Final = frozenset(
    {
        ConditionType.ENGINE_DOWN,
        ConditionType.DISK_PRESSURE,
        ConditionType.INODE_PRESSURE,
        ConditionType.GPU_ERRORS,
        ConditionType.AGENT_TOO_OLD,
        ConditionType.DUPLICATE_IDENTITY,
        ConditionType.FENCED,
    }
)
"""Conditions under which nothing new is placed on a node."""

OF_THE_AGENT: Final = frozenset(
    {
        ConditionType.ENGINE_DOWN,
        ConditionType.DISK_PRESSURE,
        ConditionType.INODE_PRESSURE,
        ConditionType.GPU_ERRORS,
        ConditionType.CLOCK_JUMP,
    }
)
"""Conditions that an agent sees and says with each heartbeat; the server sees the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Something about a node, since when, and why."""

    type: ConditionType
    since: Instant
    reason: str

    @property
    def blocks_placement(self) -> bool:
        """Whether nothing new is placed on the node meanwhile."""
        return self.type in BLOCKING


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePatch:
    """What an operator changes of a node; None leaves a field as it is (N2)."""

    display_name: str | None = None
    note: str | None = None
    labels: Mapping[str, str | None] = field(default_factory=dict)
    """Labels to set; None removes one."""


EPOCHS_PER_GENERATION: Final = 1 << 32
"""A session's epoch counts below its database's generation, so a restored one never repeats any."""


def generation_of(epoch: int) -> int:
    """Return the generation of the server's database in which a session was opened (rule RC6)."""
    return epoch // EPOCHS_PER_GENERATION


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a Register opened: who speaks, under which durable number (rule RL3)."""

    node_id: str
    session_id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a node gives out of itself, beyond what its inventory shows."""

    gpu_slots: int = 1
    """How many pipelines may share a GPU."""
    gpu_slots_by_id: Mapping[str, int] = field(default_factory=dict)
    """The same for single GPUs, by their UUID; 0: it is not given out."""
    ports: PortRange | None = None
    """The host ports for who names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a node says of itself when it registers (A1)."""

    node_id: str
    type: NodeType
    inventory: Inventory
    last_session_epoch: int | None = None
    """The newest session that the agent's journal knows; `None` where it knows none."""
    boot_id: str = ""
    """Empty: a simple client, which gets no second attempt of a step (rule RL4)."""
    agent_version: str = ""
    env_names: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    step_runtimes: frozenset[str] = frozenset()
    offer: Offer = field(default_factory=Offer)
    failed: tuple[CollectionFailure, ...] = ()
    """Parts of the inventory that could not be collected."""
    inventory_hash: str = ""
    """The hash of the inventory's stable content as the node computed it; empty: not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationOutcome:
    """What a registration led to."""

    session: Session
    maintenance: Maintenance
    state_version: int
    continuation: bool
    """Whether the session named in the registration goes on (rule RL3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationAnswer:
    """What a node is told about its registration (A4)."""

    accepted: bool
    message: str
    maintenance: Maintenance
    session_id: str
    session_epoch: int
    continuation: bool
    state_version: int
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    log_chunk_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A sign of life (C1)."""

    node_id: str
    session_id: str = ""
    sent_at: Instant | None = None
    round_trip_s: float | None = None
    conditions: Mapping[ConditionType, str] = field(default_factory=dict)
    """What holds on the node now, and why."""
    inventory_hash: str = ""
    """The hash of the inventory that the node reported last; empty: not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatResult:
    """Whether a heartbeat counted; if not, the node registers again (C5)."""

    counted: bool
    message: str = ""
    maintenance: Maintenance = Maintenance.NORMAL
    state_version: int = 0
    send_inventory: bool = False
    """The server holds another inventory: the node sends its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as the server knows it; its liveness is as of the last flip."""

    id: str
    display_name: str
    type: NodeType
    maintenance: Maintenance
    state_version: int
    state_change: StateChange | None
    """The newest change; None for a node that was never changed."""
    online: bool
    online_since: Instant | None
    last_heartbeat_at: Instant | None
    link: Link
    link_since: Instant | None
    link_cause: str
    session_id: str
    session_epoch: int
    boot_id: str
    agent_version: str
    env_names: frozenset[str]
    step_runtimes: frozenset[str]
    offer: Offer
    labels: Mapping[str, str]
    note: str
    conditions: tuple[Condition, ...]
    inventory: Inventory
    inventory_version: int
    inventory_hash: str
    """Of what the node reported last, as it computed it itself."""
    registered_at: Instant
    heartbeat_latency_s: float | None = None
    """The last round trip that the agent measured."""
    clock_skew_s: float | None = None
    """How far the node's clock is ahead of the server's."""

    @property
    def usable_as(self) -> Maintenance:
        """What it can be used for now."""
        change = self.state_change
        confirmed = change is None or change.confirmed_at is not None
        return usable_as(self.maintenance, confirmed=confirmed)

    @property
    def simple(self) -> bool:
        """Whether the node registered without the fields that fence (rule RL4)."""
        return not self.boot_id
