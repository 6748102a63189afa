"""Operations: what each route takes and answers, and how a request becomes a call of one."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gamenode.domain.access import Actor, ActorKind, Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.api import problem
from gamenode.server.api.decode import PATH_PARAMETERS, BodyReader, QueryReader

Query = TypeVar("Query")
Body = TypeVar("Body")

Authenticate = Callable[[Request], Actor]
"""Returns who sent a request, or raises UNAUTHENTICATED."""

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
        actor = self._admit(request)
        query = operation.query.read(scope["query_string"].decode("latin-1"))
        body = (
            await operation.body.read(request, bytes_max=self._body_bytes_max)
            if operation.body
            else None
        )
        call = Call(request=request, actor=actor, path=path, query=query, body=body)
        response = await operation.handler(call)
        await response(scope, receive, send)

    def _admit(self, request: Request) -> Actor:
        needed = self._roles[request.method]
        if needed is Role.PUBLIC:
            return ANYONE
        actor = self._authenticate(request)
        if not actor.may(needed):
            raise GameNodeError(
                ErrorCode.PERMISSION_DENIED,
                f"{actor.name} has the role {actor.role}, and this needs {needed}",
            )
        return actor

    def _refuse_method(self, request: Request) -> Response:
        error = GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"{request.method} cannot be done here",
            hint=f"one of {self._allow} can",
        )
        return problem.respond(
            error, status=HTTPStatus.METHOD_NOT_ALLOWED, headers={"allow": self._allow}
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
