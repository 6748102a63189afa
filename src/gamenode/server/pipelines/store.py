"""Rows of pipelines and steps: functions of a connection, without rules or commits.

A statement that every pipeline needs is built once, here: building one takes several times as long
as running it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BindParameter,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    literal_column,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from gamenode.domain.command import Dispatch, ExtendOrder, WantedEnd, WantedExtension
from gamenode.domain.container import HostPort
from gamenode.domain.log import LogKey
from gamenode.domain.pipeline import (
    STARTS_OVER,
    TERMINAL,
    OnLost,
    Pipeline,
    Reason,
    Reservation,
    Status,
    Step,
    StepType,
    Waiting,
    sources_of,
)
from gamenode.domain.verification import StepRecord
from gamenode.lib.clock import Instant
from gamenode.server.db import schema
from gamenode.server.pipelines.queue import unpack_waiting

_pipelines: Final = schema.pipelines.c
_steps: Final = schema.steps.c
_keys: Final = schema.idempotency_keys.c
_held: Final = schema.reservations.c
_SHOWN_OF_HELD: Final = (
    "cpu_millis",
    "memory_bytes",
    "gpu_id",
    "gpu_slots",
    "gpu_memory_bytes",
    "ports",
    "runs",
)
_ACTIVE: Final = tuple(s for s in Status if s not in TERMINAL)

# Parameters of prebuilt statements; a column's own name would be one that an UPDATE sets.
_PIPELINE: Final[BindParameter[Any]] = bindparam("of_pipeline")
_ATTEMPT: Final[BindParameter[Any]] = bindparam("of_attempt")
_POSITION: Final[BindParameter[Any]] = bindparam("of_position")
_NOWHERE: Final[ColumnElement[str]] = literal_column("''")


def _one_of(column: ColumnElement[str], statuses: Iterable[Status]) -> ColumnElement[bool]:
    # Written out: the planner sees which partial index fits, and nothing is bound at each run.
    return column.in_([literal_column(f"'{status}'") for status in sorted(statuses)])


def _is(column: ColumnElement[str], status: Status) -> ColumnElement[bool]:
    # Not a list of one: SQLite does not see that it is what the indices say.
    return column == literal_column(f"'{status}'")


_LISTED: Final[Select[Any]] = (
    select(
        *(
            c
            for c in schema.pipelines.columns
            if c.name not in ("file", "work", "sealed", "demand")
        ),
        schema.waiting.c.message.label("waits_because"),
        schema.waiting.c.reasons.label("waiting_reasons"),
        *(_held[name].label(f"held_{name}") for name in _SHOWN_OF_HELD),
    )
    .select_from(schema.pipelines)
    .outerjoin(
        schema.waiting,
        and_(
            schema.waiting.c.demand_id == _pipelines.demand_id,
            _is(_pipelines.status, Status.PENDING),
            _pipelines.node_id == _NOWHERE,
        ),
    )
    .outerjoin(
        schema.reservations,
        and_(_held.pipeline_id == _pipelines.id, _held.attempt == _pipelines.attempt),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A pipeline that is bound to a node and has not ended there."""

    dispatch: Dispatch
    status: Status
    acknowledged: bool
    cancel_requested: bool
    session_epoch: int
    boot_id: str
    on_lost: OnLost
    restarts: int


class Owed(NamedTuple):
    """The nodes that have not said that they know of something."""

    dispatches: frozenset[str]
    ends: frozenset[str]
    extensions: frozenset[str]


def known_key(conn: Connection, caller: str, key: str) -> tuple[str, str] | None:
    """Return the pipeline made under an idempotency key, and the hash of its request."""
    row = conn.execute(
        select(_keys.pipeline_id, _keys.body_hash).where(_keys.caller == caller, _keys.key == key)
    ).first()
    return (row.pipeline_id, row.body_hash) if row is not None else None


def insert_key(
    conn: Connection, *, caller: str, key: str, body_hash: str, pipeline_id: str, now: Instant
) -> None:
    """Remember which pipeline an idempotency key made."""
    conn.execute(
        insert(schema.idempotency_keys).values(
            caller=caller, key=key, body_hash=body_hash, pipeline_id=pipeline_id, created_at=now
        )
    )


_INSERT_PIPELINE: Final = insert(schema.pipelines)
_INSERT_STEP: Final = insert(schema.steps)


def insert_pipeline(
    conn: Connection, values: Mapping[str, object], steps: Sequence[Mapping[str, object]]
) -> None:
    """Add a pipeline and its steps."""
    conn.execute(_INSERT_PIPELINE, [dict(values)])
    conn.execute(_INSERT_STEP, [dict(step) for step in steps])


_GET: Final = _LISTED.where(_pipelines.id == _PIPELINE)


def get(conn: Connection, pipeline_id: str) -> Pipeline | None:
    """Return a pipeline with its steps, or None."""
    row = conn.execute(_GET, {"of_pipeline": pipeline_id}).first()
    if row is None:
        return None
    return _pipeline(row, tuple(step(found) for found in step_rows(conn, pipeline_id)))


def asked(conn: Connection, pipeline_id: str) -> Row[Any] | None:
    """Return how a pipeline was asked for: file, envs."""
    query: Select[Any] = select(_pipelines.file, _pipelines.envs)
    return conn.execute(query.where(_pipelines.id == pipeline_id)).first()


def steps_of(conn: Connection, pipeline_ids: Sequence[str]) -> dict[str, tuple[Step, ...]]:
    """Return the steps of pipelines, in order."""
    found: dict[str, list[Step]] = {pipeline_id: [] for pipeline_id in pipeline_ids}
    rows = conn.execute(
        select(schema.steps)
        .where(_steps.pipeline_id.in_(pipeline_ids))
        .order_by(_steps.pipeline_id, _steps.position)
    )
    for row in rows:
        found[row.pipeline_id].append(step(row))
    return {pipeline_id: tuple(steps) for pipeline_id, steps in found.items()}


def newest(
    conn: Connection,
    *,
    status: Status | None,
    node: str,
    q: str,
    limit: int,
    before: tuple[Instant, str] | None,
) -> list[Pipeline]:
    """Return pipelines, newest first, from `before` on."""
    query = _LISTED.order_by(_pipelines.created_at.desc(), _pipelines.id.desc())
    if status is not None:
        query = query.where(_pipelines.status == status)
    if node:
        query = query.where(_pipelines.node_id == node)
    if q:
        query = query.where(
            or_(
                _pipelines.name.contains(q, autoescape=True),
                _pipelines.id.contains(q, autoescape=True),
            )
        )
    if before is not None:
        at, last_id = before
        query = query.where(
            or_(
                _pipelines.created_at < at,
                and_(_pipelines.created_at == at, _pipelines.id < last_id),
            )
        )
    rows = conn.execute(query.limit(limit)).all()
    steps = steps_of(conn, [row.id for row in rows]) if rows else {}
    return [_pipeline(row, steps[row.id]) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """When a pipeline's dispatch, and its wanted end, got how far."""

    dispatched_at: Instant | None
    acknowledged_at: Instant | None
    cancel_acknowledged_at: Instant | None
    cancel_by: str


def progress(conn: Connection, pipeline_id: str) -> Progress | None:
    """Return how far the orders about a pipeline got."""
    row = conn.execute(
        select(
            _pipelines.dispatched_at,
            _pipelines.acknowledged_at,
            _pipelines.cancel_acknowledged_at,
            _pipelines.cancel_by,
        ).where(_pipelines.id == pipeline_id)
    ).first()
    if row is None:
        return None
    return Progress(
        dispatched_at=row.dispatched_at,
        acknowledged_at=row.acknowledged_at,
        cancel_acknowledged_at=row.cancel_acknowledged_at,
        cancel_by=row.cancel_by,
    )


def bound(conn: Connection, node_id: str) -> list[Bound]:
    """Return what is bound to a node and has not ended."""
    rows = conn.execute(
        select(
            _pipelines.id,
            _pipelines.attempt,
            _pipelines.status,
            _pipelines.acknowledged_at,
            _pipelines.cancel_requested_at,
            _pipelines.session_epoch,
            _pipelines.boot_id,
            _pipelines.on_lost,
            _pipelines.restarts,
        ).where(
            _pipelines.node_id == node_id,
            _pipelines.node_id != _NOWHERE,
            _one_of(_pipelines.status, _ACTIVE),
        )
    )
    return [
        Bound(
            dispatch=Dispatch(row.id, row.attempt),
            status=Status(row.status),
            acknowledged=row.acknowledged_at is not None,
            cancel_requested=row.cancel_requested_at is not None,
            session_epoch=row.session_epoch,
            boot_id=row.boot_id,
            on_lost=OnLost(row.on_lost),
            restarts=row.restarts,
        )
        for row in rows
    ]


_LINGERING: Final = (
    select(_pipelines.id, _pipelines.attempt, _pipelines.node_id, _pipelines.status)
    .join(
        schema.reservations,
        and_(_held.pipeline_id == _pipelines.id, _held.attempt == _pipelines.attempt),
    )
    # In the words of its index.
    .where(text("reservations.runs"), _one_of(_pipelines.status, TERMINAL))
)


def lingering(conn: Connection, node_id: str | None = None) -> list[tuple[str, Dispatch, Status]]:
    """Return what has ended here and may still run: on a node, or wherever (rule RA3)."""
    query = _LINGERING if node_id is None else _LINGERING.where(_held.node_id == node_id)
    return [
        (row.node_id, Dispatch(row.id, row.attempt), Status(row.status))
        for row in conn.execute(query)
    ]


_FAILING_WHEN_LOST: Final = and_(
    _pipelines.on_lost == literal_column(f"'{OnLost.FAIL}'"),
    _one_of(_pipelines.status, _ACTIVE),
    _pipelines.node_id != _NOWHERE,
)
_NODES_OF_FAILING: Final = select(_pipelines.node_id).where(_FAILING_WHEN_LOST).distinct()


def nodes_of_failing(conn: Connection) -> frozenset[str]:
    """Return the nodes whose loss some pipeline does not wait out (`on_lost: fail`)."""
    return frozenset(conn.scalars(_NODES_OF_FAILING))


def failing_when_lost(conn: Connection, node_id: str) -> list[str]:
    """Return the pipelines on a node that fail when it is away for too long."""
    return list(
        conn.scalars(select(_pipelines.id).where(_FAILING_WHEN_LOST, _pipelines.node_id == node_id))
    )


# One whose end is wanted is not sent any more: its node hears of the end instead, and a late
# Execute finds that.
_UNACKNOWLEDGED: Final = and_(
    _pipelines.node_id != _NOWHERE,
    _is(_pipelines.status, Status.PENDING),
    _pipelines.acknowledged_at.is_(None),
    _pipelines.cancel_requested_at.is_(None),
)
_CANCELLING: Final = and_(
    _pipelines.cancel_requested_at.is_not(None),
    _pipelines.cancel_acknowledged_at.is_(None),
    _pipelines.node_id != _NOWHERE,
)
# Before its node has taken a dispatch there is nothing there to extend; the order says it all.
_EXTENDING: Final = and_(
    _pipelines.extended_s > _pipelines.extension_acknowledged_s,
    _pipelines.node_id != _NOWHERE,
    _pipelines.acknowledged_at.is_not(None),
    _pipelines.cancel_requested_at.is_(None),
    _one_of(_pipelines.status, _ACTIVE),
)


_OWED: Final = tuple(
    select(_pipelines.node_id).where(condition).distinct()
    for condition in (_UNACKNOWLEDGED, _CANCELLING, _EXTENDING)
)


def owed_nodes(conn: Connection) -> Owed:
    """Return who has not said that it took a dispatch, or knows of a wanted end or extension."""
    return Owed(*(frozenset(conn.scalars(query)) for query in _OWED))


def unacknowledged(
    conn: Connection, node_ids: Collection[str], limit: int
) -> list[tuple[str, Dispatch]]:
    """Return what was bound to these nodes and they have not said that they took it."""
    rows = conn.execute(
        select(_pipelines.id, _pipelines.attempt, _pipelines.node_id)
        .where(_UNACKNOWLEDGED, _pipelines.node_id.in_(node_ids))
        .limit(limit)
    )
    return [(row.node_id, Dispatch(row.id, row.attempt)) for row in rows]


def cancelling(conn: Connection, node_ids: Collection[str], limit: int) -> list[WantedEnd]:
    """Return whose end is wanted on these nodes, while they have not said that they know."""
    rows = conn.execute(
        select(
            _pipelines.id,
            _pipelines.attempt,
            _pipelines.node_id,
            _pipelines.status,
            _pipelines.reason,
            _pipelines.cancel_reason,
        )
        .where(_CANCELLING, _pipelines.node_id.in_(node_ids))
        .limit(limit)
    )
    return [
        WantedEnd(
            dispatch=Dispatch(row.id, row.attempt),
            node_id=row.node_id,
            status=Status(row.status),
            cause=(
                Reason.NODE_LOST if row.reason == Reason.NODE_LOST else Reason.CANCELLED_BY_USER
            ),
            reason=row.cancel_reason,
        )
        for row in rows
    ]


def extending(conn: Connection, node_ids: Collection[str], limit: int) -> list[WantedExtension]:
    """Return which pipelines on these nodes may take longer than the nodes know."""
    rows = conn.execute(
        select(_pipelines.id, _pipelines.attempt, _pipelines.node_id, _pipelines.extended_s)
        .where(_EXTENDING, _pipelines.node_id.in_(node_ids))
        .limit(limit)
    )
    return [
        WantedExtension(
            order=ExtendOrder(dispatch=Dispatch(row.id, row.attempt), extended_s=row.extended_s),
            node_id=row.node_id,
        )
        for row in rows
    ]


def is_granted(conn: Connection, key: LogKey, node_id: str) -> bool:
    """Return whether a pipeline's present dispatch lets a node make this try."""
    return bool(
        conn.scalar(
            select(
                exists().where(
                    _pipelines.id == key.pipeline_id,
                    _pipelines.node_id == node_id,
                    _steps.pipeline_id == _pipelines.id,
                    _steps.name == key.step,
                    _steps.granted_from <= key.attempt,
                    _steps.granted_to >= key.attempt,
                )
            )
        )
    )


_DECIDING: Final = (
    "id",
    "name",
    "status",
    "node_id",
    "attempt",
    "cancel_requested_at",
    "cancel_reason",
    "on_lost",
    "restarts",
    "extended_s",
    "retry_of",
)
_LOCK: Final = (
    select(*(_pipelines[name] for name in _DECIDING))
    .where(_pipelines.id == _PIPELINE)
    .with_for_update()
)


def lock(conn: Connection, pipeline_id: str) -> Row[Any] | None:
    """Return what decides over a pipeline and keep others from changing it until the commit."""
    return conn.execute(_LOCK, {"of_pipeline": pipeline_id}).first()


_WORK: Final = select(_pipelines.work, _pipelines.sealed).where(_pipelines.id == _PIPELINE)


def work(conn: Connection, pipeline_id: str) -> tuple[bytes, bytes | None]:
    """Return the packed order of a pipeline, and its sealed secrets."""
    row = conn.execute(_WORK, {"of_pipeline": pipeline_id}).first()
    return (row.work, row.sealed) if row is not None else (b"", None)


def forget_secrets(conn: Connection, before: Instant) -> None:
    """Forget the secrets of pipelines that ended before that."""
    conn.execute(
        update(schema.pipelines)
        .where(_pipelines.sealed.is_not(None), _pipelines.ended_at < before)
        .values(sealed=None)
    )


def dispatched(conn: Connection, dispatch: Dispatch) -> Row[Any] | None:
    """Return what changes about a dispatch: node_id, extended_s; None for one that is over."""
    query: Select[Any] = select(_pipelines.node_id, _pipelines.extended_s)
    return conn.execute(query.where(*_OF_DISPATCH), _of(dispatch)).first()


_STEP: Final = select(schema.steps).where(
    _steps.pipeline_id == _PIPELINE, _steps.name == bindparam("of_name")
)


def step_row(conn: Connection, pipeline_id: str, name: str) -> Row[Any] | None:
    """Return the row of one step."""
    return conn.execute(_STEP, {"of_pipeline": pipeline_id, "of_name": name}).first()


_RECORDS: Final = select(
    _pipelines.id,
    _pipelines.node_id,
    _pipelines.status.label("pipeline_status"),
    *(
        _steps[name]
        for name in ("name", "type", "status", "reason", "attempt", "granted_from", "granted_to")
    ),
).where(_steps.pipeline_id == _pipelines.id)


def step_records(conn: Connection, pipeline_ids: Collection[str]) -> list[StepRecord]:
    """Return what is known of the steps of these pipelines, as far as they are known."""
    return _records(conn, _RECORDS.where(_pipelines.id.in_(pipeline_ids)))


def running_records(conn: Connection) -> list[StepRecord]:
    """Return what is known of every step that runs."""
    return _records(
        conn,
        _RECORDS.where(
            _pipelines.node_id != _NOWHERE,
            _one_of(_pipelines.status, _ACTIVE),
            _is(_steps.status, Status.RUNNING),
        ),
    )


def _records(conn: Connection, query: Select[Any]) -> list[StepRecord]:
    return [
        StepRecord(
            pipeline_id=row.id,
            step=row.name,
            type=StepType(row.type),
            node_id=row.node_id,
            pipeline_status=Status(row.pipeline_status),
            status=Status(row.status),
            reason=Reason(row.reason),
            attempt=row.attempt,
            granted_from=row.granted_from,
            granted_to=row.granted_to,
        )
        for row in conn.execute(query)
    ]


_STEPS: Final = (
    select(schema.steps).where(_steps.pipeline_id == _PIPELINE).order_by(_steps.position)
)


def step_rows(conn: Connection, pipeline_id: str) -> Sequence[Row[Any]]:
    """Return the rows of all steps, in order."""
    return conn.execute(_STEPS, {"of_pipeline": pipeline_id}).all()


_BIND: Final = update(schema.pipelines).where(
    _pipelines.id == _PIPELINE,
    _is(_pipelines.status, Status.PENDING),
    _pipelines.node_id == _NOWHERE,
    _pipelines.attempt == _ATTEMPT,
    _pipelines.cancel_requested_at.is_(None),
)


def bind(
    conn: Connection,
    pipeline_id: str,
    *,
    node_id: str,
    attempt: int,
    session_epoch: int,
    boot_id: str,
    extended_s: float,
    now: Instant,
) -> bool:
    """Bind a waiting pipeline to a node under a new attempt; False if it does not wait any more."""
    return _changed(
        conn,
        _BIND,
        {
            "of_pipeline": pipeline_id,
            "of_attempt": attempt - 1,
            "node_id": node_id,
            "attempt": attempt,
            "session_epoch": session_epoch,
            "boot_id": boot_id,
            "dispatched_at": now,
            "refusal": "",
            # What was said of the attempt before.
            "reason": Reason.NONE,
            "message": "",
            # The order says it.
            "extension_acknowledged_s": extended_s,
        },
    )


_OF_DISPATCH: Final = (_pipelines.id == _PIPELINE, _pipelines.attempt == _ATTEMPT)
_UNBIND: Final = update(schema.pipelines).where(
    *_OF_DISPATCH, _is(_pipelines.status, Status.PENDING)
)


def unbind(conn: Connection, dispatch: Dispatch, refusal: str) -> bool:
    """Let a pipeline that its node refused wait again."""
    return _changed(
        conn,
        _UNBIND,
        {
            **_of(dispatch),
            "node_id": "",
            "dispatched_at": None,
            "acknowledged_at": None,
            "refusal": refusal,
        },
    )


def start_over(conn: Connection, dispatch: Dispatch, message: str) -> bool:
    """Let a pipeline wait for a new attempt, whose steps all begin anew; False if it has ended."""
    changed = conn.execute(
        update(schema.pipelines)
        .where(
            _pipelines.id == dispatch.pipeline_id,
            _pipelines.attempt == dispatch.attempt,
            _one_of(_pipelines.status, STARTS_OVER),
        )
        .values(
            status=Status.PENDING,
            reason=Reason.RETRYING,
            message=message,
            node_id="",
            restarts=_pipelines.restarts + 1,
            dispatched_at=None,
            acknowledged_at=None,
            started_at=None,
        )
    )
    if not changed.rowcount:
        return False
    conn.execute(
        update(schema.steps)
        # What a retry left out was never granted, and stays out.
        .where(_steps.pipeline_id == dispatch.pipeline_id, _steps.granted_to > 0)
        .values(
            status=Status.PENDING,
            reason=Reason.NONE,
            message="",
            exit_code=None,
            signal=None,
            started_at=None,
            ended_at=None,
        )
    )
    return True


_GRANT: Final = update(schema.steps).where(
    _steps.pipeline_id == _PIPELINE, _steps.position == _POSITION
)


def grant(conn: Connection, pipeline_id: str, grants: Iterable[tuple[int, int, int]]) -> None:
    """Write down which tries a dispatch may make: (position, first, last) a step (rule RA5)."""
    conn.execute(
        _GRANT,
        [
            {
                "of_pipeline": pipeline_id,
                "of_position": position,
                "granted_from": first,
                "granted_to": last,
            }
            for position, first, last in grants
        ],
    )


_ACKNOWLEDGE: Final = update(schema.pipelines).where(
    *_OF_DISPATCH, _pipelines.acknowledged_at.is_(None)
)


def acknowledge(conn: Connection, dispatch: Dispatch, now: Instant) -> None:
    """Note that the agent has a dispatch in its journal."""
    conn.execute(_ACKNOWLEDGE, {**_of(dispatch), "acknowledged_at": now})


_SET_STATUS: Final = {
    target: update(schema.pipelines).where(
        *_OF_DISPATCH, _one_of(_pipelines.status, sources_of(target))
    )
    for target in Status
}


def set_status(
    conn: Connection, pipeline_id: str, attempt: int, target: Status, values: Mapping[str, object]
) -> bool:
    """Move a pipeline to `target`; False if its attempt or its status does not allow that."""
    of = {"of_pipeline": pipeline_id, "of_attempt": attempt}
    return _changed(conn, _SET_STATUS[target], {**of, "status": target, **values})


def request_cancel(conn: Connection, pipeline_id: str, values: Mapping[str, object]) -> None:
    """Note that a pipeline's end is wanted."""
    conn.execute(update(schema.pipelines).where(_pipelines.id == pipeline_id).values(**values))


def extend(conn: Connection, pipeline_id: str, by_s: float) -> None:
    """Let a pipeline's limits grow."""
    conn.execute(
        update(schema.pipelines)
        .where(_pipelines.id == pipeline_id)
        .values(extended_s=_pipelines.extended_s + by_s)
    )


def acknowledge_extension(conn: Connection, order: ExtendOrder) -> None:
    """Note that the agent knows how long a dispatch may take."""
    conn.execute(
        update(schema.pipelines)
        .where(
            _pipelines.id == order.dispatch.pipeline_id,
            _pipelines.attempt == order.dispatch.attempt,
            _pipelines.extension_acknowledged_s < order.extended_s,
        )
        .values(extension_acknowledged_s=order.extended_s)
    )


_ACKNOWLEDGE_FORCE: Final = update(schema.pipelines).where(
    *_OF_DISPATCH,
    _pipelines.cancel_requested_at.is_not(None),
    _pipelines.cancel_acknowledged_at.is_(None),
)
_ACKNOWLEDGE_CANCEL: Final = _ACKNOWLEDGE_FORCE.where(_one_of(_pipelines.status, _ACTIVE))


def acknowledge_cancel(conn: Connection, dispatch: Dispatch, *, forced: bool, now: Instant) -> None:
    """Note that the agent knows that a dispatch must end.

    One that has been ended by force since needs the agent's answer to that.
    """
    statement = _ACKNOWLEDGE_FORCE if forced else _ACKNOWLEDGE_CANCEL
    conn.execute(statement, {**_of(dispatch), "cancel_acknowledged_at": now})


_SET_STEP: Final = update(schema.steps).where(
    _steps.pipeline_id == _PIPELINE,
    _steps.position == _POSITION,
    _steps.status == bindparam("of_status"),
    _steps.attempt == _ATTEMPT,
)


def set_step(conn: Connection, row: Row[Any], values: Mapping[str, object]) -> bool:
    """Change a step that is as `row` says; False if it is not any more."""
    of = {
        "of_pipeline": row.pipeline_id,
        "of_position": row.position,
        "of_status": row.status,
        "of_attempt": row.attempt,
    }
    return _changed(conn, _SET_STEP, {**of, **values})


_ACTIVE_STEPS: Final = (
    select(schema.steps)
    .where(_steps.pipeline_id == _PIPELINE, _one_of(_steps.status, _ACTIVE))
    .order_by(_steps.position)
)


def active_steps(conn: Connection, pipeline_id: str) -> Sequence[Row[Any]]:
    """Return the rows of the steps that have not ended."""
    return conn.execute(_ACTIVE_STEPS, {"of_pipeline": pipeline_id}).all()


_HOLDS: Final = exists().where(schema.reservations.c.pipeline_id == _pipelines.id)
_REMOVABLE: Final = and_(_pipelines.ended_at.is_not(None), ~_HOLDS)


def removable(conn: Connection, *, before: Instant, ended_max: int, limit: int) -> Sequence[str]:
    """Return the longest ended pipelines of which nothing may live, and keep others from them.

    Those that ended before `before`, or before the newest `ended_max` that have ended.
    """
    too_old: ColumnElement[bool] = _pipelines.ended_at < before
    first_beyond = conn.execute(
        select(_pipelines.ended_at, _pipelines.id)
        .where(_pipelines.ended_at.is_not(None))
        .order_by(_pipelines.ended_at.desc(), _pipelines.id.desc())
        .offset(ended_max)
        .limit(1)
    ).first()
    if first_beyond is not None:
        too_old = or_(too_old, tuple_(_pipelines.ended_at, _pipelines.id) <= tuple_(*first_beyond))
    return conn.scalars(
        select(_pipelines.id)
        .where(_REMOVABLE, too_old)
        .order_by(_pipelines.ended_at, _pipelines.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()


def remove(conn: Connection, pipeline_ids: Sequence[str], *, key_keep_ns: int) -> None:
    """Remove pipelines with their steps; their keys stay `key_keep_ns` from their creation on."""
    conn.execute(
        update(schema.idempotency_keys)
        .where(_keys.pipeline_id.in_(pipeline_ids))
        .values(expires_at=_keys.created_at + key_keep_ns)
    )
    conn.execute(delete(schema.steps).where(_steps.pipeline_id.in_(pipeline_ids)))
    conn.execute(delete(schema.pipelines).where(_pipelines.id.in_(pipeline_ids)))


def remove_keys(conn: Connection, *, now: Instant, limit: int) -> int:
    """Remove idempotency keys that nobody needs any more; return how many."""
    expired = select(_keys.caller, _keys.key).where(_keys.expires_at <= now).limit(limit)
    return conn.execute(
        delete(schema.idempotency_keys).where(tuple_(_keys.caller, _keys.key).in_(expired))
    ).rowcount


def step(row: Row[Any]) -> Step:
    """Return the step that a row keeps."""
    return Step(
        name=row.name,
        type=StepType(row.type),
        status=Status(row.status),
        reason=Reason(row.reason),
        message=row.message,
        exit_code=row.exit_code,
        signal=row.signal,
        attempt=row.attempt,
        run=row.run,
        started_at=row.started_at,
        ended_at=row.ended_at,
        instance_id=row.instance_id,
        granted_to=row.granted_to,
    )


def _pipeline(row: Row[Any], steps: tuple[Step, ...]) -> Pipeline:
    return Pipeline(
        id=row.id,
        name=row.name,
        status=Status(row.status),
        reason=Reason(row.reason),
        message=row.message or row.waits_because or row.refusal,
        node_id=row.node_id,
        attempt=row.attempt,
        args=row.args,
        priority=row.priority,
        steps=steps,
        waiting=_waiting(row),
        cancel_requested_at=row.cancel_requested_at,
        cancel_reason=row.cancel_reason,
        created_at=row.created_at,
        created_by=row.created_by,
        started_at=row.started_at,
        ended_at=row.ended_at,
        retry_of=row.retry_of,
        reservation=_reservation(row),
        on_lost=OnLost(row.on_lost),
        extended_s=row.extended_s,
        may_still_run=bool(row.held_runs) and Status(row.status).terminal,
    )


def _reservation(row: Row[Any]) -> Reservation | None:
    if row.held_ports is None:
        return None
    return Reservation(
        cpu_millis=row.held_cpu_millis,
        memory_bytes=row.held_memory_bytes,
        gpu_id=row.held_gpu_id,
        gpu_slots=row.held_gpu_slots,
        gpu_memory_bytes=row.held_gpu_memory_bytes,
        ports=tuple(str(HostPort(**port)) for port in row.held_ports),
    )


def _waiting(row: Row[Any]) -> tuple[Waiting, ...]:
    refused = (Waiting(reason=Reason.REFUSED, text=row.refusal),) if row.refusal else ()
    return refused + (unpack_waiting(row.waiting_reasons) if row.waiting_reasons else ())


def _of(dispatch: Dispatch) -> dict[str, object]:
    return {"of_pipeline": dispatch.pipeline_id, "of_attempt": dispatch.attempt}


def _changed(conn: Connection, statement: Any, values: Mapping[str, object]) -> bool:
    rows: int = conn.execute(statement, values).rowcount
    return rows > 0
