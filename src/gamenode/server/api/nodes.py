"""The routes of nodes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.responses import Response
from starlette.types import ASGIApp

from gamenode.domain.command import Dispatch
from gamenode.domain.node import Maintenance, Node, NodePatch
from gamenode.domain.selector import parse_selector
from gamenode.server.api import page
from gamenode.server.api.decode import BodyReader, NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.wire import http


class NodesQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which nodes."""

    online: Annotated[bool | None, Meta(description="Only those online, or those not.")] = None
    state: Annotated[Maintenance | None, Meta(description="Only those in this state.")] = None
    selector: Annotated[str, Meta(description="Only those that this selector matches.")] = ""
    q: Annotated[str, Meta(max_length=256, description="Only those with this in id or name.")] = ""
    limit: page.Limit = 100
    cursor: page.Cursor = ""


class RemoveQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to remove a node."""

    force: Annotated[bool, Meta(description="Even if it runs something, which may go on.")] = False
    reason: Annotated[str, Meta(max_length=4096, description="Why.")] = ""


class NodeRoutes:
    """Lists, shows, describes, fences and removes nodes."""

    def __init__(
        self,
        nodes: NodeManager,
        pipelines: PipelineManager,
        *,
        lingering: Callable[[], Awaitable[Mapping[str, Sequence[Dispatch]]]],
    ) -> None:
        """Speak for `nodes`; `pipelines` know what runs on them, `lingering` what still may."""
        self._nodes = nodes
        self._pipelines = pipelines
        self._lingering = lingering

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/nodes",
                summary="List nodes",
                handler=self._list,
                query=QueryReader(NodesQuery),
                answer=http.NodeList,
            ),
            Operation(
                method="GET",
                path="/api/v1/nodes/{node}",
                summary="Show a node",
                handler=self._show,
                query=QueryReader(NoQuery),
                answer=http.Node,
            ),
            Operation(
                method="PATCH",
                path="/api/v1/nodes/{node}",
                summary="Change a node's name, note and labels",
                handler=self._describe,
                query=QueryReader(NoQuery),
                body=BodyReader(http.NodeChange),
                answer=http.Node,
            ),
            Operation(
                method="DELETE",
                path="/api/v1/nodes/{node}",
                summary="Remove a node",
                handler=self._remove,
                query=QueryReader(RemoveQuery),
                status=HTTPStatus.NO_CONTENT,
            ),
            Operation(
                method="POST",
                path="/api/v1/nodes/{node}:fence",
                summary="Say that a node's host is dead, so that its work may start elsewhere",
                handler=self._fence,
                query=QueryReader(NoQuery),
                body=BodyReader(http.FenceRequest),
                answer=http.Node,
            ),
        )

    async def _list(self, call: Call[NodesQuery, None]) -> ASGIApp:
        query = call.query
        found = await self._nodes.list(
            online=query.online,
            maintenance=query.state,
            selector=parse_selector(query.selector),
            q=query.q,
            limit=query.limit + 1,
            after=page.read_node_cursor(query.cursor),
        )
        nodes, last = page.split(found, query.limit)
        lingering = await self._lingering()
        return answer(
            http.NodeList(
                items=[http.encode_node(node, lingering.get(node.id, ())) for node in nodes],
                next_cursor=page.node_cursor(last.id) if last else None,
            )
        )

    async def _describe(self, call: Call[NoQuery, http.NodeChange]) -> ASGIApp:
        body = call.body
        patch = NodePatch(display_name=body.display_name, note=body.note, labels=body.labels)
        return await self._answer(
            await self._nodes.describe(call.path["node"], patch, by=call.actor)
        )

    async def _remove(self, call: Call[RemoveQuery, None]) -> ASGIApp:
        await self._pipelines.remove_node(
            call.path["node"], force=call.query.force, reason=call.query.reason, by=call.actor
        )
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def _show(self, call: Call[NoQuery, None]) -> ASGIApp:
        return await self._answer(await self._nodes.get(call.path["node"]))

    async def _fence(self, call: Call[NoQuery, http.FenceRequest]) -> ASGIApp:
        return await self._answer(
            await self._pipelines.fence_node(
                call.path["node"], reason=call.body.reason, by=call.actor
            )
        )

    async def _answer(self, node: Node) -> ASGIApp:
        lingering = await self._lingering()
        return answer(http.encode_node(node, lingering.get(node.id, ())))
