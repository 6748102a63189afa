"""Carries maintenance changes to agents until each is confirmed, and drains to their end.

A change is a row first (rule RC3); this loop pushes what is not confirmed to whoever is connected,
again and again, and does what a drain's deadline or end asks for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gamenode.domain.access import SYSTEM
from gamenode.domain.command import OrderOutcome, StateOrder
from gamenode.domain.errors import GameNodeError
from gamenode.domain.node import Maintenance, StateChange
from gamenode.lib.clock import Clock, ClockWatch
from gamenode.lib.tasks import Supervisor, Wake
from gamenode.server.nodes.connections import ConnectionManager
from gamenode.server.nodes.service import GameNodeService

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSettings:
    """Intervals and bounds of maintenance changes."""

    sweep_interval_s: float = 2.0
    """How often it is looked for unconfirmed changes that no wake-up told of."""
    batch_max: int = 1_000
    """Changes that one look takes on."""
    answer_timeout_s: float = 60.0
    """How long one push may take; disabling waits for the end of everything."""
    retry_s: float = 5.0
    """The wait after a push that was not confirmed."""
    tries: int = 3
    """After so many unanswered pushes a change is shown as failed; it is tried on."""


class StateKeeper:
    """Pushes, confirms, and follows drains up.

    Source: E1, E3, E4, E7, RM1.
    """

    def __init__(
        self,
        *,
        service: GameNodeService,
        connections: ConnectionManager,
        refresh: Callable[[str], Awaitable[None]],
        clock: Clock,
        clock_watch: ClockWatch,
        settings: StateSettings,
    ) -> None:
        """Call `refresh(node_id)` after every change of a node's row."""
        self._service = service
        self._connections = connections
        self._refresh = refresh
        self._clock = clock
        self._clock_watch = clock_watch
        self._settings = settings
        self._supervisor = Supervisor(expected=GameNodeError)
        self._wake = Wake()
        self._pushing: set[tuple[str, int]] = set()
        self._settled = asyncio.Condition()

    def wake(self) -> None:
        """Look again: something is wanted, or a node has connected."""
        self._wake.ring()

    async def run(self) -> None:
        """Push and follow up until cancelled."""
        while True:
            await self._wake.wait(self._settings.sweep_interval_s)
            await self._follow_up()
            await self._push_all()

    async def close(self) -> None:
        """Stop waiting for answers; what is not confirmed is pushed again after the next start."""
        await self._supervisor.close()

    async def wait_confirmed(self, node_id: str, version: int, timeout_s: float) -> None:
        """Wait until a change is confirmed or overtaken, at most `timeout_s`."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        while (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            node = await self._service.get(node_id)
            change = node.state_change
            if change is None or change.version != version or change.confirmed_at is not None:
                return
            try:
                # Another server may confirm it, so the row is looked at again now and then.
                async with asyncio.timeout(min(left_s, self._settings.sweep_interval_s)):
                    async with self._settled:
                        await self._settled.wait()
            except TimeoutError:
                continue

    async def seen(self, change: StateChange) -> None:
        """Take a simple client's heartbeat, answered with the state, for its confirmation."""
        await self._confirm(change, remaining=None)

    async def _follow_up(self) -> None:
        if self._clock_watch.jump_s() is not None:
            return  # a deadline that only the jump made pass must not end anything (rule RA6)
        now = self._clock.now()
        for change in await self._service.due_changes(now, self._settings.batch_max):
            try:
                if change.drain.until is not None and change.drain.until <= now:
                    await self._service.change_state(
                        change.node_id,
                        Maintenance.NORMAL,
                        drain=None,
                        by=SYSTEM,
                        reason="the time asked for has passed",
                        now=now,
                    )
                else:
                    await self._service.end_running(change, now=now)
            except GameNodeError as error:
                _log.warning(
                    "a drain is not followed up: %s",
                    error,
                    extra={"event": "node.drain_failed", "node_id": change.node_id},
                )
                continue
            await self._refresh(change.node_id)

    async def _push_all(self) -> None:
        for change in await self._service.unconfirmed_changes(self._settings.batch_max):
            key = (change.node_id, change.version)
            if key in self._pushing or self._connections.connection(change.node_id) is None:
                continue  # an offline node gets it when it is back
            self._pushing.add(key)
            _ = self._supervisor.start(f"state of {change.node_id}", self._push(change))

    async def _push(self, change: StateChange) -> None:
        try:
            for attempt in range(1, self._settings.tries + 1):
                connection = self._connections.connection(change.node_id)
                if connection is None:
                    return
                if await self._service.state_pushed(change, now=self._clock.now()):
                    await self._refresh(change.node_id)
                try:
                    answer = await connection.ask(
                        StateOrder(
                            node_id=change.node_id,
                            version=change.version,
                            target=change.target,
                            reason=change.reason,
                            requested_at=change.requested_at,
                            end_running=change.end_running,
                        ),
                        timeout_s=self._settings.answer_timeout_s,
                    )
                except GameNodeError as error:
                    reason = error.message
                else:
                    confirmation = answer.confirmation
                    if (
                        answer.outcome is not OrderOutcome.REFUSED
                        and confirmation is not None
                        and confirmation.version == change.version
                    ):
                        await self._confirm(change, remaining=len(confirmation.remaining))
                        return
                    reason = answer.message or "the agent refused"
                if attempt == self._settings.tries:
                    await self._service.state_failed(change, reason, now=self._clock.now())
                    await self._refresh(change.node_id)
                await asyncio.sleep(self._settings.retry_s)
        finally:
            self._pushing.discard((change.node_id, change.version))

    async def _confirm(self, change: StateChange, *, remaining: int | None) -> None:
        now = self._clock.now()
        if await self._service.confirm_state(
            change, confirmed_at=now, remaining=remaining, now=now
        ):
            await self._refresh(change.node_id)
            async with self._settled:
                self._settled.notify_all()
