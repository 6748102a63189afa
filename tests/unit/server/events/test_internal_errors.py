"""The administrator hears of unexpected errors, at most once a minute a place (J2)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import Connection
from tests.support.api_fakes import CountingIds
from tests.support.databases import OpenDatabase
from tests.support.time import FakeClock

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event, EventFilter
from gamenode.server.db.database import Database
from gamenode.server.events import store
from gamenode.server.events.feed import EventFeed, EventFeedSettings
from gamenode.server.events.internal_errors import InternalErrors, InternalErrorSettings

WAIT_S = 5.0


class Told:
    """The errors of a server with a clock that a test moves, and the events that they became."""

    def __init__(self, database: Database, **settings: int) -> None:
        self.clock = FakeClock()
        self.errors = InternalErrors(
            database,
            clock=self.clock,
            ids=CountingIds(),
            settings=InternalErrorSettings(**settings),
        )
        self._database = database

    def fail(self, place: str) -> GameNodeError:
        return self.errors.report(RuntimeError("password=hunter2"), place=place, request_id="r-1")

    async def events(self) -> Sequence[Event]:
        def read(conn: Connection) -> Sequence[Event]:
            return store.read_after(conn, 0, wanted=EventFilter(), limit=100)

        return await self._database.read(read)

    async def until(self, holds: Callable[[Sequence[Event]], bool]) -> Sequence[Event]:
        async with asyncio.timeout(WAIT_S):
            while not holds(found := await self.events()):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)
        return found


@asynccontextmanager
async def telling(url: str, open_database: OpenDatabase, **settings: int) -> AsyncIterator[Told]:
    database = await open_database(url)
    database.on_commit(EventFeed(database, settings=EventFeedSettings(), audit_key=b"key"))
    told = Told(database, **settings)
    running = asyncio.ensure_future(told.errors.run())
    try:
        yield told
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_log_has_everything_and_the_caller_an_id(
    sqlite_url: str, open_database: OpenDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async with telling(sqlite_url, open_database) as told:
        with caplog.at_level(logging.ERROR):
            answer = told.fail("GET /x")
    assert answer.code is ErrorCode.INTERNAL
    assert "hunter2" not in str(answer)
    record = caplog.records[-1]
    assert (vars(record)["error_id"], vars(record)["request_id"]) == (answer.error_id, "r-1")
    assert record.exc_info is not None
    assert "hunter2" in str(record.exc_info[1])


async def test_one_event_a_place_and_minute_with_the_number_of_errors(
    sqlite_url: str, open_database: OpenDatabase
) -> None:
    async with telling(sqlite_url, open_database) as told:
        told.fail("GET /x")
        (first,) = await told.until(lambda found: len(found) == 1)
        assert first.type == "error.internal"
        assert (first.data["place"], first.data["count"]) == ("GET /x", "1")
        assert "hunter2" not in repr(first)
        told.clock.advance(59.9)
        for _ in range(3):
            told.fail("GET /x")
        newest = told.fail("GET /x")
        told.fail("GET /y")  # another place is told at once
        found = await told.until(lambda found: len(found) == 2)
        assert found[-1].data["place"] == "GET /y"
        told.clock.advance(0.1)
        told.fail("GET /y")  # wakes the loop, and waits for its own minute
        found = await told.until(lambda found: len(found) == 3)
        assert (found[-1].data["place"], found[-1].data["count"]) == ("GET /x", "4")
        assert found[-1].data["error_id"] == newest.error_id


async def test_further_places_are_told_together(
    sqlite_url: str, open_database: OpenDatabase
) -> None:
    async with telling(sqlite_url, open_database, places_max=1) as told:
        for place in "abc":
            told.fail(place)
        found = await told.until(lambda found: len(found) == 2)
        assert {(event.data["place"], event.data["count"]) for event in found} == {
            ("a", "1"),
            ("elsewhere", "2"),
        }
