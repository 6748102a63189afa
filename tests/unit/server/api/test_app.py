"""What holds for every request at the HTTP edge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.datastructures import Headers
from tests.support.api_fakes import (
    Api,
    CountingIds,
    FixedClock,
    local_admin,
    make_node,
    make_pipeline,
    pipeline_id,
    viewer,
)
from tests.support.asgi import ask

from gamenode.domain.access import Actor, Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.access.roles import ROLES
from gamenode.server.api.app import ApiSettings, create_api
from gamenode.server.api.guard import Guard

PIPELINES = "/api/v1/pipelines"
JSON = {"content-type": "application/json"}


def is_problem(answer: Any, status: int, code: ErrorCode) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert (answer.status, problem["status"], problem["code"]) == (status, status, code), problem
    assert set(problem) >= {
        "type",
        "title",
        "status",
        "detail",
        "code",
        "details",
        "retry_after_s",
        "id",
    }
    return problem


@pytest.mark.parametrize(
    "target", ["/api/v1/nothing", "/api/v1/nodes/", "/api/v1", f"{PIPELINES}/x:paint", "/x"]
)
async def test_an_unknown_route_is_a_problem(target: str) -> None:
    is_problem(await ask(Api().app, "GET", target), 404, ErrorCode.NOT_FOUND)


async def test_a_wrong_method_is_a_problem_that_names_the_right_ones() -> None:
    answer = await ask(Api().app, "DELETE", PIPELINES)
    is_problem(answer, 405, ErrorCode.INVALID_REQUEST)
    assert answer.headers["allow"] == "GET, HEAD, POST"


async def test_a_head_is_answered_like_a_get() -> None:
    answer = await ask(Api().app, "HEAD", "/healthz")
    assert answer.status == 200


@pytest.mark.parametrize(
    ("target", "field"),
    [
        ("/api/v1/nodes/..", "node"),
        ("/api/v1/nodes/Upper", "node"),
        ("/api/v1/nodes/a\x00b", "node"),
        ("/api/v1/nodes/a\n", "node"),
        (f"{PIPELINES}/123", "pipeline"),
        (f"{PIPELINES}/{pipeline_id(1)}/steps/..", "step"),
        (f"{PIPELINES}/{pipeline_id(1)}/steps/..../logs", "step"),
    ],
)
async def test_an_id_in_a_path_is_checked_before_anybody_sees_it(target: str, field: str) -> None:
    answer = await ask(Api().app, "GET", target)
    if answer.status != 404:
        problem = is_problem(answer, 400, ErrorCode.INVALID_REQUEST)
        assert problem["details"][0]["field"] == field
    else:
        is_problem(answer, 404, ErrorCode.NOT_FOUND)


@pytest.mark.parametrize(
    ("query", "field", "advice"),
    [
        ("limt=5", "limt", "did you mean limit?"),
        ("zzzz=1", "zzzz", "one of cursor, limit, node, q, status"),
        ("limit=0", "limit", ""),
        ("limit=1001", "limit", ""),
        ("limit=ten", "limit", ""),
        ("limit=1&limit=2", "limit", ""),
        ("status=DONE", "status", "one of PENDING, RUNNING, COMPLETED, FAILED, CANCELLED"),
        ("q=%00", "q", ""),
        ("cursor=x", "cursor", "leave it out to begin at the first page"),
        ("cursor=%ff", "cursor", "leave it out to begin at the first page"),
        ("&".join(f"q={n}" for n in range(101)), "query", ""),
    ],
)
async def test_a_bad_query_names_the_parameter(query: str, field: str, advice: str) -> None:
    answer = await ask(Api().app, "GET", f"{PIPELINES}?{query}")
    problem = is_problem(answer, 400, ErrorCode.INVALID_REQUEST)
    detail = problem["details"][0]
    assert (detail["field"], detail["advice"]) == (field, advice)


async def test_an_empty_parameter_counts_as_absent() -> None:
    answer = await ask(Api().app, "GET", f"{PIPELINES}?status=&node=&q=&limit=&cursor=")
    assert answer.status == 200


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        (b"", "body", "is missing"),
        (b"{", "body", "is not JSON: it ends too soon"),
        (b"nothing", "body", "is not JSON: invalid character"),
        (b"[]", "body", "must be an object, not an array"),
        (b"{}", "file", "is missing"),
        (b'{"file": 5}', "file", "must be a string, not an integer"),
        (b'{"file": "", "arg": {}}', "arg", "is not known"),
        (b'{"file": "", "args": []}', "args", "must be an object, not an array"),
        (
            b'{"file": "", "args": {"A": 1.5}}',
            "args[...]",
            "must be true or false or an integer or a string, not a number",
        ),
        (b'{"file": "", "priority": 1001}', "priority", "must be at most 1000"),
        (b'{"file": "\xff"}', "body", "is not UTF-8"),
        (b'{"file": "a\\u0000b"}', "file", "must not have a NUL character in it"),
        (b'{"file": "", "x": ' + b"[" * 100_000, "x", "is not known"),
    ],
)
async def test_a_bad_body_names_the_field(body: bytes, field: str, reason: str) -> None:
    answer = await ask(Api().app, "POST", PIPELINES, headers=JSON, body=body)
    detail = is_problem(answer, 400, ErrorCode.INVALID_REQUEST)["details"][0]
    assert detail["field"] == field
    assert reason.casefold() in detail["reason"].casefold()


async def test_what_is_not_json_is_found_by_line_and_column() -> None:
    answer = await ask(Api().app, "POST", PIPELINES, headers=JSON, body=b'{"file": "x",\n  oops}')
    detail = is_problem(answer, 400, ErrorCode.INVALID_REQUEST)["details"][0]
    assert (detail["line"], detail["column"]) == (2, 3)


async def test_an_unknown_field_brings_the_nearest_known_one() -> None:
    answer = await ask(
        Api().app, "POST", PIPELINES, headers=JSON, body=b'{"file": "", "prioriti": 1}'
    )
    detail = is_problem(answer, 400, ErrorCode.INVALID_REQUEST)["details"][0]
    assert detail["advice"] == "did you mean priority?"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_must_say_what_it_is(content_type: str) -> None:
    answer = await ask(
        Api().app, "POST", PIPELINES, headers={"content-type": content_type}, body=b"{}"
    )
    problem = is_problem(answer, 400, ErrorCode.INVALID_REQUEST)
    assert "application/yaml" in problem["detail"]


async def test_a_body_that_is_too_large_is_not_read_to_its_end() -> None:
    api = Api(ApiSettings(body_bytes_max=1000))
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b" " * 100

    answer = await ask(api.app, "POST", PIPELINES, headers=JSON, body=endless())
    is_problem(answer, 400, ErrorCode.INVALID_REQUEST)
    assert taken <= 12
    declared = {**JSON, "content-length": "1001"}
    answer = await ask(api.app, "POST", PIPELINES, headers=declared, body=b" " * 1001)
    is_problem(answer, 400, ErrorCode.INVALID_REQUEST)


async def test_an_unknown_failure_is_reported_by_route_and_tells_its_id_alone() -> None:
    api = Api()
    api.nodes.failure = RuntimeError("password=hunter2")
    answer = await ask(api.app, "GET", "/api/v1/nodes/fra-07")
    problem = is_problem(answer, 500, ErrorCode.INTERNAL)
    assert b"hunter2" not in answer.body
    assert problem["id"] == pipeline_id(1)
    assert api.errors.places == ["GET /api/v1/nodes/{node}"]


async def test_retry_advice_is_in_the_body_and_in_whole_seconds_in_the_header() -> None:
    api = Api()
    api.nodes.failure = GameNodeError(ErrorCode.STORAGE_FULL, "the disk is full", retry_after_s=2.5)
    answer = await ask(api.app, "GET", "/api/v1/nodes/fra-07")
    problem = is_problem(answer, 507, ErrorCode.STORAGE_FULL)
    assert (problem["retry_after_s"], answer.headers["retry-after"]) == (2.5, "3")


async def test_a_request_keeps_the_id_that_it_came_with() -> None:
    api = Api()
    answer = await ask(api.app, "GET", "/healthz", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    answer = await ask(api.app, "GET", "/none", headers={"x-request-id": "abc-2"})
    assert answer.headers["x-request-id"] == "abc-2"


@pytest.mark.parametrize("given", ["", "x" * 65, "a\tb", "\xe9"])
async def test_a_request_without_a_usable_id_gets_a_new_one(given: str) -> None:
    answer = await ask(Api().app, "GET", "/healthz", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == pipeline_id(1)


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "GAMES.example:8080"],
)
async def test_a_loopback_server_goes_by_its_own_names(host: str) -> None:
    api = Api(ApiSettings(hosts=frozenset({"games.example"})))
    assert (await ask(api.app, "GET", "/healthz", headers={"host": host})).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1", "", "[", ":"]
)
async def test_a_rebound_name_is_refused(host: str) -> None:
    answer = await ask(Api().app, "GET", "/healthz", headers={"host": host})
    is_problem(answer, 403, ErrorCode.PERMISSION_DENIED)


async def test_two_hosts_are_refused() -> None:
    two = [("host", "localhost"), ("host", "evil.example")]
    is_problem(
        await ask(Api().app, "GET", "/healthz", headers=two), 403, ErrorCode.PERMISSION_DENIED
    )


async def test_any_host_is_taken_where_that_is_configured() -> None:
    api = Api(ApiSettings(hosts=frozenset({"*"})))
    answer = await ask(api.app, "GET", "/healthz", headers={"host": "lb.example"})
    assert answer.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8081"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
async def test_a_foreign_page_changes_nothing(headers: dict[str, str]) -> None:
    api = Api()
    answer = await ask(
        api.app, "POST", PIPELINES, headers={**headers, **JSON}, body=b'{"file": ""}'
    )
    is_problem(answer, 403, ErrorCode.PERMISSION_DENIED)
    assert not api.pipelines.requests


async def test_an_own_page_and_a_program_may_write() -> None:
    guard = Guard(bound_host="127.0.0.1", hosts=())
    own = Headers({"host": "127.0.0.1:8080", "origin": "http://127.0.0.1:8080"})
    guard.check("POST", own)
    guard.check("POST", Headers({"host": "127.0.0.1:8080"}))


async def test_a_role_is_needed_before_anything_is_read() -> None:
    api = Api(authenticate=viewer)
    answer = await ask(api.app, "POST", PIPELINES, headers=JSON, body=b"not json")
    problem = is_problem(answer, 403, ErrorCode.PERMISSION_DENIED)
    assert "operator" in problem["detail"]
    assert (await ask(api.app, "GET", PIPELINES)).status == 200


async def test_health_needs_nobody() -> None:
    async def nobody(_authorization: str | None, /, *, source: str) -> Actor:
        del source
        raise GameNodeError(ErrorCode.UNAUTHENTICATED, "no token")

    api = Api(authenticate=nobody)
    assert (await ask(api.app, "GET", "/healthz")).status == 200
    answer = await ask(api.app, "GET", "/api/v1/nodes")
    is_problem(answer, 401, ErrorCode.UNAUTHENTICATED)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_route_without_a_role_stops_the_start() -> None:
    roles = {name: role for name, role in ROLES.items() if name != "GET /api/v1/events"}
    api = Api()
    with pytest.raises(RuntimeError, match="GET /api/v1/events"):
        create_api(
            api.nouns,
            settings=ApiSettings(),
            authenticate=local_admin,
            refusals=api.audit,
            internal_errors=api.errors,
            clock=FixedClock(),
            ids=CountingIds(),
            roles=roles,
        )


async def test_readiness_says_why_not() -> None:
    api = Api()
    assert (await ask(api.app, "GET", "/readyz")).json() == {"status": "ready"}
    api.not_ready = "the database is being migrated"
    problem = is_problem(await ask(api.app, "GET", "/readyz"), 503, ErrorCode.UNAVAILABLE)
    assert problem["detail"] == "the database is being migrated"
    assert (await ask(api.app, "GET", "/healthz")).status == 200


async def test_the_version_is_told() -> None:
    assert (await ask(Api().app, "GET", "/api/v1/version")).json()["api"] == "v1"


INTERFACE = {
    "GET /api/v1/nodes",
    "PUT /api/v1/nodes/{node}/state",
    "POST /api/v1/nodes:state",
    "POST /api/v1/nodes/{node}:fence",
    "GET /api/v1/nodes/{node}/state-changes",
    "PATCH /api/v1/nodes/{node}",
    "DELETE /api/v1/nodes/{node}",
    "GET /api/v1/nodes/{node}",
    "GET /api/v1/nodes/{node}/inventory",
    "GET /api/v1/nodes/{node}/inventory/versions",
    "GET /api/v1/nodes/{node}/inventory/diff",
    "POST /api/v1/nodes/{node}/inventory:collect",
    "GET /api/v1/inventory",
    "POST /api/v1/pipelines",
    "POST /api/v1/pipelines:validate",
    "POST /api/v1/pipelines:plan",
    "GET /api/v1/pipelines/{pipeline}/explain",
    "GET /api/v1/pipelines",
    "GET /api/v1/pipelines/{pipeline}",
    "POST /api/v1/pipelines/{pipeline}:cancel",
    "POST /api/v1/pipelines/{pipeline}:retry",
    "POST /api/v1/pipelines/{pipeline}:extend",
    "GET /api/v1/pipelines/{pipeline}/steps/{step}/logs",
    "GET /api/v1/attempts:verify",
    "GET /api/v1/events",
    "GET /api/v1/tokens",
    "POST /api/v1/tokens",
    "DELETE /api/v1/tokens/{token}",
    "GET /api/v1/audit",
    "GET /api/v1/audit:verify",
    "GET /api/v1/version",
    "GET /healthz",
    "GET /readyz",
    "GET /openapi.json",
    "GET /",
}


async def test_the_description_lists_every_route_with_what_it_takes() -> None:
    answer = await ask(Api().app, "GET", "/openapi.json")
    document = answer.json()
    described = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert described.keys() == INTERFACE
    assert {name for name in ROLES if not name.startswith("/")} == INTERFACE

    def parameters(name: str) -> set[str]:
        return {p["name"] for p in described[name]["parameters"]}

    assert parameters("GET /api/v1/nodes") == {
        "online", "state", "selector", "q", "limit", "cursor",
    }  # fmt: skip
    assert parameters("GET /api/v1/pipelines/{pipeline}/steps/{step}/logs") == {
        "pipeline", "step", "follow", "offset", "tail", "since", "attempt", "stream", "format",
        "Last-Event-ID",
    }  # fmt: skip
    assert parameters("GET /api/v1/events") == {
        "after", "type", "node", "entity", "limit", "follow", "Last-Event-ID",
    }  # fmt: skip
    assert parameters("POST /api/v1/pipelines") == {"Idempotency-Key"}
    content = described["POST /api/v1/pipelines"]["requestBody"]["content"]
    assert set(content) == {"application/json", "application/yaml"}
    assert len({operation["operationId"] for operation in described.values()}) == len(INTERFACE)


async def test_every_reference_of_the_description_leads_somewhere() -> None:
    answer = await ask(Api().app, "GET", "/openapi.json")
    schemas = answer.json()["components"]["schemas"]

    def references(value: object) -> Iterator[str]:
        match value:
            case dict():
                if isinstance(reference := value.get("$ref"), str):
                    yield reference
                for part in value.values():
                    yield from references(part)
            case list():
                for part in value:
                    yield from references(part)
            case _:
                return

    found = set(references(answer.json()))
    assert found
    assert {reference.rpartition("/")[2] for reference in found} <= schemas.keys()


async def test_the_bodies_are_what_the_description_says() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    api = Api()
    api.nodes.add(make_node("fra-07"))
    api.pipelines.add(make_pipeline(1, waiting="no node fits"))
    document = (await ask(api.app, "GET", "/openapi.json")).json()
    for target, name in [
        ("/api/v1/nodes", "NodeList"),
        ("/api/v1/nodes/fra-07", "Node"),
        (PIPELINES, "PipelineList"),
        (f"{PIPELINES}/{pipeline_id(1)}", "Pipeline"),
        ("/api/v1/events", "EventList"),
        ("/api/v1/tokens", "TokenList"),
        ("/api/v1/audit", "AuditList"),
        ("/api/v1/audit:verify", "AuditVerdict"),
        ("/api/v1/nodes/none", "Problem"),
    ]:
        body = (await ask(api.app, "GET", target)).json()
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(body)


async def test_the_page_runs_nothing_and_escapes_everything() -> None:
    api = Api()
    hostile = "<script>alert(1)</script>\"'&"
    api.pipelines.add(make_pipeline(1, name=hostile, waiting=hostile))
    api.nodes.add(make_node("fra-07"))
    answer = await ask(api.app, "GET", "/")
    assert b"<script" not in answer.body
    assert b"&lt;script&gt;" in answer.body
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert "unsafe" not in policy
    assert b"fra-07" in answer.body
    assert b"/openapi.json" in answer.body


async def test_no_answer_is_guessed_to_be_of_another_type() -> None:
    for target in ("/", "/api/v1/nodes", "/none"):
        answer = await ask(Api().app, "GET", target)
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_problem_is_json_whatever_a_message_holds() -> None:
    api = Api()
    api.nodes.failure = GameNodeError(ErrorCode.CONFLICT, 'a "b"\n\u2028')
    answer = await ask(api.app, "GET", "/api/v1/nodes/a")
    assert json.loads(answer.body)["detail"] == 'a "b"\n\u2028'


def test_a_role_for_everything_says_public_only_for_what_shows_nothing() -> None:
    public = {name for name, role in ROLES.items() if role is Role.PUBLIC}
    assert public == {
        "GET /healthz",
        "GET /readyz",
        "GET /openapi.json",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
    }
