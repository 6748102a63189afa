"""Pipelines over HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.support.api_fakes import Api, make_pipeline, pipeline_id
from tests.support.asgi import ask, scope_of, until

from gamenode.domain.errors import ErrorCode
from gamenode.domain.pipeline import Status
from gamenode.server.api.app import ApiSettings

PIPELINES = "/api/v1/pipelines"
ONE = f"{PIPELINES}/{pipeline_id(1)}"
JSON = {"content-type": "application/json"}


async def test_a_pipeline_is_created_from_json() -> None:
    api = Api()
    body = {
        "file": "name: hello",
        "args": {"PORT": 8080, "DRY": True, "NAME": "x"},
        "envs": {"ROOT": "/srv"},
        "node": "fra-07",
        "selector": "zone=a",
        "priority": 5,
    }
    answer = await ask(
        api.app,
        "POST",
        PIPELINES,
        headers={**JSON, "idempotency-key": "k1"},
        body=json.dumps(body).encode(),
    )
    assert answer.status == 201
    assert answer.headers["location"] == ONE
    assert answer.json()["id"] == pipeline_id(1)
    request, by = api.pipelines.requests[0]
    assert request.file == "name: hello"
    assert request.args == {"PORT": "8080", "DRY": "true", "NAME": "x"}
    assert request.envs == {"ROOT": "/srv"}
    assert (request.node, request.selector, request.priority) == ("fra-07", "zone=a", 5)
    assert request.idempotency_key == "k1"
    assert (by.name, by.source) == ("local", "127.0.0.1")


async def test_a_pipeline_is_created_from_a_bare_file() -> None:
    api = Api()
    text = "name: héllo\nsteps: []\n"
    answer = await ask(
        api.app,
        "POST",
        PIPELINES,
        headers={"content-type": "application/yaml; charset=utf-8"},
        body=text.encode(),
    )
    assert answer.status == 201
    assert api.pipelines.requests[0][0].file == text


async def test_a_bare_file_that_is_not_utf8_is_refused_by_line_and_column() -> None:
    answer = await ask(
        Api().app,
        "POST",
        PIPELINES,
        headers={"content-type": "application/yaml"},
        body=b"name: ok\nx: \xff\n",
    )
    assert answer.status == 400
    detail = answer.json()["details"][0]
    assert (detail["reason"], detail["line"], detail["column"]) == ("is not UTF-8", 2, 4)


async def test_the_same_key_again_answers_with_the_first_pipeline() -> None:
    api = Api()
    headers = {**JSON, "idempotency-key": "k1"}
    first = await ask(api.app, "POST", PIPELINES, headers=headers, body=b'{"file": ""}')
    again = await ask(api.app, "POST", PIPELINES, headers=headers, body=b'{"file": ""}')
    assert first.json()["id"] == again.json()["id"]


@pytest.mark.parametrize("key", ["x" * 129, "a\tb", "\xe9"])
async def test_a_key_that_cannot_be_kept_is_refused(key: str) -> None:
    answer = await ask(
        Api().app,
        "POST",
        PIPELINES,
        headers={**JSON, "idempotency-key": key},
        body=b'{"file": ""}',
    )
    assert answer.status == 400
    assert answer.json()["details"][0]["field"] == "idempotency-key"


async def test_the_shape_of_a_pipeline() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1, waiting="no node fits"))
    assert (await ask(api.app, "GET", ONE)).json() == {
        "id": pipeline_id(1),
        "name": "hello",
        "status": "PENDING",
        "reason": "",
        "message": "no node fits",
        "node_id": None,
        "attempt": 0,
        "args": {"IMAGE": "alpine"},
        "priority": 0,
        "steps": [
            {
                "name": "greet",
                "type": "task",
                "status": "PENDING",
                "reason": "",
                "message": "",
                "exit_code": None,
                "signal": None,
                "attempt": 0,
                "started_at": None,
                "ended_at": None,
                "instance_id": None,
                "attempts_max": 0,
            }
        ],
        "waiting": [
            {
                "reason": "OFFLINE",
                "text": "no node fits",
                "nodes": [],
                "nodes_total": 0,
                "passes": True,
            }
        ],
        "cancel_requested_at": None,
        "cancel_reason": "",
        "created_at": "2026-11-24T22:00:00.123Z",
        "created_by": "local",
        "started_at": None,
        "ended_at": None,
        "retry_of": None,
        "reservation": None,
        "on_lost": "wait",
        "extended_s": 0.0,
        "may_still_run": False,
    }


async def test_an_unknown_pipeline_is_not_found() -> None:
    answer = await ask(Api().app, "GET", ONE)
    assert (answer.status, answer.json()["code"]) == (404, ErrorCode.PIPELINE_NOT_FOUND)


async def test_a_wait_answers_at_once_when_the_pipeline_ends() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    waiting = asyncio.ensure_future(ask(api.app, "GET", f"{ONE}?wait=30s"))
    await until(lambda: api.pipelines.waiters == 1)
    await api.pipelines.end(pipeline_id(1), Status.COMPLETED)
    async with asyncio.timeout(1):
        assert (await waiting).json()["status"] == "COMPLETED"


async def test_a_wait_that_runs_out_answers_with_the_pipeline_as_it_is() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    answer = await ask(api.app, "GET", f"{ONE}?wait=10ms")
    assert (answer.status, answer.json()["status"]) == (200, "PENDING")


@pytest.mark.parametrize("wait", ["61s", "soon", "30", "-1s"])
async def test_a_wait_has_a_unit_and_a_bound(wait: str) -> None:
    answer = await ask(Api().app, "GET", f"{ONE}?wait={wait}")
    assert answer.status == 400
    assert answer.json()["details"][0]["field"] == "wait"


async def test_a_wait_ends_with_the_one_who_waits() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    sent = False

    async def receive() -> dict[str, object]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await until(lambda: api.pipelines.waiters == 1)
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        raise AssertionError(message)

    async with asyncio.timeout(5):
        await api.app(scope_of("GET", f"{ONE}?wait=30s", {}), receive, send)
    assert api.pipelines.waiters == 0


async def test_a_cancel_takes_a_reason_and_who_asked() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    answer = await ask(
        api.app, "POST", f"{ONE}:cancel", headers=JSON, body=b'{"reason": "wrong map"}'
    )
    assert answer.json()["cancel_reason"] == "wrong map by local"
    assert answer.json()["status"] == "PENDING"
    answer = await ask(api.app, "POST", f"{ONE}:cancel", headers=JSON, body=b'{"force": true}')
    assert answer.json()["status"] == "CANCELLED"


async def test_a_cancel_needs_no_body() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    answer = await ask(api.app, "POST", f"{ONE}:cancel")
    assert answer.json()["cancel_requested_at"] == "2026-11-24T22:00:00.123Z"


async def test_a_retry_is_a_new_pipeline_with_a_place_of_its_own() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    headers = {**JSON, "idempotency-key": "k"}
    body = b'{"from_failed": true}'
    answer = await ask(api.app, "POST", f"{ONE}:retry", headers=headers, body=body)
    made = answer.json()
    assert (answer.status, made["retry_of"], made["waiting"][0]["text"]) == (
        201,
        pipeline_id(1),
        "from",
    )
    assert answer.headers["location"] == f"{PIPELINES}/{made['id']}"
    assert api.pipelines.keys == ["k"]
    assert (await ask(api.app, "POST", f"{ONE}:retry")).json()["waiting"] == []


async def test_an_extension_has_a_length_and_a_bound() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    answer = await ask(api.app, "POST", f"{ONE}:extend", headers=JSON, body=b'{"by_s": 60}')
    assert answer.json()["extended_s"] == 60.0
    for body in (b"{}", b'{"by_s": 0}', b'{"by_s": -1}', b'{"by_s": 2592001}', b'{"by_s": "2h"}'):
        answer = await ask(api.app, "POST", f"{ONE}:extend", headers=JSON, body=body)
        assert (answer.status, answer.json()["details"][0]["field"]) == (400, "by_s")


async def test_pages_hold_each_pipeline_once_newest_first() -> None:
    api = Api()
    for number in range(1, 8):
        api.pipelines.add(make_pipeline(number))
    seen: list[str] = []
    target = f"{PIPELINES}?limit=3"
    for _ in range(3):
        page = (await ask(api.app, "GET", target)).json()
        seen += [item["id"] for item in page["items"]]
        if page["next_cursor"] is None:
            break
        target = f"{PIPELINES}?limit=3&cursor={page['next_cursor']}"
        api.pipelines.add(make_pipeline(100 + len(seen)))  # what is new shifts no page
    assert seen == [pipeline_id(number) for number in range(7, 0, -1)]


async def test_a_full_last_page_leads_nowhere() -> None:
    api = Api()
    for number in range(1, 4):
        api.pipelines.add(make_pipeline(number))
    page = (await ask(api.app, "GET", f"{PIPELINES}?limit=3")).json()
    assert len(page["items"]) == 3
    assert page["next_cursor"] is None


async def test_a_list_is_filtered() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1, status=Status.RUNNING))
    api.pipelines.add(make_pipeline(2, name="other"))
    answer = await ask(api.app, "GET", f"{PIPELINES}?status=RUNNING")
    assert [item["id"] for item in answer.json()["items"]] == [pipeline_id(1)]
    answer = await ask(api.app, "GET", f"{PIPELINES}?q=oth")
    assert [item["id"] for item in answer.json()["items"]] == [pipeline_id(2)]


HELLO = """\
name: hello
args: [WHO]
steps:
  - name: greet
    container: {image: "alpine:3.20", commands: ["echo hello"]}
"""


async def test_a_valid_file_is_told_back_as_what_it_declares() -> None:
    answer = await ask(
        Api().app,
        "POST",
        f"{PIPELINES}:validate",
        headers={"content-type": "application/yaml"},
        body=HELLO.encode(),
    )
    assert answer.status == 200
    body = answer.json()
    assert body["name"] == "hello"
    assert body["args"][0]["name"] == "WHO"
    assert body["args"][0]["required"] is True
    assert body["steps"] == [{"name": "greet", "type": "task", "when": "success"}]
    assert body["args_schema"]["properties"] == {"WHO": {"type": "string"}}
    assert body["args_schema"]["required"] == ["WHO"]


async def test_an_invalid_file_is_a_problem_with_places_and_advice() -> None:
    answer = await ask(
        Api().app,
        "POST",
        f"{PIPELINES}:validate",
        headers={"content-type": "application/yaml"},
        body=HELLO.replace("image:", "imag:").encode(),
    )
    assert answer.status == 400
    detail = answer.json()["details"][0]
    assert "imag" in detail["field"]
    assert "image" in detail["advice"]


async def test_args_are_checked_where_they_are_given() -> None:
    for args, status in [({}, 400), ({"WHO": "you"}, 200)]:
        answer = await ask(
            Api().app,
            "POST",
            f"{PIPELINES}:validate",
            headers=JSON,
            body=json.dumps({"file": HELLO, "args": args}).encode(),
        )
        assert answer.status == status


async def test_a_longer_wait_can_be_configured() -> None:
    api = Api(ApiSettings(wait_s_max=0.005))
    api.pipelines.add(make_pipeline(1))
    assert (await ask(api.app, "GET", f"{ONE}?wait=5ms")).status == 200
    assert (await ask(api.app, "GET", f"{ONE}?wait=6ms")).status == 400
