"""Operations: what each route takes and answers, and how a request becomes a call of one."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gamenode.domain.access import Actor, ActorKind, Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.access.roles import require
from gamenode.server.api import problem
from gamenode.server.api.decode import PATH_PARAMETERS, BodyReader, QueryReader

Query = TypeVar("Query")
Body = TypeVar("Body")


class Authenticate(Protocol):
    """Says who sends a request."""

    async def __call__(self, authorization: str | None, /, *, source: str) -> Actor:
        """Return who sent this header from this address, or raise UNAUTHENTICATED."""


class InternalErrors(Protocol):
    """Takes errors that nobody expected."""

    def report(self, error: Exception, *, place: str, request_id: str = "") -> GameNodeError:
        """Keep `error` for the administrator; return what the caller may be told of it."""


class Refusals(Protocol):
    """Keeps a record of refused acts."""

    async def record(
        self,
        error: GameNodeError,
        *,
        operation: str,
        by: Actor,
        target: str,
        reason: str = "",
        request_id: str = "",
    ) -> None:
        """Record that `operation` ended with `error`, if that is a refused act."""


ANYONE: Final = Actor(kind=ActorKind.LOCAL, name="anyone", role=Role.PUBLIC)
"""Who sends a request that needs no role; nobody looks at its credentials."""

_encode: Final = msgspec.json.Encoder().encode
_PARAMETER: Final = re.compile(r"{(\w+)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Query, Body]):
    """A request that was read and found valid, of somebody who may send it."""

    request: Request
    actor: Actor
    path: Mapping[str, str]
    query: Query
    body: Body
    refused: Callable[[GameNodeError, str], Awaitable[None]]
    """Records that a part of the act was refused: why, and for what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[Query, Body]):
    """One method of one route, for the router and for the description of the interface."""

    method: str
    path: str
    """The template; `{name}` is a `PathParameter`."""
    summary: str
    handler: Callable[[Call[Query, Body]], Awaitable[ASGIApp]]
    query: QueryReader[Query]
    body: BodyReader[Body] | None = None
    answer: type[msgspec.Struct] | None = None
    """The type of a JSON answer."""
    media_types: Sequence[str] = ()
    """What else it may answer with."""
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] | None = None
    """Request headers that it reads, and what they mean."""

    @property
    def name(self) -> str:
        """Its name in the table of roles."""
        return f"{self.method} {self.path}"

    @property
    def path_parameters(self) -> Sequence[str]:
        """The names in its template."""
        return _PARAMETER.findall(self.path)


class Resource:
    """Everything that can be done at one path, as an ASGI application."""

    def __init__(
        self,
        operations: Sequence[Operation[Any, Any]],
        *,
        roles: Mapping[str, Role],
        authenticate: Authenticate,
        refusals: Refusals,
        body_bytes_max: int,
    ) -> None:
        """Serve `operations`, which share their path."""
        self._operations = {operation.method: operation for operation in operations}
        self._roles = {operation.method: roles[operation.name] for operation in operations}
        # A HEAD is a GET whose body the server withholds.
        if "GET" in self._operations:
            self._operations["HEAD"] = self._operations["GET"]
            self._roles["HEAD"] = self._roles["GET"]
        self._allow = ", ".join(sorted(self._operations))
        self._authenticate = authenticate
        self._refusals = refusals
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        path: Mapping[str, str] = scope["path_params"]
        for name, value in path.items():
            if ":" in value:
                raise no_route()  # an act that nobody knows, such as `{id}:paint`
            PATH_PARAMETERS[name].check(name, value)
        operation = self._operations.get(request.method)
        if operation is None:
            await self._refuse_method(request)(scope, receive, send)
            return
        request.state.operation = operation.name
        actor = await self._caller(request)
        answering = _Answering(operation, request, actor, self._refusals)
        try:
            require(actor, self._roles[request.method])
            response = await answering.answer(path, body_bytes_max=self._body_bytes_max)
        except GameNodeError as error:
            await answering.refused(error, next(iter(path.values()), ""))
            raise
        await response(scope, receive, send)

    async def _caller(self, request: Request) -> Actor:
        if self._roles[request.method] is Role.PUBLIC:
            return ANYONE
        # A request with two of them is nobody's: joined, they are no credentials.
        sent = request.headers.getlist("authorization")
        source = request.client.host if request.client else ""
        return await self._authenticate(", ".join(sent) if sent else None, source=source)

    def _refuse_method(self, request: Request) -> Response:
        error = GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"{request.method} cannot be done here",
            hint=f"one of {self._allow} can",
        )
        return problem.respond(
            error, status=HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": self._allow}
        )


class _Answering:
    """One request on its way through an operation."""

    def __init__(
        self,
        operation: Operation[Any, Any],
        request: Request,
        actor: Actor,
        refusals: Refusals,
    ) -> None:
        self._operation = operation
        self._request = request
        self._actor = actor
        self._refusals = refusals
        self._body: Any = None

    async def answer(self, path: Mapping[str, str], *, body_bytes_max: int) -> ASGIApp:
        """Read the request and return what the operation answers."""
        operation, request = self._operation, self._request
        query = operation.query.read(request.scope["query_string"].decode("latin-1"))
        if operation.body:
            self._body = await operation.body.read(request, bytes_max=body_bytes_max)
        call = Call(
            request=request,
            actor=self._actor,
            path=path,
            query=query,
            body=self._body,
            refused=self.refused,
        )
        return await operation.handler(call)

    async def refused(self, error: GameNodeError, target: str) -> None:
        """Record that the request, or a part of it, was refused."""
        await self._refusals.record(
            error,
            operation=self._operation.name,
            by=self._actor,
            target=target,
            reason=getattr(self._body, "reason", ""),
            request_id=self._request.state.request_id,
        )


def no_route() -> GameNodeError:
    """Return the error for a path that leads nowhere."""
    return GameNodeError(
        ErrorCode.NOT_FOUND, "there is no such route", hint="/openapi.json lists all routes"
    )


def answer(
    body: msgspec.Struct,
    *,
    status: HTTPStatus = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return `body` as a JSON response."""
    return Response(
        _encode(body),
        status_code=status,
        headers={"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )
