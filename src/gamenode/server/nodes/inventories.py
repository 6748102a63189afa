"""What nodes are made of: their versions, queries over the fleet, collection on demand."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from gamenode.domain.command import CollectOrder, OrderOutcome
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.inventory import InventoryVersion
from gamenode.domain.inventory_diff import InventoryDiff, diff
from gamenode.domain.node import Node
from gamenode.domain.quantity import parse_time
from gamenode.domain.selector import Selector
from gamenode.lib.clock import Clock, Instant
from gamenode.server.nodes.connections import ConnectionManager
from gamenode.server.nodes.service import (
    GameNodeService,
    InventorySettings,
    not_found,
    values_of,
)

_VERSION: Final = re.compile(r"[0-9]{1,18}", re.ASCII)


class InventoryKeeper:
    """Shows, compares and searches inventories, and asks agents for theirs (B2, B4, B7)."""

    def __init__(
        self,
        *,
        service: GameNodeService,
        connections: ConnectionManager,
        nodes: Mapping[str, Node],
        clock: Clock,
        settings: InventorySettings,
    ) -> None:
        """Keep the inventories of `nodes`, which change while this lives."""
        self._service = service
        self._connections = connections
        self._nodes = nodes
        self._clock = clock
        self._settings = settings
        self._waiting: dict[str, set[asyncio.Future[InventoryVersion]]] = {}

    async def show(
        self, node_id: str, *, version: int | None = None, at: Instant | None = None
    ) -> InventoryVersion:
        """Return a version of a node's inventory, or what was newest `at` a time, or is now.

        Raises:
            GameNodeError: NODE_NOT_FOUND; NOT_FOUND.
        """
        return await self._service.inventory(node_id, version=version, at=at)

    async def versions(
        self, node_id: str, *, limit: int, before: int | None
    ) -> Sequence[InventoryVersion]:
        """Return the versions of a node's inventory, newest first, from behind `before` on.

        Raises:
            GameNodeError: NODE_NOT_FOUND.
        """
        if node_id not in self._nodes:
            raise not_found(node_id)
        return await self._service.inventory_versions(node_id, limit=limit, before=before)

    async def diff(self, node_id: str, *, from_: str = "", to: str = "") -> InventoryDiff:
        """Return how two versions differ; each is a number, or a time at which it was newest.

        Without `to` it is the newest, without `from_` the one before `to`.

        Raises:
            GameNodeError: NODE_NOT_FOUND; NOT_FOUND; INVALID_REQUEST.
        """
        after = await self._named(node_id, to, field="to")
        if from_:
            before = await self._named(node_id, from_, field="from")
        else:
            before = await self._service.inventory_before(after) or after
        return InventoryDiff(
            node_id=node_id,
            from_version=before.version,
            to_version=after.version,
            changes=diff(before.inventory, after.inventory),
        )

    async def query(
        self,
        selector: Selector,
        *,
        at: Instant | None,
        changed_since: Instant | None,
        after: str = "",
    ) -> AsyncGenerator[InventoryVersion]:
        """Yield the newest inventory (`at` a time) of every node that fits, by node id.

        Labels and a node's own fields are asked for as they are now; nodes of which nothing was
        known at that time are left out.
        """
        node_ids = sorted(node_id for node_id in self._nodes if node_id > after)
        step = self._settings.query_nodes
        for start in range(0, len(node_ids), step):
            found = await self._service.inventories(
                node_ids[start : start + step], at=at, changed_since=changed_since
            )
            for version in found:
                node = self._nodes.get(version.node_id)
                if node is not None and selector.matches(_lookup(node, version)):
                    yield version

    async def collect(self, node_id: str) -> InventoryVersion:
        """Let a node collect its inventory now; return the version that it makes or finds again.

        Raises:
            GameNodeError: NODE_NOT_FOUND; NODE_OFFLINE; CONFLICT, its agent cannot do that;
                TIMEOUT, after which a late inventory is still taken.

        Source: B2.
        """
        if node_id not in self._nodes:
            raise not_found(node_id)
        connection = self._connections.connection(node_id)
        if connection is None:
            raise GameNodeError(
                ErrorCode.NODE_OFFLINE,
                f"node {node_id} is not connected, so it cannot be asked for its inventory",
                hint=f"gamenode inventory show {node_id} has what it reported last",
                retry_after_s=self._settings.collect_s_max,
            )
        collect_s_max = self._settings.collect_s_max
        collected: asyncio.Future[InventoryVersion] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(node_id, set())
        waiting.add(collected)
        try:
            async with asyncio.timeout(collect_s_max):
                answer = await connection.ask(CollectOrder(), timeout_s=collect_s_max)
                if answer.outcome is OrderOutcome.REFUSED:
                    raise GameNodeError(
                        ErrorCode.CONFLICT,
                        f"node {node_id} does not collect its inventory now: {answer.message}",
                    )
                return await collected
        except TimeoutError as error:
            raise GameNodeError(
                ErrorCode.TIMEOUT,
                f"node {node_id} did not send its inventory within {collect_s_max:g} s",
                hint="a late one is still taken; the host may be slow to answer",
            ) from error
        finally:
            waiting.discard(collected)
            if not waiting:
                self._waiting.pop(node_id, None)

    def collected(self, version: InventoryVersion) -> None:
        """Hand an inventory that came in to whoever waits for it."""
        for future in self._waiting.get(version.node_id, ()):
            if not future.done():
                future.set_result(version)

    async def _named(self, node_id: str, text: str, *, field: str) -> InventoryVersion:
        if _VERSION.fullmatch(text):
            return await self._service.inventory(node_id, version=int(text))
        at = parse_time(text, self._clock.now(), field=field) if text else None
        return await self._service.inventory(node_id, at=at)


def _lookup(node: Node, version: InventoryVersion) -> Callable[[str], Sequence[str]]:
    values = values_of(replace(node, inventory=version.inventory))
    return lambda key: values.get(key, ())
