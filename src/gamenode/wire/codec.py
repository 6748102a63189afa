"""Protobuf messages to domain values and back. No decision is made here.

A message that comes in has passed its rules (protovalidate, in the interceptor); what is checked
again is only what the types need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from gamenode.domain.command import (
    Acknowledged,
    CancelOrder,
    Closed,
    CloseReason,
    CollectOrder,
    Dispatch,
    ExecuteOrder,
    ExtendOrder,
    FencedOrder,
    FollowLog,
    GrantedStep,
    HeldPipeline,
    LivingInstances,
    NumberedReport,
    Order,
    OrderAnswer,
    OrderOutcome,
    ServerWord,
    StateConfirmation,
    Statement,
    StateOrder,
    VerifyOrder,
    Welcome,
)
from gamenode.domain.container import PortRange
from gamenode.domain.event import Event
from gamenode.domain.inventory import (
    Collection,
    CollectionAnswer,
    CollectionFailure,
    Hardware,
    Inventory,
    Network,
    Software,
)
from gamenode.domain.log import AppendAnswer, LogKey, LogLine, LogPosition
from gamenode.domain.node import (
    OF_THE_AGENT,
    ConditionType,
    Heartbeat,
    HeartbeatResult,
    Maintenance,
    NodeType,
    Offer,
    Registration,
    RegistrationAnswer,
)
from gamenode.domain.pipeline import (
    Condition,
    ContainerSpec,
    PipelineReport,
    Reason,
    Report,
    ReportOutcome,
    ReportResult,
    Status,
    StepReport,
    StepType,
)
from gamenode.domain.verification import HostAttempt, RunState
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.records import decode_record, encode_record

_NODE_TYPES: Final = {
    pb.NODE_TYPE_PHYSICAL: NodeType.PHYSICAL,
    pb.NODE_TYPE_VIRTUAL: NodeType.VIRTUAL,
    pb.NODE_TYPE_CONTAINER: NodeType.CONTAINER,
}
_NODE_TYPES_OUT: Final = {domain: wire for wire, domain in _NODE_TYPES.items()}
_MAINTENANCE: Final[Mapping[int, Maintenance]] = {
    pb.MAINTENANCE_STATE_UNSPECIFIED: Maintenance.NORMAL,
    pb.MAINTENANCE_STATE_NORMAL: Maintenance.NORMAL,
    pb.MAINTENANCE_STATE_MAINTENANCE: Maintenance.MAINTENANCE,
    pb.MAINTENANCE_STATE_DISABLED: Maintenance.DISABLED,
}
_MAINTENANCE_OUT: Final = {
    Maintenance.NORMAL: pb.MAINTENANCE_STATE_NORMAL,
    Maintenance.MAINTENANCE: pb.MAINTENANCE_STATE_MAINTENANCE,
    Maintenance.DISABLED: pb.MAINTENANCE_STATE_DISABLED,
}
_STATUS: Final = {
    pb.PENDING: Status.PENDING,
    pb.RUNNING: Status.RUNNING,
    pb.COMPLETED: Status.COMPLETED,
    pb.FAILED: Status.FAILED,
    pb.CANCELLED: Status.CANCELLED,
}
_STATUS_OUT: Final = {domain: wire for wire, domain in _STATUS.items()}
_CONDITION: Final = {
    pb.STEP_CONDITION_SUCCESS: Condition.SUCCESS,
    pb.STEP_CONDITION_FAILURE: Condition.FAILURE,
    pb.STEP_CONDITION_ALWAYS: Condition.ALWAYS,
}
_CONDITION_OUT: Final = {domain: wire for wire, domain in _CONDITION.items()}
_REPORT_OUTCOME: Final = {
    pb.REPORT_OUTCOME_APPLIED: ReportOutcome.APPLIED,
    pb.REPORT_OUTCOME_REPEATED: ReportOutcome.REPEATED,
    pb.REPORT_OUTCOME_STALE: ReportOutcome.STALE,
}
_REPORT_OUTCOME_OUT: Final = {domain: wire for wire, domain in _REPORT_OUTCOME.items()}
_ORDER_OUTCOME: Final = {
    pb.COMMAND_OUTCOME_ACCEPTED: OrderOutcome.ACCEPTED,
    pb.COMMAND_OUTCOME_REPEATED: OrderOutcome.REPEATED,
    pb.COMMAND_OUTCOME_REFUSED: OrderOutcome.REFUSED,
}
_ORDER_OUTCOME_OUT: Final = {domain: wire for wire, domain in _ORDER_OUTCOME.items()}
_RUN_STATE: Final = {
    pb.RUN_STATE_RUNNING: RunState.RUNNING,
    pb.RUN_STATE_ENDED: RunState.ENDED,
    pb.RUN_STATE_ABSENT: RunState.ABSENT,
}
_RUN_STATE_OUT: Final = {domain: wire for wire, domain in _RUN_STATE.items()}
_CLOSE_REASON: Final = {
    pb.CLOSE_REASON_SHUTDOWN: CloseReason.SHUTDOWN,
    pb.CLOSE_REASON_SUPERSEDED: CloseReason.SUPERSEDED,
    pb.CLOSE_REASON_REGISTER_AGAIN: CloseReason.REGISTER_AGAIN,
    pb.CLOSE_REASON_PROTOCOL: CloseReason.PROTOCOL,
}
_CLOSE_REASON_OUT: Final = {domain: wire for wire, domain in _CLOSE_REASON.items()}


_AGENT_CONDITIONS: Final = frozenset(str(kind) for kind in OF_THE_AGENT)


def _instant(nanoseconds: int) -> Instant | None:
    return Instant(nanoseconds) if nanoseconds else None


def _maintenance(value: int) -> Maintenance:
    # A newer peer may know states that we do not; such a state allows nothing here.
    return _MAINTENANCE.get(value, Maintenance.DISABLED)


def _reason(text: str) -> Reason:
    # A newer agent may know reasons that we do not; the words in `message` still say why.
    try:
        return Reason(text)
    except ValueError:
        return Reason.NONE


# Registration, heartbeats


def decode_registration(request: pb.RegisterRequest) -> Registration:
    """Return what a node says of itself."""
    inventory, failed = decode_parts(request)
    return Registration(
        node_id=request.node_id,
        type=_NODE_TYPES[request.node_type],
        inventory=inventory,
        last_session_epoch=(
            request.last_session_epoch if request.HasField("last_session_epoch") else None
        ),
        boot_id=request.boot_id,
        agent_version=request.agent_version,
        env_names=frozenset(request.env_names),
        labels=dict(request.labels),
        step_runtimes=frozenset(request.step_runtimes),
        offer=Offer(
            gpu_slots=request.gpu_slots or 1,
            gpu_slots_by_id=dict(request.gpu_slots_by_id),
            ports=(
                PortRange(request.ports.first, request.ports.last)
                if request.HasField("ports")
                else None
            ),
        ),
        failed=failed,
        inventory_hash=request.inventory_hash,
    )


def encode_registration(registration: Registration) -> pb.RegisterRequest:
    """Return the message of a registration."""
    request = pb.RegisterRequest(
        node_id=registration.node_id,
        node_type=_NODE_TYPES_OUT[registration.type],
        last_session_epoch=registration.last_session_epoch,
        boot_id=registration.boot_id,
        agent_version=registration.agent_version,
        env_names=sorted(registration.env_names),
        labels=registration.labels,
        step_runtimes=sorted(registration.step_runtimes),
        gpu_slots=registration.offer.gpu_slots,
        gpu_slots_by_id=registration.offer.gpu_slots_by_id,
        ports=(
            pb.PortRange(first=ports.first, last=ports.last)
            if (ports := registration.offer.ports) is not None
            else None
        ),
        failed=_encode_failed(registration.failed),
        inventory_hash=registration.inventory_hash,
    )
    encode_record(registration.inventory, request)
    return request


def encode_registration_answer(answer: RegistrationAnswer) -> pb.RegisterResponse:
    """Return the answer to a registration."""
    return pb.RegisterResponse(
        accepted=answer.accepted,
        message=answer.message,
        maintenance_state=_MAINTENANCE_OUT[answer.maintenance],
        session_id=answer.session_id,
        session_epoch=answer.session_epoch,
        continuation=answer.continuation,
        state_version=answer.state_version,
        heartbeat_interval_s=answer.heartbeat_interval_s,
        heartbeat_timeout_s=answer.heartbeat_timeout_s,
        log_chunk_bytes_max=answer.log_chunk_bytes_max,
    )


def decode_registration_answer(response: pb.RegisterResponse) -> RegistrationAnswer:
    """Return what the server answered to a registration."""
    return RegistrationAnswer(
        accepted=response.accepted,
        message=response.message,
        maintenance=_maintenance(response.maintenance_state),
        session_id=response.session_id,
        session_epoch=response.session_epoch,
        continuation=response.continuation,
        state_version=response.state_version,
        heartbeat_interval_s=response.heartbeat_interval_s,
        heartbeat_timeout_s=response.heartbeat_timeout_s,
        log_chunk_bytes_max=response.log_chunk_bytes_max,
    )


def decode_heartbeat(request: pb.HeartbeatRequest) -> Heartbeat:
    """Return a heartbeat."""
    return Heartbeat(
        node_id=request.node_id,
        session_id=request.session_id,
        sent_at=_instant(request.timestamp),
        round_trip_s=request.round_trip_s if request.HasField("round_trip_s") else None,
        conditions={
            ConditionType(condition.type): condition.reason
            for condition in request.conditions
            if condition.type in _AGENT_CONDITIONS
        },
        inventory_hash=request.inventory_hash,
    )


def encode_heartbeat(heartbeat: Heartbeat) -> pb.HeartbeatRequest:
    """Return the message of a heartbeat."""
    return pb.HeartbeatRequest(
        node_id=heartbeat.node_id,
        session_id=heartbeat.session_id,
        timestamp=heartbeat.sent_at or 0,
        round_trip_s=heartbeat.round_trip_s,
        conditions=[
            pb.NodeCondition(type=kind, reason=reason)
            for kind, reason in heartbeat.conditions.items()
        ],
        inventory_hash=heartbeat.inventory_hash,
    )


def encode_heartbeat_result(result: HeartbeatResult) -> pb.HeartbeatResponse:
    """Return the answer to a heartbeat."""
    return pb.HeartbeatResponse(
        status=pb.HEARTBEAT_STATUS_OK if result.counted else pb.HEARTBEAT_STATUS_REGISTER_AGAIN,
        message=result.message,
        maintenance_state=_MAINTENANCE_OUT[result.maintenance],
        state_version=result.state_version,
        send_inventory=result.send_inventory,
    )


def decode_resource_info(info: pb.ResourceInfo, *, now: Instant) -> Collection:
    """Return what a node collected; `now` where it does not say when."""
    return Collection(
        inventory=_decode_inventory(info),
        collected_at=_instant(info.timestamp) or now,
        failed=_decode_failed(info.failed),
        hash=info.hash,
    )


def encode_resource_info(
    collection: Collection, *, node_id: str, session_id: str
) -> pb.ResourceInfo:
    """Return the message of what a node collected."""
    info = pb.ResourceInfo(
        node_id=node_id,
        session_id=session_id,
        timestamp=collection.collected_at,
        hash=collection.hash,
        failed=_encode_failed(collection.failed),
    )
    encode_record(collection.inventory, info)
    return info


def decode_resource_answer(response: pb.UpdateResponse) -> CollectionAnswer:
    """Return what the server answered to a collection."""
    return CollectionAnswer(
        accepted=response.accepted,
        error=response.error,
        stale=response.stale,
        next_report_at=_instant(response.next_report_time),
    )


def decode_parts(
    message: pb.RegisterRequest | pb.ResourceInfo,
) -> tuple[Inventory, tuple[CollectionFailure, ...]]:
    """Return what a node says it is made of, and what it could not collect."""
    return _decode_inventory(message), _decode_failed(message.failed)


def decode_node_type(request: pb.RegisterRequest) -> NodeType | None:
    """Return what kind of machine registers; None where it names none that is known."""
    return _NODE_TYPES.get(request.node_type)


def _decode_inventory(message: pb.RegisterRequest | pb.ResourceInfo) -> Inventory:
    return Inventory(
        hardware=decode_record(Hardware, message.hardware),
        software=decode_record(Software, message.software),
        network=decode_record(Network, message.network),
    )


def _decode_failed(failed: Iterable[pb.CollectionFailure]) -> tuple[CollectionFailure, ...]:
    return tuple(CollectionFailure(part=it.part, reason=it.reason) for it in failed)


def _encode_failed(failed: Iterable[CollectionFailure]) -> list[pb.CollectionFailure]:
    return [pb.CollectionFailure(part=it.part, reason=it.reason) for it in failed]


# Reports


def decode_step_report(message: pb.StepStatusUpdate) -> StepReport:
    """Return what a node says of a step."""
    return StepReport(
        pipeline_id=message.pipeline_id,
        step=message.step_id,
        status=_STATUS[message.status],
        session_id=message.session_id,
        pipeline_attempt=message.pipeline_attempt,
        attempt=message.attempt,
        run=message.run,
        started_at=_instant(message.start_time),
        ended_at=_instant(message.end_time),
        reason=_reason(message.reason),
        message=message.error_message,
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        signal=message.signal if message.HasField("signal") else None,
        log_length_bytes=(
            message.log_length_bytes if message.HasField("log_length_bytes") else None
        ),
        log_hash=message.log_hash,
        instance_id=message.instance_id,
        log=message.logs,
    )


def encode_step_report(report: StepReport) -> pb.StepStatusUpdate:
    """Return the message of a step's report."""
    return pb.StepStatusUpdate(
        pipeline_id=report.pipeline_id,
        step_id=report.step,
        status=_STATUS_OUT[report.status],
        session_id=report.session_id,
        pipeline_attempt=report.pipeline_attempt,
        attempt=report.attempt,
        run=report.run,
        start_time=report.started_at or 0,
        end_time=report.ended_at or 0,
        reason=report.reason,
        error_message=report.message,
        exit_code=report.exit_code,
        signal=report.signal,
        log_length_bytes=report.log_length_bytes,
        log_hash=report.log_hash,
        instance_id=report.instance_id,
        logs=report.log,
    )


def decode_pipeline_report(message: pb.PipelineStatusUpdate) -> PipelineReport:
    """Return what a node says of a pipeline."""
    return PipelineReport(
        pipeline_id=message.pipeline_id,
        status=_STATUS[message.status],
        session_id=message.session_id,
        attempt=message.attempt,
        reason=_reason(message.reason),
        message=message.message,
    )


def encode_pipeline_report(report: PipelineReport) -> pb.PipelineStatusUpdate:
    """Return the message of a pipeline's report."""
    return pb.PipelineStatusUpdate(
        pipeline_id=report.pipeline_id,
        status=_STATUS_OUT[report.status],
        session_id=report.session_id,
        attempt=report.attempt,
        reason=report.reason,
        message=report.message,
    )


def decode_report(message: pb.StatusReport) -> NumberedReport:
    """Return a numbered report."""
    report: Report
    if message.HasField("step"):
        report = decode_step_report(message.step)
    else:
        report = decode_pipeline_report(message.pipeline)
    return NumberedReport(sequence=message.sequence, report=report)


def encode_report(numbered: NumberedReport) -> pb.StatusReport:
    """Return the message of a numbered report."""
    match numbered.report:
        case StepReport() as report:
            return pb.StatusReport(sequence=numbered.sequence, step=encode_step_report(report))
        case PipelineReport() as report:
            return pb.StatusReport(
                sequence=numbered.sequence, pipeline=encode_pipeline_report(report)
            )


def encode_report_result(result: ReportResult) -> pb.UpdateResponse:
    """Return the answer to a report; a stale one is never answered as accepted."""
    match result.outcome:
        case ReportOutcome.APPLIED | ReportOutcome.REPEATED:
            return pb.UpdateResponse(accepted=True, stop=result.stop)
        case ReportOutcome.STALE:
            return pb.UpdateResponse(
                accepted=False,
                stale=True,
                stop=result.stop,
                error="of a superseded session or attempt, or already ended; nothing was changed",
            )


def _encode_acknowledgement(sequence: int, result: ReportResult) -> pb.ReportAcknowledgement:
    return pb.ReportAcknowledgement(
        sequence=sequence, outcome=_REPORT_OUTCOME_OUT[result.outcome], stop=result.stop
    )


# The stream


def decode_statement(message: pb.Statement) -> Statement:
    """Return what an agent holds."""
    return Statement(
        node_id=message.node_id,
        session_id=message.session_id,
        stream_number=message.stream_number,
        state_version=message.state_version,
        maintenance=_maintenance(message.maintenance_state),
        held=tuple(
            HeldPipeline(
                dispatch=Dispatch(entry.pipeline_id, entry.attempt),
                reports=tuple(decode_report(report) for report in entry.reports),
            )
            for entry in message.pipelines
        ),
        boot_id=message.boot_id,
        instances=decode_instances(message.instances),
    )


def encode_statement(statement: Statement) -> pb.Statement:
    """Return the message of a statement."""
    return pb.Statement(
        node_id=statement.node_id,
        session_id=statement.session_id,
        stream_number=statement.stream_number,
        state_version=statement.state_version,
        maintenance_state=_MAINTENANCE_OUT[statement.maintenance],
        pipelines=[
            pb.HeldPipeline(
                pipeline_id=held.dispatch.pipeline_id,
                attempt=held.dispatch.attempt,
                reports=[encode_report(report) for report in held.reports],
            )
            for held in statement.held
        ],
        boot_id=statement.boot_id,
        instances=encode_instances(statement.instances),
    )


def decode_instances(message: pb.LivingInstances) -> LivingInstances:
    """Return which instances live on a node."""
    return LivingInstances(frozenset(message.instance_ids))


def encode_instances(instances: LivingInstances) -> pb.LivingInstances:
    """Return the message of the instances that live."""
    return pb.LivingInstances(instance_ids=sorted(instances.ids))


def _encode_dispatches(dispatches: Iterable[Dispatch]) -> list[pb.PipelineAttempt]:
    return [pb.PipelineAttempt(pipeline_id=d.pipeline_id, attempt=d.attempt) for d in dispatches]


def _decode_dispatches(messages: Iterable[pb.PipelineAttempt]) -> tuple[Dispatch, ...]:
    return tuple(Dispatch(message.pipeline_id, message.attempt) for message in messages)


def encode_server_word(word: ServerWord) -> pb.ServerMessage:
    """Return the message of what the server says on a stream."""
    match word:
        case Welcome():
            return pb.ServerMessage(welcome=pb.Welcome(unwanted=_encode_dispatches(word.unwanted)))
        case HeartbeatResult():
            return pb.ServerMessage(heartbeat=encode_heartbeat_result(word))
        case Acknowledged():
            entries = [_encode_acknowledgement(number, result) for number, result in word.results]
            return pb.ServerMessage(
                acknowledgements=pb.ReportAcknowledgements(acknowledgements=entries)
            )
        case FencedOrder():
            return pb.ServerMessage(command=_encode_command(word))
        case FollowLog():
            return pb.ServerMessage(
                follow_log=pb.FollowLog(
                    pipeline_id=word.pipeline_id, step_id=word.step, live=word.live
                )
            )
        case Closed():
            return pb.ServerMessage(
                close=pb.Close(
                    reason=_CLOSE_REASON_OUT[word.reason],
                    message=word.message,
                    retry_after_s=word.retry_after_s,
                )
            )


def decode_server_word(message: pb.ServerMessage) -> ServerWord | None:
    """Return what the server says, or None where this agent does not know such a message."""
    match message.WhichOneof("content"):
        case "welcome":
            return Welcome(unwanted=_decode_dispatches(message.welcome.unwanted))
        case "heartbeat":
            return HeartbeatResult(
                counted=message.heartbeat.status == pb.HEARTBEAT_STATUS_OK,
                message=message.heartbeat.message,
                maintenance=_maintenance(message.heartbeat.maintenance_state),
                state_version=message.heartbeat.state_version,
                send_inventory=message.heartbeat.send_inventory,
            )
        case "acknowledgements":
            return Acknowledged(
                results=tuple(
                    (
                        entry.sequence,
                        ReportResult(
                            outcome=_REPORT_OUTCOME.get(entry.outcome, ReportOutcome.STALE),
                            stop=entry.stop,
                        ),
                    )
                    for entry in message.acknowledgements.acknowledgements
                )
            )
        case "command":
            return FencedOrder(
                session_epoch=message.command.session_epoch,
                stream_number=message.command.stream_number,
                sequence=message.command.sequence,
                order=_decode_order(message.command),
            )
        case "follow_log":
            return FollowLog(
                pipeline_id=message.follow_log.pipeline_id,
                step=message.follow_log.step_id,
                live=message.follow_log.live,
            )
        case "close":
            return Closed(
                reason=_CLOSE_REASON.get(message.close.reason, CloseReason.PROTOCOL),
                message=message.close.message,
                retry_after_s=message.close.retry_after_s,
            )
        case _:
            return None


def _encode_command(fenced: FencedOrder) -> pb.Command:
    command = pb.Command(
        session_epoch=fenced.session_epoch,
        stream_number=fenced.stream_number,
        sequence=fenced.sequence,
    )
    match fenced.order:
        case None:
            pass
        case ExecuteOrder() as order:
            _encode_execute(order, command.execute)
        case CancelOrder() as order:
            command.cancel.pipeline_id = order.dispatch.pipeline_id
            command.cancel.attempt = order.dispatch.attempt
            command.cancel.reason = order.reason
            command.cancel.message = order.message
            command.cancel.force = order.force
        case ExtendOrder() as order:
            command.extend.pipeline_id = order.dispatch.pipeline_id
            command.extend.attempt = order.dispatch.attempt
            command.extend.extended_s = order.extended_s
        case StateOrder() as order:
            request = command.change_state
            request.node_id = order.node_id
            request.target_state = _MAINTENANCE_OUT[order.target]
            request.reason = order.reason
            request.time = order.requested_at
            request.version = order.version
            request.end_running = order.end_running
        case CollectOrder():
            command.collect.SetInParent()
        case VerifyOrder():
            command.verify.SetInParent()
    return command


def _decode_order(command: pb.Command) -> Order | None:
    match command.WhichOneof("request"):
        case "execute":
            return _decode_execute(command.execute)
        case "cancel":
            return CancelOrder(
                dispatch=Dispatch(command.cancel.pipeline_id, command.cancel.attempt),
                reason=_reason(command.cancel.reason),
                message=command.cancel.message,
                force=command.cancel.force,
            )
        case "extend":
            return ExtendOrder(
                dispatch=Dispatch(command.extend.pipeline_id, command.extend.attempt),
                extended_s=command.extend.extended_s,
            )
        case "change_state" if command.change_state.target_state in _MAINTENANCE:
            return StateOrder(
                node_id=command.change_state.node_id,
                version=command.change_state.version,
                target=_maintenance(command.change_state.target_state),
                reason=command.change_state.reason,
                requested_at=Instant(command.change_state.time),
                end_running=command.change_state.end_running,
            )
        case "collect":
            return CollectOrder()
        case "verify":
            return VerifyOrder()
        case _:
            return None


def encode_answer(sequence: int, answer: OrderAnswer) -> pb.CommandAnswer:
    """Return the message of an answer to a command."""
    message = pb.CommandAnswer(
        sequence=sequence,
        outcome=_ORDER_OUTCOME_OUT[answer.outcome],
        reason=answer.reason,
        message=answer.message,
    )
    if answer.confirmation is not None:
        message.state_change.accepted = True
        message.state_change.version = answer.confirmation.version
        message.state_change.confirmed_at = answer.confirmation.confirmed_at
        message.state_change.accepted_pipelines.extend(
            _encode_dispatches(answer.confirmation.remaining)
        )
    message.attempts.extend(_encode_host_attempt(attempt) for attempt in answer.attempts)
    return message


def _encode_host_attempt(attempt: HostAttempt) -> pb.HostAttempt:
    key = attempt.key
    return pb.HostAttempt(
        pipeline_id=key.pipeline_id,
        step_id=key.step,
        attempt=key.attempt,
        run=key.run,
        in_journal=attempt.in_journal,
        state=_RUN_STATE_OUT[attempt.state],
        started_at=attempt.started_at or 0,
        ended_at=attempt.ended_at or 0,
        ending=attempt.ending,
    )


def _decode_host_attempt(message: pb.HostAttempt) -> HostAttempt:
    return HostAttempt(
        key=LogKey(message.pipeline_id, message.step_id, message.attempt, message.run),
        in_journal=message.in_journal,
        state=_RUN_STATE[message.state],
        started_at=Instant(message.started_at) if message.started_at else None,
        ended_at=Instant(message.ended_at) if message.ended_at else None,
        ending=message.ending,
    )


def decode_answer(message: pb.CommandAnswer) -> OrderAnswer:
    """Return an agent's answer to a command."""
    confirmation = None
    if message.HasField("state_change") and message.state_change.accepted:
        confirmation = StateConfirmation(
            version=message.state_change.version,
            confirmed_at=Instant(message.state_change.confirmed_at),
            remaining=_decode_dispatches(message.state_change.accepted_pipelines),
        )
    return OrderAnswer(
        outcome=_ORDER_OUTCOME[message.outcome],
        reason=message.reason,
        message=message.message,
        confirmation=confirmation,
        attempts=tuple(_decode_host_attempt(attempt) for attempt in message.attempts),
    )


def _encode_execute(order: ExecuteOrder, message: pb.ExecuteCommand) -> None:
    message.pipeline_id = order.dispatch.pipeline_id
    message.attempt = order.dispatch.attempt
    message.state_version = order.state_version
    message.name = order.name
    if order.timeout_s is not None:
        message.timeout_s = order.timeout_s
    message.envs.update(order.envs)
    message.extended_s = order.extended_s
    message.secrets.update(order.secrets)
    for step in order.steps:
        entry = message.steps.add(
            name=step.name,
            service=step.type is StepType.SERVICE,
            condition=_CONDITION_OUT[step.condition],
            timeout_s=step.timeout_s,
            first_attempt=step.first_attempt,
            attempts=step.attempts,
            backoff_s=step.backoff_s,
            instance_id=step.instance_id,
        )
        encode_record(step.container, entry.container)


def _decode_execute(message: pb.ExecuteCommand) -> ExecuteOrder:
    return ExecuteOrder(
        dispatch=Dispatch(message.pipeline_id, message.attempt),
        state_version=message.state_version,
        name=message.name,
        timeout_s=message.timeout_s if message.HasField("timeout_s") else None,
        envs=dict(message.envs),
        extended_s=message.extended_s,
        secrets=dict(message.secrets),
        steps=tuple(
            GrantedStep(
                name=step.name,
                type=StepType.SERVICE if step.service else StepType.TASK,
                condition=_CONDITION.get(step.condition, Condition.SUCCESS),
                timeout_s=step.timeout_s if step.HasField("timeout_s") else None,
                first_attempt=step.first_attempt,
                attempts=step.attempts,
                backoff_s=step.backoff_s,
                container=decode_record(ContainerSpec, step.container),
                instance_id=step.instance_id,
            )
            for step in message.steps
        ),
    )


def pack_order(order: ExecuteOrder) -> bytes:
    """Return an order as bytes: what the agent's journal and the server's row keep.

    Secrets are left out: no record holds them (rule RG3).
    """
    message = pb.ExecuteCommand()
    _encode_execute(order, message)
    message.ClearField("secrets")
    return message.SerializeToString()


def unpack_order(packed: bytes) -> ExecuteOrder:
    """Return the order that `pack_order` packed."""
    return _decode_execute(pb.ExecuteCommand.FromString(packed))


# Logs, events


def decode_log_key(message: pb.LogKey) -> LogKey:
    """Return which log."""
    return LogKey(message.pipeline_id, message.step_id, message.attempt, message.run)


def encode_append(
    *,
    node_id: str,
    session_id: str,
    key: LogKey,
    offset: int,
    chunk: bytes,
    checksum: int,
    position: LogPosition,
) -> pb.AppendLogsRequest:
    """Return the message of one chunk of a log."""
    request = pb.AppendLogsRequest(
        node_id=node_id,
        session_id=session_id,
        log=pb.LogKey(
            pipeline_id=key.pipeline_id, step_id=key.step, attempt=key.attempt, run=key.run
        ),
        offset=offset,
        chunk=chunk,
        checksum=checksum,
    )
    encode_record(position, request.position)
    return request


def decode_position(message: pb.LogPosition) -> LogPosition:
    """Return how far a log's streams had been read."""
    return decode_record(LogPosition, message)


def encode_append_answer(answer: AppendAnswer) -> pb.AppendLogsResponse:
    """Return the answer to a chunk."""
    response = pb.AppendLogsResponse(
        next_offset=answer.next_offset,
        hash=answer.hash,
        stop=answer.stop,
        retry_after_s=answer.retry_after_s,
    )
    encode_record(answer.position, response.position)
    return response


def decode_append_answer(response: pb.AppendLogsResponse) -> AppendAnswer:
    """Return what the server answered to a chunk."""
    return AppendAnswer(
        next_offset=response.next_offset,
        position=decode_position(response.position),
        hash=response.hash,
        stop=response.stop,
        retry_after_s=response.retry_after_s,
    )


def encode_log_line(line: LogLine, sequence: int) -> pb.LogEntry:
    """Return the message of one line."""
    return pb.LogEntry(
        timestamp=line.at_ns,
        stream=line.stream,
        sequence=sequence,
        text=line.text,
        offset=line.offset,
        next_offset=line.next_offset,
        partial=line.partial,
    )


def encode_event(event: Event) -> pb.Event:
    """Return the message of an event."""
    seconds, nanoseconds = divmod(event.at, NANOSECONDS_PER_S)
    return pb.Event(
        id=event.id,
        type=event.type,
        node_id=event.node_id,
        entity_id=event.entity_id,
        status=event.status,
        message=event.message,
        timestamp=Timestamp(seconds=seconds, nanos=nanoseconds),
        data=event.data,
    )


def decode_event(message: pb.Event) -> Event:
    """Return the event of a message."""
    return Event(
        id=message.id,
        type=message.type,
        at=Instant(message.timestamp.seconds * NANOSECONDS_PER_S + message.timestamp.nanos),
        node_id=message.node_id,
        entity_id=message.entity_id,
        status=message.status,
        message=message.message,
        data=dict(message.data),
    )


def encode_status(status: Status) -> pb.StepStatus.ValueType:
    """Return a status as the wire numbers it."""
    return _STATUS_OUT[status]
