"""Refused acts, for the record: who was not let do what, and why."""

from __future__ import annotations

import logging
from functools import partial
from typing import Final

from gamenode.domain.access import Actor, Role
from gamenode.domain.audit import AuditEntry, AuditOutcome
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock
from gamenode.server.access.roles import ACTS, ROLES
from gamenode.server.db.database import Database
from gamenode.server.events import audit

_log = logging.getLogger(__name__)

_REFUSALS: Final = frozenset(
    {
        ErrorCode.INVALID_REQUEST,
        ErrorCode.PERMISSION_DENIED,
        ErrorCode.NOT_FOUND,
        ErrorCode.NODE_NOT_FOUND,
        ErrorCode.PIPELINE_NOT_FOUND,
        ErrorCode.CONFLICT,
        ErrorCode.STALE,
    }
)
"""What is said to an act itself; the other codes say that it could not be done just now."""


class Refusals:
    """Appends an audit row for each refused act.

    That is one that its caller's role forbids, whichever it is, and one that needs an administrator
    and was refused for another reason. A stranger's is none: there is nobody to name, and whoever
    reaches the port could fill the log.
    """

    def __init__(self, database: Database, *, clock: Clock) -> None:
        """Append to the audit log in `database`."""
        self._database = database
        self._clock = clock

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
        """Record that `operation`, named as in the tables of roles and acts, ended with `error`.

        After the refusal, in a transaction of its own: the act's was rolled back (RC4). If the
        database cannot be written to, the server's log says so; the act stays refused.
        """
        act = ACTS.get(operation)
        forbidden = error.code is ErrorCode.PERMISSION_DENIED
        administrative = ROLES.get(operation) is Role.ADMIN
        if act is None or error.code not in _REFUSALS or not (forbidden or administrative):
            return
        entry = AuditEntry(
            at=self._clock.now(),
            actor=by,
            action=act,
            target=target,
            reason=reason,
            outcome=AuditOutcome.REFUSED,
            code=error.code,
            request_id=request_id,
        )
        try:
            await self._database.write(partial(audit.append, entry=entry))
        except GameNodeError as failure:
            _log.error(
                "a refused act is not in the audit log: %s",
                failure,
                extra={"event": "audit.lost", "act": act, "actor": by.name, "target": target},
            )
