"""The table of errors' outward forms."""

from __future__ import annotations

import grpc
import pytest

from gamenode.domain.errors import ErrorCode
from gamenode.wire.errors import OUTWARD, code_of

INTERFACE = {
    "INVALID_REQUEST": (400, "INVALID_ARGUMENT", 2),
    "UNAUTHENTICATED": (401, "UNAUTHENTICATED", 4),
    "PERMISSION_DENIED": (403, "PERMISSION_DENIED", 4),
    "NOT_FOUND": (404, "NOT_FOUND", 5),
    "NODE_NOT_FOUND": (404, "NOT_FOUND", 5),
    "PIPELINE_NOT_FOUND": (404, "NOT_FOUND", 5),
    "STEP_NOT_FOUND": (404, "NOT_FOUND", 5),
    "LOG_NOT_FOUND": (404, "NOT_FOUND", 5),
    "CONFLICT": (409, "FAILED_PRECONDITION", 6),
    "STALE": (409, "ABORTED", 6),
    "CURSOR_EXPIRED": (410, "OUT_OF_RANGE", 6),
    "PIPELINE_FAILED": (422, "FAILED_PRECONDITION", 3),
    "RESOURCE_EXHAUSTED": (429, "RESOURCE_EXHAUSTED", 7),
    "INTERNAL": (500, "INTERNAL", 1),
    "NODE_OFFLINE": (503, "UNAVAILABLE", 7),
    "UNAVAILABLE": (503, "UNAVAILABLE", 7),
    "TIMEOUT": (504, "DEADLINE_EXCEEDED", 8),
    "STORAGE_FULL": (507, "RESOURCE_EXHAUSTED", 7),
}


def test_every_code_has_the_forms_that_the_interface_promises() -> None:
    found = {
        str(code): (forms.http_status, forms.grpc_status, forms.exit_code)
        for code, forms in OUTWARD.items()
    }
    assert found == INTERFACE
    assert OUTWARD.keys() == set(ErrorCode)


def test_the_grpc_statuses_exist() -> None:
    known = {status.name for status in grpc.StatusCode}
    assert {forms.grpc_status for forms in OUTWARD.values()} <= known


def test_what_a_retry_may_help_exits_as_such() -> None:
    retryable = {code for code, forms in OUTWARD.items() if forms.retryable}
    assert retryable == {code for code, forms in OUTWARD.items() if forms.exit_code in {7, 8}}


@pytest.mark.parametrize(
    ("name", "grpc_status", "code"),
    [
        ("CONFLICT", "", ErrorCode.CONFLICT),
        ("INVENTED_LATER", "UNAVAILABLE", ErrorCode.UNAVAILABLE),
        ("INVENTED_LATER", "UNKNOWN", ErrorCode.INTERNAL),
        ("", "", ErrorCode.INTERNAL),
    ],
)
def test_a_newer_peers_code_counts_as_what_its_status_means(
    name: str, grpc_status: str, code: ErrorCode
) -> None:
    assert code_of(name, grpc_status=grpc_status) is code
