"""Ids in commit order, and what a cursor promises, on both databases (rule RC4)."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Connection, delete, insert, text
from tests.support.databases import OpenDatabase
from tests.support.groups import HeldWriter, write_together

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event, EventFilter, EventType, NewEvent
from gamenode.lib.clock import Instant
from gamenode.server.db.database import Database, collect
from gamenode.server.db.schema import events
from gamenode.server.events import store
from gamenode.server.events.feed import EventFeed, EventFeedSettings

ALL = EventFilter()
KEY = b"a test's key"
WAIT_S = 10.0

OpenFeed = Callable[..., Awaitable[tuple[Database, EventFeed]]]


def happened(
    entity_id: str = "", *, at: int = 0, kind: EventType = EventType.NODE_ONLINE, node_id: str = ""
) -> Callable[[Connection], None]:
    event = NewEvent(
        type=kind, at=Instant(at), entity_id=entity_id, node_id=node_id, data={"é": '"\n'}
    )
    return lambda conn: store.append(conn, event)


def reading(after: int, wanted: EventFilter = ALL, limit: int = 1000) -> Callable[..., list[Event]]:
    return lambda conn: store.read_after(conn, after, wanted=wanted, limit=limit)


def entities(found: Sequence[Event]) -> list[str]:
    return [event.entity_id for event in found]


@pytest_asyncio.fixture
async def open_feed(open_database: OpenDatabase) -> Any:
    feeds: list[EventFeed] = []

    async def opened(url: str, **settings: Any) -> tuple[Database, EventFeed]:
        database = await open_database(url)
        bounds = EventFeedSettings(**{"poll_s": 3600.0, "idle_s": 3600.0} | settings)
        feed = EventFeed(database, settings=bounds, audit_key=KEY)
        database.on_commit(feed)
        await feed.start()
        feeds.append(feed)
        return database, feed

    yield opened
    for feed in feeds:
        await feed.close()


class Slow:
    """A hook that takes its time between the ids and the commit."""

    def __init__(self) -> None:
        self._random = random.Random(7)

    def before_commit(self, _: Connection, collected: Sequence[object]) -> object:
        time.sleep(self._random.random() * 0.003)
        return collected

    def after_commit(self, outcome: object) -> None:
        """Nothing to tell."""


async def write_each(database: Database, writer: int, events: int) -> None:
    for number in range(events):
        await database.write(happened(f"{writer}/{number}"))


async def follow_reconnecting(feed: EventFeed, total: int) -> list[Event]:
    """Follow from the start, again and again from where it stopped, until `total` are seen."""
    rng = random.Random(1)
    seen: list[Event] = []
    while len(seen) < total:
        following = feed.follow(seen[-1].id if seen else 0, ALL)
        async for batch in following:
            seen.extend(batch)
            if rng.random() < 0.3 or len(seen) >= total:
                break
        await following.aclose()
    return seen


async def test_a_follower_that_reconnects_sees_each_event_of_all_servers_once_and_in_order(
    database_url: str, open_feed: OpenFeed
) -> None:
    servers = [await open_feed(database_url, poll_s=0.005, batch_max=7)]
    if database_url.startswith("postgresql"):
        servers.append(await open_feed(database_url, poll_s=0.005))
    for database, _ in servers:
        database.on_commit(Slow())
    writers = 16 * len(servers)
    each = 10_000 // writers
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follow_reconnecting(servers[0][1], each * writers))
        for server, (database, _) in enumerate(servers):
            for writer in range(16):
                tasks.create_task(write_each(database, server * 16 + writer, each))

    ids = [event.id for event in following.result()]
    assert ids == sorted(set(ids))
    seen = entities(following.result())
    assert len(set(seen)) == each * writers
    for writer in range(writers):
        own = [entity for entity in seen if entity.startswith(f"{writer}/")]
        assert own == [f"{writer}/{number}" for number in range(each)], "answered, so in order"


class Gate:
    """A hook that keeps a transaction open after its events have got their ids."""

    def __init__(self) -> None:
        self.numbered = asyncio.Event()
        self.opened = threading.Event()
        self._loop = asyncio.get_running_loop()

    def before_commit(self, _: Connection, collected: Sequence[object]) -> object:
        self._loop.call_soon_threadsafe(self.numbered.set)
        assert self.opened.wait(WAIT_S)
        return collected

    def after_commit(self, outcome: object) -> None:
        """Nothing to tell."""


async def test_a_server_that_has_given_out_ids_commits_before_another_gives_out_any(
    postgres_url: str, open_feed: OpenFeed
) -> None:
    first, feed = await open_feed(postgres_url)
    second, _ = await open_feed(postgres_url)
    gate = Gate()
    first.on_commit(gate)
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    async with asyncio.timeout(WAIT_S):
        earlier = asyncio.ensure_future(first.write(happened("earlier")))
        await gate.numbered.wait()
        later = asyncio.ensure_future(second.write(happened("later")))
        while not later.done() and await first.read(lambda conn: conn.scalar(waiting)) == 0:
            pass  # each round is a read of the database
        overtaken = later.done()
        gate.opened.set()
        await asyncio.gather(earlier, later)
    assert not overtaken
    assert entities(await first.read(reading(0))) == ["earlier", "later"]
    await feed.close()


async def test_a_group_numbers_its_events_in_the_order_of_its_callers(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, _ = await open_feed(database_url)
    wanted = [f"{number}" for number in range(50)]
    await write_together(database, *(happened(entity) for entity in wanted))
    found = await database.read(reading(0))
    assert entities(found) == wanted
    assert found[0].data == {"é": '"\n'}


async def test_an_id_is_never_used_again(database_url: str, open_feed: OpenFeed) -> None:
    database, _ = await open_feed(database_url)
    await write_together(database, happened("a"), happened("b"))
    newest = await database.read(store.head)
    await database.write(lambda conn: conn.execute(delete(events)).close())
    await database.write(happened("c"))
    assert await database.read(store.head) > newest


async def test_a_refused_write_leaves_no_event(database_url: str, open_feed: OpenFeed) -> None:
    database, _ = await open_feed(database_url)

    def refused(conn: Connection) -> None:
        happened("refused")(conn)
        raise GameNodeError(ErrorCode.CONFLICT, "no")

    await write_together(database, happened("a"), refused, happened("b"))
    assert entities(await database.read(reading(0))) == ["a", "b"]


async def test_what_is_no_event_is_refused_loudly(database_url: str, open_feed: OpenFeed) -> None:
    database, _ = await open_feed(database_url)

    def wrong(conn: Connection) -> None:
        collect(conn, "not an event")

    answers = await write_together(database, happened("a"), wrong, happened("b"))
    assert isinstance(answers[1], TypeError)
    assert entities(await database.read(reading(0))) == ["a", "b"]


async def test_a_cursor_before_retention_or_ahead_of_the_head_is_an_error_that_says_so(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url)
    assert await database.read(reading(0)) == []
    for at in (1, 2, 3):
        await database.write(happened(f"{at}", at=at))
    first, second, third = [event.id for event in await database.read(reading(0))]
    assert await database.write(lambda conn: store.purge(conn, Instant(3))) == 2
    assert await database.write(lambda conn: store.purge(conn, Instant(3))) == 0
    assert entities(await database.read(reading(second))) == ["3"]
    assert await database.read(reading(third)) == []
    for cursor, reason in ((0, "retention"), (first, "retention"), (third + 1, "ahead")):
        with pytest.raises(GameNodeError, match=reason) as refused:
            await database.read(reading(cursor))
        assert refused.value.code is ErrorCode.CURSOR_EXPIRED
        with pytest.raises(GameNodeError, match=reason):
            await anext(feed.follow(cursor, ALL))


async def test_retention_that_empties_the_table_keeps_the_head(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, _ = await open_feed(database_url)
    await write_together(database, happened("1", at=1), happened("2", at=2))
    head = await database.read(store.head)
    assert await database.write(lambda conn: store.purge(conn, Instant(9))) == 2
    assert await database.read(store.head) == await database.read(store.oldest) == head
    assert await database.read(reading(head)) == []
    with pytest.raises(GameNodeError, match="retention"):
        await database.read(reading(0))


async def test_retention_stops_at_the_first_event_that_is_young(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, _ = await open_feed(database_url)
    await write_together(database, *(happened(f"{at}", at=at) for at in (1, 5, 2)))
    assert await database.write(lambda conn: store.purge(conn, Instant(4))) == 1
    oldest = await database.read(store.oldest)
    assert entities(await database.read(reading(oldest))) == ["5", "2"]


FILTERED = [
    ("p", EventType.PIPELINE_CREATED, "n1"),
    ("p/s", EventType.STEP_RUNNING, "n1"),
    ("P/s", EventType.STEP_RUNNING, "n2"),
    ("p_/s", EventType.STEP_FAILED, "n2"),
    ("pq", EventType.PIPELINE_FAILED, ""),
]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (EventFilter(), ["p", "p/s", "P/s", "p_/s", "pq"]),
        (EventFilter(entity_id="p"), ["p", "p/s"]),
        (EventFilter(entity_id="p/s"), ["p/s"]),
        (EventFilter(entity_id="p_"), ["p_/s"]),
        (EventFilter(node_id="n1"), ["p", "p/s"]),
        (EventFilter(types=frozenset({"step."})), ["p/s", "P/s", "p_/s"]),
        (EventFilter(types=frozenset({"step.failed", "pipeline."})), ["p", "p_/s", "pq"]),
        (EventFilter(types=frozenset({"step"})), []),
        (EventFilter(types=frozenset({"step."}), node_id="n2", entity_id="P"), ["P/s"]),
    ],
)
async def test_a_filter_means_the_same_in_the_table_and_in_memory(
    database_url: str, open_feed: OpenFeed, wanted: EventFilter, found: list[str]
) -> None:
    database, _ = await open_feed(database_url)
    await write_together(
        database, *(happened(entity, kind=kind, node_id=node) for entity, kind, node in FILTERED)
    )
    everything = await database.read(reading(0))
    assert entities(await database.read(reading(0, wanted))) == found
    assert entities([event for event in everything if wanted.matches(event)]) == found


async def test_following_from_now_starts_at_the_call(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url)
    await database.write(happened("before"))
    following = feed.follow(None, ALL)
    await database.write(happened("after"))
    async with asyncio.timeout(WAIT_S):
        assert entities(await anext(following)) == ["after"]
    await following.aclose()


async def test_a_follower_is_woken_by_a_commit_and_not_by_a_poll(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url)
    following = feed.follow(0, EventFilter(entity_id="b"))
    waiting = asyncio.ensure_future(anext(following))
    await write_together(database, happened("a"), happened("b"), happened("c"))
    async with asyncio.timeout(WAIT_S):
        assert entities(await waiting) == ["b"]
    await following.aclose()


async def test_a_slow_follower_gets_bounded_batches_and_misses_nothing(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url, batch_max=10)
    following = feed.follow(0, ALL)
    seen: list[str] = []
    async with asyncio.timeout(WAIT_S):
        for group in range(5):
            await write_together(
                database, *(happened(f"{group * 25 + number}") for number in range(25))
            )
            batch = await anext(following)
            assert len(batch) <= 10
            seen += entities(batch)
        while len(seen) < 125:
            seen += entities(await anext(following))
    assert seen == [f"{number}" for number in range(125)]
    await following.aclose()


async def test_a_follower_that_is_sent_nothing_outlives_retention(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url, idle_s=0.01)
    following = feed.follow(0, EventFilter(entity_id="wanted"))
    waiting = asyncio.ensure_future(anext(following))
    await database.write(happened("other", at=1))
    moved = asyncio.Event()
    read = database.read

    async def observed(fn: Callable[[Connection], Any]) -> Any:
        result = await read(fn)
        if result == ([], head):
            moved.set()
        return result

    head = await read(store.head)
    database.read = observed  # type: ignore[method-assign]  # to know when its cursor has moved
    async with asyncio.timeout(WAIT_S):
        await moved.wait()
        await database.write(lambda conn: store.purge(conn, Instant(2)))
        await database.write(happened("wanted", at=3))
        assert entities(await waiting) == ["wanted"]
    await following.aclose()


async def test_closing_ends_every_follower(database_url: str, open_feed: OpenFeed) -> None:
    _, feed = await open_feed(database_url)
    waiting = [asyncio.ensure_future(anext(feed.follow(0, ALL), None)) for _ in range(3)]
    await asyncio.sleep(0)
    await feed.close()
    async with asyncio.timeout(WAIT_S):
        assert await asyncio.gather(*waiting) == [None] * 3


async def test_more_followers_and_watches_than_the_bound_are_refused(
    database_url: str, open_feed: OpenFeed
) -> None:
    _, feed = await open_feed(database_url, followers_max=1, watches_max=1)
    waiting = asyncio.ensure_future(anext(feed.follow(0, ALL), None))
    await asyncio.sleep(0)
    with pytest.raises(GameNodeError) as refused:
        await anext(feed.follow(0, ALL))
    assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
    with feed.watch("a"), pytest.raises(GameNodeError) as refused, feed.watch("b"):
        pass
    assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
    with feed.watch("b"):
        pass
    await feed.close()
    await waiting


async def test_a_watch_sees_a_change_between_the_read_and_the_wait(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url)
    with feed.watch("p") as watch:
        await database.read(store.head)
        await database.write(happened("p/step"))
        assert await watch.changed(0)
        assert not await watch.changed(0), "each change is told once"
        await database.write(happened("other"))
        await database.write(happened("pp"))
        assert not await watch.changed(0)
        waiting = asyncio.ensure_future(watch.changed(WAIT_S))
        await database.write(happened("p"))
        assert await waiting


async def test_a_watch_runs_out_without_a_change(database_url: str, open_feed: OpenFeed) -> None:
    _, feed = await open_feed(database_url)
    with feed.watch("p") as watch:
        assert not await watch.changed(0.01)


async def test_listeners_hear_each_event_once_on_the_loop_and_a_failing_one_harms_nobody(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url, poll_s=0.001, batch_max=3)
    heard: list[str] = []
    loop_thread = threading.get_ident()

    def fail(_: Sequence[Event]) -> None:
        raise ValueError("a listener's fault")

    def listen(found: Sequence[Event]) -> None:
        assert threading.get_ident() == loop_thread
        heard.extend(entities(found))

    feed.on_events(fail)
    feed.on_events(listen)
    wanted = [f"{number}" for number in range(200)]
    for number in range(0, 200, 10):
        await write_together(database, *map(happened, wanted[number : number + 10]))
    assert sorted(heard) == sorted(wanted)
    await asyncio.sleep(0.02)  # the poll finds nothing that was not heard
    assert sorted(heard) == sorted(wanted)


async def test_a_commit_that_nobody_announced_is_found_by_the_poll(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url, poll_s=0.01)
    heard: list[str] = []
    feed.on_events(lambda found: heard.extend(entities(found)))
    row = {
        "type": "node.online",
        "at": 0,
        "node_id": "",
        "entity_id": "theirs",
        "status": "",
        "message": "",
        "data": {},
    }
    with feed.watch("theirs") as watch:
        await database.write(lambda conn: conn.execute(insert(events), [row]).close())
        assert await watch.changed(WAIT_S)
    assert heard == ["theirs"]


async def test_an_event_of_a_cancelled_caller_is_announced(
    database_url: str, open_feed: OpenFeed
) -> None:
    database, feed = await open_feed(database_url)
    following = feed.follow(None, ALL)
    async with HeldWriter(database):
        cancelled = asyncio.ensure_future(database.write(happened("a")))
        await asyncio.sleep(0)
        cancelled.cancel()
    async with asyncio.timeout(WAIT_S):
        assert entities(await anext(following)) == ["a"]
    await following.aclose()
