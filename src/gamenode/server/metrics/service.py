"""The only writer of the metric journal: a report is on disk before it is acknowledged."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock, ClockWatch, after
from gamenode.server.db.database import Database
from gamenode.server.metrics import store


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSettings:
    """Bounds of the journal."""

    journal_bytes_max: int = 1024 * 1024 * 1024
    """A report that would go beyond it is refused until older ones have gone."""
    journal_keep_s: float = 24 * 3600.0
    """How long reports are kept."""
    purge_interval_s: float = 60.0
    """How often it is looked what may be removed."""


class MetricService:
    """Keeps what nodes measure, as it came (D5, D6)."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        clock_watch: ClockWatch,
        settings: MetricSettings,
    ) -> None:
        """Keep the rows in `database`."""
        self._db = database
        self._clock = clock
        self._clock_watch = clock_watch
        self._settings = settings
        self._kept_bytes = 0

    async def append(
        self, *, node_id: str, spool_id: str, sequence: int, content_hash: bytes, report: bytes
    ) -> None:
        """Keep one report; a numbered one that comes again is kept once (rule RG4).

        Raises:
            GameNodeError: CONFLICT if the same number came with other content;
                RESOURCE_EXHAUSTED while the journal is full.
        """
        if self._kept_bytes + len(report) > self._settings.journal_bytes_max:
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                "the metric journal is full",
                retry_after_s=self._settings.purge_interval_s,
            )
        now = self._clock.now()

        def record(conn: Connection) -> bool:
            if spool_id:
                known = store.hash_of(conn, node_id, spool_id, sequence)
                if known is not None and known != content_hash:
                    raise GameNodeError(
                        ErrorCode.CONFLICT,
                        f"report {sequence} of spool {spool_id} came before with other content",
                    )
                if known is not None:
                    return False
            store.append(
                conn,
                node_id=node_id,
                spool_id=spool_id,
                sequence=sequence,
                content_hash=content_hash,
                report=report,
                now=now,
            )
            return True

        if await self._db.write(record):
            self._kept_bytes += len(report)

    async def purge(self) -> None:
        """Again and again: drop what is older than the journal keeps."""
        while True:
            if self._clock_watch.jump_s() is None:  # else what is old cannot be told (rule RA6)
                before = after(self._clock.now(), -self._settings.journal_keep_s)
                await self._db.write(partial(store.purge, before=before))
            self._kept_bytes = await self._db.read(store.size_bytes)
            await asyncio.sleep(self._settings.purge_interval_s)
