"""A node: a host that runs our agent (or a client that speaks for one)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from gamenode.domain.inventory import CollectionFailure, Inventory
from gamenode.lib.clock import Instant


class NodeType(StrEnum):
    """What kind of machine a node is."""

    PHYSICAL = "physical"
    VIRTUAL = "virtual"
    CONTAINER = "container"


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


class Link(StrEnum):
    """How the server reaches a node right now (C7)."""

    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a Register opened: who speaks, under which durable number (rule RL3)."""

    node_id: str
    session_id: str
    epoch: int


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
    superseded: Session | None
    """The session that this one replaces, which must be told so."""


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
    labels: Mapping[str, str]
    note: str
    inventory: Inventory
    registered_at: Instant

    @property
    def simple(self) -> bool:
        """Whether the node registered without the fields that fence (rule RL4)."""
        return not self.boot_id
