"""Gives up what does not wait for its node: `on_lost: fail`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gamenode.domain.errors import GameNodeError
from gamenode.domain.event import Event, EventType
from gamenode.domain.node import Node
from gamenode.lib.clock import Clock, Instant
from gamenode.lib.tasks import Wake
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.service import GamePipelineGRPCService

_FLIPS: Final = frozenset({EventType.NODE_ONLINE, EventType.NODE_OFFLINE})


class LostPipelines:
    """Watches the nodes that are away with work that does not wait for them.

    How long one is away is measured by this process's own clock, so the count begins anew when a
    server starts: the time in which nobody could have heard a node is not held against it (P7).
    """

    def __init__(
        self,
        *,
        service: GamePipelineGRPCService,
        nodes: NodeManager,
        clock: Clock,
        fail_s: float,
        sweep_interval_s: float,
    ) -> None:
        """Give a node `fail_s` to come back; look every `sweep_interval_s`, and when one flips."""
        self._service = service
        self._nodes = nodes
        self._clock = clock
        self._fail_s = fail_s
        self._sweep_interval_s = sweep_interval_s
        self._wake = Wake()
        self._away: dict[str, tuple[Instant | None, float]] = {}
        """Since when each node is away: by its own row, and as this process saw it first."""

    def hear(self, happened: Sequence[Event]) -> None:
        """Look at once when a node comes or goes."""
        if any(event.type in _FLIPS for event in happened):
            self._wake.ring()

    async def run(self) -> None:
        """Give up until cancelled."""
        while True:
            await self.sweep()
            await self._wake.wait(self._sweep_interval_s)

    async def sweep(self) -> None:
        """End what has waited long enough for a node that is away."""
        away: dict[str, tuple[Instant | None, float]] = {}
        for node_id in await self._service.nodes_of_failing():
            node = await self._known(node_id)
            if node is None or node.online:
                continue
            before = self._away.get(node_id)
            if before is None or before[0] != node.link_since:
                before = (node.link_since, self._clock.monotonic_s())
            away[node_id] = before
            away_s = self._clock.monotonic_s() - before[1]
            if away_s >= self._fail_s:
                await self._service.give_up(
                    node_id,
                    f"node {node_id} has been offline for {away_s:.0f} s; it may still run there",
                    now=self._clock.now(),
                )
        self._away = away

    async def _known(self, node_id: str) -> Node | None:
        try:
            return await self._nodes.get(node_id)
        except GameNodeError:
            return None  # removed a moment ago, and its pipelines with it
