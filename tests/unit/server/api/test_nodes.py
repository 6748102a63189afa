"""Nodes over HTTP."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.api_fakes import Api, make_node, make_pipeline
from tests.support.asgi import ask

from gamenode.domain.errors import ErrorCode
from gamenode.domain.pipeline import Status

JSON = {"content-type": "application/json"}
NODES = "/api/v1/nodes"


async def test_the_shape_of_a_node() -> None:
    api = Api()
    api.nodes.add(make_node("fra-07", note="loud fan"))
    now = "2026-11-24T22:00:00.123Z"
    assert (await ask(api.app, "GET", f"{NODES}/fra-07")).json() == {
        "id": "fra-07",
        "display_name": "fra-07",
        "type": "physical",
        "online": True,
        "online_since": now,
        "last_heartbeat_at": now,
        "heartbeat_latency_s": None,
        "clock_skew_s": None,
        "link": {"state": "connected", "since": now, "cause": ""},
        "state": "normal",
        "state_change": None,
        "session_epoch": 3,
        "agent_version": "0.1.0",
        "labels": {"zone": "a"},
        "note": "loud fan",
        "conditions": [],
        "inventory_version": 1,
        "registered_at": now,
        "may_still_run": [],
    }


async def test_a_node_shows_what_it_may_still_run() -> None:
    api = Api()
    api.nodes.add(make_node("fra-07", online=False))
    lost = replace(make_pipeline(1, status=Status.FAILED), node_id="fra-07", attempt=2)
    api.pipelines.add(replace(lost, may_still_run=True))
    shown = (await ask(api.app, "GET", f"{NODES}/fra-07")).json()
    listed = (await ask(api.app, "GET", NODES)).json()["items"][0]
    assert shown["may_still_run"] == [{"pipeline_id": lost.id, "attempt": 2}]
    assert listed == shown


async def test_a_fence_says_why_it_is_known() -> None:
    api = Api()
    body = b'{"reason": "its mainboard burnt"}'
    answer = await ask(api.app, "POST", f"{NODES}/fra-07:fence", headers=JSON, body=body)
    assert (answer.status, answer.json()["id"]) == (200, "fra-07")
    assert api.pipelines.fenced == [("fra-07", "its mainboard burnt", "local")]
    for vague in (b"{}", b'{"reason": ""}'):
        answer = await ask(api.app, "POST", f"{NODES}/fra-07:fence", headers=JSON, body=vague)
        assert (answer.status, answer.json()["details"][0]["field"]) == (400, "reason")


async def test_an_unknown_node_is_not_found() -> None:
    answer = await ask(Api().app, "GET", f"{NODES}/fra-07")
    assert (answer.status, answer.json()["code"]) == (404, ErrorCode.NODE_NOT_FOUND)


async def test_pages_hold_each_node_once() -> None:
    api = Api()
    for number in range(7):
        api.nodes.add(make_node(f"n{number}"))
    seen: list[str] = []
    target = f"{NODES}?limit=3"
    while True:
        page = (await ask(api.app, "GET", target)).json()
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        target = f"{NODES}?limit=3&cursor={page['next_cursor']}"
    assert seen == [f"n{number}" for number in range(7)]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("online=true", ["up"]),
        ("online=false", ["down"]),
        ("state=disabled", []),
        ("selector=zone=a", ["down", "up"]),
        ("selector=zone%3Db", []),
        ("q=ow", ["down"]),
    ],
)
async def test_a_list_is_filtered(query: str, found: list[str]) -> None:
    api = Api()
    api.nodes.add(make_node("up"))
    api.nodes.add(make_node("down", online=False))
    answer = await ask(api.app, "GET", f"{NODES}?{query}")
    assert [item["id"] for item in answer.json()["items"]] == found


async def test_a_selector_that_cannot_be_read_is_named() -> None:
    answer = await ask(Api().app, "GET", f"{NODES}?selector=a%20b")
    assert answer.status == 400
    assert answer.json()["details"][0]["field"] == "selector"


async def test_a_cursor_of_another_list_is_refused() -> None:
    api = Api()
    for number in range(3):
        api.nodes.add(make_node(f"n{number}"))
    cursor = (await ask(api.app, "GET", f"{NODES}?limit=1")).json()["next_cursor"]
    answer = await ask(api.app, "GET", f"/api/v1/pipelines?cursor={cursor}")
    assert answer.status == 400
