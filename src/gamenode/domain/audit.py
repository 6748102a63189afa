"""Who did what, for the record."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gamenode.domain.access import Actor
from gamenode.lib.clock import Instant


class AuditOutcome(StrEnum):
    """What became of an act."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    CONFIRMED = "confirmed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One administrative act, before the commit that links it into the chain (rule RC4)."""

    at: Instant
    actor: Actor
    action: str
    target: str
    reason: str = ""
    outcome: AuditOutcome = AuditOutcome.ACCEPTED
    code: str = ""
    before: str = ""
    after: str = ""
    request_id: str = ""
