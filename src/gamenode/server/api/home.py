"""The plain page at `/`: what is there, for somebody with a browser."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

from starlette.responses import HTMLResponse
from starlette.types import ASGIApp

from gamenode import __version__
from gamenode.domain.node import Node
from gamenode.domain.pipeline import Pipeline
from gamenode.domain.selector import Selector
from gamenode.server.api.decode import NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.service import GamePipelineGRPCService
from gamenode.wire import http

_ROWS_MAX: Final = 50

_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid #8884; padding: .25rem 1rem .25rem 0; text-align: left }
code { font-size: .9em }
"""

_POLICY: Final = (
    "default-src 'none'; "
    f"style-src 'sha256-{b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing but our own style: whatever slipped past the escaping would still do nothing."""


class HomeRoutes:
    """Shows nodes and the newest pipelines."""

    def __init__(self, nodes: NodeManager, pipelines: GamePipelineGRPCService) -> None:
        """Speak for `nodes` and `pipelines`."""
        self._nodes = nodes
        self._pipelines = pipelines

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/",
                summary="A page for people",
                handler=self._show,
                query=QueryReader(NoQuery),
                media_types=("text/html; charset=utf-8",),
            ),
        )

    async def _show(self, _call: Call[NoQuery, None]) -> ASGIApp:
        nodes = await self._nodes.list(
            online=None, maintenance=None, selector=Selector(), q="", limit=_ROWS_MAX, after=""
        )
        pipelines = await self._pipelines.list(
            status=None, node="", q="", limit=_ROWS_MAX, before=None
        )
        return HTMLResponse(
            _page(nodes, pipelines),
            headers={"content-security-policy": _POLICY, "cache-control": "no-store"},
        )


def _page(nodes: Sequence[Node], pipelines: Sequence[Pipeline]) -> str:
    node_rows = (
        (
            node.id,
            "online" if node.online else f"offline ({node.link})",
            node.maintenance,
            "" if node.last_heartbeat_at is None else http.encode_time(node.last_heartbeat_at),
            node.agent_version,
        )
        for node in nodes
    )
    pipeline_rows = (
        (
            pipeline.id,
            pipeline.name,
            f"{pipeline.status} {pipeline.reason}".rstrip(),
            pipeline.node_id or pipeline.message,
            http.encode_time(pipeline.created_at),
        )
        for pipeline in pipelines
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GameNode</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>GameNode {escape(__version__)}</h1>
<p><a href="/openapi.json">openapi.json</a> describes the HTTP interface;
<code>gamenode --help</code> lists the commands.</p>
<h2>Nodes</h2>
{_table(("Node", "Liveness", "State", "Last heartbeat", "Agent"), node_rows)}
<h2>Newest pipelines</h2>
{_table(("Pipeline", "Name", "Status", "Node, or why it waits", "Created"), pipeline_rows)}
</body>
</html>
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    if not body:
        return "<p>None yet.</p>"
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
