"""Says where a pipeline could run, and why one is where it is (F10)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.explanation import Explanation, Survey, explain, survey
from gamenode.domain.node import Node
from gamenode.domain.pipeline import NewPipeline
from gamenode.domain.placement import Demand, decide
from gamenode.lib.clock import Clock
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.server.pipelines.service import GamePipelineGRPCService


@dataclass(frozen=True, slots=True)
class Plan:
    """What would become of a pipeline if it were created now."""

    name: str
    survey: Survey


class Planner:
    """Asks the function that places for its reasons; changes nothing."""

    def __init__(
        self,
        *,
        pipelines: PipelineManager,
        service: GamePipelineGRPCService,
        nodes: NodeManager,
        clock: Clock,
    ) -> None:
        """Look through these."""
        self._pipelines = pipelines
        self._service = service
        self._nodes = nodes
        self._clock = clock

    async def plan(self, request: NewPipeline) -> Plan:
        """Return where a pipeline would go now, and what speaks against each other node.

        Raises:
            GameNodeError: what creating it would raise: INVALID_REQUEST with everything that is
                wrong or missing; NODE_NOT_FOUND for a named node.
        """
        # On a thread: a hostile file may take its time.
        prepared = await asyncio.to_thread(self._pipelines.prepare, request)
        if prepared.demand.node_id:
            await self._nodes.get(prepared.demand.node_id)
        return Plan(prepared.name, await self._survey(prepared.demand))

    async def explain(self, pipeline_id: str) -> Explanation:
        """Return why a pipeline waits, has failed, or has not ended yet.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND.
        """
        standing = await self._service.standing(pipeline_id)
        found = await self._survey(standing.demand) if standing.demand is not None else None
        return explain(
            standing,
            node=await self._node(standing.pipeline.node_id),
            survey=found,
            now=self._clock.now(),
        )

    async def _survey(self, demand: Demand) -> Survey:
        candidates = self._nodes.candidates(await self._service.reserved())
        running = await self._service.running()
        # On a thread: ten thousand nodes take a moment, and heartbeats come first (P14).
        return await asyncio.to_thread(lambda: survey(decide(demand, candidates, running), demand))

    async def _node(self, node_id: str) -> Node | None:
        if not node_id:
            return None
        try:
            return await self._nodes.get(node_id)
        except GameNodeError as error:
            if error.code is not ErrorCode.NODE_NOT_FOUND:
                raise
            return None
