"""What a report does to a step and to a pipeline: F2, RA3, RA5, P3, P4."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from gamenode.domain.pipeline import (
    TERMINAL,
    TRANSITIONS,
    PipelineReport,
    Reason,
    ReportOutcome,
    Status,
    Step,
    StepReport,
    StepType,
    judge_pipeline,
    judge_step,
    sources_of,
)

APPLIED, REPEATED, STALE = ReportOutcome
GRANTED = range(4, 7)
REPORTED = [status for status in Status if status is not Status.PENDING]


def step(status: Status, *, attempt: int = 5, reason: Reason = Reason.NONE) -> Step:
    return Step(
        name="s",
        type=StepType.TASK,
        status=status,
        reason=reason,
        message="",
        exit_code=None,
        signal=None,
        attempt=attempt,
        run=1,
        started_at=None,
        ended_at=None,
        instance_id="",
    )


def report(status: Status, *, attempt: int = 5, reason: Reason = Reason.NONE) -> StepReport:
    return StepReport(pipeline_id="p", step="s", status=status, attempt=attempt, reason=reason)


def test_terminal_statuses_absorb() -> None:
    assert {Status.COMPLETED, Status.FAILED, Status.CANCELLED} == TERMINAL
    for status, target in itertools.product(TERMINAL, Status):
        assert target not in TRANSITIONS[status]
        assert status not in sources_of(target)


def test_nothing_becomes_pending_again() -> None:
    assert sources_of(Status.PENDING) == frozenset()


@pytest.mark.parametrize("now", Status)
@pytest.mark.parametrize("said", REPORTED)
def test_a_report_of_the_same_try(now: Status, said: Status) -> None:
    if said is now:
        expected = REPEATED
    elif now in TERMINAL:
        expected = STALE
    else:
        expected = APPLIED
    assert judge_step(step(now), report(said), GRANTED).outcome is expected


@pytest.mark.parametrize("now", Status)
@pytest.mark.parametrize("said", REPORTED)
def test_a_report_of_a_later_try_changes_only_what_has_not_ended(now: Status, said: Status) -> None:
    expected = STALE if now in TERMINAL else APPLIED
    assert judge_step(step(now), report(said, attempt=6), GRANTED).outcome is expected


@pytest.mark.parametrize("now", Status)
@pytest.mark.parametrize("said", REPORTED)
@pytest.mark.parametrize("attempt", [3, 4, 7])
def test_an_earlier_or_ungranted_try_changes_nothing(
    now: Status, said: Status, attempt: int
) -> None:
    assert judge_step(step(now), report(said, attempt=attempt), GRANTED).outcome is STALE


@pytest.mark.parametrize("now", Status)
@pytest.mark.parametrize("said", REPORTED)
@pytest.mark.parametrize("attempt", [0, *range(3, 8)])
@pytest.mark.parametrize("reason", Reason)
def test_no_late_report_of_a_step_ends_its_pipeline(
    now: Status, said: Status, attempt: int, reason: Reason
) -> None:
    said_again = report(said, attempt=attempt, reason=reason)
    assert not judge_step(step(now), said_again, GRANTED).stop


def test_an_unset_try_means_the_one_that_counts() -> None:
    assert judge_step(step(Status.RUNNING), report(Status.FAILED, attempt=0), GRANTED).outcome is (
        APPLIED
    )
    first = judge_step(step(Status.PENDING, attempt=0), report(Status.RUNNING, attempt=0), GRANTED)
    assert first.outcome is APPLIED


def test_how_far_a_pull_is_is_news_only_until_the_try_has_started() -> None:
    def pulling(message: str, *, attempt: int = 5) -> StepReport:
        it = report(Status.RUNNING, reason=Reason.PULLING, attempt=attempt)
        return replace(it, message=message)

    fetching = replace(step(Status.RUNNING, reason=Reason.PULLING), message="1 of 2 MB")
    assert judge_step(step(Status.PENDING), pulling("1 of 2 MB"), GRANTED).outcome is APPLIED
    assert judge_step(fetching, pulling("1 of 2 MB"), GRANTED).outcome is REPEATED
    assert judge_step(fetching, pulling("2 of 2 MB"), GRANTED).outcome is APPLIED
    assert judge_step(fetching, report(Status.RUNNING), GRANTED).outcome is APPLIED
    started = step(Status.RUNNING)
    over = step(Status.RUNNING, reason=Reason.RETRYING)
    for later in (started, over):
        assert judge_step(later, pulling("2 of 2 MB"), GRANTED).outcome is REPEATED
        assert judge_step(later, pulling("0 of 2 MB", attempt=6), GRANTED).outcome is APPLIED


def test_a_try_that_is_over_is_news_once_and_runs_no_more() -> None:
    running = step(Status.RUNNING)
    over = step(Status.RUNNING, reason=Reason.RETRYING)
    retrying = report(Status.RUNNING, reason=Reason.RETRYING)
    assert judge_step(running, retrying, GRANTED).outcome is APPLIED
    assert judge_step(over, retrying, GRANTED).outcome is REPEATED
    assert judge_step(over, report(Status.RUNNING), GRANTED).outcome is REPEATED
    assert judge_step(over, report(Status.RUNNING, attempt=6), GRANTED).outcome is APPLIED
    assert judge_step(over, report(Status.FAILED), GRANTED).outcome is APPLIED


def test_a_step_that_was_skipped_is_skipped_again_under_any_try() -> None:
    skipped = report(Status.CANCELLED, attempt=4, reason=Reason.SKIPPED)
    never_tried = step(Status.CANCELLED, attempt=0, reason=Reason.SKIPPED)
    assert judge_step(never_tried, skipped, GRANTED).outcome is REPEATED


@pytest.mark.parametrize("now", Status)
@pytest.mark.parametrize("said", REPORTED)
def test_a_report_of_a_pipeline(now: Status, said: Status) -> None:
    result = judge_pipeline(now, PipelineReport(pipeline_id="p", status=said))
    if said is now:
        assert result.outcome is REPEATED
    else:
        assert result.outcome is (APPLIED if said in TRANSITIONS[now] else STALE)
    assert result.stop is (now in TERMINAL and said is Status.RUNNING)
