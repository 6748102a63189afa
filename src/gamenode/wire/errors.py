"""The one table of what an `ErrorCode` is outside: HTTP, gRPC, and a command's exit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gamenode.domain.errors import ErrorCode


@dataclass(frozen=True, slots=True)
class Outward:
    """One error's outward forms."""

    title: str
    """What happened, in general; the same words for every error of the code."""
    http_status: int
    grpc_status: str
    """The name of a gRPC status code."""
    exit_code: int
    """What a command exits with."""
    retryable: bool
    """Whether the same request may succeed later, with nothing changed about it."""


OUTWARD: Final[Mapping[ErrorCode, Outward]] = MappingProxyType(
    {
        ErrorCode.INVALID_REQUEST: Outward(
            "The request is not valid", 400, "INVALID_ARGUMENT", 2, retryable=False
        ),
        ErrorCode.UNAUTHENTICATED: Outward(
            "Not signed in", 401, "UNAUTHENTICATED", 4, retryable=False
        ),
        ErrorCode.PERMISSION_DENIED: Outward(
            "Not allowed", 403, "PERMISSION_DENIED", 4, retryable=False
        ),
        ErrorCode.NOT_FOUND: Outward("Not found", 404, "NOT_FOUND", 5, retryable=False),
        ErrorCode.NODE_NOT_FOUND: Outward("No such node", 404, "NOT_FOUND", 5, retryable=False),
        ErrorCode.PIPELINE_NOT_FOUND: Outward(
            "No such pipeline", 404, "NOT_FOUND", 5, retryable=False
        ),
        ErrorCode.STEP_NOT_FOUND: Outward("No such step", 404, "NOT_FOUND", 5, retryable=False),
        ErrorCode.LOG_NOT_FOUND: Outward("No such log", 404, "NOT_FOUND", 5, retryable=False),
        ErrorCode.CONFLICT: Outward(
            "In conflict with the present state", 409, "FAILED_PRECONDITION", 6, retryable=False
        ),
        ErrorCode.STALE: Outward(
            "Overtaken by something newer", 409, "ABORTED", 6, retryable=False
        ),
        ErrorCode.CURSOR_EXPIRED: Outward(
            "What follows the cursor is gone", 410, "OUT_OF_RANGE", 6, retryable=False
        ),
        ErrorCode.PIPELINE_FAILED: Outward(
            "The pipeline ended badly", 422, "FAILED_PRECONDITION", 3, retryable=False
        ),
        ErrorCode.RESOURCE_EXHAUSTED: Outward(
            "Too much at once", 429, "RESOURCE_EXHAUSTED", 7, retryable=True
        ),
        ErrorCode.INTERNAL: Outward("An error in the server", 500, "INTERNAL", 1, retryable=False),
        ErrorCode.NODE_OFFLINE: Outward(
            "The node is offline", 503, "UNAVAILABLE", 7, retryable=True
        ),
        ErrorCode.UNAVAILABLE: Outward("Not available now", 503, "UNAVAILABLE", 7, retryable=True),
        ErrorCode.TIMEOUT: Outward("It took too long", 504, "DEADLINE_EXCEEDED", 8, retryable=True),
        ErrorCode.STORAGE_FULL: Outward(
            "The storage is full", 507, "RESOURCE_EXHAUSTED", 7, retryable=True
        ),
    }
)
"""Total: every code has its forms. The server's edges, the agent and the CLI read it."""

_STANDARD: Final[Mapping[str, ErrorCode]] = MappingProxyType(
    {
        "INVALID_ARGUMENT": ErrorCode.INVALID_REQUEST,
        "UNAUTHENTICATED": ErrorCode.UNAUTHENTICATED,
        "PERMISSION_DENIED": ErrorCode.PERMISSION_DENIED,
        "NOT_FOUND": ErrorCode.NOT_FOUND,
        "FAILED_PRECONDITION": ErrorCode.CONFLICT,
        "ABORTED": ErrorCode.STALE,
        "OUT_OF_RANGE": ErrorCode.CURSOR_EXPIRED,
        "RESOURCE_EXHAUSTED": ErrorCode.RESOURCE_EXHAUSTED,
        "INTERNAL": ErrorCode.INTERNAL,
        "UNAVAILABLE": ErrorCode.UNAVAILABLE,
        "DEADLINE_EXCEEDED": ErrorCode.TIMEOUT,
    }
)


def code_of(name: str, *, grpc_status: str = "") -> ErrorCode:
    """Return the code that a peer named.

    A name that this version does not know counts as what its gRPC status usually means, and as
    INTERNAL where that says nothing either; a newer peer may name newer codes.
    """
    try:
        return ErrorCode(name)
    except ValueError:
        return _STANDARD.get(grpc_status, ErrorCode.INTERNAL)
