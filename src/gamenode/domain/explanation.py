"""Where a pipeline could run, and why one waits, has failed or has not ended: in words (F10).

Pure functions over what the server knows at one moment; `plan`, `explain` and everything that shows
them say the same.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gamenode.domain.node import Link, Node
from gamenode.domain.pipeline import OnLost, Pipeline, Reason, Status, Step, StepType
from gamenode.domain.placement import Decision, Demand, Misfit, Objection, Verdict
from gamenode.domain.quantity import span
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

NAMED_MAX: Final = 10
"""How many nodes a reason names; it counts them all."""


class Cause(StrEnum):
    """What a pipeline waits for, beside what speaks against nodes and what steps ended by."""

    QUEUE = "QUEUE"
    DISPATCHED = "DISPATCHED"
    RUNNING = "RUNNING"
    UNREACHABLE = "UNREACHABLE"
    CANCEL_WANTED = "CANCEL_WANTED"
    MAY_STILL_RUN = "MAY_STILL_RUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Because:
    """One reason, and the nodes that it is about."""

    reason: str
    """For programs: a `Misfit`, a `Reason`, a `Cause`."""
    message: str
    nodes: tuple[str, ...] = ()
    """Some of them, by id."""
    nodes_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Which nodes could take a pipeline now, and what speaks against each of the others."""

    summary: str
    next_step: str
    """What to do; empty where there is nothing to be done."""
    reasons: tuple[Because, ...]
    node_id: str
    """Where it would go now; empty: nowhere."""
    gpu_id: str
    ports: tuple[int, ...]
    """What it would get there, for each host port that the node chooses."""
    never: bool
    """Whether waiting does not help: somebody must change a node, or the file."""
    verdicts: tuple[Verdict, ...]
    """Of every node: who fits first, then who may later, then who never can; by id."""
    fitting: int
    waiting: int
    """How many nodes may fit later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a pipeline is, beyond what everybody is shown of it."""

    pipeline: Pipeline
    dispatched_at: Instant | None
    acknowledged_at: Instant | None
    """When its node's agent had it in its journal."""
    cancel_acknowledged_at: Instant | None
    """When its node's agent knew that its end is wanted."""
    cancel_by: str
    demand: Demand | None
    """What it asks for, while it waits for a node."""
    ahead: int
    """How many wait before it for a node."""
    queued: int
    """How many wait for a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a pipeline is where it is."""

    pipeline_id: str
    status: Status
    summary: str
    next_step: str
    reasons: tuple[Because, ...]
    survey: Survey | None = None
    """While it waits for a node."""


# Where it could run


def survey(decision: Decision, demand: Demand) -> Survey:
    """Return what a decision means for people."""
    fitting = sum(not verdict.objections for verdict in decision.verdicts)
    never = sum(verdict.never for verdict in decision.verdicts)
    total = len(decision.verdicts)
    fits = decision.node_id is not None
    if fits:
        summary = f"fits {_nodes(fitting, total)} now; it would go to {decision.node_id}"
    elif decision.never:
        summary = f"can never fit as things are: {decision.explain()}"
    else:
        summary = f"must wait: {decision.explain()}"
    return Survey(
        summary=summary,
        next_step="" if fits else _placing_advice(decision, demand),
        reasons=tuple(
            Because(
                reason=entry.reason,
                message=f"{entry.nodes_total} {_noun(entry.nodes_total)} {entry.text}"
                if entry.nodes_total
                else entry.text,
                nodes=tuple(sorted(entry.nodes)),
                nodes_total=entry.nodes_total,
            )
            for entry in decision.against(named_max=NAMED_MAX)
        ),
        node_id=decision.node_id or "",
        gpu_id=decision.assignment.gpu_id,
        ports=decision.assignment.ports,
        never=decision.never,
        verdicts=tuple(sorted(decision.verdicts, key=_promising_first)),
        fitting=fitting,
        waiting=total - fitting - never,
    )


def detail(objection: Objection) -> str:
    """Return what speaks against one node: `has fewer than 2 CPUs free (1.5 free)`."""
    return f"{objection.text()} ({objection.found})" if objection.found else objection.text()


def _promising_first(verdict: Verdict) -> tuple[bool, bool, str]:
    return verdict.never, bool(verdict.objections), verdict.node_id


ADVICE: Final[Mapping[Misfit, str]] = {
    Misfit.OTHER_NODE: "the node that is asked for is not registered: gamenode nodes list",
    Misfit.SELECTOR: "label a node so that it matches (gamenode nodes label {node} KEY=VALUE),"
    " or ask for less in the selector",
    Misfit.ENV_MISSING: "define the env in the configuration of a node's agent, section [envs],"
    " or pass it with -e",
    Misfit.SIMPLE_CLIENT: "name the node to use it: --node {node}",
    Misfit.UNSUPPORTED: "leave these keys out, or run the agent of a node with a container engine",
    Misfit.CPU_TOTAL: "ask for fewer CPUs in `placement`, or add a larger node",
    Misfit.MEMORY_TOTAL: "ask for less memory in `placement`, or add a larger node",
    Misfit.GPU_TOTAL: "ask for less of one GPU in `placement`, or add a node with such a GPU",
    Misfit.PORTS_TOTAL: "name the host ports, or widen the node's range, section [capacity] of its"
    " agent's configuration",
    Misfit.MAINTENANCE: "gamenode nodes enable {node} ends the maintenance",
    Misfit.DISABLED: "gamenode nodes enable {node} lets it work again",
    Misfit.OFFLINE: "see to the host and its agent: gamenode nodes show {node}",
    Misfit.CONDITION: "gamenode nodes show {node} says what the condition is about",
    Misfit.BUSY: "it goes on when a pipeline there has ended:"
    " gamenode pipelines list --node {node}",
    Misfit.CPU: "it goes on when enough is free: gamenode pipelines list --node {node}",
    Misfit.MEMORY: "it goes on when enough is free: gamenode pipelines list --node {node}",
    Misfit.GPU_SLOTS: "it goes on when a slot is free: gamenode pipelines list --node {node}",
    Misfit.GPU_MEMORY: "it goes on when enough is free: gamenode pipelines list --node {node}",
    Misfit.PORT: "it goes on when the port is free: gamenode pipelines list --node {node}",
    Misfit.PORTS: "it goes on when enough are free: gamenode pipelines list --node {node}",
    Misfit.GROUP: "it goes on when another one of the group has ended:"
    " gamenode pipelines list --status RUNNING",
}
"""What to do about each, where it is what most of the nodes that come nearest have against them."""

_NO_NODES: Final = "run gamenode agent on a host: gamenode agent --server ADDRESS"


def _placing_advice(decision: Decision, demand: Demand) -> str:
    """Return what to do so that the pipeline fits: about those nodes that come nearest to it."""
    if decision.group is not None:
        return ADVICE[decision.group.misfit]
    if not decision.verdicts:
        return _NO_NODES
    nearest = [verdict for verdict in decision.verdicts if not verdict.never]
    if not nearest and demand.node_id:
        nearest = [verdict for verdict in decision.verdicts if verdict.node_id == demand.node_id]
    nearest = nearest or list(decision.verdicts)
    ((misfit, _),) = Counter(each.objections[0].misfit for each in nearest).most_common(1)
    node_id = min(v.node_id for v in nearest if v.objections[0].misfit is misfit)
    return ADVICE[misfit].format(node=node_id)


# Why it is where it is


def explain(
    standing: Standing, *, node: Node | None, survey: Survey | None, now: Instant
) -> Explanation:
    """Return why a pipeline waits, has failed, or has not ended yet.

    `node` is the one that it is bound to, if it is registered still; `survey` is of now, for one
    that is bound to none.
    """
    pipeline = standing.pipeline
    if pipeline.status.terminal:
        return _ended(pipeline, node)
    if not pipeline.node_id:
        return _queued(standing, survey)
    return _under_way(standing, node, now)


def _queued(standing: Standing, survey: Survey | None) -> Explanation:
    pipeline = standing.pipeline
    reasons = survey.reasons if survey is not None else ()
    place = f"{standing.ahead + 1} of {standing.queued} in the queue"
    # A node that refused it is left alone for a moment; why it did, is known nowhere else.
    refused = tuple(
        Because(reason=each.reason, message=each.text)
        for each in pipeline.waiting
        if each.reason == Reason.REFUSED
    )
    found = (survey.summary,) if survey is not None else ()
    return Explanation(
        pipeline_id=pipeline.id,
        status=pipeline.status,
        summary="; ".join((*(each.message for each in refused), *found, place)),
        next_step=survey.next_step if survey is not None else "",
        reasons=(*refused, *reasons, Because(reason=Cause.QUEUE, message=place)),
        survey=survey,
    )


_LOST: Final[Mapping[OnLost, str]] = {
    OnLost.WAIT: "it waits for its node, and what runs there goes on",
    OnLost.FAIL: "it fails if its node stays away for too long, and may run on there",
    OnLost.RESTART: "it starts anew elsewhere once its node says that it has ended, or is fenced",
}
"""What becomes of it while its node is away."""


def _under_way(standing: Standing, node: Node | None, now: Instant) -> Explanation:
    pipeline = standing.pipeline
    unreachable = node is None or not node.online or (not node.simple and node.link is Link.LOST)
    reasons = [
        *_cancel_wanted(standing, now),
        *([_unreachable(pipeline, node, now)] if unreachable else ()),
        *_progress(standing, now),
    ]
    if pipeline.cancel_requested_at is not None and unreachable:
        advice = (
            f"gamenode pipelines cancel {pipeline.id} --force ends it here, while its host may"
            f" still run it; where the host is dead: gamenode nodes fence {pipeline.node_id}"
        )
    elif pipeline.cancel_requested_at is not None:
        advice = (
            "it ends with the step that runs, after its stop grace, and its clean-up steps;"
            f" gamenode pipelines cancel {pipeline.id} --force waits for neither"
        )
    elif unreachable:
        advice = (
            f"see to the host and its agent: gamenode nodes show {pipeline.node_id};"
            f" where the host is dead: gamenode nodes fence {pipeline.node_id}"
        )
    else:
        advice = f"gamenode logs -f {pipeline.id} follows it"
    return Explanation(
        pipeline_id=pipeline.id,
        status=pipeline.status,
        summary="; ".join(reason.message for reason in reasons),
        next_step=advice,
        reasons=tuple(reasons),
    )


def _cancel_wanted(standing: Standing, now: Instant) -> Iterator[Because]:
    pipeline = standing.pipeline
    if pipeline.cancel_requested_at is None:
        return
    heard = (
        "its node sees to it"
        if standing.cancel_acknowledged_at is not None
        else "its node has not heard of it yet"
    )
    why = f" ({pipeline.cancel_reason})" if pipeline.cancel_reason else ""
    since = _ago(pipeline.cancel_requested_at, now)
    yield Because(
        reason=Cause.CANCEL_WANTED,
        message=f"{standing.cancel_by} wanted its end{why} {since} ago, and {heard}",
        nodes=(pipeline.node_id,),
        nodes_total=1,
    )


def _unreachable(pipeline: Pipeline, node: Node | None, now: Instant) -> Because:
    if node is None:
        message = f"node {pipeline.node_id} is not registered any more"
    else:
        cause = f" ({node.link_cause})" if node.link_cause else ""
        since = f" for {_ago(node.link_since, now)}" if node.link_since is not None else ""
        message = f"node {node.id} has been unreachable{since}{cause}"
    return Because(
        reason=Cause.UNREACHABLE,
        message=f"{message}: {_LOST[pipeline.on_lost]}",
        nodes=(pipeline.node_id,),
        nodes_total=1,
    )


def _progress(standing: Standing, now: Instant) -> Iterator[Because]:
    """Yield what it does now."""
    pipeline = standing.pipeline
    running = [step for step in pipeline.steps if step.status is Status.RUNNING]
    for step in running:
        if step.reason is Reason.PULLING:
            yield Because(
                reason=Reason.PULLING,
                message=f"the image of step {step.name} is being fetched"
                f"{f': {step.message}' if step.message else ''}",
            )
        elif step.reason is Reason.RETRYING:
            yield Because(
                reason=Reason.RETRYING,
                message=f"{_try(step)} of step {step.name} failed"
                f"{f' ({step.message})' if step.message else ''}; the next one follows",
            )
        else:
            since = f" for {_ago(step.started_at, now)}" if step.started_at is not None else ""
            yield Because(
                reason=Cause.RUNNING,
                message=f"step {step.name}, {_try(step)}, has been running{since}",
            )
    if running:
        return
    if pipeline.status is Status.PENDING and standing.acknowledged_at is None:
        since = _ago(standing.dispatched_at, now) if standing.dispatched_at is not None else "0s"
        message = f"sent to node {pipeline.node_id} {since} ago, which has not taken it yet"
    else:
        waiting = [step.name for step in pipeline.steps if step.status is Status.PENDING]
        message = (
            f"node {pipeline.node_id} prepares step {waiting[0]}"
            if waiting
            else f"every step has ended, and node {pipeline.node_id} is about to say so"
        )
    yield Because(
        reason=Cause.DISPATCHED, message=message, nodes=(pipeline.node_id,), nodes_total=1
    )


HOW: Final[Mapping[Reason, str]] = {
    Reason.NONE: "it did not say why",
    Reason.SKIPPED: "it was skipped",
    Reason.EXIT_CODE: "exit code {exit_code}",
    Reason.SIGNAL: "ended by {signal}",
    Reason.TIMEOUT: "its time was up",
    Reason.OOM_KILLED: "it needed more memory than it may have",
    Reason.IMAGE_PULL: "its image could not be fetched",
    Reason.START_FAILED: "it could not be started",
    Reason.UNSUPPORTED: "its node cannot honour what it asks for",
    Reason.UNHEALTHY: "it did not become healthy",
    Reason.RETRYING: "it is to be tried again",
    Reason.PULLING: "its image is being fetched",
    Reason.SECRET_MISSING: "a secret that it needs is gone from its node",
    Reason.NODE_LOST: "its node was lost",
    Reason.NODE_DISABLED: "its node was disabled",
    Reason.DRAINED: "its node was drained",
    Reason.OUTCOME_UNKNOWN: "how it ended is not known",
    Reason.POLICY: "its node's policy does not allow it",
    Reason.REFUSED: "its node refused it",
    Reason.CANCELLED_BY_USER: "its end was wanted",
    Reason.AGENT_STOPPED: "its node's agent was stopped for good",
}
"""How a step, or a pipeline as a whole, came to its end."""

REMEDY: Final[Mapping[Reason, str]] = {
    Reason.EXIT_CODE: "gamenode logs {where} shows what it printed",
    Reason.SIGNAL: "gamenode logs {where} shows what it printed",
    Reason.TIMEOUT: "give it a longer `timeout`; gamenode pipelines extend helps one that runs",
    Reason.OOM_KILLED: "give it more under deploy.resources.limits.memory",
    Reason.IMAGE_PULL: "see to the image's name, its registry, and the node's credentials for it",
    Reason.START_FAILED: "see to its command, image and mounts: gamenode pipelines show {pipeline}",
    Reason.UNSUPPORTED: "gamenode pipelines plan FILE names the nodes that can",
    Reason.UNHEALTHY: "gamenode logs {where} shows what it printed; see to its healthcheck",
    Reason.SECRET_MISSING: "run its file again, with its secrets",
    Reason.NODE_LOST: "see to the host: gamenode nodes show {node}",
    Reason.NODE_DISABLED: "gamenode nodes enable {node} lets it work again",
    Reason.DRAINED: "gamenode nodes enable {node} lets it work again",
    Reason.OUTCOME_UNKNOWN: "look on the host before it runs again: it may have done its work",
    Reason.POLICY: "the host's policy file has the last word; another node may allow it",
    Reason.REFUSED: "gamenode nodes show {node} may say more",
}
"""What to do about it, before it is run again; nothing about what somebody decided."""

_ABOUT_THE_NODE: Final = frozenset(
    {
        Reason.UNSUPPORTED,
        Reason.POLICY,
        Reason.REFUSED,
        Reason.NODE_LOST,
        Reason.NODE_DISABLED,
        Reason.DRAINED,
    }
)
"""Ends that another node may not have brought about; a retry from there stays on the same one."""


def how(step: Step) -> str:
    """Return how a step ended, in words; with what its node said, where that says more."""
    words = HOW[step.reason].format(exit_code=step.exit_code, signal=_signal(step.signal))
    return _said(words, step.message)


def _ended(pipeline: Pipeline, node: Node | None) -> Explanation:
    reasons = [
        Because(
            reason=step.reason or step.status,
            message=f"step {step.name} failed at {_try(step)}: {how(step)}"
            if step.attempt
            else f"step {step.name} failed: {how(step)}",
        )
        for step in pipeline.steps
        if step.status is Status.FAILED
    ]
    if not reasons and pipeline.status is not Status.COMPLETED:
        words = HOW[pipeline.reason].format(exit_code="", signal="a signal")
        reasons.append(
            Because(
                reason=pipeline.reason or pipeline.status,
                message=_said(words, pipeline.message),
            )
        )
    if pipeline.may_still_run:
        reasons.append(
            Because(
                reason=Cause.MAY_STILL_RUN,
                message=f"node {pipeline.node_id} has not said that it ended, and may still run it",
                nodes=(pipeline.node_id,),
                nodes_total=1,
            )
        )
    lives_on = [
        step.name
        for step in pipeline.steps
        if step.type is StepType.SERVICE and step.status is Status.COMPLETED
    ]
    if pipeline.status is Status.COMPLETED and lives_on:
        reasons.append(
            Because(
                reason=Status.COMPLETED,
                message=f"{', '.join(lives_on)} was started, and lives on",
                nodes=(pipeline.node_id,),
                nodes_total=1,
            )
        )
    words = "; ".join(reason.message for reason in reasons)
    return Explanation(
        pipeline_id=pipeline.id,
        status=pipeline.status,
        summary=f"{pipeline.status}: {words}" if words else str(pipeline.status),
        next_step=_remedy(pipeline, node),
        reasons=tuple(reasons),
    )


def _remedy(pipeline: Pipeline, node: Node | None) -> str:
    if pipeline.status is Status.COMPLETED:
        return ""
    failed = next((step for step in pipeline.steps if step.status is Status.FAILED), None)
    reason = failed.reason if failed is not None else pipeline.reason
    where = f"{pipeline.id}/{failed.name}" if failed is not None else pipeline.id
    node_id = node.id if node is not None else pipeline.node_id or "NODE"
    remedy = REMEDY.get(reason, "").format(pipeline=pipeline.id, where=where, node=node_id)
    again = f"gamenode pipelines retry {pipeline.id} runs it again"
    if reason not in _ABOUT_THE_NODE and any(
        step.status is Status.COMPLETED for step in pipeline.steps
    ):
        again = f"gamenode pipelines retry {pipeline.id} --from-failed runs it again from there"
    return f"{remedy}; {again}" if remedy else again


# Words


def _said(words: str, message: str) -> str:
    """Return words of ours with a node's own; one of them where it says the other too."""
    if not message or message == words:
        return words
    return message if message.startswith(words) else f"{words}: {message}"


def _try(step: Step) -> str:
    most = f" of {step.granted_to}" if step.granted_to > 1 else ""
    return f"try {step.attempt}{most}"


def _nodes(count: int, total: int) -> str:
    return f"{count} of {total} {_noun(total)}"


def _noun(count: int) -> str:
    return "node" if count == 1 else "nodes"


def _ago(since: Instant | None, now: Instant) -> str:
    return span(max(0.0, (now - (since or now)) / NANOSECONDS_PER_S))


def _signal(number: int | None) -> str:
    try:
        return f"signal {number} ({signal.Signals(number or 0).name})"
    except ValueError:
        return f"signal {number}"
