"""Events over HTTP, from a real database and its feed."""

from __future__ import annotations

import json
from functools import partial

from tests.support.api_fakes import NOW, Api
from tests.support.asgi import ask, opened
from tests.support.databases import OpenDatabase

from gamenode.domain.event import EventType, NewEvent
from gamenode.lib.clock import Instant
from gamenode.server.events import store
from gamenode.server.events.feed import EventFeed, EventFeedSettings

SSE = {"accept": "text/event-stream"}


async def test_events_are_read_and_followed_from_the_table(
    sqlite_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(sqlite_url)
    feed = EventFeed(database, settings=EventFeedSettings(), audit_key=b"key")
    database.on_commit(feed)
    await feed.start()
    api = Api(events=feed)

    async def happen(count: int) -> None:
        for _ in range(count):
            event = NewEvent(type=EventType.NODE_ONLINE, at=NOW, node_id="fra-07")
            await database.write(partial(store.append, event=event))

    await happen(3)
    try:
        body = (await ask(api.app, "GET", "/api/v1/events")).json()
        assert [item["id"] for item in body["items"]] == [1, 2, 3]
        async with opened(api.app, "GET", "/api/v1/events?after=2", headers=SSE) as stream:
            await stream.until(b"id: 3\n")
            await happen(1)
            await stream.until(b"id: 4\n")
        ahead = await ask(api.app, "GET", "/api/v1/events?after=99", headers=SSE)
        assert (ahead.status, json.loads(ahead.body)["code"]) == (410, "CURSOR_EXPIRED")
    finally:
        await feed.close()


async def test_a_cursor_past_retention_is_an_error_that_says_where_to_go_on(
    sqlite_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(sqlite_url)
    feed = EventFeed(database, settings=EventFeedSettings(), audit_key=b"key")
    database.on_commit(feed)
    for at in (1, 2, 3):
        event = NewEvent(type=EventType.NODE_ONLINE, at=Instant(at))
        await database.write(partial(store.append, event=event))
    await database.write(lambda conn: store.purge(conn, Instant(3)))
    api = Api(events=feed)
    for headers in ({}, SSE):
        old = await ask(api.app, "GET", "/api/v1/events?after=1", headers=headers)
        assert (old.status, old.json()["code"]) == (410, "CURSOR_EXPIRED")
        assert "after 2" in old.json()["hint"]
    for target in ("/api/v1/events?after=2", "/api/v1/events"):
        kept = (await ask(api.app, "GET", target)).json()
        assert [item["id"] for item in kept["items"]] == [3]
