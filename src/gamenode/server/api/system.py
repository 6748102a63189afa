"""The routes about the server itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp

from gamenode import __version__
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.api.decode import NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.wire import http


class SystemRoutes:
    """Says which server this is, whether it lives, works, and what it can be asked."""

    def __init__(
        self,
        *,
        why_not_ready: Callable[[], str],
        description: Callable[[], bytes],
        retry_after_s: float,
    ) -> None:
        """Answer with what is handed in.

        Args:
            why_not_ready: Says why the server takes no work; empty when it does.
            description: Returns the OpenAPI document, as JSON.
            retry_after_s: When to ask again whether it is ready.
        """
        self._why_not_ready = why_not_ready
        self._description = description
        self._retry_after_s = retry_after_s

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/version",
                summary="Show which program answers",
                handler=self._version,
                query=QueryReader(NoQuery),
                answer=http.Version,
            ),
            Operation(
                method="GET",
                path="/healthz",
                summary="Whether the server lives",
                handler=self._health,
                query=QueryReader(NoQuery),
                answer=http.Health,
            ),
            Operation(
                method="GET",
                path="/readyz",
                summary="Whether the server takes work",
                handler=self._readiness,
                query=QueryReader(NoQuery),
                answer=http.Health,
            ),
            Operation(
                method="GET",
                path="/openapi.json",
                summary="Describe this interface",
                handler=self._describe,
                query=QueryReader(NoQuery),
                media_types=("application/json",),
            ),
        )

    async def _version(self, _call: Call[NoQuery, None]) -> ASGIApp:
        return answer(http.Version(version=__version__, api="v1"))

    async def _health(self, _call: Call[NoQuery, None]) -> ASGIApp:
        return answer(http.Health(status="ok"))

    async def _readiness(self, _call: Call[NoQuery, None]) -> ASGIApp:
        if reason := self._why_not_ready():
            raise GameNodeError(ErrorCode.UNAVAILABLE, reason, retry_after_s=self._retry_after_s)
        return answer(http.Health(status="ready"))

    async def _describe(self, _call: Call[NoQuery, None]) -> ASGIApp:
        return Response(self._description(), media_type="application/json")
