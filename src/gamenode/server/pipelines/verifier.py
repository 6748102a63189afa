"""Compares what the server knows of every attempt with what agents hold (P1, P2)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from gamenode.domain.command import OrderOutcome, VerifyOrder
from gamenode.domain.errors import GameNodeError
from gamenode.domain.verification import (
    AttemptVerdict,
    AttemptViolation,
    HostAttempt,
    violations,
)
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.service import GamePipelineGRPCService

_log = logging.getLogger(__name__)
_Seen = Mapping[str, Sequence[HostAttempt]]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierSettings:
    """Bounds of a comparison of all records."""

    asked_at_once_max: int = 64
    """How many agents are asked side by side."""
    answer_timeout_s: float = 15.0
    """How long an agent's answer is waited for; then its node counts as absent."""
    second_look_s: float = 2.0
    """The wait before the second look: records that move at the first are at rest at the other."""
    clock_skew_s_max: float = 5.0
    """How far the clocks of two nodes may be apart; what overlaps by less has not overlapped."""
    pipelines_per_query_max: int = 500
    """How many pipelines one statement names."""


class AttemptVerifier:
    """Asks every agent what it holds, and judges."""

    def __init__(
        self, *, service: GamePipelineGRPCService, nodes: NodeManager, settings: VerifierSettings
    ) -> None:
        """Compare the rows of `service` with what the agents of `nodes` state."""
        self._service = service
        self._nodes = nodes
        self._settings = settings
        self._asking = asyncio.Semaphore(settings.asked_at_once_max)

    async def verify(self) -> AttemptVerdict:
        """Return every violation that stands at two looks, a moment apart.

        What comes and goes between two looks is work on its way: a run whose end was not heard of
        yet, remains that are about to be removed. Nothing is said of nodes that cannot be asked.
        """
        node_ids = self._nodes.ids()
        seen = await self._ask(node_ids)
        attempts, found = await self._judge(seen)
        if found:
            await asyncio.sleep(self._settings.second_look_s)
            # Everybody once more: an attempt that is on two nodes concerns both.
            first = {violation.identity for violation in found}
            seen = await self._ask(seen)
            attempts, found = await self._judge(seen)
            found = [violation for violation in found if violation.identity in first]
        if found:
            _log.error(
                "%d attempts are not as they must be: gamenode verify attempts",
                len(found),
                extra={"event": "attempts.violated"},
            )
        return AttemptVerdict(
            attempts=attempts,
            nodes_asked=len(seen),
            nodes_absent=tuple(node_id for node_id in node_ids if node_id not in seen),
            violations=tuple(found),
        )

    async def _judge(self, seen: _Seen) -> tuple[int, list[AttemptViolation]]:
        """Return how many attempts there are, and what is wrong with them at this look."""
        # Rows after the hosts: an end that a host has stated is in them or on its way to them.
        records = await self._service.step_records(
            {attempt.key.pipeline_id for attempt in chain.from_iterable(seen.values())},
            batch_max=self._settings.pipelines_per_query_max,
        )
        found = violations(records, seen, clock_skew_s_max=self._settings.clock_skew_s_max)
        return sum(map(len, seen.values())), found

    async def _ask(self, node_ids: Iterable[str]) -> _Seen:
        """Return what the agents of these nodes hold; those that do not say are left out."""
        asked = list(node_ids)
        stated = await asyncio.gather(*(self._ask_one(node_id) for node_id in asked))
        return {
            node_id: attempts
            for node_id, attempts in zip(asked, stated, strict=True)
            if attempts is not None
        }

    async def _ask_one(self, node_id: str) -> Sequence[HostAttempt] | None:
        async with self._asking:
            connection = self._nodes.connection(node_id)
            if connection is None:
                return None
            try:
                answer = await connection.ask(
                    VerifyOrder(), timeout_s=self._settings.answer_timeout_s
                )
            except GameNodeError as error:
                why = str(error)
            else:
                if answer.outcome is not OrderOutcome.REFUSED:
                    return answer.attempts
                why = answer.message
        _log.info(
            "a node's attempts are not known: %s",
            why,
            extra={"event": "attempts.unstated", "node_id": node_id},
        )
        return None
