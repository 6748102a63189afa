"""What the HTTP edge needs of the server's nouns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gamenode.domain.access import Actor
from gamenode.domain.event import Event, EventFilter
from gamenode.domain.log import LogKey, LogSlice
from gamenode.domain.node import Drain, Maintenance, Node, NodePatch, StateChange
from gamenode.domain.pipeline import NewPipeline, Pipeline, Status
from gamenode.domain.selector import Selector
from gamenode.lib.clock import Instant
from gamenode.server.logs.streamer import From


class PipelineManager(Protocol):
    """What pipelines do."""

    async def create(self, request: NewPipeline, *, by: Actor) -> Pipeline:
        """Create a pipeline; the same idempotency key and values again return the first one."""

    async def cancel(self, pipeline_id: str, *, reason: str, force: bool, by: Actor) -> Pipeline:
        """Ask for a pipeline's end; return it as it is then."""

    async def remove_node(self, node_id: str, *, force: bool, reason: str, by: Actor) -> None:
        """Remove a node that runs nothing, or with `force` any."""

    async def wait_ended(self, pipeline_id: str, timeout_s: float) -> Pipeline:
        """Return a pipeline once it has ended, or as it is after `timeout_s`."""


class PipelineService(Protocol):
    """The record of pipelines."""

    async def loads(self) -> Mapping[str, int]:
        """Return how many pipelines are bound to each node and have not ended."""

    async def get(self, pipeline_id: str) -> Pipeline:
        """Return a pipeline, or raise PIPELINE_NOT_FOUND."""

    async def list(
        self,
        *,
        status: Status | None,
        node: str,
        q: str,
        limit: int,
        before: tuple[Instant, str] | None,
    ) -> Sequence[Pipeline]:
        """Return pipelines, newest first, that were created before the one that is named."""


class NodeManager(Protocol):
    """Nodes, with their liveness as it is now."""

    async def get(self, node_id: str) -> Node:
        """Return a node, or raise NODE_NOT_FOUND."""

    async def list(
        self,
        *,
        online: bool | None,
        maintenance: Maintenance | None,
        selector: Selector,
        q: str,
        limit: int,
        after: str,
    ) -> Sequence[Node]:
        """Return nodes by their ids, from behind `after` on."""

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
        """Want a node's state; wait for its agent's confirmation for a while."""

    async def describe(self, node_id: str, patch: NodePatch, *, by: Actor) -> Node:
        """Change a node's display name, note and labels."""

    async def state_changes(self, node_id: str, *, limit: int) -> Sequence[StateChange]:
        """Return a node's state changes, newest first."""


class LogManager(Protocol):
    """Logs, as the bytes that are stored: CRI lines."""

    async def open(self, pipeline_id: str, step: str, attempt: int) -> LogKey:
        """Return which log that is (attempt 0: the newest), or raise ..._NOT_FOUND."""

    async def start(self, key: LogKey, start: From) -> int:
        """Return the offset that `start` means, or raise INVALID_REQUEST."""

    def read(self, key: LogKey, start: From, *, follow: bool) -> AsyncIterator[LogSlice]:
        """Yield whole lines as they are stored; with `follow`, until the log has ended."""


class EventLog(Protocol):
    """The stored events, and those to come."""

    async def read_after(
        self,
        after: int | None,
        *,
        wanted: EventFilter,
        limit: int,
    ) -> Sequence[Event]:
        """Return stored events behind `after` (None: from the oldest), or raise CURSOR_EXPIRED."""

    def follow(
        self,
        after: int | None,
        wanted: EventFilter,
    ) -> AsyncIterator[Sequence[Event]]:
        """Yield events behind `after` (None: from now on) as they come, in batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nouns:
    """Everything that the HTTP edge speaks for."""

    pipeline_manager: PipelineManager
    pipeline_service: PipelineService
    nodes: NodeManager
    logs: LogManager
    events: EventLog
    why_not_ready: Callable[[], str]
    """Says why this server takes no work; empty when it does."""
