"""The route that compares every record of every attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp

from gamenode.server.api.decode import NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.api.streams import unless_gone
from gamenode.server.pipelines.verifier import AttemptVerifier
from gamenode.wire import http


class AttemptRoutes:
    """Says whether rows, journals and hosts agree (P1, P2)."""

    def __init__(self, verifier: AttemptVerifier) -> None:
        """Speak for `verifier`."""
        self._verifier = verifier

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/attempts:verify",
                summary="Find out whether server, journals and hosts agree about every attempt",
                handler=self._verify,
                query=QueryReader(NoQuery),
                answer=http.AttemptVerdict,
            ),
        )

    async def _verify(self, call: Call[NoQuery, None]) -> ASGIApp:
        verdict = await unless_gone(call.request.receive, self._verifier.verify())
        return answer(http.encode_attempt_verdict(verdict))
