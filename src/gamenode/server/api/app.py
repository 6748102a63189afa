"""The HTTP edge as one ASGI application: who may ask what, and how errors leave the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Final

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gamenode.domain.access import Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock
from gamenode.lib.ids import Ids
from gamenode.server.access.manager import AccessManager
from gamenode.server.access.roles import ROLES, check_complete
from gamenode.server.api import openapi, problem
from gamenode.server.api.attempts import AttemptRoutes
from gamenode.server.api.audit import AuditRoutes
from gamenode.server.api.events import EventRoutes
from gamenode.server.api.guard import Guard
from gamenode.server.api.home import HomeRoutes
from gamenode.server.api.inventory import InventoryRoutes
from gamenode.server.api.logs import LogRoutes
from gamenode.server.api.nodes import NodeRoutes
from gamenode.server.api.operation import (
    Authenticate,
    InternalErrors,
    Operation,
    Refusals,
    Resource,
    no_route,
)
from gamenode.server.api.pipelines import PipelineRoutes
from gamenode.server.api.plans import PlanRoutes
from gamenode.server.api.states import StateRoutes
from gamenode.server.api.streams import Streams
from gamenode.server.api.system import SystemRoutes
from gamenode.server.api.tokens import TokenRoutes
from gamenode.server.events.audit_log import AuditLog
from gamenode.server.events.feed import EventFeed
from gamenode.server.logs.manager import LogManager
from gamenode.server.nodes.inventories import InventoryKeeper
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.server.pipelines.planner import Planner
from gamenode.server.pipelines.service import GamePipelineGRPCService
from gamenode.server.pipelines.verifier import AttemptVerifier

_REQUEST_ID: Final = "x-request-id"
_REQUEST_ID_LENGTH_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """The bounds of the HTTP edge."""

    bound_host: str = "127.0.0.1"
    """The address or name that the server listens on."""
    hosts: frozenset[str] = frozenset()
    """Other names that it goes by; `*` is any."""
    body_bytes_max: int = 1024 * 1024
    """A longer body of a request is refused."""
    wait_s_max: float = 60.0
    """How long a request may wait for a pipeline's end."""
    streams_max: int = 1000
    """How many followers of events and logs there may be at once."""
    heartbeat_s: float = 15.0
    """How often a stream of server-sent events says that it is alive."""
    retry_after_s: float = 1.0
    """When to come back to a server that had no room, or was not ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nouns:
    """Everything that the HTTP edge speaks for."""

    pipeline_manager: PipelineManager
    pipeline_service: GamePipelineGRPCService
    planner: Planner
    verifier: AttemptVerifier
    nodes: NodeManager
    inventories: InventoryKeeper
    logs: LogManager
    events: EventFeed
    tokens: AccessManager
    audit: AuditLog
    why_not_ready: Callable[[], str]
    """Says why this server takes no work; empty when it does."""


def create_api(
    nouns: Nouns,
    *,
    settings: ApiSettings,
    authenticate: Authenticate,
    refusals: Refusals,
    internal_errors: InternalErrors,
    clock: Clock,
    ids: Ids,
    roles: Mapping[str, Role] = ROLES,
) -> ASGIApp:
    """Return the HTTP edge of a server.

    Raises:
        RuntimeError: A route has no role.
    """
    streams = Streams(
        streams_max=settings.streams_max,
        heartbeat_s=settings.heartbeat_s,
        retry_after_s=settings.retry_after_s,
    )

    @cache
    def description() -> bytes:
        # Made when it is first asked for: it is no part of starting up.
        return msgspec.json.encode(openapi.describe(operations, roles=roles))

    operations: Sequence[Operation[Any, Any]] = (
        *NodeRoutes(
            nouns.nodes, nouns.pipeline_manager, lingering=nouns.pipeline_service.lingering
        ).operations(),
        *StateRoutes(
            nouns.nodes,
            loads=nouns.pipeline_service.loads,
            lingering=nouns.pipeline_service.lingering,
            clock=clock,
            wait_s_max=settings.wait_s_max,
        ).operations(),
        *InventoryRoutes(nouns.inventories, streams=streams, clock=clock).operations(),
        *PipelineRoutes(
            nouns.pipeline_manager, nouns.pipeline_service, wait_s_max=settings.wait_s_max
        ).operations(),
        *PlanRoutes(nouns.planner).operations(),
        *AttemptRoutes(nouns.verifier).operations(),
        *LogRoutes(nouns.logs, streams=streams, clock=clock).operations(),
        *EventRoutes(nouns.events, streams=streams).operations(),
        *TokenRoutes(nouns.tokens).operations(),
        *AuditRoutes(nouns.audit).operations(),
        *SystemRoutes(
            why_not_ready=nouns.why_not_ready,
            description=description,
            retry_after_s=settings.retry_after_s,
        ).operations(),
        *HomeRoutes(nouns.nodes, nouns.pipeline_service).operations(),
    )
    check_complete((operation.name for operation in operations), roles=roles)
    router = Router(
        [
            Route(
                path,
                Resource(
                    tuple(group),
                    roles=roles,
                    authenticate=authenticate,
                    refusals=refusals,
                    body_bytes_max=settings.body_bytes_max,
                ),
            )
            for path, group in groupby(
                sorted(operations, key=_specific_first), key=lambda operation: operation.path
            )
        ],
        redirect_slashes=False,
        default=_no_route,
    )
    guard = Guard(bound_host=settings.bound_host, hosts=settings.hosts)
    return Edge(router, guard=guard, internal_errors=internal_errors, ids=ids)


class Edge:
    """What holds for every request: its id, the guard, and errors that leave as problems."""

    def __init__(
        self, app: ASGIApp, *, guard: Guard, internal_errors: InternalErrors, ids: Ids
    ) -> None:
        """Stand before `app`."""
        self._app = app
        self._guard = guard
        self._internal_errors = internal_errors
        self._ids = ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        match scope["type"]:
            case "http":
                await self._answer(scope, receive, send)
            case "websocket":
                await send({"type": "websocket.close", "code": 1008})
            case _:
                await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = _valid_request_id(headers) or self._ids.new()
        state = scope["state"] = {"request_id": request_id, "operation": "HTTP"}
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                marked = MutableHeaders(scope=message)
                marked[_REQUEST_ID] = request_id
                marked["x-content-type-options"] = "nosniff"
                marked["referrer-policy"] = "no-referrer"
            await send(message)

        try:
            self._guard.check(scope["method"], headers)
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as error:
            refusal = self._refusal(error, state)
            if started:
                # The status is gone out; only a broken connection can still say it.
                raise
            await problem.respond(refusal)(scope, receive, send_marked)

    def _refusal(self, error: Exception, state: Mapping[str, str]) -> GameNodeError:
        if isinstance(error, GameNodeError) and (
            error.code is not ErrorCode.INTERNAL or error.error_id
        ):
            return error
        return self._internal_errors.report(
            error, place=state["operation"], request_id=state["request_id"]
        )


def _valid_request_id(headers: Headers) -> str:
    request_id = headers.get(_REQUEST_ID, "")
    if len(request_id) <= _REQUEST_ID_LENGTH_MAX and request_id.isascii():
        return request_id if request_id.isprintable() else ""
    return ""


def _specific_first(operation: Operation[Any, Any]) -> tuple[bool, str]:
    # `{pipeline}` would match `{pipeline}:cancel` too, so that one is looked at before it.
    return operation.path.endswith("}"), operation.path


async def _no_route(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise no_route()
