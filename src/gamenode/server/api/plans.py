"""The routes that say where a pipeline could run, and why one is where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from starlette.types import ASGIApp

from gamenode.server.api import page
from gamenode.server.api.decode import QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.api.pipelines import PIPELINE_BODY, new_pipeline
from gamenode.server.pipelines.planner import Planner
from gamenode.wire import http


class NodesQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many nodes are judged one by one; all of them are counted."""

    limit: page.Limit = 100


class PlanRoutes:
    """Plans and explains (F10)."""

    def __init__(self, planner: Planner) -> None:
        """Speak for `planner`."""
        self._planner = planner

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="POST",
                path="/api/v1/pipelines:plan",
                summary="Find out which nodes could take a pipeline, and why the others could not",
                handler=self._plan,
                query=QueryReader(NodesQuery),
                body=PIPELINE_BODY,
                answer=http.Plan,
            ),
            Operation(
                method="GET",
                path="/api/v1/pipelines/{pipeline}/explain",
                summary="Find out why a pipeline waits, has failed, or has not ended yet",
                handler=self._explain,
                query=QueryReader(NodesQuery),
                answer=http.Explanation,
            ),
        )

    async def _plan(self, call: Call[NodesQuery, http.PipelineRequest]) -> ASGIApp:
        plan = await self._planner.plan(new_pipeline(call.body))
        return answer(http.encode_plan(plan.name, plan.survey, limit=call.query.limit))

    async def _explain(self, call: Call[NodesQuery, None]) -> ASGIApp:
        explanation = await self._planner.explain(call.path["pipeline"])
        return answer(http.encode_explanation(explanation, limit=call.query.limit))
