"""The one error that GameNode raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, for programs. Outward forms are in the one table of `wire.errors`."""

    INVALID_REQUEST = "INVALID_REQUEST"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    NODE_NOT_FOUND = "NODE_NOT_FOUND"
    PIPELINE_NOT_FOUND = "PIPELINE_NOT_FOUND"
    STEP_NOT_FOUND = "STEP_NOT_FOUND"
    LOG_NOT_FOUND = "LOG_NOT_FOUND"
    CONFLICT = "CONFLICT"
    STALE = "STALE"
    CURSOR_EXPIRED = "CURSOR_EXPIRED"
    PIPELINE_FAILED = "PIPELINE_FAILED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    INTERNAL = "INTERNAL"
    NODE_OFFLINE = "NODE_OFFLINE"
    UNAVAILABLE = "UNAVAILABLE"
    TIMEOUT = "TIMEOUT"
    STORAGE_FULL = "STORAGE_FULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One thing that is wrong with a request: where, what, and what to do."""

    field: str
    reason: str
    advice: str = ""
    line: int | None = None
    column: int | None = None


class GameNodeError(Exception):
    """A refusal: a code for programs, a message for people, details and retry advice.

    Source: J1, J2.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        hint: str = "",
        retry_after_s: float | None = None,
        error_id: str = "",
    ) -> None:
        """Say what is wrong (`message`), what to do (`hint`) and when a retry may help."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = tuple(violations)
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.error_id = error_id

    def __str__(self) -> str:
        """Return code and message."""
        return f"{self.code}: {self.message}"


def invalid(field: str, reason: str, *, advice: str = "") -> GameNodeError:
    """Return the error for one invalid field."""
    return GameNodeError(
        ErrorCode.INVALID_REQUEST,
        f"{field}: {reason}",
        violations=[Violation(field=field, reason=reason, advice=advice)],
        hint=advice,
    )
