"""Keeps the server's picture of this host true: when to collect, and when to send.

Source: B2, B3, B5.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from gamenode.agent.link import LinkError
from gamenode.domain.inventory import Collection, CollectionAnswer
from gamenode.lib.backoff import Backoff
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock
from gamenode.lib.tasks import Wake

_log = logging.getLogger(__name__)


class Collecting(Protocol):
    """What looks at the host."""

    async def collect(self) -> Collection:
        """Return what the host is made of now."""

    async def may_have_changed(self) -> bool:
        """Return, cheaply, whether another collection may differ from the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReporterSettings:
    """When the inventory is looked at and sent."""

    interval_s: float = 24 * 3600.0
    """How often it is sent although nothing changed; the server's word, where it has one, wins."""
    check_s: float = 60.0
    """How often the cheap sources are looked at."""
    retries: int = 3
    """How often a report that failed is sent again."""
    retry_first_s: float = 1.0
    """The wait before the first of these; it doubles with each."""
    retry_most_s: float = 10.0
    """The longest such wait."""


class InventoryReporter:
    """Sends the inventory every day, when it changed, and when it is asked for.

    One collection at most waits to be sent, the newest: after the retries it is kept, and sent
    with the next check or on the next stream.
    """

    def __init__(
        self,
        *,
        collector: Collecting,
        send: Callable[[Collection], Awaitable[CollectionAnswer]],
        active: Callable[[], bool],
        clock: Clock,
        random: Random,
        settings: ReporterSettings,
    ) -> None:
        """Know of nothing yet. While not `active`, nothing is collected and nothing sent."""
        self._collector = collector
        self._send = send
        self._active = active
        self._clock = clock
        self._random = random
        self._settings = settings
        self._wake = Wake()
        self._asked = False
        self._last: Collection | None = None
        self._unsent: Collection | None = None
        self._reported_hash = ""
        self._offered_hash = ""
        self._due_s = 0.0

    @property
    def reported_hash(self) -> str:
        """Return the hash of the inventory that the server was given last; empty: none yet."""
        return self._reported_hash

    async def collect(self) -> Collection:
        """Collect now, for a registration; `registered` says that it arrived."""
        self._last = await self._collector.collect()
        return self._last

    def registered(self) -> None:
        """Take note that the server has what was collected last."""
        if self._last is not None:
            self._reported_hash = self._last.hash
            self._done(self._last, self._settings.interval_s)

    def connected(self) -> None:
        """Send what waits, on the stream that has just been opened."""
        self._wake.ring()

    def ask(self) -> None:
        """Collect now and send it, whether it changed or not."""
        self._asked = True
        self._wake.ring()

    def resend(self) -> None:
        """Send again what was collected last: the server holds another one."""
        self._unsent = self._unsent or self._last
        self._wake.ring()

    async def run(self) -> None:
        """Look and send, again and again, until cancelled."""
        while True:
            _ = await self._wake.wait(self._settings.check_s)
            if not self._active():
                continue
            await self._look()
            if self._unsent is not None:
                await self._deliver(self._unsent)

    async def _look(self) -> None:
        demanded = self._asked or self._clock.monotonic_s() >= self._due_s
        self._asked = False
        if not demanded and not await self._collector.may_have_changed():
            return
        before, collected = self._last, await self.collect()
        failed_before = before.failed if before is not None else ()
        if demanded or collected.hash != self._reported_hash or collected.failed != failed_before:
            self._unsent = collected

    async def _deliver(self, collection: Collection) -> None:
        backoff = Backoff(first_s=self._settings.retry_first_s, most_s=self._settings.retry_most_s)
        for failures in range(1 + self._settings.retries):
            if failures:
                await asyncio.sleep(backoff.delay_s(failures, self._random))
            try:
                answer = await self._send(collection)
            except LinkError as error:
                if error.transient:
                    continue
                answer = CollectionAnswer(accepted=False, error=str(error))
            self._answered(collection, answer)
            return
        _log.warning(
            "the inventory could not be sent; it is kept", extra={"event": "inventory.kept"}
        )

    def _answered(self, collection: Collection, answer: CollectionAnswer) -> None:
        if answer.stale:
            return  # kept: the registration that follows brings it
        wait_s = self._settings.interval_s
        if answer.next_report_at is not None:
            wait_s = max(0.0, (answer.next_report_at - self._clock.now()) / NANOSECONDS_PER_S)
        if answer.accepted:
            self._reported_hash = collection.hash
        else:
            # Repeating it would change nothing; the next one may be better.
            _log.error(
                "the server refuses the inventory: %s",
                answer.error,
                extra={"event": "inventory.refused"},
            )
        self._done(collection, max(wait_s, self._settings.check_s))

    def _done(self, collection: Collection, wait_s: float) -> None:
        self._offered_hash = collection.hash
        self._due_s = self._clock.monotonic_s() + wait_s
        if self._unsent is not None and self._unsent.collected_at <= collection.collected_at:
            self._unsent = None
