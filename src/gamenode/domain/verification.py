"""Whether the three records of every attempt agree: rows, journals, and what is on the hosts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gamenode.domain.log import LogKey
from gamenode.domain.pipeline import Reason, Status, StepType
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

StepKey = tuple[str, str]
"""A pipeline's id and the name of one of its steps."""


class RunState(StrEnum):
    """What a host has of a run."""

    RUNNING = "RUNNING"
    ENDED = "ENDED"
    ABSENT = "ABSENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAttempt:
    """One run as its agent sees it: in its journal, on its host, or both."""

    key: LogKey
    in_journal: bool
    state: RunState
    started_at: Instant | None = None
    ended_at: Instant | None = None
    ending: bool = False
    """Whether the agent knows that its end is wanted, and sees to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What the server's rows say of one step, and of the pipeline that it belongs to."""

    pipeline_id: str
    step: str
    type: StepType
    node_id: str
    """The node that the pipeline is bound to; empty while it is bound to none."""
    pipeline_status: Status
    status: Status
    reason: Reason
    attempt: int
    """The try that counts, from 1; 0 before the first."""
    granted_from: int
    granted_to: int

    @property
    def runs(self) -> bool:
        """Whether the server takes the try that counts for one that runs now."""
        # Between two tries nothing runs, and the status stays (rule RA5).
        return self.status is Status.RUNNING and self.reason is not Reason.RETRYING

    def why_unwanted(self, key: LogKey, node_id: str) -> str:
        """Return why a run of this step must not live on a node; empty where it may."""
        if self.node_id != node_id:
            return f"its pipeline is bound to {self.node_id or 'no node'}"
        if not self.granted_from <= key.attempt <= self.granted_to:
            return f"tries {self.granted_from} to {self.granted_to} are granted"
        if key.attempt < self.attempt:
            return f"try {self.attempt} has followed it"
        if self.status is Status.COMPLETED and self.type is StepType.SERVICE:
            return ""  # it lives on, whatever became of its pipeline
        if self.status.terminal:
            return f"the step has ended: {self.status}"
        if self.pipeline_status.terminal:
            return f"the pipeline has ended: {self.pipeline_status}"
        return ""


class ViolationKind(StrEnum):
    """What is wrong with an attempt."""

    STARTED_TWICE = "STARTED_TWICE"
    OVERLAP = "OVERLAP"
    UNKNOWN = "UNKNOWN"
    UNWANTED = "UNWANTED"
    MISSING = "MISSING"
    LEFT_BEHIND = "LEFT_BEHIND"
    UNJOURNALED = "UNJOURNALED"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptViolation:
    """One thing that must not be."""

    kind: ViolationKind
    key: LogKey
    node_id: str
    message: str

    @property
    def identity(self) -> tuple[ViolationKind, LogKey, str]:
        """What makes it the same one at another look, whatever its message says."""
        return self.kind, self.key, self.node_id


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptVerdict:
    """What came of comparing the records."""

    attempts: int
    """How many runs were compared."""
    nodes_asked: int
    nodes_absent: tuple[str, ...]
    """Who could not be asked; nothing is said about what is on them."""
    violations: tuple[AttemptViolation, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found; on the nodes that were asked."""
        return not self.violations


_Run = tuple[str, HostAttempt]
"""A run and the node that stated it."""
_FOR_EVER: Final = Instant(2**63 - 1)


def violations(
    records: Mapping[StepKey, StepRecord],
    seen: Mapping[str, Sequence[HostAttempt]],
    *,
    clock_skew_s_max: float,
) -> list[AttemptViolation]:
    """Return everything that must not be, by pipeline, step, attempt, run and node.

    `seen` is what each node stated that was asked; about others nothing is said. `records` holds
    every step that a node stated anything of, if the server knows it, and every step that the
    server takes for one that runs on a node that was asked. Clocks of two nodes may differ by
    `clock_skew_s_max`; what overlaps by less has not overlapped.

    One look at records that move proves nothing: an end that is on its way to the server looks like
    a run that is not wanted. What stands at a second look is true.

    Source: P1, P2, RA1, RA2, RL3.
    """
    present: defaultdict[StepKey, list[_Run]] = defaultdict(list)
    for node_id, attempts in seen.items():
        for attempt in attempts:
            if attempt.state is not RunState.ABSENT:
                present[_step_of(attempt.key)].append((node_id, attempt))
    found = list(_missing(records.values(), seen))
    for step, runs in present.items():
        record = records.get(step)
        runs.sort(key=_by_start)
        for node_id, attempt in runs:
            found += _of_run(record, node_id, attempt)
        found += _twice(record, runs)
        found += _overlaps(runs, clock_skew_s_max)
    return sorted(found, key=_order)


def _of_run(
    record: StepRecord | None, node_id: str, attempt: HostAttempt
) -> Iterator[AttemptViolation]:
    """Yield what is wrong with one run that is on a host."""
    running = attempt.state is RunState.RUNNING
    if not attempt.in_journal:
        kind = ViolationKind.UNJOURNALED if running else ViolationKind.LEFT_BEHIND
        yield AttemptViolation(
            kind=kind,
            key=attempt.key,
            node_id=node_id,
            message="it runs, and the agent's journal does not hold it"
            if running
            else "it has ended and was released, and it is still on the host",
        )
    if record is None:
        yield AttemptViolation(
            kind=ViolationKind.UNKNOWN,
            key=attempt.key,
            node_id=node_id,
            message=f"it is on the host ({attempt.state}), and the server knows no such step",
        )
    elif running and not attempt.ending and (why := record.why_unwanted(attempt.key, node_id)):
        yield AttemptViolation(
            kind=ViolationKind.UNWANTED,
            key=attempt.key,
            node_id=node_id,
            message=f"it runs, and must not: {why}",
        )


def _twice(record: StepRecord | None, runs: Iterable[_Run]) -> Iterator[AttemptViolation]:
    """Yield the runs of one step that were started once too often (P1)."""
    started_on: dict[LogKey, str] = {}
    for node_id, attempt in runs:
        key = attempt.key
        first = started_on.setdefault(key, node_id)
        if first != node_id:
            message = (
                f"node {first} has started it too;"
                " was the data folder of one copied from the other's?"
            )
        elif key.run > 1 and record is not None and record.type is StepType.TASK:
            message = f"a task has one run, and this is run {key.run}"
        else:
            continue
        yield AttemptViolation(
            kind=ViolationKind.STARTED_TWICE, key=key, node_id=node_id, message=message
        )


def _overlaps(runs: Iterable[_Run], clock_skew_s_max: float) -> Iterator[AttemptViolation]:
    """Yield the runs of one step, by their start, that began while another one lived (P2)."""
    last: _Run | None = None
    for run in runs:
        if last is None:
            last = run
            continue
        (earlier_node, earlier), (node_id, attempt) = last, run
        if earlier.key != attempt.key and _overlap(last, run, clock_skew_s_max):
            yield AttemptViolation(
                kind=ViolationKind.OVERLAP,
                key=attempt.key,
                node_id=node_id,
                message=f"it began while attempt {earlier.key.attempt}, run {earlier.key.run},"
                f" lived on node {earlier_node}",
            )
        if _end(attempt) > _end(earlier):
            last = run


def _missing(
    records: Iterable[StepRecord], seen: Mapping[str, Sequence[HostAttempt]]
) -> Iterator[AttemptViolation]:
    """Yield what the server takes for running, and the host that was asked does not have."""
    stated = {
        (node_id, attempt.key.pipeline_id, attempt.key.step, attempt.key.attempt): attempt
        for node_id, attempts in seen.items()
        for attempt in sorted(attempts, key=lambda each: each.key.run)
    }
    for record in records:
        if not record.runs or record.node_id not in seen:
            continue
        attempt = stated.get((record.node_id, record.pipeline_id, record.step, record.attempt))
        if attempt is not None and attempt.state is not RunState.ABSENT:
            continue
        yield AttemptViolation(
            kind=ViolationKind.MISSING,
            key=LogKey(record.pipeline_id, record.step, record.attempt),
            node_id=record.node_id,
            message="the server takes it for running; it is in the agent's journal alone"
            if attempt is not None
            else "the server takes it for running; neither journal nor host has it",
        )


def _overlap(earlier: _Run, later: _Run, clock_skew_s_max: float) -> bool:
    if later[1].state is RunState.RUNNING and earlier[1].state is RunState.RUNNING:
        return True
    # One host has one clock; what two of them say may be that much apart.
    allowed_ns = 0 if earlier[0] == later[0] else round(clock_skew_s_max * NANOSECONDS_PER_S)
    return min(_end(earlier[1]), _end(later[1])) - _start(later[1]) > allowed_ns


def _start(attempt: HostAttempt) -> Instant:
    return attempt.started_at or Instant(0)


def _end(attempt: HostAttempt) -> Instant:
    if attempt.state is RunState.RUNNING:
        return _FOR_EVER
    return attempt.ended_at or _start(attempt)


def _by_start(run: _Run) -> tuple[Instant, int, int, str]:
    node_id, attempt = run
    return _start(attempt), attempt.key.attempt, attempt.key.run, node_id


def _step_of(key: LogKey) -> StepKey:
    return key.pipeline_id, key.step


def _order(violation: AttemptViolation) -> tuple[str, str, int, int, str, ViolationKind]:
    key = violation.key
    return key.pipeline_id, key.step, key.attempt, key.run, violation.node_id, violation.kind
