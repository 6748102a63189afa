"""The routes of inventories: of one node, through time, and of the whole fleet."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct, field
from starlette.types import ASGIApp

from gamenode.domain.errors import invalid
from gamenode.domain.inventory import InventoryVersion
from gamenode.domain.quantity import parse_time
from gamenode.domain.selector import parse_selector
from gamenode.lib.clock import Clock, Instant
from gamenode.server.api import page
from gamenode.server.api.decode import NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.api.streams import NDJSON_MEDIA_TYPE, Streams, unless_gone
from gamenode.server.nodes.inventories import InventoryKeeper
from gamenode.wire import http
from gamenode.wire.inventory_table import HEADINGS, row_of

CSV_MEDIA_TYPE: Final = "text/csv; charset=utf-8"

Number = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Time = Annotated[str, Meta(description="RFC 3339, or `2h` for two hours ago.")]

_encode_json: Final = msgspec.json.Encoder().encode


class InventoryFormat(StrEnum):
    """How the inventories of many nodes are written."""

    JSON = "json"  # a page of a list
    NDJSON = "ndjson"  # all of them, a line of JSON each
    CSV = "csv"  # all of them, a row each


class InventoryQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which version of a node's inventory; without either, the newest."""

    version: Annotated[Number | None, Meta(description="The version with this number.")] = None
    at: Annotated[Time, Meta(description="The version that was the newest at this time.")] = ""


class VersionsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which versions."""

    limit: page.Limit = 100
    cursor: page.Cursor = ""


class DiffQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which two versions: each a number, or a time at which it was the newest."""

    from_: Annotated[str, Meta(description="The older; without it, the one before `to`.")] = field(
        name="from", default=""
    )
    to: Annotated[str, Meta(description="The newer; without it, the newest.")] = ""


class FleetQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose inventories, as of when, in which form."""

    query: Annotated[str, Meta(description="Only nodes that this selector matches.")] = ""
    at: Annotated[Time, Meta(description="As they were at this time.")] = ""
    changed_since: Annotated[Time, Meta(description="Only those that changed since then.")] = ""
    format: InventoryFormat = InventoryFormat.JSON
    limit: page.Limit = 100
    cursor: page.Cursor = ""


class InventoryRoutes:
    """Shows, compares, searches and collects inventories (B)."""

    def __init__(self, inventories: InventoryKeeper, *, streams: Streams, clock: Clock) -> None:
        """Speak for `inventories`."""
        self._inventories = inventories
        self._streams = streams
        self._clock = clock

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/nodes/{node}/inventory",
                summary="Show what a node is made of, now or before",
                handler=self._show,
                query=QueryReader(InventoryQuery),
                answer=http.Inventory,
            ),
            Operation(
                method="GET",
                path="/api/v1/nodes/{node}/inventory/versions",
                summary="List the versions of a node's inventory",
                handler=self._versions,
                query=QueryReader(VersionsQuery),
                answer=http.InventoryVersionList,
            ),
            Operation(
                method="GET",
                path="/api/v1/nodes/{node}/inventory/diff",
                summary="Compare two versions of a node's inventory",
                handler=self._diff,
                query=QueryReader(DiffQuery),
                answer=http.InventoryDiff,
            ),
            Operation(
                method="POST",
                path="/api/v1/nodes/{node}/inventory:collect",
                summary="Let a node collect its inventory now",
                handler=self._collect,
                query=QueryReader(NoQuery),
                answer=http.Inventory,
            ),
            Operation(
                method="GET",
                path="/api/v1/inventory",
                summary="Search and export the inventories of all nodes",
                handler=self._query,
                query=QueryReader(FleetQuery),
                answer=http.InventoryList,
                media_types=(NDJSON_MEDIA_TYPE, CSV_MEDIA_TYPE),
            ),
        )

    async def _show(self, call: Call[InventoryQuery, None]) -> ASGIApp:
        query = call.query
        if query.version is not None and query.at:
            raise invalid("at", "stands beside `version`", advice="give one of them")
        found = await self._inventories.show(
            call.path["node"], version=query.version, at=self._time(query.at, "at")
        )
        return answer(http.encode_inventory(found))

    async def _versions(self, call: Call[VersionsQuery, None]) -> ASGIApp:
        query = call.query
        found = await self._inventories.versions(
            call.path["node"],
            limit=query.limit + 1,
            before=page.read_inventory_cursor(query.cursor),
        )
        versions, last = page.split(found, query.limit)
        return answer(
            http.InventoryVersionList(
                items=[http.encode_inventory_version(version) for version in versions],
                next_cursor=page.inventory_cursor(last.version) if last else None,
            )
        )

    async def _diff(self, call: Call[DiffQuery, None]) -> ASGIApp:
        diff = await self._inventories.diff(
            call.path["node"], from_=call.query.from_, to=call.query.to
        )
        return answer(http.encode_inventory_diff(diff))

    async def _collect(self, call: Call[NoQuery, None]) -> ASGIApp:
        collecting = self._inventories.collect(call.path["node"])
        return answer(http.encode_inventory(await unless_gone(call.request.receive, collecting)))

    async def _query(self, call: Call[FleetQuery, None]) -> ASGIApp:
        query = call.query
        found = self._inventories.query(
            parse_selector(query.query, field="query"),
            at=self._time(query.at, "at"),
            changed_since=self._time(query.changed_since, "changed_since"),
            after=page.read_node_cursor(query.cursor),
        )
        match query.format:
            case InventoryFormat.JSON:
                return await _page(found, query.limit)
            case InventoryFormat.NDJSON:
                chunks = _written(found, _line)
                return self._streams.respond(chunks, media_type=NDJSON_MEDIA_TYPE)
            case InventoryFormat.CSV:
                chunks = _written(found, _row, heading=_csv_line(HEADINGS))
                return self._streams.respond(
                    chunks,
                    media_type=CSV_MEDIA_TYPE,
                    headers={"content-disposition": 'attachment; filename="inventory.csv"'},
                )

    def _time(self, text: str, name: str) -> Instant | None:
        return parse_time(text, self._clock.now(), field=name) if text else None


async def _page(found: AsyncGenerator[InventoryVersion], limit: int) -> ASGIApp:
    items: list[InventoryVersion] = []
    async with aclosing(found):
        async for version in found:
            items.append(version)
            if len(items) > limit:
                break
    shown, last = page.split(items, limit)
    return answer(
        http.InventoryList(
            items=[http.encode_inventory(version) for version in shown],
            next_cursor=page.node_cursor(last.node_id) if last else None,
        )
    )


async def _written(
    found: AsyncGenerator[InventoryVersion],
    write: Callable[[InventoryVersion], bytes],
    *,
    heading: bytes = b"",
) -> AsyncIterator[bytes]:
    if heading:
        yield heading
    async with aclosing(found):
        async for version in found:
            yield write(version)


def _line(version: InventoryVersion) -> bytes:
    return b"%b\n" % _encode_json(http.encode_inventory(version))


def _row(version: InventoryVersion) -> bytes:
    return _csv_line(row_of(version))


def _csv_line(cells: Sequence[object]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()
