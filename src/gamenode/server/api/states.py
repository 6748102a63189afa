"""The routes of maintenance: one node, or all that a selector matches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from gamenode.domain.command import Dispatch
from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.domain.node import MAINTENANCE_TRANSITIONS, Drain, Maintenance, Node
from gamenode.domain.quantity import parse_duration, parse_time
from gamenode.domain.selector import parse_selector
from gamenode.lib.clock import Clock, after
from gamenode.server.api.decode import BodyReader, NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.api.streams import unless_gone
from gamenode.server.nodes.manager import NodeManager
from gamenode.wire import http

_CHANGES_MAX = 1000


class StateQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long to wait."""

    wait: Annotated[
        str, Meta(description="Answer once the agent has confirmed, at the latest after this time.")
    ] = ""


class StateRoutes:
    """Changes what nodes may be used for (E)."""

    def __init__(
        self,
        nodes: NodeManager,
        *,
        loads: Callable[[], Awaitable[Mapping[str, int]]],
        lingering: Callable[[], Awaitable[Mapping[str, Sequence[Dispatch]]]],
        clock: Clock,
        wait_s_max: float,
    ) -> None:
        """Speak for `nodes`; `loads` counts the pipelines on each, `lingering` has what may be."""
        self._nodes = nodes
        self._lingering = lingering
        self._loads = loads
        self._clock = clock
        self._wait_s_max = wait_s_max

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="PUT",
                path="/api/v1/nodes/{node}/state",
                summary="Change what a node may be used for",
                handler=self._change,
                query=QueryReader(StateQuery),
                body=BodyReader(http.StateRequest),
                answer=http.Node,
            ),
            Operation(
                method="POST",
                path="/api/v1/nodes:state",
                summary="Change what many nodes may be used for",
                handler=self._change_many,
                query=QueryReader(NoQuery),
                body=BodyReader(http.StatesRequest),
                answer=http.StateOutcomes,
            ),
            Operation(
                method="GET",
                path="/api/v1/nodes/{node}/state-changes",
                summary="List a node's state changes",
                handler=self._list,
                query=QueryReader(NoQuery),
                answer=http.StateChangeList,
            ),
        )

    async def _change(self, call: Call[StateQuery, http.StateRequest]) -> ASGIApp:
        wait_s = parse_duration(call.query.wait, field="wait") if call.query.wait else 0.0
        if wait_s > self._wait_s_max:
            raise invalid("wait", f"is longer than {self._wait_s_max:g} s")
        body = call.body
        changing = self._nodes.change_state(
            call.path["node"],
            body.state,
            drain=self._drain(body),
            by=call.actor,
            reason=body.reason,
            wait_s=wait_s,
        )
        node = await unless_gone(call.request.receive, changing) if wait_s else await changing
        lingering = (await self._lingering()).get(node.id, ())
        return answer(http.encode_node(await self._with_progress(node), lingering))

    async def _change_many(self, call: Call[NoQuery, http.StatesRequest]) -> ASGIApp:
        body = call.body
        drain = self._drain(body)
        loads = await self._loads()
        outcomes = []
        for node in await self._nodes.list(
            online=None,
            maintenance=None,
            selector=parse_selector(body.selector),
            q="",
            limit=_CHANGES_MAX,
            after="",
        ):
            outcome, message = _preview(node, body.state)
            if outcome == "would_change" and not body.dry_run:
                try:
                    node = await self._nodes.change_state(  # noqa: PLW2901 - as it is then
                        node.id, body.state, drain=drain, by=call.actor, reason=body.reason
                    )
                    outcome = "changed"
                except GameNodeError as error:
                    outcome, message = "refused", error.message
                    await call.refused(error, node.id)
            elif outcome == "refused" and not body.dry_run:
                await call.refused(GameNodeError(ErrorCode.CONFLICT, message), node.id)
            outcomes.append(
                http.StateOutcome(
                    node_id=node.id,
                    outcome=outcome,
                    message=message,
                    state=node.maintenance,
                    running=loads.get(node.id, 0),
                )
            )
        return answer(http.StateOutcomes(items=outcomes))

    async def _list(self, call: Call[NoQuery, None]) -> ASGIApp:
        changes = await self._nodes.state_changes(call.path["node"], limit=_CHANGES_MAX)
        return answer(http.encode_state_changes(changes))

    def _drain(self, body: http.StateRequest) -> Drain | None:
        timed = body.deadline_s is not None or body.until or body.drain
        if not timed:
            return None
        if body.state is Maintenance.NORMAL:
            raise invalid("state", "a drain leads to maintenance or disabled, not to normal")
        now = self._clock.now()
        until = parse_time(body.until, now, field="until") if body.until else None
        if until is not None and until <= now:
            raise invalid("until", "lies in the past")
        return Drain(
            deadline_at=after(now, body.deadline_s) if body.deadline_s is not None else None,
            then=body.then,
            until=until,
        )

    async def _with_progress(self, node: Node) -> Node:
        """Return the node with how much still runs on it, while it is being emptied."""
        if node.state_change is None or node.maintenance is Maintenance.NORMAL:
            return node
        running = (await self._loads()).get(node.id, 0)
        return replace(node, state_change=replace(node.state_change, remaining=running))


def _preview(node: Node, target: Maintenance) -> tuple[str, str]:
    if node.maintenance is target:
        return "unchanged", f"is {target} already"
    if target not in MAINTENANCE_TRANSITIONS[node.maintenance]:
        return "refused", f"is {node.maintenance} and cannot become {target}"
    return "would_change", f"from {node.maintenance} to {target}"
