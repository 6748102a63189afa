"""What a command says when it cannot do its work, and the number that it ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.wire.errors import OUTWARD

Problem = Mapping[str, Any]
"""The error object of the HTTP interface (RFC 9457)."""

EXIT_OK: Final = 0
EXIT_UNKNOWN: Final = 1
EXIT_ENDED_BADLY: Final = OUTWARD[ErrorCode.PIPELINE_FAILED].exit_code
EXIT_DIFFERENT: Final = 10
"""Differences were found."""
EXIT_INTERRUPTED: Final = 130

_EXIT_BY_STATUS: Final = {outward.http_status: outward.exit_code for outward in OUTWARD.values()}
_HINTS: Final[Mapping[str, str]] = {
    ErrorCode.UNAUTHENTICATED: "give a token with --token-file or GAMENODE_TOKEN",
    ErrorCode.PERMISSION_DENIED: "the token's role does not allow this",
    ErrorCode.CURSOR_EXPIRED: "begin again without a cursor",
    ErrorCode.STORAGE_FULL: "make room on the server's disk, then try again",
}


class ApiError(Exception):
    """The server refused: its problem object, as it came.

    A code that this version does not know is kept; the HTTP status then says how to exit.
    """

    def __init__(self, problem: Problem) -> None:
        """Take the problem object of an answer."""
        super().__init__(str(problem.get("detail") or problem.get("title") or "no detail"))
        self.problem = problem

    @property
    def code(self) -> str:
        """The server's name for what went wrong."""
        return str(self.problem.get("code", ""))


class UnreachableError(GameNodeError):
    """No whole answer came from the server."""

    def __init__(self, message: str, *, sent: bool, hint: str = "") -> None:
        """Say what happened; `sent`: the server may have seen the request."""
        super().__init__(ErrorCode.UNAVAILABLE, message, hint=hint)
        self.sent = sent


class SilentError(UnreachableError):
    """A stream brought nothing for a while: nothing to tell, or nobody there any more."""


def problem_of(error: ApiError | GameNodeError) -> Problem:
    """Return `error` in the shape of the HTTP interface, wherever it came from."""
    if isinstance(error, ApiError):
        return error.problem
    outward = OUTWARD[error.code]
    return {
        "type": f"urn:gamenode:problem:{error.code}",
        "title": outward.title,
        "status": outward.http_status,
        "detail": error.message,
        "code": str(error.code),
        "details": [
            {
                "field": violation.field,
                "line": violation.line,
                "column": violation.column,
                "reason": violation.reason,
                "advice": violation.advice,
            }
            for violation in error.violations
        ],
        "retry_after_s": error.retry_after_s,
        "id": error.error_id or None,
        "hint": error.hint,
    }


def problem_of_answer(status: int, body: bytes, *, content_type: str, url: str) -> Problem:
    """Return the problem that an answer holds; one that holds none is described as one."""
    if content_type.partition(";")[0].strip().endswith("json"):
        try:
            problem = json.loads(body)
        except ValueError:
            problem = None
        if isinstance(problem, dict) and "code" in problem:
            return problem
    # Not ours: a proxy between us and the server, or another program on that port.
    away = status in (
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    )
    code = ErrorCode.UNAVAILABLE if away else ErrorCode.INTERNAL
    return {
        "type": f"urn:gamenode:problem:{code}",
        "title": OUTWARD[code].title,
        "status": status,
        "detail": f"{url} answered {status} without a GameNode error",
        "code": str(code),
        "details": [],
        "hint": "check --url, and what stands between here and the server",
    }


def exit_code(problem: Problem) -> int:
    """Return what a command ends with after `problem`."""
    try:
        return OUTWARD[ErrorCode(problem.get("code", ""))].exit_code
    except ValueError:
        return _EXIT_BY_STATUS.get(problem.get("status", 0), EXIT_UNKNOWN)


def describe(problem: Problem, *, file: str = "") -> str:
    """Return `problem` for people, in lines; places in the file that was sent name `file`."""
    code = problem.get("code", "")
    lines = [f"error: {code}: {problem.get('detail') or problem.get('title') or ''}"]
    details: Sequence[Mapping[str, Any]] = problem.get("details") or ()
    if _says_nothing_new(details, str(problem.get("detail"))):
        hint = details[0].get("advice") or problem.get("hint")
    else:
        lines.extend(_place(detail, file) for detail in details)
        hint = problem.get("hint")
        if any(hint == detail.get("advice") for detail in details):
            hint = ""  # it stands in its line
    if hint := hint or _HINTS.get(code, ""):
        lines.append(f"hint: {hint}")
    if error_id := problem.get("id"):
        lines.append(f"id: {error_id}")
    return "\n".join(lines)


def _says_nothing_new(details: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Return whether the only detail repeats the error's text, with no place in a file."""
    return (
        len(details) == 1
        and details[0].get("line") is None
        and f"{details[0].get('field')}: {details[0].get('reason')}" == text
    )


def _place(detail: Mapping[str, Any], file: str) -> str:
    where = ""
    if detail.get("line") is not None:
        where = ":".join(str(part) for part in (file, detail["line"], detail.get("column")) if part)
        where = f"{where}: "
    field = f"{detail['field']}: " if detail.get("field") else ""
    advice = f" ({detail['advice']})" if detail.get("advice") else ""
    return f"{where}{field}{detail.get('reason', '')}{advice}"
