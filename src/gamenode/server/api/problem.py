"""Errors as RFC 9457 problems: the only place where the HTTP edge words one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.wire import http

PROBLEM_MEDIA_TYPE = "application/problem+json"

_encode = msgspec.json.Encoder().encode


def encode(error: GameNodeError) -> bytes:
    """Return the JSON of the problem that says `error`."""
    return _encode(http.encode_problem(error))


def respond(
    error: GameNodeError, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the response that says `error`; `status` where HTTP has a closer one than its code."""
    body = http.encode_problem(error, status=status)
    all_headers = {"cache-control": "no-store", **(headers or {})}
    if error.retry_after_s is not None:
        # The header knows whole seconds; earlier than advised would be too early.
        all_headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.code is ErrorCode.UNAUTHENTICATED:
        all_headers["www-authenticate"] = "Bearer"
    return Response(
        _encode(body),
        status_code=body.status,
        headers=all_headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )
