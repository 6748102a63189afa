"""Pipelines while they live: created, dispatched, reported on, cancelled (L3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from gamenode.domain.access import Actor
from gamenode.domain.args import resolve
from gamenode.domain.assignment import demand_of
from gamenode.domain.command import (
    Acknowledged,
    Closed,
    CloseReason,
    Dispatch,
    ExecuteOrder,
    GrantedStep,
    LivingInstances,
    NumberedReport,
    Statement,
    Welcome,
)
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation, invalid
from gamenode.domain.event import EventFilter, EventType
from gamenode.domain.log import LogKey
from gamenode.domain.node import Node, Session
from gamenode.domain.pipeline import (
    NewPipeline,
    Pipeline,
    PipelineReport,
    PipelineSpec,
    Reason,
    Report,
    ReportOutcome,
    ReportResult,
    Status,
    Step,
    StepReport,
    StepSpec,
    StepType,
    first_to_repeat,
)
from gamenode.lib.clock import Clock, Instant, after
from gamenode.lib.ids import Ids
from gamenode.lib.tasks import every
from gamenode.server.events.feed import EventFeed
from gamenode.server.logs.manager import LogManager
from gamenode.server.logs.service import LogService
from gamenode.server.nodes.connections import AgentConnection
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.dispatcher import TaskDispatcher
from gamenode.server.pipelines.retention import RetentionSettings
from gamenode.server.pipelines.service import GamePipelineGRPCService, Original, Prepared
from gamenode.wire.pipeline_file import parse_pipeline

_ENDS: Final = EventFilter(
    types=frozenset(
        {EventType.PIPELINE_COMPLETED, EventType.PIPELINE_FAILED, EventType.PIPELINE_CANCELLED}
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings(RetentionSettings):
    """Bounds of pipelines."""

    wait_s_max: float = 60.0
    """The longest that one request may wait for an end."""
    reports_per_write_max: int = 250
    """How many reports one transaction takes, so that nobody waits long behind it (P14)."""
    secrets_keep_s: float = 86_400.0
    """How long the secrets of one that did not complete are kept, so that it can be retried."""
    secrets_sweep_interval_s: float = 600.0
    """How often it is looked for such that can be forgotten."""
    log_owners_max: int = 10_000
    """How many logs are remembered as rightly written to; then all are asked for anew."""
    lost_fail_s: float = 15 * 60.0
    """How long a node may be offline before its pipelines with `on_lost: fail` end."""
    lost_sweep_interval_s: float = 2.0
    """How often it is looked whether one has been."""
    restarts_max: int = 16
    """How often a pipeline with `on_lost: restart` may lose its node; then it fails."""


class PipelineManager:
    """What the edges call to change pipelines; queries go to the service."""

    def __init__(
        self,
        *,
        service: GamePipelineGRPCService,
        dispatcher: TaskDispatcher,
        nodes: NodeManager,
        logs: LogService,
        log_manager: LogManager,
        feed: EventFeed,
        clock: Clock,
        ids: Ids,
        settings: PipelineSettings,
    ) -> None:
        """Work through the service and the dispatcher."""
        self._service = service
        self._dispatcher = dispatcher
        self._nodes = nodes
        self._logs = logs
        self._log_manager = log_manager
        self._feed = feed
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._log_owners: set[tuple[LogKey, str]] = set()

    async def create(self, request: NewPipeline, *, by: Actor) -> Pipeline:
        """Create a pipeline; durable on return, and on its way to a node (F1).

        Raises:
            GameNodeError: INVALID_REQUEST with everything that is wrong; NODE_NOT_FOUND for a named
                node; CONFLICT for a reused idempotency key.
        """
        prepared = self.prepare(request)
        if prepared.demand.node_id:
            await self._nodes.get(prepared.demand.node_id)
        return await self._service.create(prepared, by=by, now=self._clock.now())

    async def cancel(self, pipeline_id: str, *, reason: str, force: bool, by: Actor) -> Pipeline:
        """Want a pipeline's end (F4)."""
        return await self._service.cancel(
            pipeline_id, reason=reason, force=force, by=by, now=self._clock.now()
        )

    async def extend(self, pipeline_id: str, by_s: float, *, key: str, by: Actor) -> Pipeline:
        """Let a pipeline and its steps take `by_s` longer (F8)."""
        return await self._service.extend(pipeline_id, by_s, key=key, by=by, now=self._clock.now())

    async def retry(self, pipeline_id: str, *, from_failed: bool, key: str, by: Actor) -> Pipeline:
        """Create a pipeline that repeats one that went badly, linked to it (F12).

        With `from_failed` it goes to the same node and leaves out what went well there; what is
        left out ends as SKIPPED, and says where it was done.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND; NODE_NOT_FOUND, the node is gone; CONFLICT, it has
                not failed and was not cancelled, its secrets are forgotten, it may still run where
                it is to go on, or the idempotency key was used with other content.
        """
        original = await self._service.original(pipeline_id)
        _check_repeatable(original, from_failed=from_failed)
        prepared = self._repeated(original, from_failed=from_failed, key=key)
        if prepared.demand.node_id:
            await self._nodes.get(prepared.demand.node_id)
        return await self._service.create(prepared, by=by, now=self._clock.now())

    async def fence_node(self, node_id: str, *, reason: str, by: Actor) -> Node:
        """Take an operator's word that a node's host is dead (RA1)."""
        await self._service.fence_node(
            node_id, session_id=self._ids.new(), by=by, reason=reason, now=self._clock.now()
        )
        return await self._nodes.fenced(node_id)

    async def forget_secrets(self) -> None:
        """Forget, time and again, the secrets of pipelines that ended long ago."""

        async def sweep() -> None:
            keep_s = self._settings.secrets_keep_s
            await self._service.forget_secrets(after(self._clock.now(), -keep_s))

        await every(self._settings.secrets_sweep_interval_s, sweep)

    async def remove_node(self, node_id: str, *, force: bool, reason: str, by: Actor) -> None:
        """Remove a node; its agent is told so."""
        await self._service.remove_node(
            node_id, force=force, reason=reason, by=by, now=self._clock.now()
        )
        self._nodes.forget(node_id, f"node {node_id} was removed")

    async def wait_ended(self, pipeline_id: str, timeout_s: float) -> Pipeline:
        """Return a pipeline as soon as it has ended, or as it is when the time is up.

        A server that stops gives its answers: the time is up then.
        """
        deadline_s = self._clock.monotonic_s() + min(timeout_s, self._settings.wait_s_max)
        with self._feed.watch(pipeline_id, _ENDS) as watch:
            while True:
                pipeline = await self._service.get(pipeline_id)
                left_s = deadline_s - self._clock.monotonic_s()
                if pipeline.status.terminal or left_s <= 0 or self._feed.closed:
                    return pipeline
                await watch.changed(left_s)

    async def update_step_status(
        self, report: StepReport, *, node_id: str, session: Session | None
    ) -> ReportResult:
        """Take a simple client's word for a step; its inline log is stored first (F3).

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND, STEP_NOT_FOUND.
        """
        await self._service.log_key(report.pipeline_id, report.step, 0)
        if report.log and report.status in (Status.COMPLETED, Status.FAILED):
            key = LogKey(
                report.pipeline_id, report.step, max(report.attempt, 1), max(report.run, 1)
            )
            end = await self._logs.store_inline(key, node_id, report.log, now=self._clock.now())
            report = replace(report, log_length_bytes=end.length_bytes, log_hash=end.hash)
        return await self._take_one(report, node_id=node_id, session=session)

    async def update_status(
        self, report: PipelineReport, *, node_id: str, session: Session | None
    ) -> ReportResult:
        """Take a simple client's word for a pipeline."""
        return await self._take_one(report, node_id=node_id, session=session)

    async def check_log_owner(self, key: LogKey, node_id: str) -> None:
        """Check that a node may write this log: it was granted the try (P15).

        A log that it has begun stays its own, whoever makes the next attempt (rule RA4).

        Raises:
            GameNodeError: PERMISSION_DENIED.
        """
        owned = (key, node_id)
        if owned in self._log_owners:
            return
        granted = await self._service.is_granted(key, node_id)
        begun = None if granted else await self._logs.stored(key)
        if not granted and (begun is None or begun.node_id != node_id):
            raise GameNodeError(
                ErrorCode.PERMISSION_DENIED,
                f"node {node_id} was not granted try {key.attempt} of step {key.step}",
            )
        if len(self._log_owners) >= self._settings.log_owners_max:
            self._log_owners.clear()
        self._log_owners.add(owned)

    def forget(self, pipeline_ids: Collection[str]) -> None:
        """Let go of what is remembered of pipelines that were removed."""
        gone = set(pipeline_ids)
        self._log_owners = {
            (key, node_id) for key, node_id in self._log_owners if key.pipeline_id not in gone
        }

    async def node_of(self, pipeline_id: str) -> str:
        """Return the node that a pipeline is bound to; empty before a dispatch."""
        return (await self._service.get(pipeline_id)).node_id

    async def hear(self, connection: AgentConnection, reports: Sequence[NumberedReport]) -> None:
        """Take what an agent reports on its stream, and acknowledge it once it is on disk."""
        acknowledged = await self._apply(connection, reports)
        if acknowledged is None:
            connection.close(_SUPERSEDED)
        else:
            connection.say(acknowledged)

    async def hear_instances(self, connection: AgentConnection, living: LivingInstances) -> None:
        """Take what an agent says of the services that live on its node."""
        freed = await self._service.settle_instances(
            living.ids, session=connection.session, stream_number=connection.stream_number
        )
        if freed is None:
            connection.close(_SUPERSEDED)
        elif freed:
            self._dispatcher.look_again()

    async def reconcile(self, connection: AgentConnection, statement: Statement) -> None:
        """Agree with an agent again: its reports first, then who must end, start or is lost.

        May be repeated until it went well: the agent hears nothing before everything is on disk,
        and has nothing but what it stated until it hears.

        Source: RL1.
        """
        acknowledged = await self._apply(
            connection, [report for held in statement.held for report in held.reports]
        )
        actions = None
        if acknowledged is not None:
            await self._nodes.hear_state(connection.session, statement.state_version)
            actions = await self._service.reconcile(
                statement.held,
                living=statement.instances.ids,
                session=connection.session,
                stream_number=connection.stream_number,
                now=self._clock.now(),
            )
        if acknowledged is None or actions is None:
            connection.close(_SUPERSEDED)
            return
        connection.welcome(Welcome(unwanted=actions.unwanted))
        connection.say(acknowledged)
        for pipeline_id, step in self._log_manager.followed():
            if any(held.dispatch.pipeline_id == pipeline_id for held in statement.held):
                self._dispatcher.tell_followed(connection, pipeline_id, step)
        self._dispatcher.wake()  # it sends what was never accepted

    async def _apply(
        self, connection: AgentConnection, reports: Sequence[NumberedReport]
    ) -> Acknowledged | None:
        """Take reports; None if the session is superseded."""
        results: list[tuple[int, ReportResult]] = []
        most = self._settings.reports_per_write_max
        for start in range(0, len(reports), most):
            some = reports[start : start + most]
            taken = await self._take(
                [numbered.report for numbered in some],
                node_id=connection.node_id,
                session=connection.session,
            )
            if taken is None:
                return None
            results += zip((numbered.sequence for numbered in some), taken, strict=True)
        return Acknowledged(results=tuple(results))

    async def _take_one(
        self, report: Report, *, node_id: str, session: Session | None
    ) -> ReportResult:
        taken = await self._take([report], node_id=node_id, session=session)
        return taken[0] if taken is not None else ReportResult(outcome=ReportOutcome.STALE)

    async def _take(
        self, reports: Sequence[Report], *, node_id: str, session: Session | None
    ) -> Sequence[ReportResult] | None:
        results = await self._service.apply(
            reports, node_id=node_id, session=session, now=self._clock.now()
        )
        if any(isinstance(r, PipelineReport) and r.status.terminal for r in reports):
            # An end that was forced here before is news to nobody, but frees what it held.
            self._dispatcher.look_again()
        for report in reports:
            if isinstance(report, StepReport) and report.status.terminal:
                await self._logs.ended(
                    LogKey(
                        report.pipeline_id, report.step, max(report.attempt, 1), max(report.run, 1)
                    )
                )
        return results

    def prepare(self, request: NewPipeline) -> Prepared:
        """Return a request as it would be written down; nothing is.

        Raises:
            GameNodeError: INVALID_REQUEST with everything that is wrong.
        """
        spec = parse_pipeline(request.file)
        resolved = resolve(spec, request.args)
        _check_envs(spec, request)
        placement = replace(
            spec.placement,
            node=request.node or spec.placement.node,
            selector=",".join(filter(None, (spec.placement.selector, request.selector))),
        )
        pipeline_id = self._ids.new()
        return Prepared(
            id=pipeline_id,
            request=request,
            name=spec.name,
            args=resolved.args,
            demand=demand_of(
                resolved.steps,
                placement,
                envs_needed=frozenset(spec.envs).difference(request.envs),
                group=spec.concurrency,
            ),
            on_lost=spec.on_lost,
            work=self._work(pipeline_id, spec, resolved.steps, request.envs, resolved.secrets),
        )

    def _repeated(self, original: Original, *, from_failed: bool, key: str) -> Prepared:
        """Return a pipeline as it was asked for, once more: file, args, envs and place."""
        before = original.pipeline
        spec = parse_pipeline(original.file)
        resolved = resolve(spec, original.args)
        pinned = before.node_id if from_failed else ""
        node_id = pinned or original.demand.node_id
        request = NewPipeline(
            file=original.file,
            args=original.args,
            envs=original.envs,
            node=node_id,
            priority=before.priority,
            idempotency_key=key,
        )
        carried = 0
        if from_failed:
            left_out = {step.name for step in before.steps} - original.ran
            carried = first_to_repeat(before.steps, left_out)
        pipeline_id = self._ids.new()
        steps = resolved.steps[carried:]
        return Prepared(
            id=pipeline_id,
            request=request,
            name=spec.name,
            args=resolved.args,
            demand=replace(original.demand, node_id=node_id),
            on_lost=spec.on_lost,
            work=self._work(pipeline_id, spec, steps, original.envs, resolved.secrets),
            retry_of=before.id,
            carried=tuple(
                _left_out(step, before.id, now=self._clock.now()) for step in before.steps[:carried]
            ),
        )

    def _work(
        self,
        pipeline_id: str,
        spec: PipelineSpec,
        steps: Sequence[StepSpec],
        envs: Mapping[str, str],
        secrets: Mapping[str, str],
    ) -> ExecuteOrder:
        return ExecuteOrder(
            dispatch=Dispatch(pipeline_id, 0),
            name=spec.name,
            steps=tuple(self._unbound(step) for step in steps),
            timeout_s=spec.timeout_s,
            envs=dict(envs),
            secrets=secrets,
        )

    def _unbound(self, step: StepSpec) -> GrantedStep:
        return GrantedStep(
            name=step.name,
            type=step.type,
            condition=step.condition,
            timeout_s=step.timeout_s,
            first_attempt=0,
            attempts=step.retries.max + 1,
            backoff_s=step.retries.backoff_s,
            container=step.container,
            instance_id=self._ids.new() if step.type is StepType.SERVICE else "",
        )


_SUPERSEDED: Final = Closed(
    reason=CloseReason.SUPERSEDED, message="a newer session or stream of the node took over"
)


def _check_repeatable(original: Original, *, from_failed: bool) -> None:
    pipeline = original.pipeline
    if pipeline.status not in (Status.FAILED, Status.CANCELLED):
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"pipeline {pipeline.id} is {pipeline.status}: only what failed or was cancelled can be"
            " retried",
            hint="to run its file once more: gamenode run",
        )
    if original.forgotten:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"the secrets of pipeline {pipeline.id} are forgotten: {', '.join(original.forgotten)}",
            hint="run the file again, with its secrets",
        )
    if from_failed and pipeline.may_still_run:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"pipeline {pipeline.id} may still run on node {pipeline.node_id}, to go on there",
            hint="wait until the node has said that it ended, or retry the whole elsewhere",
        )


def _left_out(step: Step, original_id: str, *, now: Instant) -> Step:
    """Return a step as the retry shows it that does not run it."""
    message = step.message
    if step.status is Status.COMPLETED:
        message = f"completed in pipeline {original_id}"
    return replace(
        step,
        status=Status.CANCELLED,
        reason=Reason.SKIPPED,
        message=message,
        exit_code=None,
        signal=None,
        attempt=0,
        run=0,
        started_at=None,
        ended_at=now,
        instance_id="",
    )


def _check_envs(spec: PipelineSpec, request: NewPipeline) -> None:
    if not -1000 <= request.priority <= 1000:  # noqa: PLR2004 - as on the wire
        raise invalid("priority", "must be between -1000 and 1000")
    unknown = sorted(request.envs.keys() - set(spec.envs))
    if unknown:
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"the file declares no env {', '.join(unknown)}",
            violations=[
                Violation(
                    field=f"envs.{name}",
                    reason="is not declared by the file",
                    advice="add it to the file's `envs`",
                )
                for name in unknown
            ],
        )
