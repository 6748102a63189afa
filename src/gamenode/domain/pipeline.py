"""A pipeline: one accepted piece of work, its steps, and the tables of what may follow what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Final

from gamenode.lib.clock import Instant


class Status(StrEnum):
    """The status of a step, and of a pipeline (F2)."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """Whether nothing can follow (P4)."""
        return not TRANSITIONS[self]


TRANSITIONS: Final[Mapping[Status, frozenset[Status]]] = {
    # A node's word may skip RUNNING: a step that never started can fail, be skipped, or have been
    # reported late.
    Status.PENDING: frozenset({Status.RUNNING, Status.COMPLETED, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""The only table; the guards in SQL and the tests read it.

What `on_lost: restart` does is no report and stands apart: a new attempt begins at PENDING again.
"""

STARTS_OVER: Final = frozenset({Status.PENDING, Status.RUNNING})
"""The statuses of a pipeline from which a new attempt may follow; never from an end (P4)."""

TERMINAL: Final = frozenset(s for s in Status if s.terminal)


def sources_of(target: Status) -> frozenset[Status]:
    """Return the statuses from which `target` may follow; SQL guards use it too."""
    return frozenset(s for s, targets in TRANSITIONS.items() if target in targets)


class Reason(StrEnum):
    """Why something has its status, for programs (F2b)."""

    NONE = ""
    SKIPPED = "SKIPPED"
    EXIT_CODE = "EXIT_CODE"
    SIGNAL = "SIGNAL"
    TIMEOUT = "TIMEOUT"
    OOM_KILLED = "OOM_KILLED"
    IMAGE_PULL = "IMAGE_PULL"
    START_FAILED = "START_FAILED"
    UNSUPPORTED = "UNSUPPORTED"
    UNHEALTHY = "UNHEALTHY"
    RETRYING = "RETRYING"
    PULLING = "PULLING"
    NODE_LOST = "NODE_LOST"
    NODE_DISABLED = "NODE_DISABLED"
    DRAINED = "DRAINED"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    POLICY = "POLICY"
    REFUSED = "REFUSED"
    SECRET_MISSING = "SECRET_MISSING"  # noqa: S105 - a reason, not a secret
    CANCELLED_BY_USER = "CANCELLED_BY_USER"
    AGENT_STOPPED = "AGENT_STOPPED"


NODE_ENDED: Final = frozenset({Reason.NODE_DISABLED, Reason.DRAINED, Reason.AGENT_STOPPED})
"""Reasons by which a node, and neither the work nor its user, ended a pipeline.

After these `on_lost: restart` makes a new attempt. `OUTCOME_UNKNOWN` is none of them, nor is
`NODE_LOST`, which an agent says of what a restored or copied journal holds: what is not known to
have ended must not run a second time beside it (P2).
"""


class OnLost(StrEnum):
    """What becomes of a pipeline whose node disappears."""

    WAIT = "wait"  # for the node, however long
    FAIL = "fail"  # after a time; it may still run there
    RESTART = "restart"  # elsewhere, once the node's attempt is known to have ended


class StepType(StrEnum):
    """What a step leaves behind."""

    TASK = "task"  # done when it ends
    SERVICE = "service"  # done when it runs; lives on


class Condition(StrEnum):
    """When a step runs."""

    SUCCESS = "success"
    FAILURE = "failure"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ulimit:
    """A limit of a process's resource; -1 is none."""

    name: str
    soft: int
    hard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthcheck:
    """How to see that a container is healthy; zero means the engine's default."""

    test: tuple[str, ...] = ()
    interval_s: float = 0.0
    timeout_s: float = 0.0
    retries: int = 0
    start_period_s: float = 0.0
    disable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReservation:
    """Devices reserved by capability, such as GPUs. No count and no ids: all."""

    capabilities: tuple[str, ...] = ()
    count: int = 0
    device_ids: tuple[str, ...] = ()
    driver: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """What a step runs, in the Compose specification's words; field by field as on the wire."""

    image: str = ""
    container_name: str = ""
    hostname: str = ""
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # some may be secret
    working_dir: str = ""
    user: str = ""
    volumes: tuple[str, ...] = ()
    tmpfs: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()
    shm_size_bytes: int = 0
    ulimits: tuple[Ulimit, ...] = ()
    extra_hosts: tuple[str, ...] = ()
    network_mode: str = ""
    healthcheck: Healthcheck | None = None
    restart: str = ""
    stop_grace_period_s: float = 5.0
    cpus: float = 0.0
    memory_bytes: int = 0
    memory_reservation_bytes: int = 0
    devices_reserved: tuple[DeviceReservation, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    init: bool | None = None
    stop_signal: str = ""
    pull_policy: str = ""
    read_only: bool = False

    def used(self) -> tuple[str, ...]:
        """Return the fields that are not as in a container that says nothing."""
        unset = ContainerSpec()
        names = (item.name for item in fields(self))
        return tuple(name for name in names if getattr(self, name) != getattr(unset, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a failed step is tried again, and after which first wait."""

    max: int = 0
    backoff_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One step of a pipeline file."""

    name: str
    container: ContainerSpec
    type: StepType = StepType.TASK
    condition: Condition = Condition.SUCCESS
    timeout_s: float | None = None
    retries: Retries = Retries()


class ArgType(StrEnum):
    """What an arg's value must be."""

    STRING = "string"
    INTEGER = "integer"
    BOOLEAN = "boolean"
    CHOICE = "choice"
    SECRET = "secret"  # noqa: S105 - a kind: a string that no record, log or argv shows


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgSpec:
    """One declared arg. Without a default it is required."""

    name: str
    type: ArgType = ArgType.STRING
    default: str | None = None
    description: str = ""
    pattern: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDemand:
    """A part of one GPU."""

    slots: int = 1
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Pipelines of which only so many run at once, wherever they run."""

    name: str
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a pipeline may run, and what is kept for it there."""

    node: str = ""
    selector: str = ""
    cpus: float = 0.0
    memory_bytes: int = 0
    gpu: GpuDemand | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpec:
    """A pipeline file that was read and found valid. Texts may still hold templates."""

    name: str
    steps: tuple[StepSpec, ...]
    description: str = ""
    args: tuple[ArgSpec, ...] = ()
    envs: tuple[str, ...] = ()
    timeout_s: float | None = None
    on_lost: OnLost = OnLost.WAIT
    placement: Placement = Placement()
    concurrency: Group | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPipeline:
    """A request for a pipeline, as it was asked; nothing in it is checked yet."""

    file: str
    """The text of a pipeline file."""
    args: Mapping[str, str] = field(default_factory=dict, repr=False)  # some may be secret
    envs: Mapping[str, str] = field(default_factory=dict)
    node: str = ""
    """Where it must run; empty leaves it to the file and the placement."""
    selector: str = ""
    priority: int = 0
    """Higher ones are dispatched first."""
    idempotency_key: str = ""
    """The same key, file and values again mean the pipeline that was made the first time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step as the server keeps it."""

    name: str
    type: StepType
    status: Status
    reason: Reason
    message: str
    exit_code: int | None
    signal: int | None
    attempt: int
    """The try that counts, from 1; 0 before the first."""
    run: int
    started_at: Instant | None
    ended_at: Instant | None
    instance_id: str
    granted_to: int = 0
    """The last try that may be made, until it is dispatched anew (rule RA5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a pipeline holds of its node, until that says that nothing of it lives (rule RA3)."""

    cpu_millis: int
    memory_bytes: int
    gpu_id: str
    """Empty: no GPU."""
    gpu_slots: int
    gpu_memory_bytes: int
    ports: tuple[str, ...]
    """Ports of the host, such as `8080/tcp`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One reason why a pipeline is not dispatched yet."""

    reason: str
    """For programs: a `Misfit`, or REFUSED."""
    text: str
    """For people; it follows the number of nodes, where there is one."""
    nodes: tuple[str, ...] = ()
    """Some of the nodes of which it is true, by id."""
    nodes_total: int = 0
    """Of how many it is true; 0: it is not about single nodes."""
    passes: bool = True
    """Whether it passes by itself; else somebody must change something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A pipeline as the server keeps it."""

    id: str
    name: str
    status: Status
    reason: Reason
    message: str
    """Why it ended so; while it waits, why in one line."""
    node_id: str
    """The node that it is bound to; empty before a dispatch."""
    attempt: int
    """How often it was dispatched."""
    args: Mapping[str, str]
    priority: int
    steps: tuple[Step, ...]
    waiting: tuple[Waiting, ...]
    """Why it is not dispatched yet; empty once it is."""
    cancel_requested_at: Instant | None
    cancel_reason: str
    created_at: Instant
    created_by: str
    started_at: Instant | None
    ended_at: Instant | None
    retry_of: str
    on_lost: OnLost = OnLost.WAIT
    extended_s: float = 0.0
    """By how much its limits were extended, in all."""
    may_still_run: bool = False
    """It has ended here without its node's word, which may still run it (rule RA3)."""
    reservation: Reservation | None = None


def first_to_repeat(steps: Sequence[Step], carried: Collection[str] = ()) -> int:
    """Return the index of the step from which a retry goes on: the first that did not go well.

    That is the first that failed or was cut off; where there is none (it was cancelled between two
    steps) the first that never began. `carried` are those that an earlier retry had left out, as
    done before.
    """
    for index, step in enumerate(steps):
        cut_off = step.status is Status.CANCELLED and step.reason is not Reason.SKIPPED
        if step.status is Status.FAILED or cut_off:
            return index
    for index, step in enumerate(steps):
        if step.status is not Status.COMPLETED and step.name not in carried:
            return index
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a node says of one of its steps. Unset fences come from simple clients only (RL4)."""

    pipeline_id: str
    step: str
    status: Status
    session_id: str = ""
    pipeline_attempt: int = 0
    attempt: int = 0
    run: int = 0
    started_at: Instant | None = None
    ended_at: Instant | None = None
    reason: Reason = Reason.NONE
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None
    log_length_bytes: int | None = None
    log_hash: bytes = b""
    instance_id: str = ""
    log: bytes = b""
    """The whole log, from clients that do not append it in chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineReport:
    """What a node says of one of its pipelines."""

    pipeline_id: str
    status: Status
    session_id: str = ""
    attempt: int = 0
    reason: Reason = Reason.NONE
    message: str = ""


Report = StepReport | PipelineReport


class ReportOutcome(StrEnum):
    """What became of a report; a stale one is never answered as accepted."""

    APPLIED = "APPLIED"
    REPEATED = "REPEATED"
    STALE = "STALE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportResult:
    """What became of a report, and whether its subject must not run any more (rule RA3)."""

    outcome: ReportOutcome
    stop: bool = False
    """The dispatch that it is about is not wanted any more; never said for a mere late report."""


def judge_step(step: Step, report: StepReport, granted: range) -> ReportResult:
    """Return what a report does to a step; the guard in SQL repeats it.

    `granted` are the tries that the present dispatch may make (rule RA5). Reports come again when
    an acknowledgement was lost, also those that others have overtaken since: they are stale, and
    nothing has to stop for it.

    Source: F2, RA3, RC2, promises P3 and P4.
    """
    attempt = report.attempt or step.attempt or granted.start
    if attempt not in granted or attempt < step.attempt:
        return ReportResult(outcome=ReportOutcome.STALE)
    same_try = attempt == step.attempt
    if step.status.terminal:
        skipped = report.reason is Reason.SKIPPED
        repeated = report.status is step.status and (same_try or skipped)
        return ReportResult(outcome=ReportOutcome.REPEATED if repeated else ReportOutcome.STALE)
    if report.status is step.status:
        # A try that is over, and to be followed by another one, does not run again.
        over = same_try and step.reason is Reason.RETRYING
        if same_try and report.reason is Reason.PULLING:
            # How far the pull is: news only while the try has not started.
            news = step.reason is Reason.PULLING and report.message != step.message
        else:
            news = not over and (not same_try or report.reason is not step.reason)
        return ReportResult(outcome=ReportOutcome.APPLIED if news else ReportOutcome.REPEATED)
    if report.status in TRANSITIONS[step.status]:
        return ReportResult(outcome=ReportOutcome.APPLIED)
    return ReportResult(outcome=ReportOutcome.STALE)


def judge_pipeline(status: Status, report: PipelineReport) -> ReportResult:
    """Return what a report does to a pipeline of `status`."""
    if report.status is status:
        return ReportResult(outcome=ReportOutcome.REPEATED)
    if report.status in TRANSITIONS[status]:
        return ReportResult(outcome=ReportOutcome.APPLIED)
    return ReportResult(
        outcome=ReportOutcome.STALE, stop=status.terminal and not report.status.terminal
    )
