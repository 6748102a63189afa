"""How domain types are written in HTTP bodies."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.lib.clock import Instant
from gamenode.wire import http


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (999_999, "1970-01-01T00:00:00.000Z"),
        (1_795_557_600_123_999_999, "2026-11-24T22:00:00.123Z"),
        (2**63 - 1, "2262-04-11T23:47:16.854Z"),
    ],
)
def test_a_time_has_milliseconds_rounded_down(moment: int, text: str) -> None:
    assert http.encode_time(Instant(moment)) == text


@given(st.integers(0, 2**63 - 1))
def test_a_log_time_keeps_every_nanosecond(moment_ns: int) -> None:
    text = http.encode_log_time(moment_ns)
    whole, _, fraction = text.removesuffix("Z").partition(".")
    seconds = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
    assert int(seconds) * 10**9 + int(fraction) == moment_ns
    assert len(fraction) == 9


def test_a_problem_says_everything_that_an_error_knows() -> None:
    error = GameNodeError(
        ErrorCode.INVALID_REQUEST,
        "two things",
        violations=[
            Violation(field="steps[0].imag", reason="unknown", advice="image?", line=3, column=5),
            Violation(field="name", reason="is missing"),
        ],
        hint="look",
        retry_after_s=1.5,
        error_id="e1",
    )
    problem = http.encode_problem(error)
    assert problem.type == "urn:gamenode:problem:INVALID_REQUEST"
    assert (problem.status, problem.code, problem.detail) == (400, "INVALID_REQUEST", "two things")
    assert [(d.field, d.line, d.column, d.advice) for d in problem.details] == [
        ("steps[0].imag", 3, 5, "image?"),
        ("name", None, None, ""),
    ]
    assert (problem.retry_after_s, problem.id, problem.hint) == (1.5, "e1", "look")


@pytest.mark.parametrize(
    ("value", "text"), [("x", "x"), (8080, "8080"), (True, "true"), (False, "false")]
)
def test_an_args_value_means_the_text_that_writes_it(value: http.ArgValue, text: str) -> None:
    assert http.arg_text(value) == text
