"""What is written of nodes while they live, on both databases."""

from __future__ import annotations

from tests.support.databases import OpenDatabase
from tests.support.machines import registration

from gamenode.lib.clock import Instant
from gamenode.server.events.feed import EventFeed, EventFeedSettings
from gamenode.server.nodes.service import GameNodeService, InventorySettings


async def test_every_node_has_its_own_last_heartbeat_and_a_removed_one_is_no_matter(
    open_database: OpenDatabase, database_url: str
) -> None:
    database = await open_database(database_url)
    database.on_commit(EventFeed(database, settings=EventFeedSettings(), audit_key=b"key"))
    service = GameNodeService(database, InventorySettings())
    for name in ("a", "b", "c"):
        await service.register(registration(name), session_id=name, now=Instant(1))
    await service.set_last_heartbeats(
        [("a", Instant(11)), ("removed", Instant(12)), ("c", Instant(13))]
    )
    heard = {node.id: node.last_heartbeat_at for node in await service.every()}
    assert (heard["a"], heard["c"]) == (11, 13)
    assert heard["b"] not in (11, 12, 13)
