"""The only writer of pipelines and steps: one call, one transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, Row

from gamenode.domain.access import Actor
from gamenode.domain.assignment import assigned
from gamenode.domain.command import (
    BoundPipeline,
    Dispatch,
    ExecuteOrder,
    ExtendOrder,
    HeldPipeline,
    Reconciliation,
    WantedEnd,
    WantedExtension,
    reconcile,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import EventType
from gamenode.domain.explanation import Standing
from gamenode.domain.log import LogKey
from gamenode.domain.node import Maintenance, Session
from gamenode.domain.pipeline import (
    TERMINAL,
    NewPipeline,
    OnLost,
    Pipeline,
    Reason,
    Report,
    ReportResult,
    Status,
    Step,
    StepType,
)
from gamenode.domain.placement import Candidate, Demand, Explained, Reserved, decide
from gamenode.domain.template import Namespace, names_used
from gamenode.domain.verification import StepKey, StepRecord
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant
from gamenode.server.db.database import Database
from gamenode.server.events import store as events
from gamenode.server.logs import service as logs
from gamenode.server.nodes import service as nodes
from gamenode.server.pipelines import changes, queue, reservations, store
from gamenode.server.pipelines.queue import Queued
from gamenode.server.pipelines.secrets import SecretBox
from gamenode.wire.codec import pack_order, unpack_order

QueueMark = tuple[int, int]
"""The newest event, and how many reservations there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What is waited for, and what is taken already."""

    mark: QueueMark
    demands: Mapping[str, Demand] = field(default_factory=dict)
    """Each distinct demand of what waits for a node, by id."""
    reserved: Mapping[str, Reserved] = field(default_factory=dict)
    """By node."""
    running: Mapping[str, int] = field(default_factory=dict)
    """By concurrency group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that was read, checked and resolved, ready to be written down."""

    id: str
    request: NewPipeline
    name: str
    work: ExecuteOrder
    """What an agent will be asked; its dispatch and tries are filled in when it is bound."""
    args: Mapping[str, str]
    demand: Demand
    on_lost: OnLost
    retry_of: str = ""
    """The pipeline that this one repeats."""
    carried: tuple[Step, ...] = ()
    """The first steps, which a retry leaves out, as they are to be shown; `work` has the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A pipeline as it was asked for, to be asked for again."""

    pipeline: Pipeline
    file: str
    args: Mapping[str, str] = field(repr=False)
    """With the values of secret ones, as long as they are kept."""
    envs: Mapping[str, str]
    demand: Demand
    ran: frozenset[str]
    """The steps that it was to run; an earlier retry may have left some out."""
    forgotten: tuple[str, ...]
    """Secret args whose values are not kept any more."""


class GamePipelineGRPCService:
    """The state of pipelines (L1)."""

    def __init__(self, database: Database, secrets: SecretBox, *, restarts_max: int = 16) -> None:
        """Keep the rows in `database`, and secret args in them sealed by `secrets`.

        A pipeline that loses its nodes begins anew `restarts_max` times.
        """
        self._db = database
        self._secrets = secrets
        self._restarts_max = restarts_max

    # Queries

    async def get(self, pipeline_id: str) -> Pipeline:
        """Return a pipeline.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND.
        """
        pipeline = await self._db.read(lambda conn: store.get(conn, pipeline_id))
        if pipeline is None:
            raise not_found(pipeline_id)
        return pipeline

    async def standing(self, pipeline_id: str) -> Standing:
        """Return how far a pipeline is.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND.
        """

        def read(conn: Connection) -> Standing:
            pipeline, progress = store.get(conn, pipeline_id), store.progress(conn, pipeline_id)
            if pipeline is None or progress is None:
                raise not_found(pipeline_id)
            waits = pipeline.status is Status.PENDING and not pipeline.node_id
            ahead, queued = queue.place(conn, pipeline_id) if waits else (0, 0)
            return Standing(
                pipeline=pipeline,
                dispatched_at=progress.dispatched_at,
                acknowledged_at=progress.acknowledged_at,
                cancel_acknowledged_at=progress.cancel_acknowledged_at,
                cancel_by=progress.cancel_by,
                demand=queue.demand(conn, pipeline_id) if waits else None,
                ahead=ahead,
                queued=queued,
            )

        return await self._db.read(read)

    async def list(
        self,
        *,
        status: Status | None = None,
        node: str = "",
        q: str = "",
        limit: int,
        before: tuple[Instant, str] | None = None,
    ) -> list[Pipeline]:
        """Return pipelines, newest first, from `before` on."""
        return await self._db.read(
            lambda conn: store.newest(
                conn, status=status, node=node, q=q, limit=limit, before=before
            )
        )

    async def queue_mark(self) -> QueueMark:
        """Return a value that differs once something may have changed for what waits."""
        return await self._db.read(_mark)

    async def queue(self, known: Mapping[str, Demand]) -> Queue:
        """Return what is waited for, and what is taken; `known` demands are not read again."""

        def read(conn: Connection) -> Queue:
            # The mark comes first: what happens between the reads must not be missed.
            mark = _mark(conn)
            demands = queue.queued_demands(conn, known)
            if not demands:
                return Queue(mark=mark)
            return Queue(
                mark=mark,
                demands=demands,
                reserved=reservations.reserved(conn),
                running=reservations.running(conn),
            )

        return await self._db.read(read)

    async def queued(
        self, hidden: Collection[str], limit: int, after: Queued | None = None
    ) -> Sequence[Queued]:
        """Return what waits behind a place in the queue, but for some demands."""
        return await self._db.read(lambda conn: queue.queued(conn, hidden, limit, after))

    async def explained(self) -> Mapping[str, Explained]:
        """Return why the pipelines of each demand wait, as it was written down."""
        return await self._db.read(queue.explained)

    async def reserved(self) -> Mapping[str, Reserved]:
        """Return what is taken on each node; a node that is absent is empty."""
        return await self._db.read(reservations.reserved)

    async def running(self) -> Mapping[str, int]:
        """Return how many pipelines of each concurrency group may run."""
        return await self._db.read(reservations.running)

    async def loads(self) -> Mapping[str, int]:
        """Return how many dispatches may run on each node."""
        return await self._db.read(reservations.loads)

    async def original(self, pipeline_id: str) -> Original:
        """Return how a pipeline was asked for.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND.
        """

        def read(conn: Connection) -> Original:
            pipeline, asked = store.get(conn, pipeline_id), store.asked(conn, pipeline_id)
            if pipeline is None or asked is None:
                raise not_found(pipeline_id)
            work = self._work(conn, pipeline_id)
            needed = {n for step in work.steps for n in names_used(step.container, Namespace.ARGS)}
            return Original(
                pipeline=pipeline,
                file=asked.file,
                args={**pipeline.args, **work.secrets},
                envs=asked.envs,
                demand=queue.demand(conn, pipeline_id),
                ran=frozenset(step.name for step in work.steps),
                forgotten=tuple(sorted(needed - work.secrets.keys())),
            )

        return await self._db.read(read)

    async def lingering(self) -> Mapping[str, Sequence[Dispatch]]:
        """Return by node what has ended here without its word and may still run there (RA3)."""
        found: dict[str, list[Dispatch]] = {}
        for node_id, dispatch, _ in await self._db.read(store.lingering):
            found.setdefault(node_id, []).append(dispatch)
        return found

    async def nodes_of_failing(self) -> frozenset[str]:
        """Return the nodes whose loss some pipeline does not wait out (`on_lost: fail`)."""
        return await self._db.read(store.nodes_of_failing)

    async def owed_nodes(self) -> store.Owed:
        """Return who has not said that it took a dispatch, or knows of a wanted end or extension.

        What is owed to those that are away must not hide what is owed to the others.
        """
        return await self._db.read(store.owed_nodes)

    async def unacknowledged(
        self, node_ids: Collection[str], limit: int
    ) -> Sequence[tuple[str, Dispatch]]:
        """Return what was bound to these nodes and they have not said that they took it."""
        return await self._db.read(lambda conn: store.unacknowledged(conn, node_ids, limit))

    async def cancelling(self, node_ids: Collection[str], limit: int) -> Sequence[WantedEnd]:
        """Return whose end is wanted on these nodes, while they have not said that they know."""
        return await self._db.read(lambda conn: store.cancelling(conn, node_ids, limit))

    async def extending(self, node_ids: Collection[str], limit: int) -> Sequence[WantedExtension]:
        """Return which pipelines on these nodes may take longer than the nodes know."""
        return await self._db.read(lambda conn: store.extending(conn, node_ids, limit))

    async def step_records(
        self, pipeline_ids: Collection[str], *, batch_max: int
    ) -> Mapping[StepKey, StepRecord]:
        """Return what is known of the steps of these pipelines, and of every step that runs.

        At most `batch_max` pipelines are named in one statement.
        """
        wanted = sorted(pipeline_ids)

        def read(conn: Connection) -> Mapping[StepKey, StepRecord]:
            found = store.running_records(conn)
            for start in range(0, len(wanted), batch_max):
                found += store.step_records(conn, wanted[start : start + batch_max])
            return {(record.pipeline_id, record.step): record for record in found}

        return await self._db.read(read)

    async def is_granted(self, key: LogKey, node_id: str) -> bool:
        """Return whether a node was granted this try."""
        return await self._db.read(lambda conn: store.is_granted(conn, key, node_id))

    async def log_key(self, pipeline_id: str, step: str, attempt: int) -> LogKey:
        """Return which log a try at a step has; attempt 0: the newest try, or the first to come.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND, STEP_NOT_FOUND; LOG_NOT_FOUND, no such try.
        """

        def read(conn: Connection) -> LogKey:
            row = store.step_row(conn, pipeline_id, step)
            if row is None:
                raise self._no_step(store.get(conn, pipeline_id), pipeline_id, step)
            newest = row.attempt or row.granted_from or 1
            if attempt > max(newest, row.granted_to):
                raise GameNodeError(
                    ErrorCode.LOG_NOT_FOUND,
                    f"step {step} has had {row.attempt} tries, not {attempt}",
                )
            return LogKey(pipeline_id, step, attempt or newest, row.run or 1)

        return await self._db.read(read)

    async def is_finished(self, key: LogKey) -> bool:
        """Return whether this try has ended: its log gets no more, unless a length says so."""

        def read(conn: Connection) -> bool:
            row = store.step_row(conn, key.pipeline_id, key.step)
            return row is None or row.attempt > key.attempt or Status(row.status).terminal

        return await self._db.read(read)

    @staticmethod
    def _no_step(pipeline: Pipeline | None, pipeline_id: str, step: str) -> GameNodeError:
        if pipeline is None:
            return not_found(pipeline_id)
        names = ", ".join(known.name for known in pipeline.steps)
        return GameNodeError(
            ErrorCode.STEP_NOT_FOUND,
            f"pipeline {pipeline_id} has no step {step}",
            hint=f"its steps: {names}",
        )

    async def order(self, dispatch: Dispatch) -> ExecuteOrder | None:
        """Return the order of a dispatch, as it was granted; None once it holds nothing.

        It has the node's present state version. Where the node shall take nothing new by now it has
        none, and is refused: then it waits for another node (rule RM1).
        """

        def read(conn: Connection) -> ExecuteOrder | None:
            given = reservations.assignment(conn, dispatch)
            row = store.dispatched(conn, dispatch)
            node = nodes.place(conn, row.node_id) if row is not None else None
            if given is None or row is None or node is None:
                return None  # it ended a moment ago
            usable = node.usable_as is Maintenance.NORMAL
            work = self._work(conn, dispatch.pipeline_id)
            steps = [
                replace(step, first_attempt=row.granted_from)
                for step, row in zip(work.steps, _rows_of(conn, work), strict=True)
            ]
            return replace(
                work,
                dispatch=dispatch,
                state_version=node.state_version if usable else 0,
                extended_s=row.extended_s,
                steps=assigned(steps, given),
            )

        return await self._db.read(read)

    def _key_use(self, by: Actor, key: str, content: tuple[object, ...]) -> _KeyUse:
        return _KeyUse(by, key, self._secrets.fingerprint(repr(content).encode()))

    def _work(self, conn: Connection, pipeline_id: str) -> ExecuteOrder:
        packed, sealed = store.work(conn, pipeline_id)
        return replace(unpack_order(packed), secrets=self._secrets.unseal(pipeline_id, sealed))

    def _ended_with_its_boot(self, conn: Connection, row: store.Bound, boot_id: str) -> bool:
        """Return whether nothing of a dispatch can live, since its host has booted since (P2).

        A journal may be lost while what it knew of runs on. And a service that its engine starts
        again by itself outlives a boot.
        """
        if row.boot_id == boot_id:
            return False
        return not any(
            step.type is StepType.SERVICE and step.container.restart not in {"", "no"}
            for step in self._work(conn, row.dispatch.pipeline_id).steps
        )

    # Commands

    async def create(self, prepared: Prepared, *, by: Actor, now: Instant) -> Pipeline:
        """Write a pipeline down; the same key with the same content again returns the first (P10).

        Raises:
            GameNodeError: CONFLICT if the key was used with other content.
        """
        request = prepared.request
        values, step_values, pipeline = _new_rows(prepared, by, now)
        values["sealed"] = self._secrets.seal(prepared.id, prepared.work.secrets)
        use = self._key_use(by, request.idempotency_key, _content_of(prepared))

        def record(conn: Connection) -> Pipeline:
            if (first := use.first(conn, prepared.id, now)) is not None:
                return first
            store.insert_pipeline(conn, values, step_values)
            changes.append_created(conn, pipeline, now)
            return pipeline

        return await self._db.write(record)

    async def bind(
        self, pipeline_id: str, demand: Demand, candidate: Candidate, *, now: Instant
    ) -> ExecuteOrder | None:
        """Bind a waiting pipeline to a node under a new attempt; return what to ask of its agent.

        None if it does not wait any more, or does not fit on the node now: the rows of the node and
        of the concurrency group are locked, and it is judged again with what is taken at this
        moment (rule RC5). From here only the agent's word frees the pipeline, and what it was given
        (rules RA1, RA3).
        """
        node_id = candidate.node_id

        def record(conn: Connection) -> ExecuteOrder | None:
            node = nodes.lock_place(conn, node_id)
            row = store.lock(conn, pipeline_id)
            if node is None or row is None:
                return None
            attempt = row.attempt + 1
            if node.simple and row.attempt:
                return None  # such a node never gets a second attempt (rule RL4)
            group = demand.group
            decision = decide(
                demand,
                [
                    replace(
                        candidate,
                        maintenance=node.usable_as,
                        simple=node.simple,
                        reserved=reservations.reserved_on(conn, node_id),
                    )
                ],
                {group.name: reservations.lock_group(conn, group.name)} if group else {},
            )
            if decision.node_id is None:
                return None
            if not store.bind(
                conn,
                pipeline_id,
                node_id=node_id,
                attempt=attempt,
                session_epoch=node.session_epoch,
                boot_id=node.boot_id,
                extended_s=row.extended_s,
                now=now,
            ):
                return None
            work = self._work(conn, pipeline_id)
            # The first attempt at all steps is the usual case, and needs no look at them.
            granted = [(position, 0) for position in range(len(work.steps))]
            if row.attempt or row.retry_of:
                granted = [(step.position, step.granted_to) for step in _rows_of(conn, work)]
            steps = tuple(
                replace(step, first_attempt=last + 1)
                for step, (_, last) in zip(work.steps, granted, strict=True)
            )
            store.grant(
                conn,
                pipeline_id,
                [
                    (position, step.first_attempt, step.first_attempt + step.attempts - 1)
                    for step, (position, _) in zip(steps, granted, strict=True)
                ],
            )
            reservations.reserve(
                conn,
                Dispatch(pipeline_id, attempt),
                node_id=node_id,
                demand=demand,
                assignment=decision.assignment,
                # A simple client does not say what lives on it.
                instance_ids=[s.instance_id for s in steps if s.instance_id and not node.simple],
            )
            changes.append_event(
                conn,
                EventType.PIPELINE_DISPATCHED,
                pipeline_id,
                now,
                node_id=node_id,
                status=Status.PENDING,
                data={"name": row.name, "attempt": str(attempt)},
            )
            return replace(
                work,
                dispatch=Dispatch(pipeline_id, attempt),
                state_version=node.state_version,
                extended_s=row.extended_s,
                steps=assigned(steps, decision.assignment),
            )

        return await self._db.write(record)

    async def forget_secrets(self, before: Instant) -> None:
        """Forget the secrets of pipelines that ended before that."""
        await self._db.write(lambda conn: store.forget_secrets(conn, before))

    async def explain_waiting(
        self, reasons: Mapping[str, Explained], gone: Collection[str]
    ) -> None:
        """Write down why the pipelines of these demands wait, and that others wait no more."""
        await self._db.write(lambda conn: queue.explain(conn, reasons, gone))

    async def acknowledge(self, dispatches: Sequence[Dispatch], *, now: Instant) -> None:
        """Note that agents have these dispatches in their journals."""

        def record(conn: Connection) -> None:
            for dispatch in dispatches:
                store.acknowledge(conn, dispatch, now)

        await self._db.write(record)

    async def requeue(self, dispatch: Dispatch, refusal: str, *, now: Instant) -> None:
        """Let a pipeline that its node refused for now wait again; end it if that is wanted."""

        def record(conn: Connection) -> None:
            row = store.lock(conn, dispatch.pipeline_id)
            if row is None or row.attempt != dispatch.attempt:
                return
            if row.cancel_requested_at is not None:
                changes.end_unrun(conn, row, Reason.REFUSED, refusal, now)
            else:
                changes.let_go(conn, dispatch, now)
                store.unbind(conn, dispatch, refusal)

        await self._db.write(record)

    async def fail(self, dispatch: Dispatch, reason: Reason, message: str, *, now: Instant) -> None:
        """End a dispatch that its node refused for good."""

        def record(conn: Connection) -> None:
            row = store.lock(conn, dispatch.pipeline_id)
            if row is not None and row.attempt == dispatch.attempt:
                changes.end_unrun(conn, row, reason, message, now)

        await self._db.write(record)

    async def refuse(self, pipeline_id: str, reason: Reason, message: str, *, now: Instant) -> None:
        """End a pipeline that waits for a node and that none can run."""

        def record(conn: Connection) -> None:
            row = store.lock(conn, pipeline_id)
            if row is not None and not row.node_id and row.status not in TERMINAL:
                changes.end_unrun(conn, row, reason, message, now)

        await self._db.write(record)

    async def acknowledge_cancel(self, dispatch: Dispatch, *, forced: bool, now: Instant) -> None:
        """Note that the agent knows that a dispatch must end; by force only if it was told so."""
        await self._db.write(
            lambda conn: store.acknowledge_cancel(conn, dispatch, forced=forced, now=now)
        )

    async def cancel(
        self, pipeline_id: str, *, reason: str, force: bool, by: Actor, now: Instant
    ) -> Pipeline:
        """Want a pipeline's end: at once where it was not dispatched, else with its node's word.

        With `force` it is CANCELLED here and now, whatever its node still runs. Asking again
        changes nothing.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND; CONFLICT if it has ended otherwise.

        Source: F4, RA3.
        """

        def record(conn: Connection) -> Pipeline:
            row = store.lock(conn, pipeline_id)
            if row is None:
                raise not_found(pipeline_id)
            status = Status(row.status)
            if status.terminal and status is not Status.CANCELLED:
                raise GameNodeError(
                    ErrorCode.CONFLICT, f"pipeline {pipeline_id} has ended already: {status}"
                )
            if not status.terminal:
                changes.want_cancel(conn, row, reason=reason, force=force, by=by, now=now)
            cancelled = store.get(conn, pipeline_id)
            assert cancelled is not None
            return cancelled

        return await self._db.write(record)

    async def acknowledge_extension(self, order: ExtendOrder) -> None:
        """Note that the agent knows how long a dispatch may take."""
        await self._db.write(lambda conn: store.acknowledge_extension(conn, order))

    async def extend(
        self, pipeline_id: str, by_s: float, *, key: str, by: Actor, now: Instant
    ) -> Pipeline:
        """Let a pipeline and its steps take `by_s` longer; the same key again changes nothing.

        Its node is told afterwards, and again until it has said that it knows.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND; CONFLICT if it has ended or its end is wanted, if
                nothing of it has a limit, or if the key was used with other content.

        Source: F8, RC3.
        """
        use = self._key_use(by, key, ("extend", pipeline_id, by_s))

        def record(conn: Connection) -> Pipeline:
            row = store.lock(conn, pipeline_id)
            if row is None:
                raise not_found(pipeline_id)
            if (first := use.first(conn, pipeline_id, now)) is not None:
                return first
            _check_extendable(row, self._work(conn, pipeline_id))
            changes.extend(conn, row, by_s, by=by, now=now)
            extended = store.get(conn, pipeline_id)
            assert extended is not None
            return extended

        return await self._db.write(record)

    async def fence_node(
        self, node_id: str, *, session_id: str, by: Actor, reason: str, now: Instant
    ) -> None:
        """Take an operator's word that a host is dead: what is bound to it is free (RA1).

        Its pipelines end as NODE_LOST, or begin anew elsewhere with `on_lost: restart`. The node's
        session is superseded by `session_id`, which nobody holds: should its agent come back, it
        has no continuity, and must end whatever it still holds. Asking again changes nothing.

        Raises:
            GameNodeError: NODE_NOT_FOUND; CONFLICT while it is online.
        """

        def record(conn: Connection) -> None:
            if not nodes.fence(conn, node_id, session_id=session_id, by=by, reason=reason, now=now):
                return
            message = f"node {node_id} was fenced by {by.name}: {reason}"
            for pipeline in store.bound(conn, node_id):
                row = store.lock(conn, pipeline.dispatch.pipeline_id)
                assert row is not None
                changes.end_lost(conn, row, message, now, restarts_max=self._restarts_max)
            for _, dispatch, _ in store.lingering(conn, node_id):
                changes.let_go(conn, dispatch, now)
            reservations.release_node(conn, node_id)

        await self._db.write(record)

    async def give_up(self, node_id: str, message: str, *, now: Instant) -> None:
        """End what does not wait for a node that is away (`on_lost: fail`); none if it is back."""

        def record(conn: Connection) -> None:
            if not nodes.is_away(conn, node_id):
                return
            for pipeline_id in store.failing_when_lost(conn, node_id):
                row = store.lock(conn, pipeline_id)
                if row is not None and row.node_id == node_id and row.status not in TERMINAL:
                    changes.give_up(conn, row, message, now)

        await self._db.write(record)

    async def remove_node(
        self, node_id: str, *, force: bool, reason: str, by: Actor, now: Instant
    ) -> None:
        """Remove a node that runs nothing; with `force` what it runs ends here as NODE_LOST (N1).

        Raises:
            GameNodeError: NODE_NOT_FOUND; CONFLICT while something is bound to it.
        """

        def record(conn: Connection) -> None:
            if nodes.lock_place(conn, node_id) is None:
                raise nodes.not_found(node_id)
            bound = store.bound(conn, node_id)
            if bound and not force:
                raise GameNodeError(
                    ErrorCode.CONFLICT,
                    f"{len(bound)} pipelines are bound to node {node_id}",
                    hint="disable it first, or --force: what it runs may go on there",
                )
            for pipeline in bound:
                row = store.lock(conn, pipeline.dispatch.pipeline_id)
                assert row is not None
                changes.end_unrun(conn, row, Reason.NODE_LOST, "its node was removed", now)
            for _, dispatch, _ in store.lingering(conn, node_id):
                changes.let_go(conn, dispatch, now)
            reservations.release_node(conn, node_id)
            nodes.remove_node(conn, node_id, by=by, reason=reason, now=now)

        await self._db.write(record)

    async def remove_ended(
        self, *, before: Instant, ended_max: int, key_keep_s: float, limit: int
    ) -> Sequence[str]:
        """Remove the longest ended pipelines, with steps and logs; return which, at most `limit`.

        Those that ended before `before`, or before the newest `ended_max`; never one that its node
        may still run, or of which a service lives on. Their idempotency keys stay until they are
        `key_keep_s` old (RC5). Afterwards `LogService.remove_files` removes their logs' files.
        """

        def record(conn: Connection) -> Sequence[str]:
            ids = store.removable(conn, before=before, ended_max=ended_max, limit=limit)
            if ids:
                logs.remove(conn, ids)
                store.remove(conn, ids, key_keep_ns=round(key_keep_s * NANOSECONDS_PER_S))
            return ids

        return await self._db.write(record)

    async def remove_keys(self, *, now: Instant, limit: int) -> int:
        """Remove idempotency keys that have outlived their pipelines for long enough."""
        return await self._db.write(lambda conn: store.remove_keys(conn, now=now, limit=limit))

    async def apply(
        self,
        reports: Sequence[Report],
        *,
        node_id: str,
        session: Session | None,
        now: Instant,
    ) -> Sequence[ReportResult] | None:
        """Take a node's word for its pipelines and steps, in order; each is judged and guarded.

        None from a superseded session (or no session): it changes nothing, and what it reported
        will come again from the session that continues it (P3). Nor does a report change anything
        that is of an attempt that does not count any more, or about something that has ended (P4).
        """

        def record(conn: Connection) -> Sequence[ReportResult] | None:
            if session is None or not nodes.session_is_newest(conn, node_id, session.epoch):
                return None
            simple = nodes.is_simple(conn, node_id)
            return [
                changes.apply(
                    conn,
                    report,
                    node_id,
                    now,
                    simple=simple,
                    restarts_max=self._restarts_max,
                )
                for report in reports
            ]

        return await self._db.write(record)

    async def settle_instances(
        self, living: Collection[str], *, session: Session, stream_number: int
    ) -> bool | None:
        """Free what the ended services of a node kept; return whether there was any.

        None from a session or stream that a newer one has overtaken: a service may have begun since
        (RL2).
        """

        def record(conn: Connection) -> bool | None:
            if not nodes.use_stream(conn, session, stream_number):
                return None
            return reservations.settle_ended(conn, session.node_id, living)

        return await self._db.write(record)

    async def reconcile(
        self,
        held: Sequence[HeldPipeline],
        *,
        living: Collection[str] = (),
        session: Session,
        stream_number: int,
        now: Instant,
    ) -> Reconciliation | None:
        """Let a stream act for its node: agree on what its agent holds, and end what is lost.

        The reports of the statement are applied before. None from a session or stream that a newer
        one has overtaken: what it states is not how things are. All in one transaction, so that
        nothing is judged by a statement that is older than its binding (RL1, RL2, RL3).
        """

        def record(conn: Connection) -> Reconciliation | None:
            node_id = session.node_id
            if not nodes.use_stream(conn, session, stream_number):
                return None
            continuity_epoch = nodes.continuity_epoch(conn, node_id)
            boot_id = nodes.boot_id(conn, node_id)
            bound = [
                BoundPipeline(
                    dispatch=row.dispatch,
                    status=row.status,
                    acknowledged=row.acknowledged,
                    resendable=row.session_epoch >= continuity_epoch,
                    starts_over=changes.may_start_over(row, self._restarts_max)
                    and self._ended_with_its_boot(conn, row, boot_id),
                )
                for row in store.bound(conn, node_id)
            ]
            bound += [
                BoundPipeline(dispatch=dispatch, status=status, acknowledged=True, resendable=False)
                for _, dispatch, status in store.lingering(conn, node_id)
            ]
            actions = reconcile(bound, held)
            message = f"node {node_id} came back without it: its journal does not know this attempt"
            for dispatch in (*actions.lost, *actions.restart):
                row = store.lock(conn, dispatch.pipeline_id)
                assert row is not None
                if dispatch in actions.restart:
                    changes.start_over(conn, row, Reason.NODE_LOST, message, now)
                else:
                    changes.end_unrun(conn, row, Reason.NODE_LOST, message, now)
            for dispatch in actions.gone:
                changes.ended(conn, dispatch, now)
            # What is neither held nor sent again runs no more, whatever its status (rule RA3).
            holds = {h.dispatch for h in held if not h.ended} | set(actions.resend)
            reservations.settle(conn, node_id, holds, living)
            return actions

        return await self._db.write(record)


def _mark(conn: Connection) -> QueueMark:
    return events.head(conn), reservations.count(conn)


def not_found(pipeline_id: str) -> GameNodeError:
    """Return the error for a pipeline that is not known."""
    return GameNodeError(
        ErrorCode.PIPELINE_NOT_FOUND,
        f"no pipeline {pipeline_id}",
        hint="list the pipelines: gamenode pipelines list",
    )


# Rows


def _new_rows(
    prepared: Prepared, by: Actor, now: Instant
) -> tuple[dict[str, object], list[dict[str, object]], Pipeline]:
    request = prepared.request
    steps = prepared.work.steps
    demand_id, packed_demand = queue.pack_demand(prepared.demand)
    pipeline = Pipeline(
        id=prepared.id,
        name=prepared.name,
        status=Status.PENDING,
        reason=Reason.NONE,
        message="",
        node_id="",
        attempt=0,
        args=prepared.args,
        priority=request.priority,
        steps=prepared.carried
        + tuple(
            Step(
                name=step.name,
                type=step.type,
                status=Status.PENDING,
                reason=Reason.NONE,
                message="",
                exit_code=None,
                signal=None,
                attempt=0,
                run=0,
                started_at=None,
                ended_at=None,
                instance_id=step.instance_id,
            )
            for step in steps
        ),
        waiting=(),
        cancel_requested_at=None,
        cancel_reason="",
        created_at=now,
        created_by=by.name,
        started_at=None,
        ended_at=None,
        retry_of=prepared.retry_of,
        on_lost=prepared.on_lost,
    )
    values: dict[str, object] = {
        "id": prepared.id,
        "name": prepared.name,
        "status": Status.PENDING,
        "reason": Reason.NONE,
        "message": "",
        "file": request.file,
        "args": dict(prepared.args),
        "envs": dict(request.envs),
        "demand": packed_demand,
        "demand_id": demand_id,
        "work": pack_order(prepared.work),
        "priority": request.priority,
        "node_id": "",
        "attempt": 0,
        "session_epoch": 0,
        "boot_id": "",
        "refusal": "",
        "created_at": now,
        "created_by": by.name,
        "cancel_reason": "",
        "cancel_by": "",
        "retry_of": prepared.retry_of,
        "on_lost": prepared.on_lost,
        "restarts": 0,
        "extended_s": 0.0,
        "extension_acknowledged_s": 0.0,
    }
    step_values: list[dict[str, object]] = [
        {
            "pipeline_id": prepared.id,
            "position": position,
            "name": step.name,
            "type": step.type,
            "status": step.status,
            "reason": step.reason,
            "message": step.message,
            "attempt": 0,
            "run": 0,
            "granted_from": 0,
            "granted_to": 0,
            "ended_at": step.ended_at,
            "instance_id": step.instance_id if step.type is StepType.SERVICE else "",
        }
        for position, step in enumerate(pipeline.steps)
    ]
    return values, step_values, pipeline


def _rows_of(conn: Connection, work: ExecuteOrder) -> Sequence[Row[Any]]:
    """Return the rows of the steps that a pipeline runs; what a retry left out comes first."""
    rows = store.step_rows(conn, work.dispatch.pipeline_id)
    return rows[len(rows) - len(work.steps) :]


def _check_extendable(row: Row[Any], work: ExecuteOrder) -> None:
    if row.status in TERMINAL:
        raise GameNodeError(
            ErrorCode.CONFLICT, f"pipeline {row.id} has ended already: {row.status}"
        )
    if row.cancel_requested_at is not None:
        raise GameNodeError(ErrorCode.CONFLICT, f"pipeline {row.id} is being cancelled")
    if work.timeout_s is None and all(step.timeout_s is None for step in work.steps):
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"pipeline {row.id} has no limit, nor has any of its steps: it may take as long as "
            "it likes",
        )


@dataclass(frozen=True, slots=True)
class _KeyUse:
    """One use of an idempotency key by somebody; an empty key is none."""

    by: Actor
    key: str
    body_hash: str

    def first(self, conn: Connection, pipeline_id: str, now: Instant) -> Pipeline | None:
        """Return the pipeline of the key's first use; None if this is it, which is noted.

        Raises:
            GameNodeError: CONFLICT if the first use had other content.
        """
        if not self.key:
            return None
        caller = f"{self.by.kind}:{self.by.name}"
        known = store.known_key(conn, caller, self.key)
        if known is None:
            store.insert_key(
                conn,
                caller=caller,
                key=self.key,
                body_hash=self.body_hash,
                pipeline_id=pipeline_id,
                now=now,
            )
            return None
        known_id, first_hash = known
        if first_hash != self.body_hash:
            raise GameNodeError(
                ErrorCode.CONFLICT,
                f"idempotency key {self.key} was used before, with another request",
                hint="use a new key for a new request",
            )
        pipeline = store.get(conn, known_id)
        if pipeline is None:
            raise GameNodeError(
                ErrorCode.PIPELINE_NOT_FOUND,
                f"idempotency key {self.key} made pipeline {known_id}, which was removed since",
                hint="use a new key for a new request",
            )
        return pipeline


def _content_of(prepared: Prepared) -> tuple[object, ...]:
    request = prepared.request
    content: tuple[object, ...] = (
        request.file,
        sorted(request.args.items()),
        sorted(request.envs.items()),
        request.node,
        request.selector,
        request.priority,
    )
    return (*content, prepared.retry_of, len(prepared.carried)) if prepared.retry_of else content
