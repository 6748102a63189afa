"""Who may what, at the faces of a real server: every row of the table, by every kind of caller."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from gamenode.domain.access import SYSTEM, TOKEN_ROLES, Actor, ActorKind, Role
from gamenode.lib.clock import SystemClock
from gamenode.lib.ids import UuidV7
from gamenode.server.access.manager import AccessSettings, AuthMode
from gamenode.server.access.roles import ACTS, ROLES
from gamenode.server.app import Server
from gamenode.server.settings import ListenSettings, ServerSettings
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

UNKNOWN = "019ab000-0000-7000-8000-000000000001"
IN_PATHS = {"{node}": "fra-07", "{pipeline}": UNKNOWN, "{step}": "a", "{token}": UNKNOWN}
ANONYMOUS = "anonymous"
CALLERS = (ANONYMOUS, *TOKEN_ROLES)
ROUTES = sorted(name for name in ROLES if not name.startswith("/"))
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in (
        pb.DESCRIPTOR.services_by_name["GameNodeService"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    )
    for method in service.methods
}


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Served:
    """A server in this process, on loopback, and a token for each role."""

    def __init__(self, folder: Path, *, auth: AuthMode = AuthMode.TOKENS) -> None:
        self.http, self.grpc = _free_address(), _free_address()
        clock = SystemClock()
        listen = ListenSettings(http=self.http, grpc=self.grpc, data=folder, stop_s_max=1.0)
        settings = ServerSettings(server=listen, access=AccessSettings(auth=auth))
        self.server = Server(settings, clock=clock, ids=UuidV7(clock), random=Random(1))
        self.tokens: dict[str, str] = {}

    async def start(self) -> None:
        await self.server.start()
        for role in TOKEN_ROLES:
            _, self.tokens[role] = await self.server._access.create(
                name=f"the {role}", role=role, ttl_s=None, by=SYSTEM
            )

    def credentials(self, caller: str) -> dict[str, str]:
        token = self.tokens.get(caller, "")
        return {"authorization": f"Bearer {token}"} if token else {}

    async def ask(
        self, caller: str, operation: str, body: object = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send the request that `operation` names, as `caller`."""
        method, _, path = operation.partition(" ")
        for template, value in IN_PATHS.items():
            path = path.replace(template, value)
        headers = {"content-type": "application/json", **self.credentials(caller)}
        content = None if body is None else json.dumps(body)

        def exchange() -> tuple[int, Mapping[str, str], bytes]:
            connection = http.client.HTTPConnection(self.http, timeout=10.0)
            try:
                connection.request(method, path, content, headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        return await asyncio.to_thread(exchange)

    async def call(self, caller: str, method: str, message: bytes = b"") -> Any:
        """Make the call that `method` names, as `caller`; return its status."""
        described = METHODS[method]
        kind = (
            f"{'stream' if described.client_streaming else 'unary'}_"
            f"{'stream' if described.server_streaming else 'unary'}"
        )
        async with grpc.aio.insecure_channel(self.grpc) as channel:
            request: Any = message
            if described.client_streaming:
                request = _one(message)
            call = getattr(channel, kind)(method)(
                request, metadata=tuple(self.credentials(caller).items()), timeout=0.5
            )
            try:
                if described.server_streaming:
                    await call.read()
                    call.cancel()
                    return grpc.StatusCode.OK
                await call
            except grpc.aio.AioRpcError as error:
                return error
            return grpc.StatusCode.OK

    async def acts(self) -> list[dict[str, Any]]:
        """Return the audit log, newest first."""
        _, _, body = await self.ask(Role.ADMIN, "GET /api/v1/audit?limit=1000")
        items: list[dict[str, Any]] = json.loads(body)["items"]
        return items


async def _one(message: bytes) -> AsyncIterator[bytes]:
    yield message


@asynccontextmanager
async def serving(folder: Path, *, auth: AuthMode = AuthMode.TOKENS) -> AsyncIterator[Served]:
    served = Served(folder, auth=auth)
    await served.start()
    try:
        yield served
    finally:
        await served.server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("server")) as started:
        yield started


def _may(caller: str, needed: Role) -> bool:
    if caller == ANONYMOUS:
        return needed is Role.PUBLIC
    return Actor(kind=ActorKind.TOKEN, name="", role=Role(caller)).may(needed)


module_loop = pytest.mark.asyncio(loop_scope="module")


@module_loop
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("route", ROUTES)
async def test_a_route_is_for_who_has_its_role_and_nobody_else(
    served: Served, route: str, caller: str
) -> None:
    status, headers, body = await served.ask(caller, route)
    if _may(caller, ROLES[route]):
        assert status not in (401, 403, 500), body
        return
    problem = json.loads(body)
    if caller == ANONYMOUS:
        assert (status, problem["code"]) == (401, "UNAUTHENTICATED")
        assert headers["www-authenticate"] == "Bearer"
    else:
        assert (status, problem["code"]) == (403, "PERMISSION_DENIED")
        assert ROLES[route] in problem["hint"]


@module_loop
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("method", sorted(METHODS))
async def test_a_call_is_for_who_has_its_role_and_nobody_else(
    served: Served, method: str, caller: str
) -> None:
    ended = await served.call(caller, method)
    code = ended if ended is grpc.StatusCode.OK else ended.code()
    needed = ROLES[method]
    # Agents have no credentials yet: whoever sends none from this host may be one.
    if _may(caller, needed) or (caller == ANONYMOUS and needed is Role.NODE):
        assert code not in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.UNIMPLEMENTED,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        ), ended
    elif caller == ANONYMOUS:
        assert code is grpc.StatusCode.UNAUTHENTICATED, ended
    else:
        assert code is grpc.StatusCode.PERMISSION_DENIED, ended
        assert needed in _hint_of(ended)


def _hint_of(error: Any) -> str:
    status: status_pb2.Status | None = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.metadata["hint"])


def test_every_act_is_named_for_the_audit_log() -> None:
    looks = {"POST /api/v1/pipelines:validate", "POST /api/v1/pipelines:plan"}
    acts = {
        name
        for name, role in ROLES.items()
        if name.partition(" ")[0] in {"POST", "PUT", "PATCH", "DELETE"} and name not in looks
    }
    assert {name for name in ACTS if not name.startswith("/")} == acts
    assert ACTS.keys() <= ROLES.keys()


@module_loop
@pytest.mark.parametrize(
    ("operation", "caller"),
    [
        (operation, caller)
        for operation in sorted(ACTS)
        for caller in TOKEN_ROLES
        if not _may(caller, ROLES[operation])
    ],
)
async def test_a_forbidden_act_is_in_the_audit_log_as_refused(
    served: Served, operation: str, caller: Role
) -> None:
    before = len(await served.acts())
    if operation.startswith("/"):
        await served.call(caller, operation, b"\x0a\x06fra-07")  # the id in the first field
    else:
        await served.ask(caller, operation)
    newest, *older = await served.acts()
    assert len(older) == before
    assert newest["action"] == ACTS[operation]
    assert newest["actor"] == {"kind": "token", "name": f"the {caller}", "role": caller}
    assert (newest["outcome"], newest["code"]) == ("refused", "PERMISSION_DENIED")
    assert newest["source"] == "127.0.0.1"
    if operation.startswith("/"):
        assert newest["target"] == "fra-07"
    else:
        assert newest["request_id"]
        named = [value for name, value in IN_PATHS.items() if name in operation]
        assert newest["target"] == (named[0] if named else "")


@module_loop
async def test_an_administrators_act_that_is_refused_is_in_the_audit_log_too(
    served: Served,
) -> None:
    body = {"state": "disabled", "reason": "sold"}
    status, _, _ = await served.ask(Role.ADMIN, "PUT /api/v1/nodes/nowhere/state", body)
    assert status == 404
    newest = (await served.acts())[0]
    assert (newest["action"], newest["target"]) == ("node.state", "nowhere")
    assert (newest["outcome"], newest["code"]) == ("refused", "NODE_NOT_FOUND")
    assert newest["reason"] == "sold"


@module_loop
async def test_a_stranger_fills_no_audit_log(served: Served) -> None:
    before = await served.acts()
    await served.ask(ANONYMOUS, "PUT /api/v1/nodes/{node}/state", {"state": "disabled"})
    assert await served.acts() == before


@module_loop
async def test_a_token_of_another_server_is_unknown_here(served: Served, tmp_path: Path) -> None:
    async with serving(tmp_path) as other:
        served.tokens["foreigner"] = other.tokens[Role.ADMIN]
    status, _, body = await served.ask("foreigner", "GET /api/v1/nodes")
    assert (status, json.loads(body)["detail"]) == (401, "this token is not known")
    ended = await served.call("foreigner", "/gamenode.v1.GameNodeService/Register")
    assert ended.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_where_nobody_signs_in_everything_is_open(tmp_path: Path) -> None:
    async with serving(tmp_path, auth=AuthMode.NONE) as served:
        for route in ROUTES:
            status, _, body = await served.ask(ANONYMOUS, route)
            assert status not in (401, 403), (route, body)
        ended = await served.call(ANONYMOUS, "/gamenode.v1.GameNodeService/Execute")
        assert ended.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not (tmp_path / "admin-token").exists()
