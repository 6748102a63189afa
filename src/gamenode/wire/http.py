"""The bodies of the HTTP interface: their shapes, and how domain types are written in them.

A field that is not there yet, such as the end of a running step, is `null`; a text without
content is empty. Times are RFC 3339 in UTC with milliseconds, those of log lines with nanoseconds.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Final

from msgspec import UNSET, Meta, Struct, UnsetType, field

from gamenode.domain import access, audit, command, verification
from gamenode.domain import event as events
from gamenode.domain import explanation as explanations
from gamenode.domain import inventory as inventories
from gamenode.domain import inventory_diff as diffs
from gamenode.domain import log as logs
from gamenode.domain import node as nodes
from gamenode.domain import pipeline as pipelines
from gamenode.domain.errors import GameNodeError
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant
from gamenode.wire.args_schema import args_json_schema
from gamenode.wire.errors import OUTWARD

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
"""A moment, such as `2026-11-24T22:00:00.123Z`."""

Text = Annotated[str, Meta(pattern=r"^[^\x00]*$")]
"""A text that both databases can keep."""

ArgValue = Text | int | bool
"""An arg's value; a number or truth value means the text that writes it."""

PROBLEM_TYPE: Final = "urn:gamenode:problem:"
"""What the `type` of a problem begins with; its code follows."""


class NodeLink(Struct, frozen=True, kw_only=True):
    """How the server reaches a node."""

    state: nodes.Link
    since: Time | None
    cause: str


class StateChange(Struct, frozen=True, kw_only=True):
    """A change of a node's state that was asked for."""

    version: int
    target: nodes.Maintenance
    reason: str
    by: str
    requested_at: Time
    pushed_at: Time | None
    confirmed_at: Time | None
    error: str
    deadline_at: Time | None
    then: nodes.DrainThen
    until: Time | None
    remaining: int | None


class NodeChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to change of a node; what is absent stays."""

    display_name: Annotated[Text, Meta(max_length=128)] | None = None
    note: Annotated[Text, Meta(max_length=4096)] | None = None
    labels: Mapping[str, str | None] = {}
    """Labels to set; null removes one."""


class StateChangeList(Struct, frozen=True, kw_only=True):
    """A node's state changes, newest first."""

    items: Sequence[StateChange]
    next_cursor: str | None = None


class StateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node shall be used for, and how it is emptied."""

    state: nodes.Maintenance
    reason: Annotated[Text, Meta(max_length=4096)] = ""
    drain: bool = False
    deadline_s: Annotated[float, Meta(ge=0)] | None = None
    """How long what runs may go on."""
    then: nodes.DrainThen = nodes.DrainThen.KEEP
    """What happens to what still runs then."""
    until: Text = ""
    """When the node works again by itself: RFC 3339, or such as `+2h`."""


class StatesRequest(StateRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for every node that a selector matches."""

    selector: Annotated[Text, Meta(min_length=1, max_length=1024)]
    dry_run: bool = False


class StateOutcome(Struct, frozen=True, kw_only=True):
    """What became, or would become, of one node."""

    node_id: str
    outcome: str
    """`changed`, `unchanged` or `refused`; with a dry run `would_change`."""
    message: str
    state: nodes.Maintenance
    running: int
    """How many pipelines are on it now."""


class StateOutcomes(Struct, frozen=True, kw_only=True):
    """One outcome a node."""

    items: Sequence[StateOutcome]
    next_cursor: str | None = None


class NodeCondition(Struct, frozen=True, kw_only=True):
    """Something about a node that an operator should know."""

    type: str
    since: Time
    reason: str
    blocks_placement: bool


class Lingering(Struct, frozen=True, kw_only=True):
    """A dispatch of a pipeline that a node may still run."""

    pipeline_id: str
    attempt: int


class Node(Struct, frozen=True, kw_only=True):
    """A node."""

    id: str
    display_name: str
    type: nodes.NodeType
    online: bool
    online_since: Time | None
    last_heartbeat_at: Time | None
    heartbeat_latency_s: float | None
    clock_skew_s: float | None
    link: NodeLink
    state: nodes.Maintenance
    state_change: StateChange | None
    session_epoch: int
    agent_version: str
    labels: Mapping[str, str]
    note: str
    conditions: Sequence[NodeCondition]
    inventory_version: int
    registered_at: Time
    may_still_run: Sequence[Lingering]
    """What has ended here without the node's word; it is ended there when the node is back."""


class Inventory(Struct, frozen=True, kw_only=True):
    """What a node is made of; null is what it does not show, never zero."""

    node_id: str
    version: int
    collected_at: Time
    """When this content was first seen."""
    seen_at: Time
    """When it was last reported."""
    hash: str
    hardware: inventories.Hardware
    software: inventories.Software
    network: inventories.Network
    failed: Sequence[inventories.CollectionFailure]


class InventoryList(Struct, frozen=True, kw_only=True):
    """Inventories of some nodes, by node."""

    items: Sequence[Inventory]
    next_cursor: str | None


class InventoryVersion(Struct, frozen=True, kw_only=True):
    """A version of a node's inventory, without its content."""

    version: int
    collected_at: Time
    seen_at: Time
    hash: str
    summary: str
    """What changed, in words; empty for the first version."""
    failed: Sequence[inventories.CollectionFailure]


class InventoryVersionList(Struct, frozen=True, kw_only=True):
    """Versions of a node's inventory, newest first."""

    items: Sequence[InventoryVersion]
    next_cursor: str | None


FieldValue = str | int | float | bool | Sequence[str]
ChangedValue = FieldValue | Mapping[str, FieldValue] | None
"""The value of a field, or the fields of a part."""


class InventoryChange(Struct, frozen=True, kw_only=True):
    """One difference; `from` is null for what was added, `to` for what was removed."""

    op: diffs.ChangeOp
    path: str
    """By identity, such as `gpu[GPU-5f0d].driver_version`."""
    from_: ChangedValue = field(name="from")
    to: ChangedValue


class InventoryDiff(Struct, frozen=True, kw_only=True):
    """How two versions of a node's inventory differ."""

    node_id: str
    from_: int = field(name="from")
    to: int
    changes: Sequence[InventoryChange]


class Step(Struct, frozen=True, kw_only=True):
    """A step of a pipeline."""

    name: str
    type: pipelines.StepType
    status: pipelines.Status
    reason: pipelines.Reason
    message: str
    exit_code: int | None
    signal: int | None
    attempt: int
    started_at: Time | None
    ended_at: Time | None
    instance_id: str | None
    attempts_max: int
    """The last try that may be made; 0 before a dispatch."""


class ReservedGpu(Struct, frozen=True, kw_only=True):
    """What a pipeline holds of a GPU."""

    id: str
    slots: int
    memory_bytes: int


class Reservation(Struct, frozen=True, kw_only=True):
    """What a pipeline holds of its node, until that says that nothing of it lives."""

    cpus: float
    memory_bytes: int
    gpu: ReservedGpu | None
    ports: Sequence[str]
    """Ports of the host, such as `8080/tcp`."""


class Waiting(Struct, frozen=True, kw_only=True):
    """Why a pipeline waits; `nodes` names some of the `nodes_total` of which that is true."""

    reason: str
    text: str
    nodes: Sequence[str]
    nodes_total: int
    passes: bool


class Pipeline(Struct, frozen=True, kw_only=True):
    """A pipeline."""

    id: str
    name: str
    status: pipelines.Status
    reason: pipelines.Reason
    message: str
    node_id: str | None
    attempt: int
    args: Mapping[str, str]
    priority: int
    steps: Sequence[Step]
    waiting: Sequence[Waiting]
    cancel_requested_at: Time | None
    cancel_reason: str
    created_at: Time
    created_by: str
    started_at: Time | None
    ended_at: Time | None
    retry_of: str | None
    on_lost: pipelines.OnLost
    extended_s: float
    """By how much its limits were extended, in all."""
    may_still_run: bool
    """It has ended here without its node's word, which may still run it."""
    reservation: Reservation | None
    """Null before a dispatch, and once its node has said that nothing of it lives."""


class Event(Struct, frozen=True, kw_only=True):
    """Something that happened. Its id is the cursor."""

    id: int
    type: str
    node_id: str
    entity_id: str
    status: str
    message: str
    timestamp: Time
    data: Mapping[str, str]


class LogLine(Struct, frozen=True, kw_only=True):
    """A line of a log; `base64` stands for `text` where the line is not UTF-8."""

    offset: int
    next_offset: int
    time: Time
    stream: logs.LogStream
    partial: Annotated[
        bool, Meta(description="Whether the step had not ended the line; the next one goes on.")
    ]
    text: str | UnsetType = UNSET
    base64: str | UnsetType = UNSET


class NodeList(Struct, frozen=True, kw_only=True):
    """Some nodes."""

    items: Sequence[Node]
    next_cursor: str | None


class PipelineList(Struct, frozen=True, kw_only=True):
    """Some pipelines, newest first."""

    items: Sequence[Pipeline]
    next_cursor: str | None


class EventList(Struct, frozen=True, kw_only=True):
    """Some events, oldest first."""

    items: Sequence[Event]
    next_cursor: str | None


class PipelineRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pipeline to create."""

    file: Annotated[Text, Meta(description="The text of a pipeline file.")]
    args: dict[Text, ArgValue] = field(default_factory=dict)
    envs: dict[Text, ArgValue] = field(default_factory=dict)
    node: Annotated[Text, Meta(max_length=63)] = ""
    selector: Annotated[Text, Meta(max_length=1024)] = ""
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0

    def __repr__(self) -> str:
        """Show no values: some may be secret."""
        return f"PipelineRequest(args={list(self.args)}, node={self.node!r})"


class ValidateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pipeline file to look at; its args are looked at too where they are given."""

    file: Annotated[Text, Meta(description="The text of a pipeline file.")]
    args: dict[Text, ArgValue] | None = None

    def __repr__(self) -> str:
        """Show no values: some may be secret."""
        return f"ValidateRequest(args={list(self.args or ())})"


class CancelRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a pipeline shall end, and whether to end it without the node's word."""

    reason: Annotated[Text, Meta(max_length=4096)] = ""
    force: bool = False


class RetryRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to repeat a pipeline that went badly."""

    from_failed: Annotated[
        bool, Meta(description="On the same node, from the first step on that did not go well.")
    ] = False


class ExtendRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much longer a pipeline and its steps may take."""

    by_s: Annotated[float, Meta(gt=0, le=2_592_000, description="In seconds; at most 30 days.")]


class FenceRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a node's host is known to be dead."""

    reason: Annotated[Text, Meta(min_length=1, max_length=4096)]


class DeclaredArg(Struct, frozen=True, kw_only=True):
    """An arg that a pipeline file declares."""

    name: str
    type: pipelines.ArgType
    required: bool
    default: str | None
    description: str
    pattern: str
    choices: Sequence[str]


class DeclaredStep(Struct, frozen=True, kw_only=True):
    """A step that a pipeline file declares."""

    name: str
    type: pipelines.StepType
    when: pipelines.Condition


class PipelineFile(Struct, frozen=True, kw_only=True):
    """What a valid pipeline file declares."""

    name: str
    description: str
    args: Sequence[DeclaredArg]
    args_schema: Annotated[
        dict[str, Any], Meta(description="The JSON Schema (draft 2020-12) of the args' values.")
    ]
    envs: Sequence[str]
    steps: Sequence[DeclaredStep]


class Token(Struct, frozen=True, kw_only=True):
    """A token, without its secret."""

    id: str
    name: str
    role: access.Role
    created_at: Time
    created_by: str
    expires_at: Time | None
    last_used_at: Time | None
    """As it was written down last, which is done every minute."""
    revoked_at: Time | None


class NewToken(Token, frozen=True, kw_only=True):
    """A token that was just made."""

    token: str
    """What its holder sends; it is shown here only."""


class TokenList(Struct, frozen=True, kw_only=True):
    """Some tokens, newest first."""

    items: Sequence[Token]
    next_cursor: str | None


class TokenRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token to make."""

    name: Annotated[Text, Meta(min_length=1, max_length=128)]
    """Whose it is, and what for; it stands in the audit log."""
    role: access.Role
    ttl: Text = ""
    """How long it works, such as `90d`; without it, until it is revoked."""


class AuditActor(Struct, frozen=True, kw_only=True):
    """Who acted."""

    kind: access.ActorKind
    name: str
    role: access.Role


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One administrative act."""

    id: int
    at: Time
    actor: AuditActor
    action: str
    target: str
    reason: str
    source: str
    outcome: audit.AuditOutcome
    code: str
    before: str
    after: str
    request_id: str


class AuditList(Struct, frozen=True, kw_only=True):
    """Some entries of the audit log, newest first."""

    items: Sequence[AuditEntry]
    next_cursor: str | None


class AuditVerdict(Struct, frozen=True, kw_only=True):
    """Whether the audit log is whole."""

    ok: bool
    rows: int
    """How many, from the oldest on, the chain vouches for."""
    head: str
    """The last sound link."""
    first_bad: int | None
    """The first entry that is altered or out of place, or the first that is missing at the end."""


class Version(Struct, frozen=True, kw_only=True):
    """Which program answers."""

    version: str
    api: str


class Because(Struct, frozen=True, kw_only=True):
    """One reason, and the nodes that it is about."""

    reason: str
    """For programs."""
    message: str
    nodes: Sequence[str]
    """Some of them."""
    nodes_total: int


class Objection(Struct, frozen=True, kw_only=True):
    """One thing that speaks against a node."""

    reason: str
    """For programs."""
    detail: str


class NodeVerdict(Struct, frozen=True, kw_only=True):
    """Whether a node could take a pipeline now, and everything that speaks against it."""

    node_id: str
    fits: bool
    never: bool
    """Whether waiting does not help: somebody must change the node, or the file."""
    reasons: Sequence[Objection]


class Survey(Struct, frozen=True, kw_only=True):
    """What the nodes are to a pipeline: counts of all, verdicts of some."""

    nodes: Sequence[NodeVerdict]
    """At most `limit`: who fits first, then who may later, then who never can."""
    nodes_total: int
    nodes_fitting: int
    nodes_waiting: int
    """How many may fit later."""
    nodes_never: int


class Plan(Survey, frozen=True, kw_only=True):
    """What would become of a pipeline if it were created now."""

    name: str
    fits: bool
    """Whether a node would take it now."""
    never: bool
    """Whether waiting does not help."""
    node_id: str | None
    """Where it would go."""
    gpu_id: str | None
    """The GPU that it would be given there."""
    ports: Sequence[int]
    """The host ports that it would be given there, where it leaves them to the node."""
    summary: str
    reasons: Sequence[Because]
    next_step: Annotated[str, Meta(description="What to do.")]


class Explanation(Survey, frozen=True, kw_only=True):
    """Why a pipeline waits, has failed, or has not ended yet; nodes, while it waits for one."""

    pipeline_id: str
    status: pipelines.Status
    summary: str
    reasons: Sequence[Because]
    next_step: Annotated[str, Meta(description="What to do.")]


class AttemptViolation(Struct, frozen=True, kw_only=True):
    """One thing that must not be."""

    kind: verification.ViolationKind
    pipeline_id: str
    step: str
    attempt: int
    run: int
    node_id: str
    message: str


class AttemptVerdict(Struct, frozen=True, kw_only=True):
    """Whether rows, journals and hosts agree about every attempt."""

    ok: bool
    attempts: int
    """How many runs were compared."""
    nodes_asked: int
    nodes_absent: Sequence[str]
    """Who could not be asked; nothing is said about what is on them."""
    violations: Sequence[AttemptViolation]


class Health(Struct, frozen=True, kw_only=True):
    """That the program answers."""

    status: str


class Detail(Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a request."""

    field: str
    line: int | None
    column: int | None
    reason: str
    advice: str


class Problem(Struct, frozen=True, kw_only=True):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    details: Sequence[Detail]
    retry_after_s: float | None
    id: str | None
    hint: Annotated[str, Meta(description="What to do.")]


@lru_cache(maxsize=4096)
def _second(moment_s: int) -> str:
    # Most bodies name few different seconds, and this is the costly part of a time.
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def encode_time(moment: Instant) -> str:
    """Return `moment` as RFC 3339 in UTC with milliseconds, rounded down."""
    seconds, nanoseconds = divmod(moment, NANOSECONDS_PER_S)
    return f"{_second(seconds)}.{nanoseconds // 1_000_000:03d}Z"


def encode_log_time(moment_ns: int) -> str:
    """Return `moment_ns` as RFC 3339 in UTC with nanoseconds."""
    seconds, nanoseconds = divmod(moment_ns, NANOSECONDS_PER_S)
    return f"{_second(seconds)}.{nanoseconds:09d}Z"


def _time_or_null(moment: Instant | None) -> str | None:
    return None if moment is None else encode_time(moment)


def encode_node(node: nodes.Node, lingering: Sequence[command.Dispatch] = ()) -> Node:
    """Return the body of `node`, with what it may still run."""
    return Node(
        id=node.id,
        display_name=node.display_name,
        type=node.type,
        online=node.online,
        online_since=_time_or_null(node.online_since),
        last_heartbeat_at=_time_or_null(node.last_heartbeat_at),
        heartbeat_latency_s=node.heartbeat_latency_s,
        clock_skew_s=node.clock_skew_s,
        link=NodeLink(state=node.link, since=_time_or_null(node.link_since), cause=node.link_cause),
        state=node.maintenance,
        state_change=_encode_state_change(node.state_change),
        session_epoch=node.session_epoch,
        agent_version=node.agent_version,
        labels=node.labels,
        note=node.note,
        conditions=[
            NodeCondition(
                type=condition.type,
                since=encode_time(condition.since),
                reason=condition.reason,
                blocks_placement=condition.blocks_placement,
            )
            for condition in node.conditions
        ],
        inventory_version=node.inventory_version,
        registered_at=encode_time(node.registered_at),
        may_still_run=[
            Lingering(pipeline_id=dispatch.pipeline_id, attempt=dispatch.attempt)
            for dispatch in lingering
        ],
    )


def _encode_state_change(change: nodes.StateChange | None) -> StateChange | None:
    if change is None:
        return None
    return StateChange(
        version=change.version,
        target=change.target,
        reason=change.reason,
        by=change.requested_by,
        requested_at=encode_time(change.requested_at),
        pushed_at=_time_or_null(change.pushed_at),
        confirmed_at=_time_or_null(change.confirmed_at),
        error=change.error,
        deadline_at=_time_or_null(change.drain.deadline_at),
        then=change.drain.then,
        until=_time_or_null(change.drain.until),
        remaining=change.remaining,
    )


def encode_state_changes(changes: Sequence[nodes.StateChange]) -> StateChangeList:
    """Return the body of a node's state changes."""
    items = [encoded for change in changes if (encoded := _encode_state_change(change))]
    return StateChangeList(items=items)


def encode_inventory(version: inventories.InventoryVersion) -> Inventory:
    """Return the body of a node's inventory."""
    return Inventory(
        node_id=version.node_id,
        version=version.version,
        collected_at=encode_time(version.collected_at),
        seen_at=encode_time(version.seen_at),
        hash=version.hash,
        hardware=version.inventory.hardware,
        software=version.inventory.software,
        network=version.inventory.network,
        failed=version.failed,
    )


def encode_inventory_version(version: inventories.InventoryVersion) -> InventoryVersion:
    """Return the body of one line of an inventory's history."""
    return InventoryVersion(
        version=version.version,
        collected_at=encode_time(version.collected_at),
        seen_at=encode_time(version.seen_at),
        hash=version.hash,
        summary=version.summary,
        failed=version.failed,
    )


def encode_inventory_diff(diff: diffs.InventoryDiff) -> InventoryDiff:
    """Return the body of a comparison."""
    return InventoryDiff(
        node_id=diff.node_id,
        from_=diff.from_version,
        to=diff.to_version,
        changes=[
            InventoryChange(op=change.op, path=change.path, from_=change.from_, to=change.to)
            for change in diff.changes
        ],
    )


def _encode_step(step: pipelines.Step) -> Step:
    return Step(
        name=step.name,
        type=step.type,
        status=step.status,
        reason=step.reason,
        message=step.message,
        exit_code=step.exit_code,
        signal=step.signal,
        attempt=step.attempt,
        started_at=_time_or_null(step.started_at),
        ended_at=_time_or_null(step.ended_at),
        instance_id=step.instance_id or None,
        attempts_max=step.granted_to,
    )


def _encode_reservation(held: pipelines.Reservation | None) -> Reservation | None:
    if held is None:
        return None
    gpu = ReservedGpu(id=held.gpu_id, slots=held.gpu_slots, memory_bytes=held.gpu_memory_bytes)
    return Reservation(
        cpus=held.cpu_millis / 1000,
        memory_bytes=held.memory_bytes,
        gpu=gpu if held.gpu_id else None,
        ports=held.ports,
    )


def encode_pipeline(pipeline: pipelines.Pipeline) -> Pipeline:
    """Return the body of `pipeline`."""
    return Pipeline(
        id=pipeline.id,
        name=pipeline.name,
        status=pipeline.status,
        reason=pipeline.reason,
        message=pipeline.message,
        node_id=pipeline.node_id or None,
        attempt=pipeline.attempt,
        args=pipeline.args,
        priority=pipeline.priority,
        steps=[_encode_step(step) for step in pipeline.steps],
        waiting=[
            Waiting(
                reason=entry.reason,
                text=entry.text,
                nodes=entry.nodes,
                nodes_total=entry.nodes_total,
                passes=entry.passes,
            )
            for entry in pipeline.waiting
        ],
        cancel_requested_at=_time_or_null(pipeline.cancel_requested_at),
        cancel_reason=pipeline.cancel_reason,
        created_at=encode_time(pipeline.created_at),
        created_by=pipeline.created_by,
        started_at=_time_or_null(pipeline.started_at),
        ended_at=_time_or_null(pipeline.ended_at),
        retry_of=pipeline.retry_of or None,
        on_lost=pipeline.on_lost,
        extended_s=pipeline.extended_s,
        may_still_run=pipeline.may_still_run,
        reservation=_encode_reservation(pipeline.reservation),
    )


def encode_pipeline_file(spec: pipelines.PipelineSpec) -> PipelineFile:
    """Return the body that says what the file declares."""
    return PipelineFile(
        name=spec.name,
        description=spec.description,
        args=[
            DeclaredArg(
                name=arg.name,
                type=arg.type,
                required=arg.default is None,
                default=arg.default,
                description=arg.description,
                pattern=arg.pattern,
                choices=arg.choices,
            )
            for arg in spec.args
        ],
        args_schema=args_json_schema(spec.args),
        envs=spec.envs,
        steps=[
            DeclaredStep(name=step.name, type=step.type, when=step.condition) for step in spec.steps
        ],
    )


def encode_event(event: events.Event) -> Event:
    """Return the body of `event`."""
    return Event(
        id=event.id,
        type=event.type,
        node_id=event.node_id,
        entity_id=event.entity_id,
        status=event.status,
        message=event.message,
        timestamp=encode_time(event.at),
        data=event.data,
    )


def encode_token(token: access.ApiToken) -> Token:
    """Return the body of `token`."""
    return Token(**_token_fields(token))


def encode_new_token(token: access.ApiToken, text: str) -> NewToken:
    """Return the body of `token` with what its holder sends."""
    return NewToken(**_token_fields(token), token=text)


def _token_fields(token: access.ApiToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "role": token.role,
        "created_at": encode_time(token.created_at),
        "created_by": token.created_by,
        "expires_at": _time_or_null(token.expires_at),
        "last_used_at": _time_or_null(token.last_used_at),
        "revoked_at": _time_or_null(token.revoked_at),
    }


def encode_audit(number: int, entry: audit.AuditEntry) -> AuditEntry:
    """Return the body of `entry`, which is stored as `number`."""
    actor = entry.actor
    return AuditEntry(
        id=number,
        at=encode_time(entry.at),
        actor=AuditActor(kind=actor.kind, name=actor.name, role=actor.role),
        action=entry.action,
        target=entry.target,
        reason=entry.reason,
        source=actor.source,
        outcome=entry.outcome,
        code=entry.code,
        before=entry.before,
        after=entry.after,
        request_id=entry.request_id,
    )


def encode_plan(name: str, survey: explanations.Survey, *, limit: int) -> Plan:
    """Return the body of a plan, with the verdicts of at most `limit` nodes."""
    return Plan(
        name=name,
        fits=bool(survey.node_id),
        never=survey.never,
        node_id=survey.node_id or None,
        gpu_id=survey.gpu_id or None,
        ports=survey.ports,
        summary=survey.summary,
        reasons=_encode_reasons(survey.reasons),
        next_step=survey.next_step,
        **_survey_fields(survey, limit),
    )


def encode_explanation(explanation: explanations.Explanation, *, limit: int) -> Explanation:
    """Return the body of an explanation, with the verdicts of at most `limit` nodes."""
    return Explanation(
        pipeline_id=explanation.pipeline_id,
        status=explanation.status,
        summary=explanation.summary,
        reasons=_encode_reasons(explanation.reasons),
        next_step=explanation.next_step,
        **_survey_fields(explanation.survey, limit),
    )


def _encode_reasons(reasons: Sequence[explanations.Because]) -> list[Because]:
    return [
        Because(
            reason=each.reason,
            message=each.message,
            nodes=each.nodes,
            nodes_total=each.nodes_total,
        )
        for each in reasons
    ]


def _survey_fields(survey: explanations.Survey | None, limit: int) -> dict[str, Any]:
    verdicts = survey.verdicts if survey is not None else ()
    fitting, waiting = (survey.fitting, survey.waiting) if survey is not None else (0, 0)
    return {
        "nodes": [
            NodeVerdict(
                node_id=verdict.node_id,
                fits=not verdict.objections,
                never=verdict.never,
                reasons=[
                    Objection(reason=each.misfit, detail=explanations.detail(each))
                    for each in verdict.objections
                ],
            )
            for verdict in verdicts[:limit]
        ],
        "nodes_total": len(verdicts),
        "nodes_fitting": fitting,
        "nodes_waiting": waiting,
        "nodes_never": len(verdicts) - fitting - waiting,
    }


def encode_attempt_verdict(verdict: verification.AttemptVerdict) -> AttemptVerdict:
    """Return the body of what came of comparing all records."""
    return AttemptVerdict(
        ok=verdict.ok,
        attempts=verdict.attempts,
        nodes_asked=verdict.nodes_asked,
        nodes_absent=verdict.nodes_absent,
        violations=[
            AttemptViolation(
                kind=violation.kind,
                pipeline_id=violation.key.pipeline_id,
                step=violation.key.step,
                attempt=violation.key.attempt,
                run=violation.key.run,
                node_id=violation.node_id,
                message=violation.message,
            )
            for violation in verdict.violations
        ],
    )


def encode_log_line(line: logs.LogLine) -> LogLine:
    """Return the body of `line`."""
    try:
        text: str | UnsetType = line.text.decode()
        encoded: str | UnsetType = UNSET
    except UnicodeDecodeError:
        text, encoded = UNSET, base64.b64encode(line.text).decode()
    return LogLine(
        offset=line.offset,
        next_offset=line.next_offset,
        time=encode_log_time(line.at_ns),
        stream=line.stream,
        partial=line.partial,
        text=text,
        base64=encoded,
    )


def encode_problem(error: GameNodeError, *, status: int | None = None) -> Problem:
    """Return the problem that says `error`; `status` where HTTP has a closer one than its code."""
    outward = OUTWARD[error.code]
    return Problem(
        type=PROBLEM_TYPE + error.code,
        title=outward.title,
        status=outward.http_status if status is None else status,
        detail=error.message,
        code=error.code,
        details=[
            Detail(
                field=violation.field,
                line=violation.line,
                column=violation.column,
                reason=violation.reason,
                advice=violation.advice,
            )
            for violation in error.violations
        ],
        retry_after_s=error.retry_after_s,
        id=error.error_id or None,
        hint=error.hint,
    )


def arg_text(value: ArgValue) -> str:
    """Return the text that an arg's value means."""
    match value:
        case bool():
            return "true" if value else "false"
        case _:
            return str(value)
