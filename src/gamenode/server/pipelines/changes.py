"""What changes a pipeline's rows, with the events that tell of it: functions of a connection.

Every change is guarded here and again in SQL; the service gives it a transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, Row

from gamenode.domain.access import SYSTEM, Actor
from gamenode.domain.audit import AuditEntry
from gamenode.domain.command import Dispatch
from gamenode.domain.event import EventType, NewEvent
from gamenode.domain.log import LogKey
from gamenode.domain.pipeline import (
    NODE_ENDED,
    OnLost,
    Pipeline,
    PipelineReport,
    Reason,
    Report,
    ReportOutcome,
    ReportResult,
    Status,
    StepReport,
    judge_pipeline,
    judge_step,
)
from gamenode.lib.clock import Instant
from gamenode.server.events import audit
from gamenode.server.events import store as events
from gamenode.server.logs.service import set_final
from gamenode.server.pipelines import reservations, store

_PIPELINE_EVENTS: Final = {
    Status.RUNNING: EventType.PIPELINE_RUNNING,
    Status.COMPLETED: EventType.PIPELINE_COMPLETED,
    Status.FAILED: EventType.PIPELINE_FAILED,
    Status.CANCELLED: EventType.PIPELINE_CANCELLED,
}
_STEP_EVENTS: Final = {
    Status.RUNNING: EventType.STEP_RUNNING,
    Status.COMPLETED: EventType.STEP_COMPLETED,
    Status.FAILED: EventType.STEP_FAILED,
    Status.CANCELLED: EventType.STEP_CANCELLED,
}
_STALE: Final = ReportResult(outcome=ReportOutcome.STALE)


def apply(
    conn: Connection,
    report: Report,
    node_id: str,
    now: Instant,
    *,
    simple: bool,
    restarts_max: int,
) -> ReportResult:
    """Take a node's word for one of its pipelines or steps; `simple` may leave out the fences."""
    unwanted = ReportResult(outcome=ReportOutcome.STALE, stop=not report.status.terminal)
    row = store.lock(conn, report.pipeline_id)
    if row is None or row.node_id != node_id:
        return unwanted
    if isinstance(report, StepReport):
        named, unnamed = report.pipeline_attempt, 0 in (report.pipeline_attempt, report.attempt)
    else:
        named, unnamed = report.attempt, not report.attempt
    if unnamed and not simple:
        return _STALE  # only a node that registered without the fences may leave them out (RL4)
    if named and named != row.attempt:
        return unwanted
    match report:
        case StepReport():
            return _apply_step(conn, row, report, now)
        case PipelineReport():
            return _apply_pipeline(conn, row, report, now, restarts_max=restarts_max)


def _apply_step(
    conn: Connection, pipeline: Row[Any], report: StepReport, now: Instant
) -> ReportResult:
    row = store.step_row(conn, report.pipeline_id, report.step)
    if row is None:
        return _STALE  # one odd report must not hold up what else its node has to say
    step = store.step(row)
    result = judge_step(step, report, range(row.granted_from, row.granted_to + 1))
    _note_log_end(conn, row, report, pipeline.node_id, now)
    status = Status(pipeline.status)
    if status.terminal and result.outcome is not ReportOutcome.REPEATED:
        # A forced end does not wait for the node's word; its late word changes nothing (P4).
        return ReportResult(outcome=ReportOutcome.STALE, stop=not report.status.terminal)
    if result.outcome is not ReportOutcome.APPLIED:
        return result
    skipped = report.reason is Reason.SKIPPED
    attempt = step.attempt if skipped else report.attempt or row.granted_from
    values = {
        "status": report.status,
        "reason": report.reason,
        "message": report.message,
        "exit_code": report.exit_code,
        "signal": report.signal,
        "attempt": attempt,
        "run": step.run if skipped else report.run or 1,
        "started_at": report.started_at or step.started_at,
        "ended_at": (report.ended_at or now) if report.status.terminal else None,
    }
    if not store.set_step(conn, row, values):
        return _STALE
    if status is Status.PENDING and not skipped:
        started = {"started_at": report.started_at or now, "acknowledged_at": now}
        store.set_status(conn, pipeline.id, pipeline.attempt, Status.RUNNING, started)
        append_event(
            conn,
            EventType.PIPELINE_RUNNING,
            pipeline.id,
            now,
            node_id=pipeline.node_id,
            status=Status.RUNNING,
            data={"name": pipeline.name},
        )
    further_pull = step.reason is report.reason is Reason.PULLING and step.attempt == attempt
    if not further_pull:
        _append_step(conn, pipeline, report.step, report, attempt, now)
    return result


def _note_log_end(
    conn: Connection, row: Row[Any], report: StepReport, node_id: str, now: Instant
) -> None:
    """Note how long a log is in all; also from a late report, since its bytes still count (RA4)."""
    granted = range(row.granted_from, row.granted_to + 1)
    if report.log_length_bytes is not None and report.attempt in granted:
        set_final(
            conn,
            LogKey(report.pipeline_id, report.step, report.attempt, report.run or 1),
            node_id=node_id,
            length_bytes=report.log_length_bytes,
            sha256=report.log_hash,
            now=now,
        )


def _apply_pipeline(
    conn: Connection, row: Row[Any], report: PipelineReport, now: Instant, *, restarts_max: int
) -> ReportResult:
    result = judge_pipeline(Status(row.status), report)
    if report.status.terminal:
        ended(conn, Dispatch(row.id, row.attempt), now)
    if result.outcome is not ReportOutcome.APPLIED:
        return result
    if report.status.terminal:
        if report.reason in NODE_ENDED and may_start_over(row, restarts_max):
            message = f"{row.node_id} ended attempt {row.attempt}: {report.reason}"
            start_over(conn, row, report.reason, message, now)
        else:
            _end(conn, row, report.status, report.reason, report.message, now)
        return result
    values = {"started_at": now, "acknowledged_at": now}
    if not store.set_status(conn, row.id, row.attempt, report.status, values):
        return _STALE
    append_event(
        conn,
        _PIPELINE_EVENTS[report.status],
        row.id,
        now,
        node_id=row.node_id,
        status=report.status,
        data={"name": row.name},
    )
    return result


def _end(
    conn: Connection, row: Row[Any], status: Status, reason: Reason, message: str, now: Instant
) -> None:
    """End a pipeline, and with it every step that has not ended."""
    values: dict[str, object] = {
        "reason": reason,
        "message": message,
        "ended_at": now,
        "cancel_acknowledged_at": now,
    }
    if status is Status.COMPLETED:
        values["sealed"] = None  # nothing will ask for its secrets again, a retry included
    if not store.set_status(conn, row.id, row.attempt, status, values):
        return
    for step in store.active_steps(conn, row.id):
        began = step.status == Status.RUNNING
        ended = StepReport(
            pipeline_id=row.id,
            step=step.name,
            status=status if began else Status.CANCELLED,
            reason=reason if began else Reason.SKIPPED,
            message=message if began else "",
        )
        store.set_step(
            conn,
            step,
            {
                "status": ended.status,
                "reason": ended.reason,
                "message": ended.message,
                "ended_at": now,
            },
        )
        _append_step(conn, row, step.name, ended, step.attempt, now)
    append_event(
        conn,
        _PIPELINE_EVENTS[status],
        row.id,
        now,
        node_id=row.node_id,
        status=status,
        message=message,
        data={"name": row.name, "reason": reason},
    )
    if status is Status.FAILED:
        append_event(
            conn,
            EventType.ERROR_PIPELINE,
            row.id,
            now,
            node_id=row.node_id,
            status=status,
            message=message or reason,
            data={"name": row.name, "reason": reason},
        )


def let_go(conn: Connection, dispatch: Dispatch, now: Instant) -> None:
    """Note that nothing of a dispatch runs on its node any more, nor ever will.

    By the node's word (it ended, was refused, is not held), or by an operator's, who fenced or
    removed the node. The status says nothing about it: what has ended by force may go on there.
    What a dispatch holds of its node is free from here on, and nobody is left to tell of its end.

    Source: RA1, RA3.
    """
    store.acknowledge_cancel(conn, dispatch, forced=True, now=now)
    reservations.release(conn, dispatch)


def ended(conn: Connection, dispatch: Dispatch, now: Instant) -> None:
    """Note that an agent has ended a dispatch; where a service lives on, it keeps what it has."""
    store.acknowledge_cancel(conn, dispatch, forced=True, now=now)
    reservations.end(conn, dispatch)


def end_unrun(conn: Connection, row: Row[Any], reason: Reason, message: str, now: Instant) -> None:
    """End a dispatch that nothing runs of: as its user wanted, if its end was wanted (F4)."""
    let_go(conn, Dispatch(row.id, row.attempt), now)
    if row.cancel_requested_at is not None:
        _end(conn, row, Status.CANCELLED, Reason.CANCELLED_BY_USER, row.cancel_reason, now)
    else:
        _end(conn, row, Status.FAILED, reason, message, now)


def may_start_over(row: Row[Any] | store.Bound, restarts_max: int) -> bool:
    """Return whether a pipeline gets a new attempt once its node has lost the present one."""
    cancelled = (
        row.cancel_requested
        if isinstance(row, store.Bound)
        else row.cancel_requested_at is not None
    )
    return row.on_lost == OnLost.RESTART and row.restarts < restarts_max and not cancelled


def start_over(conn: Connection, row: Row[Any], reason: Reason, message: str, now: Instant) -> None:
    """Let a pipeline wait for a new attempt: nothing runs of the present one (P2, RA1)."""
    dispatch = Dispatch(row.id, row.attempt)
    let_go(conn, dispatch, now)
    if store.start_over(conn, dispatch, message):
        append_event(
            conn,
            EventType.PIPELINE_RESTARTED,
            row.id,
            now,
            node_id=row.node_id,
            status=Status.PENDING,
            message=message,
            data={"name": row.name, "attempt": str(row.attempt), "reason": reason},
        )


def end_lost(
    conn: Connection, row: Row[Any], message: str, now: Instant, *, restarts_max: int
) -> None:
    """Follow up on a dispatch that its node lost, and of which nothing runs (`on_lost`)."""
    if may_start_over(row, restarts_max):
        start_over(conn, row, Reason.NODE_LOST, message, now)
    else:
        end_unrun(conn, row, Reason.NODE_LOST, message, now)


def give_up(conn: Connection, row: Row[Any], message: str, now: Instant) -> None:
    """End a pipeline whose node is away for too long; it may still run there (`on_lost: fail`).

    What the node holds of it is ended when it is back, and listed until then (rule RA3).
    """
    if row.cancel_requested_at is not None:
        _end(conn, row, Status.CANCELLED, Reason.CANCELLED_BY_USER, message, now)
    else:
        _end(conn, row, Status.FAILED, Reason.NODE_LOST, message, now)
    wanted: dict[str, object] = {"cancel_acknowledged_at": None}
    if row.cancel_requested_at is None:
        wanted |= {
            "cancel_requested_at": now,
            "cancel_reason": f"on_lost: {OnLost.FAIL}",
            "cancel_by": SYSTEM.name,
        }
    store.request_cancel(conn, row.id, wanted)


def want_cancel(
    conn: Connection, row: Row[Any], *, reason: str, force: bool, by: Actor, now: Instant
) -> None:
    """Want a pipeline's end; it comes at once where nothing was dispatched, or by force (RA3)."""
    dispatched = bool(row.node_id)
    if force or not dispatched:
        message = reason or f"cancelled by {by.name}"
        if dispatched:
            message = f"{message} (forced: node {row.node_id} may still run it)"
        _request(conn, row, reason=reason, by=by, now=now)
        row_now = store.lock(conn, row.id)
        assert row_now is not None
        _end(conn, row_now, Status.CANCELLED, Reason.CANCELLED_BY_USER, message, now)
        if dispatched:
            # Its node must still hear of it, and whether it has is not known.
            store.request_cancel(conn, row.id, {"cancel_acknowledged_at": None})
    elif row.cancel_requested_at is None:
        _request(conn, row, reason=reason, by=by, now=now)
    else:
        return
    audit.append(
        conn,
        AuditEntry(
            at=now,
            actor=by,
            action="pipeline.cancel",
            target=row.id,
            reason=reason,
            before=row.status,
        ),
    )


def extend(conn: Connection, row: Row[Any], by_s: float, *, by: Actor, now: Instant) -> None:
    """Let a pipeline and its steps take longer (F8)."""
    store.extend(conn, row.id, by_s)
    extended_s = row.extended_s + by_s
    append_event(
        conn,
        EventType.PIPELINE_EXTENDED,
        row.id,
        now,
        node_id=row.node_id,
        status=Status(row.status),
        data={"name": row.name, "by": by.name, "extended_s": f"{extended_s:g}"},
    )
    audit.append(
        conn,
        AuditEntry(
            at=now,
            actor=by,
            action="pipeline.extend",
            target=row.id,
            before=f"{row.extended_s:g}s",
            after=f"{extended_s:g}s",
        ),
    )


def _request(conn: Connection, row: Row[Any], *, reason: str, by: Actor, now: Instant) -> None:
    if row.cancel_requested_at is not None:
        return
    store.request_cancel(
        conn,
        row.id,
        {"cancel_requested_at": now, "cancel_reason": reason, "cancel_by": by.name},
    )
    append_event(
        conn,
        EventType.PIPELINE_CANCEL_REQUESTED,
        row.id,
        now,
        node_id=row.node_id,
        status=Status(row.status),
        message=reason,
        data={"name": row.name, "by": by.name},
    )


# Events


def append_created(conn: Connection, pipeline: Pipeline, now: Instant) -> None:
    """Tell of a new pipeline."""
    append_event(
        conn,
        EventType.PIPELINE_CREATED,
        pipeline.id,
        now,
        node_id=pipeline.node_id,
        status=pipeline.status,
        data={"name": pipeline.name, "by": pipeline.created_by}
        | ({"retry_of": pipeline.retry_of} if pipeline.retry_of else {}),
    )


def append_event(
    conn: Connection,
    kind: EventType,
    entity_id: str,
    now: Instant,
    *,
    node_id: str,
    status: Status,
    data: Mapping[str, str],
    message: str = "",
) -> None:
    """Tell of something that happened to a pipeline or a step."""
    events.append(
        conn,
        NewEvent(
            type=kind,
            at=now,
            node_id=node_id,
            entity_id=entity_id,
            status=status,
            message=message,
            data=data,
        ),
    )


def _append_step(
    conn: Connection,
    pipeline: Row[Any],
    name: str,
    report: StepReport,
    attempt: object,
    now: Instant,
) -> None:
    data = {"name": pipeline.name, "step": name, "attempt": str(attempt)}
    if report.reason:
        data["reason"] = report.reason
    if report.exit_code is not None:
        data["exit_code"] = str(report.exit_code)
    append_event(
        conn,
        _STEP_EVENTS[report.status],
        f"{pipeline.id}/{name}",
        now,
        node_id=pipeline.node_id,
        status=report.status,
        message=report.message,
        data=data,
    )
