"""Events over HTTP."""

from __future__ import annotations

import json

import pytest
from tests.support.api_fakes import Api, make_event, pipeline_id
from tests.support.asgi import ask, opened, until

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.api.app import ApiSettings

EVENTS = "/api/v1/events"
SSE = {"accept": "text/event-stream"}


async def test_the_shape_of_an_event() -> None:
    api = Api()
    await api.events.append(make_event(7, message="queued"))
    answer = await ask(api.app, "GET", EVENTS)
    assert answer.json() == {
        "items": [
            {
                "id": 7,
                "type": "pipeline.created",
                "node_id": "fra-07",
                "entity_id": pipeline_id(1),
                "status": "PENDING",
                "message": "queued",
                "timestamp": "2026-11-24T22:00:00.123Z",
                "data": {},
            }
        ],
        "next_cursor": None,
    }


async def test_pages_hold_each_event_once_oldest_first() -> None:
    api = Api()
    await api.events.append(*(make_event(number) for number in range(1, 8)))
    seen: list[int] = []
    target = f"{EVENTS}?limit=3"
    while True:
        page = (await ask(api.app, "GET", target)).json()
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        target = f"{EVENTS}?limit=3&after={page['next_cursor']}"
    assert seen == list(range(1, 8))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("type=node.online", [2]),
        ("type=node.online&type=pipeline.created", [1, 2]),
        ("type=step.", [3]),
        ("node=ams-01", []),
        (f"entity={pipeline_id(1)}", [1, 2, 3]),
    ],
)
async def test_events_are_filtered(query: str, found: list[int]) -> None:
    api = Api()
    await api.events.append(
        make_event(1), make_event(2, type_="node.online"), make_event(3, type_="step.running")
    )
    page = (await ask(api.app, "GET", f"{EVENTS}?{query}")).json()
    assert [item["id"] for item in page["items"]] == found


async def test_a_type_that_does_not_exist_brings_the_nearest_one() -> None:
    answer = await ask(Api().app, "GET", f"{EVENTS}?type=pipeline.create")
    assert answer.status == 400
    assert answer.json()["details"][0]["advice"] == "did you mean pipeline.created?"


@pytest.mark.parametrize("headers", [{}, SSE])
async def test_an_expired_cursor_is_gone_before_a_stream_begins(headers: dict[str, str]) -> None:
    api = Api()
    api.events.oldest = 100
    answer = await ask(api.app, "GET", f"{EVENTS}?after=5&follow=1", headers=headers)
    assert (answer.status, answer.json()["code"]) == (410, ErrorCode.CURSOR_EXPIRED)


async def test_server_sent_events_carry_cursor_type_and_body() -> None:
    api = Api()
    await api.events.append(make_event(1))
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        await until(lambda: api.events.readers == 1)
        await api.events.append(make_event(2, message="a\nb"))
        seen = await stream.until(b"event: pipeline.created")
    block = seen.rpartition(b": here\n\n")[2]
    lines = block.decode().strip().split("\n")
    assert lines[0] == "id: 2"  # from now on, so the first one is not told
    assert lines[1] == "event: pipeline.created"
    assert json.loads(lines[2].removeprefix("data: "))["message"] == "a\nb"
    assert len(lines) == 3


async def test_a_reader_that_comes_back_goes_on_where_it_was() -> None:
    api = Api()
    await api.events.append(*(make_event(number) for number in range(1, 5)))
    headers = {**SSE, "last-event-id": "2"}
    async with opened(api.app, "GET", f"{EVENTS}?after=0", headers=headers) as stream:
        seen = await stream.until(b"id: 4")
    assert b"id: 3\n" in seen
    assert b"id: 2\n" not in seen


@pytest.mark.parametrize("last", ["x", "-1", "1" * 20, "9" * 5000, "\xb2"])
async def test_a_last_event_id_that_is_none_is_refused(last: str) -> None:
    answer = await ask(Api().app, "GET", EVENTS, headers={**SSE, "last-event-id": last})
    assert answer.status == 400


async def test_following_without_server_sent_events_gives_lines_of_json() -> None:
    api = Api()
    await api.events.append(make_event(1))
    async with opened(api.app, "GET", f"{EVENTS}?follow=true&after=0") as stream:
        assert stream.headers["content-type"] == "application/x-ndjson"
        assert json.loads(await stream.until(b"\n"))["id"] == 1


async def test_a_quiet_stream_says_that_it_is_alive() -> None:
    api = Api(ApiSettings(heartbeat_s=0.005))
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        for _ in range(3):
            assert await stream.next() == b": here\n\n"


async def test_a_reader_that_left_holds_nothing() -> None:
    api = Api()
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        await stream.next()
        assert api.events.readers == 1
    assert api.events.readers == 0


async def test_a_failure_of_a_running_stream_is_told_in_it() -> None:
    api = Api()
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        await until(lambda: api.events.readers == 1)
        await api.events.fail(GameNodeError(ErrorCode.UNAVAILABLE, "the server is stopping"))
        seen = await stream.rest()
    told = seen.partition(b"event: problem\ndata: ")[2]
    assert json.loads(told)["code"] == ErrorCode.UNAVAILABLE


async def test_no_more_streams_than_the_setting_says() -> None:
    api = Api(ApiSettings(streams_max=1))
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        await stream.next()
        answer = await ask(api.app, "GET", EVENTS, headers=SSE)
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        assert stream.status == 200


async def test_a_burst_is_sent_whole_in_few_writes() -> None:
    api = Api()
    async with opened(api.app, "GET", EVENTS, headers=SSE) as stream:
        await stream.next()
        await until(lambda: api.events.readers == 1)
        await api.events.append(*(make_event(number) for number in range(1, 2001)))
        writes, seen = 0, b""
        while b"id: 2000\n" not in seen:
            seen = await stream.next() or b""
            writes += 1
    assert writes <= 3
