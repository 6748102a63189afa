"""What the three records of an attempt may say of each other, and what they must not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gamenode.domain.log import LogKey
from gamenode.domain.pipeline import Reason, Status, StepType
from gamenode.domain.verification import (
    AttemptVerdict,
    HostAttempt,
    RunState,
    StepRecord,
    ViolationKind,
    violations,
)
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

T0 = 1_800_000_000 * NANOSECONDS_PER_S
SKEW_S = 5.0

RECORD = StepRecord(
    pipeline_id="p",
    step="s",
    type=StepType.TASK,
    node_id="n1",
    pipeline_status=Status.RUNNING,
    status=Status.RUNNING,
    reason=Reason.NONE,
    attempt=1,
    granted_from=1,
    granted_to=3,
)
OVER = replace(RECORD, status=Status.COMPLETED, pipeline_status=Status.COMPLETED)
KEPT = replace(OVER, type=StepType.SERVICE)


def at(seconds: float) -> Instant:
    return Instant(T0 + round(seconds * NANOSECONDS_PER_S))


def runs(
    attempt: int = 1,
    run: int = 1,
    *,
    since_s: float = 0.0,
    in_journal: bool = True,
    ending: bool = False,
) -> HostAttempt:
    return HostAttempt(
        key=LogKey("p", "s", attempt, run),
        in_journal=in_journal,
        state=RunState.RUNNING,
        started_at=at(since_s),
        ending=ending,
    )


def ended(
    attempt: int = 1, *, lived_s: tuple[float, float] = (0.0, 1.0), in_journal: bool = True
) -> HostAttempt:
    return HostAttempt(
        key=LogKey("p", "s", attempt),
        in_journal=in_journal,
        state=RunState.ENDED,
        started_at=at(lived_s[0]),
        ended_at=at(lived_s[1]),
    )


def absent(attempt: int = 1) -> HostAttempt:
    return HostAttempt(key=LogKey("p", "s", attempt), in_journal=True, state=RunState.ABSENT)


def found(
    record: StepRecord | None, **seen: list[HostAttempt]
) -> list[tuple[ViolationKind, int, str]]:
    records = {(record.pipeline_id, record.step): record} if record is not None else {}
    return [
        (violation.kind, violation.key.attempt, violation.node_id)
        for violation in violations(records, seen, clock_skew_s_max=SKEW_S)
    ]


GOOD: dict[str, tuple[StepRecord | None, dict[str, list[HostAttempt]]]] = {
    "nothing anywhere": (None, {"n1": []}),
    "it runs": (RECORD, {"n1": [runs()]}),
    "it has ended, and its report is on its way": (RECORD, {"n1": [ended()]}),
    "it has ended, and waits for its release": (OVER, {"n1": [ended()]}),
    "journaled, and not created yet": (
        replace(RECORD, status=Status.PENDING, attempt=0),
        {"n1": [absent()]},
    ),
    "created, and its report is on its way": (
        replace(RECORD, status=Status.PENDING, attempt=0),
        {"n1": [runs()]},
    ),
    "the next try has begun, and its report is on its way": (
        RECORD,
        {"n1": [ended(1), runs(2, since_s=2.0)]},
    ),
    "between two tries nothing runs": (
        replace(RECORD, reason=Reason.RETRYING),
        {"n1": [ended(1)]},
    ),
    "between two tries nothing need be there": (
        replace(RECORD, reason=Reason.RETRYING),
        {"n1": []},
    ),
    "one try after the other, without a pause": (
        replace(RECORD, attempt=2),
        {"n1": [ended(1, lived_s=(0, 1)), runs(2, since_s=1.0)]},
    ),
    "a service lives on": (KEPT, {"n1": [runs()]}),
    "a service lives on whatever became of its pipeline": (
        replace(KEPT, pipeline_status=Status.CANCELLED),
        {"n1": [runs()]},
    ),
    "a service may be started anew": (
        KEPT,
        {"n1": [ended(1), runs(1, 2, since_s=2.0)]},
    ),
    "cancelled by force, and its agent sees to it": (
        replace(RECORD, status=Status.CANCELLED, pipeline_status=Status.CANCELLED),
        {"n1": [runs(ending=True)]},
    ),
    "its node was not asked": (RECORD, {"n2": []}),
    "another host's clock is off": (
        replace(RECORD, node_id="n2", attempt=2, granted_from=2),
        {"n1": [ended(1, lived_s=(0, 10))], "n2": [runs(2, since_s=6.0)]},
    ),
}

BAD: dict[
    str,
    tuple[
        StepRecord | None,
        dict[str, list[HostAttempt]],
        list[tuple[ViolationKind, int, str]],
    ],
] = {
    "the same attempt on two hosts": (
        RECORD,
        {"n1": [runs()], "n2": [ended(lived_s=(3, 4))]},
        [(ViolationKind.STARTED_TWICE, 1, "n2")],
    ),
    "a second run of a task": (
        RECORD,
        {"n1": [ended(1), runs(1, 2, since_s=2.0)]},
        [(ViolationKind.STARTED_TWICE, 1, "n1")],
    ),
    "two tries at once": (
        replace(RECORD, attempt=2),
        {"n1": [ended(1, lived_s=(0, 3)), runs(2, since_s=2.0)]},
        [(ViolationKind.OVERLAP, 2, "n1")],
    ),
    "a short try within a long one": (
        replace(RECORD, attempt=3),
        {
            "n1": [
                ended(1, lived_s=(0, 9)),
                ended(2, lived_s=(1, 2)),
                ended(3, lived_s=(4, 5)),
            ]
        },
        [(ViolationKind.OVERLAP, 2, "n1"), (ViolationKind.OVERLAP, 3, "n1")],
    ),
    "two tries at once on two hosts": (
        replace(RECORD, node_id="n2", attempt=2, granted_from=2),
        {"n1": [runs(1)], "n2": [runs(2, since_s=2.0)]},
        [(ViolationKind.UNWANTED, 1, "n1"), (ViolationKind.OVERLAP, 2, "n2")],
    ),
    "a try that ended long after the next began elsewhere": (
        replace(RECORD, node_id="n2", attempt=2, granted_from=2),
        {"n1": [ended(1, lived_s=(0, 10))], "n2": [runs(2, since_s=4.0)]},
        [(ViolationKind.OVERLAP, 2, "n2")],
    ),
    "of a step that nobody knows": (None, {"n1": [runs()]}, [(ViolationKind.UNKNOWN, 1, "n1")]),
    "remains of a step that nobody knows": (
        None,
        {"n1": [ended()]},
        [(ViolationKind.UNKNOWN, 1, "n1")],
    ),
    "of a pipeline that is bound elsewhere": (
        replace(RECORD, node_id="n3"),
        {"n1": [runs()]},
        [(ViolationKind.UNWANTED, 1, "n1")],
    ),
    "of a pipeline that is bound nowhere": (
        replace(RECORD, node_id="", status=Status.PENDING, attempt=0),
        {"n1": [runs()]},
        [(ViolationKind.UNWANTED, 1, "n1")],
    ),
    "a try that was never granted": (
        RECORD,
        {"n1": [ended(1), runs(4, since_s=2.0)]},
        [(ViolationKind.UNWANTED, 4, "n1")],
    ),
    "a try that another has followed": (
        replace(RECORD, attempt=2),
        {"n1": [runs(1), absent(2)]},
        [(ViolationKind.UNWANTED, 1, "n1"), (ViolationKind.MISSING, 2, "n1")],
    ),
    "of a step that has ended": (
        replace(RECORD, status=Status.FAILED),
        {"n1": [runs()]},
        [(ViolationKind.UNWANTED, 1, "n1")],
    ),
    "of a pipeline that has ended": (
        replace(RECORD, pipeline_status=Status.CANCELLED, status=Status.PENDING, attempt=0),
        {"n1": [runs()]},
        [(ViolationKind.UNWANTED, 1, "n1")],
    ),
    "taken for running, and nowhere": (RECORD, {"n1": []}, [(ViolationKind.MISSING, 1, "n1")]),
    "taken for running, and in the journal alone": (
        RECORD,
        {"n1": [absent()]},
        [(ViolationKind.MISSING, 1, "n1")],
    ),
    "released, and still on the host": (
        OVER,
        {"n1": [ended(in_journal=False)]},
        [(ViolationKind.LEFT_BEHIND, 1, "n1")],
    ),
    "running, and in no journal": (
        RECORD,
        {"n1": [runs(in_journal=False)]},
        [(ViolationKind.UNJOURNALED, 1, "n1")],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_work_on_its_way_is_no_violation(case: str) -> None:
    record, seen = GOOD[case]
    assert found(record, **seen) == []


@pytest.mark.parametrize("case", BAD)
def test_what_must_not_be_is_found(case: str) -> None:
    record, seen, expected = BAD[case]
    assert found(record, **seen) == expected


def test_every_kind_has_a_case() -> None:
    assert {kind for _, _, expected in BAD.values() for kind, _, _ in expected} == set(
        ViolationKind
    )


def test_a_message_says_what_is_wrong_in_words() -> None:
    seen = {"n1": [runs(1)], "n2": [runs(2, since_s=2.0)]}
    record = replace(RECORD, node_id="n2", attempt=2, granted_from=2)
    unwanted, overlap = violations({("p", "s"): record}, seen, clock_skew_s_max=SKEW_S)
    assert unwanted.message == "it runs, and must not: its pipeline is bound to n2"
    assert overlap.message == "it began while attempt 1, run 1, lived on node n1"


def test_a_verdict_is_good_while_nothing_is_found() -> None:
    assert AttemptVerdict(attempts=1, nodes_asked=1, nodes_absent=(), violations=()).ok
