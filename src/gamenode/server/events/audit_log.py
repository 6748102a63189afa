"""The audit log as people read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.db.database import Database
from gamenode.server.events import audit
from gamenode.server.events.audit import AuditHead, AuditRecord, AuditVerdict

_RETRY_S = 2.0


class AuditLog:
    """Lists the audit log and walks along its chain, on the readers' threads."""

    def __init__(
        self, database: Database, *, key: bytes, head: Callable[[], AuditHead | None]
    ) -> None:
        """Read from `database`; `head` is the end of the log as this server knows it."""
        self._database = database
        self._key = key
        self._head = head
        self._verifying = asyncio.Lock()

    async def list(self, *, limit: int, before: int | None) -> Sequence[AuditRecord]:
        """Return entries, newest first; with `before`, only those of a lower id."""
        return await self._database.read(
            lambda conn: audit.newest_first(conn, before=before, limit=limit)
        )

    async def verify(self, *, known_head: str = "") -> AuditVerdict:
        """Walk along the whole chain; `known_head` is a link from the server's log, in hex.

        One walk at a time: it takes one of the readers for as long as the log is long.

        Raises:
            GameNodeError: RESOURCE_EXHAUSTED, another walk goes on.
        """
        if self._verifying.locked():
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                "the audit log is being verified already",
                retry_after_s=_RETRY_S,
            )
        async with self._verifying:
            end = self._head()
            heads = {known_head} if known_head else set()
            if end is not None:
                heads.add(end.link.hex())
            return await self._database.read(
                lambda conn: audit.verify(conn, self._key, known_heads=heads)
            )
