"""What the server and an agent say to each other on the stream, and how they agree again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gamenode.domain.node import HeartbeatResult, Maintenance
from gamenode.domain.pipeline import (
    Condition,
    ContainerSpec,
    PipelineReport,
    Reason,
    Report,
    ReportResult,
    Status,
    StepType,
)
from gamenode.domain.verification import HostAttempt
from gamenode.lib.clock import Instant


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One dispatch of a pipeline: the pipeline and its attempt, from 1."""

    pipeline_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedStep:
    """One step to run, with the tries granted for it (rule RA5)."""

    name: str
    type: StepType
    condition: Condition
    timeout_s: float | None
    first_attempt: int
    attempts: int
    backoff_s: float
    container: ContainerSpec
    instance_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecuteOrder:
    """Run this pipeline."""

    dispatch: Dispatch
    name: str
    steps: tuple[GrantedStep, ...]
    timeout_s: float | None = None
    envs: Mapping[str, str] = field(default_factory=dict)
    """Values of declared envs that the node does not define itself."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Values of secret args; their templates stand in `environment`. Never in a journal (RG3)."""
    state_version: int = 0
    extended_s: float = 0.0
    """By how much the limits of the pipeline and of its steps have been extended so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendOrder:
    """Let a pipeline take longer: its own limit and those of its steps."""

    dispatch: Dispatch
    extended_s: float
    """In all; no more than before changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelOrder:
    """End this pipeline."""

    dispatch: Dispatch
    reason: Reason
    message: str = ""
    force: bool = False
    """Clean-up steps are ended too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOrder:
    """Take this maintenance state (RM1)."""

    node_id: str
    version: int
    target: Maintenance
    reason: str
    requested_at: Instant
    end_running: bool = False
    """In maintenance: end what still runs, since a drain's deadline has passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateConfirmation:
    """The agent obeys a state, durably."""

    version: int
    confirmed_at: Instant
    remaining: tuple[Dispatch, ...]
    """What was accepted before and goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedEnd:
    """A pipeline whose end is wanted, while its node has not said that it knows."""

    dispatch: Dispatch
    node_id: str
    status: Status
    cause: Reason
    reason: str
    """In words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedExtension:
    """A pipeline that may take longer, while its node has not said that it knows."""

    order: ExtendOrder
    node_id: str


@dataclass(frozen=True, slots=True)
class CollectOrder:
    """Collect the inventory now, and send it (B2)."""


@dataclass(frozen=True, slots=True)
class VerifyOrder:
    """State every attempt that the journal or the host holds."""


WorkOrder = ExecuteOrder | CancelOrder | ExtendOrder | StateOrder
"""What changes the work that a node does; only these go through its journal."""

Order = WorkOrder | CollectOrder | VerifyOrder


class OrderOutcome(StrEnum):
    """Whether an agent took an order."""

    ACCEPTED = "ACCEPTED"
    REPEATED = "REPEATED"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderAnswer:
    """An agent's answer to an order; accepted means that it is in its journal."""

    outcome: OrderOutcome
    reason: str = ""
    message: str = ""
    confirmation: StateConfirmation | None = None
    """The answer to a `StateOrder`."""
    attempts: tuple[HostAttempt, ...] = ()
    """The answer to a `VerifyOrder`: all of them, never a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedReport:
    """A report with its number in the agent's session, by which it is acknowledged."""

    sequence: int
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPipeline:
    """One dispatch that an agent holds, with every report of it that is not acknowledged yet."""

    dispatch: Dispatch
    reports: tuple[NumberedReport, ...]

    @property
    def ended(self) -> bool:
        """Whether the agent has ended it and only waits for the acknowledgement."""
        return any(
            isinstance(numbered.report, PipelineReport) and numbered.report.status.terminal
            for numbered in self.reports
        )


@dataclass(frozen=True, slots=True)
class LivingInstances:
    """Every instance that lives on a node: what its services left running, and has not ended."""

    ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """Everything that an agent holds; it opens every stream (rule RL1)."""

    node_id: str
    session_id: str
    stream_number: int
    state_version: int
    maintenance: Maintenance
    held: tuple[HeldPipeline, ...]
    boot_id: str
    instances: LivingInstances = LivingInstances()


class CloseReason(StrEnum):
    """Why the server ended a stream."""

    SHUTDOWN = "SHUTDOWN"
    SUPERSEDED = "SUPERSEDED"
    REGISTER_AGAIN = "REGISTER_AGAIN"
    PROTOCOL = "PROTOCOL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The statement was reconciled; orders may follow."""

    unwanted: tuple[Dispatch, ...] = ()
    """What must not run any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """Answers to numbered reports."""

    results: tuple[tuple[int, ReportResult], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FencedOrder:
    """An order with what tells a late or doubled one (rule RL2); None: an unknown request."""

    session_epoch: int
    stream_number: int
    sequence: int
    order: Order | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowLog:
    """Somebody reads a step's log now, or nobody does any more."""

    pipeline_id: str
    step: str
    live: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The server ends the stream."""

    reason: CloseReason
    message: str = ""
    retry_after_s: float = 0.0


ServerWord = Welcome | HeartbeatResult | Acknowledged | FencedOrder | FollowLog | Closed
"""What the server says on a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundPipeline:
    """One pipeline that the server has bound to a node and that has not ended there yet.

    With a terminal status it has ended here without the node's word, and may still run there.
    """

    dispatch: Dispatch
    status: Status
    acknowledged: bool
    """Whether the agent has said that it is in its journal."""
    resendable: bool
    """Whether it was sent under a session that the present one continues (rule RL3)."""
    starts_over: bool = False
    """Whether it gets a new attempt once this one is lost (`on_lost: restart`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """What follows when the server's rows meet an agent's statement."""

    unwanted: tuple[Dispatch, ...]
    """Held, and must not run any more: the agent ends them."""
    resend: tuple[Dispatch, ...]
    """Never accepted, and safe to send again."""
    lost: tuple[Dispatch, ...]
    """Not held and never to be sent again: they end as NODE_LOST."""
    restart: tuple[Dispatch, ...]
    """The same, but they are to begin anew elsewhere."""
    gone: tuple[Dispatch, ...]
    """Ended before without the node's word, and not held any more: nothing of them runs."""


def reconcile(bound: Sequence[BoundPipeline], held: Sequence[HeldPipeline]) -> Reconciliation:
    """Return what must happen so that server and agent agree.

    `bound` is what the server has after the reports of the statement were applied. A dispatch that
    the agent holds and the server does not want is ended, unless it has ended already. One that the
    server wants and the agent does not hold is sent again only if the agent can never have had it:
    it was not acknowledged, and the agent's journal reaches back to when it was sent.

    What has ended on the server alone is gone once the agent does not hold it. A fenced node's
    pipelines are not bound to it any more, so whatever its agent still holds of them is unwanted.

    Source: RL1, RL3, RA1, RA3.
    """
    wanted = {pipeline.dispatch for pipeline in bound if not pipeline.status.terminal}
    holds = {pipeline.dispatch for pipeline in held}
    missing = [p for p in bound if p.dispatch not in holds]
    resend = [p for p in missing if p.dispatch in wanted and p.resendable and not p.acknowledged]
    lost = [p for p in missing if p.dispatch in wanted and p not in resend]
    return Reconciliation(
        unwanted=tuple(p.dispatch for p in held if p.dispatch not in wanted and not p.ended),
        resend=tuple(p.dispatch for p in resend),
        lost=tuple(p.dispatch for p in lost if not p.starts_over),
        restart=tuple(p.dispatch for p in lost if p.starts_over),
        gone=tuple(p.dispatch for p in missing if p.dispatch not in wanted),
    )
