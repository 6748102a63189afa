"""The audit log: who did what, in a chain that shows what was changed afterwards.

Each group commit makes one link: HMAC-SHA256, under a key kept outside of the database, of the
link before it and of the group's rows. All rows of a group carry it. A cut tail leaves a sound
chain, so the head is logged with each commit, and `verify` takes heads to look for (rule RC4).
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, delete, func, insert, select

from gamenode.domain.access import SYSTEM, Actor, ActorKind, Role
from gamenode.domain.audit import AuditEntry, AuditOutcome
from gamenode.lib.clock import Instant
from gamenode.server.db.database import collect
from gamenode.server.db.schema import audit

_FIRST_LINK: Final = bytes(32)
_CHECKPOINT: Final = "audit.checkpoint"
_PAGE_MAX: Final = 1_000

_LINKED: Final = (
    "at",
    "actor_kind",
    "actor_name",
    "actor_role",
    "source",
    "action",
    "target",
    "reason",
    "outcome",
    "code",
    "before",
    "after",
    "request_id",
)
"""The columns that a link vouches for. Not the id: the chain itself gives the order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """An entry as it is stored."""

    id: int
    entry: AuditEntry


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The end of the chain: its newest row, and the link that this row carries."""

    id: int
    link: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditVerdict:
    """What a walk along the chain found."""

    ok: bool
    rows: int
    """Rows that the chain vouches for, from the oldest on."""
    head: str
    """The last sound link, in hex; empty for an empty log."""
    first_bad: int | None
    """The first id that is altered or out of place; for a cut tail, the first that is missing."""


def append(conn: Connection, entry: AuditEntry) -> None:
    """Record `entry` with the running transaction; the commit links it into the chain (RC4).

    A refused act is recorded by a write of its own: what refused it was rolled back.
    """
    collect(conn, entry)


def head(conn: Connection) -> AuditHead | None:
    """Return the end of the chain, or None if the log is empty."""
    newest = select(audit.c.id, audit.c.link).order_by(audit.c.id.desc()).limit(1)
    row = conn.execute(newest).first()
    return None if row is None else AuditHead(row.id, row.link)


def link_all(
    conn: Connection, entries: Sequence[AuditEntry], *, key: bytes, known: AuditHead | None = None
) -> AuditHead:
    """Store what a group has collected, under one link; return the new head. For the commit hook.

    `known` is a head that the caller saw before. If the log ends before it, its tail was cut, and
    the new link follows the lost one, so that the chain shows the gap for ever.
    """
    newest = head(conn)
    if known is not None and (newest is None or newest.id < known.id):
        newest = known
    rows = [_columns(entry) for entry in entries]
    link = _link(_FIRST_LINK if newest is None else newest.link, rows, key)
    conn.execute(insert(audit), [{**row, "link": link} for row in rows])
    return AuditHead(conn.execute(select(func.max(audit.c.id))).scalar_one(), link)


def newest_first(conn: Connection, *, before: int | None = None, limit: int) -> list[AuditRecord]:
    """Return at most `limit` entries, newest first; with `before`, only those of a lower id."""
    page = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        page = page.where(audit.c.id < before)
    return [_record(row) for row in conn.execute(page).mappings()]


def verify(conn: Connection, key: bytes, *, known_heads: Collection[str] = ()) -> AuditVerdict:
    """Walk along the whole chain; stop at the first row that it does not vouch for.

    `known_heads` are links that were seen before, in hex: if no row carries one, the tail was cut.
    """
    previous = _link_before(conn)
    rows = last = 0
    end = ""
    missing = set(known_heads)
    for link, group in groupby(_walk(conn), key=lambda row: bytes(row["link"])):
        made = hmac.new(key, previous, "sha256")
        first = count = 0
        for row in group:
            made.update(_canonical(row))
            first, last, count = first or row["id"], row["id"], count + 1
        if not hmac.compare_digest(made.digest(), link):
            return AuditVerdict(ok=False, rows=rows, head=end, first_bad=first)
        previous, end, rows = link, link.hex(), rows + count
        missing.discard(end)
    return AuditVerdict(
        ok=not missing, rows=rows, head=end, first_bad=last + 1 if missing else None
    )


def purge(conn: Connection, before: Instant, *, now: Instant) -> int:
    """Remove the oldest groups, up to the first row not before `before`; return how many rows.

    A checkpoint, itself an entry of the chain, tells where it begins from then on. The newest
    group always stays.
    """
    newest = select(func.max(audit.c.id)).scalar_subquery()
    first_young = conn.scalar(select(func.min(audit.c.id)).where(audit.c.at >= before))
    edge = select(audit.c.link).where(audit.c.id == (first_young or newest)).scalar_subquery()
    first_kept = conn.scalar(select(func.min(audit.c.id)).where(audit.c.link == edge))
    if first_kept is None:
        return 0
    old = audit.c.id < first_kept
    link = conn.scalar(select(audit.c.link).where(old).order_by(audit.c.id.desc()).limit(1))
    if link is None:
        return 0
    removed = conn.execute(delete(audit).where(old)).rowcount
    append(
        conn,
        AuditEntry(
            at=now,
            actor=SYSTEM,
            action=_CHECKPOINT,
            target=str(first_kept),
            reason=f"retention removed {removed} older rows",
            before=link.hex(),
        ),
    )
    return removed


def _link_before(conn: Connection) -> bytes:
    """Return the link that the oldest row follows; retention's checkpoint vouches for it."""
    oldest = select(func.min(audit.c.id))
    first = conn.scalar(oldest)
    checkpoint = select(audit.c.before).where(
        audit.c.action == _CHECKPOINT, audit.c.target == str(first)
    )
    link: str | None = conn.scalar(checkpoint)
    return _FIRST_LINK if link is None else bytes.fromhex(link)


def _walk(conn: Connection) -> Iterator[RowMapping]:
    """Yield all rows, oldest first, a page at a time."""
    last = -1
    while True:
        page = select(audit).where(audit.c.id > last).order_by(audit.c.id).limit(_PAGE_MAX)
        rows = conn.execute(page).mappings().all()
        yield from rows
        if len(rows) < _PAGE_MAX:
            return
        last = rows[-1]["id"]


def _link(previous: bytes, rows: Sequence[dict[str, Any]], key: bytes) -> bytes:
    return hmac.digest(key, previous + b"".join(map(_canonical, rows)), "sha256")


def _canonical(row: dict[str, Any] | RowMapping) -> bytes:
    """Return one line of bytes that no other row has."""
    return json.dumps([row[name] for name in _LINKED]).encode() + b"\n"


def _columns(entry: AuditEntry) -> dict[str, Any]:
    return {
        "at": entry.at,
        "actor_kind": entry.actor.kind.value,
        "actor_name": entry.actor.name,
        "actor_role": entry.actor.role.value,
        "source": entry.actor.source,
        "action": entry.action,
        "target": entry.target,
        "reason": entry.reason,
        "outcome": entry.outcome.value,
        "code": entry.code,
        "before": entry.before,
        "after": entry.after,
        "request_id": entry.request_id,
    }


def _record(row: RowMapping) -> AuditRecord:
    entry = AuditEntry(
        at=row["at"],
        actor=Actor(
            kind=ActorKind(row["actor_kind"]),
            name=row["actor_name"],
            role=Role(row["actor_role"]),
            source=row["source"],
        ),
        action=row["action"],
        target=row["target"],
        reason=row["reason"],
        outcome=AuditOutcome(row["outcome"]),
        code=row["code"],
        before=row["before"],
        after=row["after"],
        request_id=row["request_id"],
    )
    return AuditRecord(id=row["id"], entry=entry)
