"""The routes of the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from gamenode.server.api import page
from gamenode.server.api.decode import QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.events.audit_log import AuditLog
from gamenode.wire import http


class AuditQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of the log."""

    limit: page.Limit = 100
    cursor: page.Cursor = ""


class VerifyQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of the log from elsewhere."""

    head: Annotated[
        str,
        Meta(
            pattern="^([0-9a-f]{64})?$",
            description="A head that the server's log has told: if the audit log does not have "
            "it, its end was cut off.",
        ),
    ] = ""


class AuditRoutes:
    """Lists the audit log, and says whether it is whole."""

    def __init__(self, audit: AuditLog) -> None:
        """Speak for `audit`."""
        self._audit = audit

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/audit",
                summary="List who did what, newest first",
                handler=self._list,
                query=QueryReader(AuditQuery),
                answer=http.AuditList,
            ),
            Operation(
                method="GET",
                path="/api/v1/audit:verify",
                summary="Find out whether the audit log was altered, reordered or cut",
                handler=self._verify,
                query=QueryReader(VerifyQuery),
                answer=http.AuditVerdict,
            ),
        )

    async def _list(self, call: Call[AuditQuery, None]) -> ASGIApp:
        query = call.query
        found = await self._audit.list(
            limit=query.limit + 1, before=page.read_audit_cursor(query.cursor)
        )
        records, last = page.split(found, query.limit)
        return answer(
            http.AuditList(
                items=[http.encode_audit(record.id, record.entry) for record in records],
                next_cursor=page.audit_cursor(last.id) if last else None,
            )
        )

    async def _verify(self, call: Call[VerifyQuery, None]) -> ASGIApp:
        verdict = await self._audit.verify(known_head=call.query.head)
        return answer(
            http.AuditVerdict(
                ok=verdict.ok, rows=verdict.rows, head=verdict.head, first_bad=verdict.first_bad
            )
        )
