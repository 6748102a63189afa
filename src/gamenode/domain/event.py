"""Something that happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gamenode.lib.clock import Instant


class EventType(StrEnum):
    """What kind of thing happened."""

    NODE_REGISTERED = "node.registered"
    NODE_ONLINE = "node.online"
    NODE_OFFLINE = "node.offline"
    NODE_STATE_REQUESTED = "node.state_requested"
    NODE_STATE_CONFIRMED = "node.state_confirmed"
    NODE_STATE_FAILED = "node.state_failed"
    NODE_CONDITION = "node.condition"
    NODE_UPDATED = "node.updated"
    NODE_FENCED = "node.fenced"
    NODE_REMOVED = "node.removed"
    NODE_INVENTORY_CHANGED = "node.inventory.changed"
    PIPELINE_CREATED = "pipeline.created"
    PIPELINE_DISPATCHED = "pipeline.dispatched"
    PIPELINE_RUNNING = "pipeline.running"
    PIPELINE_COMPLETED = "pipeline.completed"
    PIPELINE_FAILED = "pipeline.failed"
    PIPELINE_RESTARTED = "pipeline.restarted"
    PIPELINE_EXTENDED = "pipeline.extended"
    PIPELINE_CANCEL_REQUESTED = "pipeline.cancel_requested"
    PIPELINE_CANCELLED = "pipeline.cancelled"
    STEP_RUNNING = "step.running"
    STEP_COMPLETED = "step.completed"
    STEP_FAILED = "step.failed"
    STEP_CANCELLED = "step.cancelled"
    ERROR_NODE = "error.node"
    ERROR_PIPELINE = "error.pipeline"
    ERROR_INTERNAL = "error.internal"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event before the commit that gives it its id (rule RC4)."""

    type: EventType
    at: Instant
    node_id: str = ""
    entity_id: str = ""
    status: str = ""
    message: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event as it is stored; ids follow commit order, so an id is a cursor."""

    id: int
    type: str
    at: Instant
    node_id: str
    entity_id: str
    status: str
    message: str
    data: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events somebody wants; an empty field asks for all."""

    types: frozenset[str] = frozenset()
    """Whole types, or families ending in a dot, such as `pipeline.`."""
    node_id: str = ""
    entity_id: str = ""

    def matches(self, event: Event) -> bool:
        """Return whether `event` is wanted."""
        if self.node_id and event.node_id != self.node_id:
            return False
        # A pipeline's steps belong to it: "<pipeline>/<step>".
        if self.entity_id and not f"{event.entity_id}/".startswith(f"{self.entity_id}/"):
            return False
        return not self.types or any(
            event.type == wanted or (wanted.endswith(".") and event.type.startswith(wanted))
            for wanted in self.types
        )
