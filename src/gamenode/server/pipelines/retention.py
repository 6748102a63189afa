"""Removes pipelines that ended long ago, or that are too many: rows first, then files.

That files are to follow is a row too, so that a crash in between leaves none behind (rule RC3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gamenode.lib.clock import Clock, ClockWatch, after
from gamenode.server.logs.service import LogService
from gamenode.server.pipelines.service import GamePipelineGRPCService

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionSettings:
    """How long pipelines are kept that have ended, with their steps and logs."""

    retention_s: float = 30 * 24 * 3600.0
    """How long pipelines are kept once they have ended."""
    ended_max: int = 100_000
    """How many that have ended are kept, however young they are."""
    key_keep_s: float = 7 * 24 * 3600.0
    """How long idempotency keys are kept at least; never less than their pipelines."""
    removal_interval_s: float = 300.0
    """How often it is looked what may be removed."""
    removals_per_write_max: int = 100
    """How many one transaction removes, so that nobody waits long behind it (P14)."""
    removal_pause_s: float = 0.05
    """The wait between two such transactions."""


class Retention:
    """Keeps what ended within its bounds.

    A pipeline stays, whatever its age, while its node may still run it or a service of it lives on.

    Source: RC5, RA6.
    """

    def __init__(
        self,
        *,
        service: GamePipelineGRPCService,
        logs: LogService,
        removed: Callable[[Collection[str]], None],
        clock: Clock,
        clock_watch: ClockWatch,
        settings: RetentionSettings,
    ) -> None:
        """Call `removed(pipeline_ids)` after each removal."""
        self._service = service
        self._logs = logs
        self._removed = removed
        self._clock = clock
        self._clock_watch = clock_watch
        self._settings = settings

    async def run(self) -> None:
        """Remove what is past its time, again and again, until cancelled."""
        while True:
            await self.remove()
            await asyncio.sleep(self._settings.removal_interval_s)

    async def remove(self) -> None:
        """Remove what is past its time now."""
        await self._remove_keys()
        await self._remove_ended()
        while await self._logs.remove_files(self._settings.removals_per_write_max):
            continue

    async def _remove_ended(self) -> None:
        settings = self._settings
        count = 0
        # Looked at each time: what is old cannot be told after a jump (rule RA6).
        while self._clock_watch.jump_s() is None:
            ids = await self._service.remove_ended(
                before=after(self._clock.now(), -settings.retention_s),
                ended_max=settings.ended_max,
                key_keep_s=settings.key_keep_s,
                limit=settings.removals_per_write_max,
            )
            self._removed(ids)
            count += len(ids)
            if len(ids) < settings.removals_per_write_max:
                break
            await asyncio.sleep(settings.removal_pause_s)
        if count:
            _log.info(
                "removed %d ended pipelines",
                count,
                extra={"event": "pipelines.removed", "count": count},
            )

    async def _remove_keys(self) -> None:
        limit = self._settings.removals_per_write_max
        while self._clock_watch.jump_s() is None:
            if await self._service.remove_keys(now=self._clock.now(), limit=limit) < limit:
                break
            await asyncio.sleep(self._settings.removal_pause_s)
