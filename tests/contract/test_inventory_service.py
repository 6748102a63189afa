"""What becomes of the inventories that nodes report, on both databases (B4)."""

from __future__ import annotations

import json

import pytest
import pytest_asyncio
from sqlalchemy import update
from tests.support.databases import OpenDatabase
from tests.support.machines import (
    HOST,
    SWAPS,
    registration,
    with_moved_module,
    with_new_driver,
    with_other_disk,
    with_second_interface,
    with_what_moves,
    without_gpu,
)

from gamenode.domain.access import SYSTEM
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event, EventFilter
from gamenode.domain.inventory import (
    Collection,
    CollectionFailure,
    Inventory,
    InventoryVersion,
    content_hash,
)
from gamenode.domain.inventory_diff import diff
from gamenode.domain.node import ConditionType, Session
from gamenode.lib.clock import Instant
from gamenode.server.db import schema
from gamenode.server.db.database import Database
from gamenode.server.events.feed import EventFeed, EventFeedSettings
from gamenode.server.events.store import read_after
from gamenode.server.nodes.service import GameNodeService, InventorySettings, remove_node

NODE = "fra-07"


def at(second: int) -> Instant:
    return Instant(1_795_557_600_000_000_000 + second * 1_000_000_000)


class Node:
    """A registered node whose reports come one second after the other."""

    def __init__(self, database: Database, service: GameNodeService) -> None:
        self.database = database
        self.service = service
        self.second = 0
        self.session = Session(node_id=NODE, session_id="", epoch=0)

    async def register(self, inventory: Inventory = HOST) -> None:
        self.second += 1
        outcome = await self.service.register(
            registration(NODE, inventory), session_id=f"s{self.second}", now=at(self.second)
        )
        self.session = outcome.session

    async def report(
        self, inventory: Inventory, *, failed: str = "", collected_at: Instant | None = None
    ) -> InventoryVersion:
        self.second += 1
        now = at(self.second)
        collection = Collection(
            inventory=inventory,
            collected_at=collected_at or now,
            failed=(CollectionFailure(part=failed, reason="hangs"),) if failed else (),
            hash=content_hash(inventory),
        )
        version = await self.service.update_inventory(self.session, collection, now=now)
        assert version is not None
        return version

    async def versions(self) -> list[int]:
        found = await self.service.inventory_versions(NODE, limit=1000, before=None)
        return [version.version for version in found]

    async def changes(self) -> list[Event]:
        wanted = EventFilter(types=frozenset({"node.inventory.changed"}))
        return await self.database.read(lambda conn: read_after(conn, 0, wanted=wanted, limit=1000))

    async def conditions(self) -> list[ConditionType]:
        node = await self.service.get(NODE)
        return [condition.type for condition in node.conditions]


@pytest_asyncio.fixture
async def node(open_database: OpenDatabase, database_url: str) -> Node:
    database = await open_database(database_url)
    database.on_commit(EventFeed(database, settings=EventFeedSettings(), audit_key=b"key"))
    service = GameNodeService(database, InventorySettings(versions_max=5, changes_told_max=2))
    node = Node(database, service)
    await node.register()
    return node


async def test_the_same_inventory_a_hundred_times_is_one_version(node: Node) -> None:
    for number in range(100):
        await node.report(with_what_moves(HOST) if number % 2 else HOST)
    await node.register()
    assert await node.versions() == [1]
    assert await node.changes() == []
    newest = await node.service.inventory(NODE)
    assert newest.collected_at == at(1)
    assert newest.seen_at == at(node.second)


async def test_what_moves_by_itself_is_shown_as_it_was_seen_last(node: Node) -> None:
    await node.report(with_what_moves(HOST))
    shown = (await node.service.inventory(NODE)).inventory
    assert shown == with_what_moves(HOST)
    assert (await node.service.get(NODE)).inventory == shown


@pytest.mark.parametrize("swap", SWAPS)
async def test_a_swap_is_one_new_version_with_the_right_diff(node: Node, swap: str) -> None:
    change, expected = SWAPS[swap]
    for _ in range(3):
        await node.report(change(HOST))
    assert await node.versions() == [2, 1]
    before, after = [await node.service.inventory(NODE, version=number) for number in (1, 2)]
    changes = diff(before.inventory, after.inventory)
    assert sorted((str(each.op), each.path) for each in changes) == sorted(expected)
    (event,) = await node.changes()
    assert event.data["count"] == str(len(expected))
    assert all(told["text"] in event.message for told in json.loads(event.data["changes"]))


async def test_the_event_says_in_words_what_changed_and_names_a_bounded_number(
    node: Node,
) -> None:
    await node.report(with_other_disk(with_second_interface(with_new_driver(HOST))))
    (event,) = await node.changes()
    assert "and 4 more" in event.message
    assert (event.data["from"], event.data["to"], event.data["count"]) == ("1", "2", "6")
    assert len(json.loads(event.data["changes"])) == 2
    (version, _) = await node.service.inventory_versions(NODE, limit=2, before=None)
    assert version.summary == event.message
    await node.report(with_other_disk(with_second_interface(HOST)))
    assert "gpu_driver.driver_version 555.42 → 550.54" in (await node.changes())[1].message


async def test_a_change_that_is_seen_at_registration_is_a_version_too(node: Node) -> None:
    await node.register(with_new_driver(HOST))
    assert await node.versions() == [2, 1]
    assert (await node.service.get(NODE)).inventory_version == 2


async def test_a_part_that_could_not_be_collected_stays_as_it_was(node: Node) -> None:
    version = await node.report(without_gpu(HOST), failed="gpu")
    assert version.version == 1
    assert version.inventory.hardware.gpu == HOST.hardware.gpu
    assert [failure.part for failure in version.failed] == ["gpu"]
    assert await node.conditions() == []
    assert (await node.report(HOST)).failed == ()


async def test_the_hash_that_the_node_gave_is_kept_beside_ours(node: Node) -> None:
    await node.report(without_gpu(HOST), failed="gpu")
    # The node does not know what we saw before; a heartbeat with its hash must not be asked again.
    assert (await node.service.get(NODE)).inventory_hash == content_hash(without_gpu(HOST))
    assert (await node.service.inventory(NODE)).hash == content_hash(HOST)


async def test_lost_parts_are_a_condition_until_they_are_back(node: Node) -> None:
    await node.report(without_gpu(HOST))
    assert await node.conditions() == [ConditionType.INVENTORY_SHRANK]
    await node.report(with_moved_module(HOST))
    assert await node.conditions() == []


async def test_a_superseded_session_changes_nothing(node: Node) -> None:
    old = node.session
    await node.register()
    collection = Collection(inventory=with_new_driver(HOST), collected_at=at(9))
    assert await node.service.update_inventory(old, collection, now=at(9)) is None
    assert await node.versions() == [1]


async def test_the_oldest_versions_are_dropped(node: Node) -> None:
    for number in range(8):
        await node.report(with_new_driver(HOST) if number % 2 == 0 else HOST)
    assert await node.versions() == [9, 8, 7, 6, 5]
    with pytest.raises(GameNodeError, match="no version 4") as caught:
        await node.service.inventory(NODE, version=4)
    assert caught.value.code is ErrorCode.NOT_FOUND


async def test_what_was_known_at_a_time_is_found(node: Node) -> None:
    await node.report(with_new_driver(HOST), collected_at=at(100))  # a clock that is ahead
    node.second = 200
    await node.report(with_other_disk(HOST), collected_at=at(1))  # and one that is behind
    found = [
        (await node.service.inventory(NODE, at=at(second))).version for second in (1, 2, 199, 999)
    ]
    assert found == [1, 3, 3, 3]
    with pytest.raises(GameNodeError) as caught:
        await node.service.inventory(NODE, at=at(0))
    assert caught.value.code is ErrorCode.NOT_FOUND


async def test_many_nodes_are_searched_as_they_were_and_by_when_they_changed(node: Node) -> None:
    other = registration("ber-01")
    await node.service.register(other, session_id="o", now=at(5))
    node.second = 9
    await node.report(with_new_driver(HOST))
    service = node.service
    names = [NODE, "ber-01", "unknown"]

    async def found(**when: Instant | None) -> list[tuple[str, int]]:
        bounds = {"at": None, "changed_since": None} | when
        versions = await service.inventories(names, **bounds)
        return [(version.node_id, version.version) for version in versions]

    assert await found() == [("ber-01", 1), (NODE, 2)]
    assert await found(at=at(4)) == [(NODE, 1)]
    assert await found(at=at(6)) == [("ber-01", 1), (NODE, 1)]
    assert await found(changed_since=at(6)) == [(NODE, 2)]


async def test_the_versions_of_a_removed_node_go_with_it(node: Node) -> None:
    await node.database.write(
        lambda conn: remove_node(conn, NODE, by=SYSTEM, reason="sold", now=at(9))
    )
    assert await node.versions() == []
    with pytest.raises(GameNodeError) as caught:
        await node.service.inventory(NODE)
    assert caught.value.code is ErrorCode.NODE_NOT_FOUND


async def test_a_hash_that_another_release_computed_makes_no_version(node: Node) -> None:
    await node.database.write(
        lambda conn: conn.execute(update(schema.inventory_versions).values(hash="another way"))
    )
    version = await node.report(HOST)
    assert (version.version, version.hash) == (1, content_hash(HOST))
