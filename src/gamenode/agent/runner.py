"""Runs the pipelines that this node accepted: step after step, through cancels and crashes.

Every dispatch is one task. After a restart of the agent the same task runs again from the journal:
what was tried before is found on the host and adopted, never started a second time (P1, RA2).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gamenode.agent.journal import Held, Journal, KeptService, Outcome, Try
from gamenode.agent.runtime import Ended, LogBlock, Runtime, StartError
from gamenode.agent.uploader import LogUploader
from gamenode.domain.command import (
    CancelOrder,
    Dispatch,
    ExecuteOrder,
    GrantedStep,
    OrderAnswer,
    OrderOutcome,
    StateConfirmation,
    StateOrder,
    WorkOrder,
)
from gamenode.domain.errors import GameNodeError
from gamenode.domain.log import LogEnd, LogKey, LogPosition
from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import (
    Condition,
    PipelineReport,
    Reason,
    Report,
    Status,
    StepReport,
    StepType,
)
from gamenode.domain.template import fill_container
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock
from gamenode.lib.tasks import Supervisor

_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Takes reports in order and delivers them until each is acknowledged."""

    def report(self, dispatch: Dispatch, report: Report) -> None:
        """Deliver `report` of `dispatch`, after those handed in before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """Bounds of the runner."""

    pipelines_max: int = 1_000
    """More dispatches than this at once are refused."""
    log_wait_s: float = 5.0
    """How long the report of an end waits for the rest of the log (rule RA4)."""
    backoff_s_max: float = 300.0
    service_settle_s: float = 0.5
    """A service that ends sooner has failed to start."""
    clean_up_s_max: float = 10.0
    """How long clean-up steps may take when everything is ended."""
    repeat_s: float = 1.0
    """How long a dispatch waits after something unexpected, before it goes on."""


@dataclass(slots=True)
class _Work:
    """One dispatch while it is held."""

    dispatch: Dispatch
    order: ExecuteOrder | None
    tries: dict[LogKey, Outcome | None] = field(default_factory=dict)
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    cancel: CancelOrder | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    failed: Outcome | None = None
    """The end that decides the pipeline's, once a step went wrong."""


class Runner:
    """The pipelines of one node."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        journal: Journal,
        uploader: LogUploader,
        reporter: Reporter,
        envs: Mapping[str, str],
        clock: Clock,
        settings: RunnerSettings,
    ) -> None:
        """Hold nothing yet; `resume` brings back what the journal holds."""
        self._runtime = runtime
        self._journal = journal
        self._uploader = uploader
        self._reporter = reporter
        self._envs = envs
        self._clock = clock
        self._settings = settings
        self._supervisor = Supervisor()
        self._works: dict[Dispatch, _Work] = {}
        self._state_version, self._maintenance = journal.state()
        self._state_lock = asyncio.Lock()
        self._services: dict[LogKey, KeptService] = {}

    def resume(self) -> None:
        """Go on with everything that the journal holds."""
        for service in self._journal.services():
            self._watch_service(service)
        for held in self._journal.held():
            self._begin(held)

    def held(self) -> list[Dispatch]:
        """Return every dispatch that the server has not released."""
        return list(self._works)

    async def take(self, order: WorkOrder) -> OrderAnswer:
        """Accept an order durably, or refuse it. Repeats are harmless.

        Source: RL2, RA2.
        """
        match order:
            case ExecuteOrder():
                return await self._execute(order)
            case CancelOrder():
                return await self.cancel(order)
            case StateOrder():
                return await self._change_state(order)

    async def cancel(self, order: CancelOrder) -> OrderAnswer:
        """End a dispatch: its running step now, the rest never starts, clean-up steps still do.

        With `force` clean-up steps are ended too. For a dispatch that is not held, the cancel
        itself is held, so that a late Execute finds it (rule RL2).
        """
        work = self._works.get(order.dispatch)
        if work is not None and work.cancel is not None and not order.force:
            return OrderAnswer(outcome=OrderOutcome.REPEATED)
        await self._journal.cancel(order)
        work = self._works.get(order.dispatch)
        if work is None:
            self._begin(Held(dispatch=order.dispatch, order=None, cancel=order, tries=()))
        else:
            work.cancel = work.cancel or order
            work.cancelled.set()
            if order.force:
                work.forced.set()
        return OrderAnswer(outcome=OrderOutcome.ACCEPTED)

    def release(self, dispatch: Dispatch) -> None:
        """Forget a dispatch: the server has its end on disk."""
        work = self._works.get(dispatch)
        if work is not None:
            work.released.set()

    @property
    def state(self) -> tuple[int, Maintenance]:
        """Return the maintenance state that is obeyed, and its version."""
        return self._state_version, self._maintenance

    async def end_everything(self, message: str) -> int:
        """End every pipeline and service, clean-up steps run; return how many runs were ended.

        For an agent that its user stops for good (`gamenode dev`), not for a restart. Returns when
        nothing lives; a clean-up that takes longer than the settings allow is ended too.
        """
        return await self._end_all(Reason.AGENT_STOPPED, message)

    async def _end_all(self, reason: Reason, message: str) -> int:
        running = sum(
            outcome is None for work in self._works.values() for outcome in work.tries.values()
        )
        for force in (False, True):
            works = [work for work in self._works.values() if not work.ended.is_set()]
            for work in works:
                await self.cancel(
                    CancelOrder(
                        dispatch=work.dispatch,
                        reason=reason,
                        message=message,
                        force=force,
                    )
                )
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.clean_up_s_max):
                    for work in works:
                        await work.ended.wait()
        services = list(self._services.values())
        async with asyncio.TaskGroup() as group:
            for service in services:
                group.create_task(self._runtime.stop(service.key, grace_s=service.grace_s))
        return running + len(services)

    async def all_released(self, timeout_s: float) -> None:
        """Wait until the server has acknowledged every end, at most `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for work in list(self._works.values()):
                    await work.released.wait()

    async def close(self) -> None:
        """Let go of everything; what runs goes on without us."""
        await self._supervisor.close()

    async def _change_state(self, order: StateOrder) -> OrderAnswer:
        """Obey a maintenance state, and confirm it once it holds (E1, RM1, P12).

        Disabled holds once nothing runs any more; until then the answer waits.
        """
        async with self._state_lock:
            if order.version < self._state_version:
                return OrderAnswer(
                    outcome=OrderOutcome.REFUSED,
                    reason="STATE_VERSION",
                    message=f"version {self._state_version} is obeyed already",
                )
            if order.version > self._state_version:
                # In memory first: an Execute that arrives while the disk is written is refused.
                self._state_version, self._maintenance = order.version, order.target
                await self._journal.obey(order.version, order.target)
        if order.target is Maintenance.DISABLED:
            await self._end_all(Reason.NODE_DISABLED, order.reason)
        elif order.end_running:
            await self._end_all(Reason.DRAINED, order.reason)
        return OrderAnswer(
            outcome=OrderOutcome.ACCEPTED,
            confirmation=StateConfirmation(
                version=order.version,
                confirmed_at=self._clock.now(),
                remaining=tuple(d for d, work in self._works.items() if not work.ended.is_set()),
            ),
        )

    async def _execute(self, order: ExecuteOrder) -> OrderAnswer:
        work = self._works.get(order.dispatch)
        if work is not None and work.order is None:
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason=Reason.CANCELLED_BY_USER,
                message="it was cancelled before it arrived",
            )
        if work is not None:
            await work.accepted.wait()
            return OrderAnswer(outcome=OrderOutcome.REPEATED)
        if order.state_version < self._state_version or self._maintenance is not Maintenance.NORMAL:
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="STATE_VERSION",
                message=f"it is {self._maintenance} here since version {self._state_version}",
            )
        if len(self._works) >= self._settings.pipelines_max:
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="BUSY",
                message=f"{self._settings.pipelines_max} pipelines are held already",
            )
        for step in order.steps:
            unsupported = self._runtime.unsupported(step.container)
            if unsupported:
                return OrderAnswer(
                    outcome=OrderOutcome.REFUSED,
                    reason=Reason.UNSUPPORTED,
                    message=f"step {step.name}: the {self._runtime.name} runtime of this node"
                    f" does not support {', '.join(unsupported)}",
                )
        first = _first_key(order)
        work = _Work(order.dispatch, order)
        if first is not None:
            work.tries[first] = None
        # In the table before the journal answers: a doubled Execute must find it.
        self._works[order.dispatch] = work
        try:
            await self._journal.accept(order, first)
        except sqlite3.Error as error:
            del self._works[order.dispatch]
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="JOURNAL",
                message=f"the agent cannot write its journal: {error}",
            )
        finally:
            work.accepted.set()
        self._start(work, fresh=first)
        return OrderAnswer(outcome=OrderOutcome.ACCEPTED)

    def _begin(self, held: Held) -> None:
        work = _Work(held.dispatch, held.order, tries=_known(held.tries), cancel=held.cancel)
        work.accepted.set()
        if held.cancel is not None:
            work.cancelled.set()
        self._works[held.dispatch] = work
        self._start(work, fresh=None)

    def _start(self, work: _Work, *, fresh: LogKey | None) -> None:
        name = f"pipeline {work.dispatch.pipeline_id}"
        _ = self._supervisor.start(name, self._run(work, fresh))

    async def _run(self, work: _Work, fresh: LogKey | None) -> None:
        while work.order is not None:
            try:
                await self._run_steps(work, work.order, fresh)
                break
            except Exception:  # noqa: BLE001 - whatever it was, the journal says how to go on
                _log.exception(
                    "pipeline goes on after an unexpected failure",
                    extra={"event": "runner.failed", "pipeline_id": work.dispatch.pipeline_id},
                )
                fresh = None
                await asyncio.sleep(self._settings.repeat_s)
        work.ended.set()
        self._reporter.report(work.dispatch, _pipeline_end(work))
        await work.released.wait()
        await self._forget(work)

    async def _run_steps(self, work: _Work, order: ExecuteOrder, fresh: LogKey | None) -> None:
        overdue = asyncio.Event()
        timer = None
        if order.timeout_s is not None:
            left_s = order.timeout_s - self._elapsed_s(work)
            timer = asyncio.get_running_loop().call_later(left_s, overdue.set)
        work.failed = None
        try:
            for step in order.steps:
                if overdue.is_set() and work.failed is None:
                    work.failed = Outcome(
                        status=Status.FAILED,
                        reason=Reason.TIMEOUT,
                        message=_timeout_message("pipeline", order.timeout_s),
                    )
                if _wanted(step, work):
                    await self._run_step(work, step, overdue, fresh)
                else:
                    skipped = Outcome(status=Status.CANCELLED, reason=Reason.SKIPPED)
                    self._report(work, step, skipped, step.first_attempt)
        finally:
            if timer is not None:
                timer.cancel()

    async def _run_step(
        self, work: _Work, step: GrantedStep, overdue: asyncio.Event, fresh: LogKey | None
    ) -> None:
        """Try a step until it goes well, no try is left, or nobody wants it any more."""
        limits = _Limits(work, step, overdue)
        for number in range(step.attempts):
            key = LogKey(work.dispatch.pipeline_id, step.name, step.first_attempt + number)
            outcome = work.tries.get(key)
            if outcome is not None:
                # It ended before a restart of the agent; the rest of its log may be here still.
                self._follow_log(key, outcome)
            else:
                outcome = await self._try(work, step, key, limits, fresh=key == fresh)
            last = number + 1 == step.attempts
            if outcome.status is not Status.FAILED or last or limits.reached:
                await self._report_end(work, step, key, outcome)
                if outcome.status is not Status.COMPLETED and work.failed is None:
                    work.failed = outcome
                return
            retrying = replace(
                outcome, status=Status.RUNNING, reason=Reason.RETRYING, ended_at=None
            )
            self._report(work, step, retrying, key.attempt)
            wait_s = min(step.backoff_s * 2.0**number, self._settings.backoff_s_max)
            await _first_of(limits.waits(), timeout_s=wait_s)

    async def _try(
        self, work: _Work, step: GrantedStep, key: LogKey, limits: _Limits, *, fresh: bool
    ) -> Outcome:
        """Make one try, or adopt the one that the journal knows; return its end, on disk."""
        found = None
        if key not in work.tries:
            await self._journal.begin_try(work.dispatch, key)
            work.tries[key] = None
        elif not fresh:
            found = await self._runtime.find(key)
        if found is None:
            why = limits.outcome()
            if why is not None:
                return await self._ended(work, key, why)
            try:
                # The node's own values win: a caller supplies only what it does not define (F6).
                envs = {**(work.order.envs if work.order else {}), **self._envs}
                container = fill_container(step.container, envs)
                started_at = await self._runtime.start(
                    key, container, service=step.type is StepType.SERVICE
                )
            except StartError as error:
                return await self._ended(work, key, _not_started(error.reason, error.message))
            except GameNodeError as error:
                return await self._ended(
                    work, key, _not_started(Reason.START_FAILED, error.message)
                )
        else:
            started_at = found.started_at
        running = Outcome(status=Status.RUNNING, started_at=started_at)
        self._follow_log(key, running, new=found is None)
        self._report(work, step, running, key.attempt)
        if isinstance(found, Ended):
            return await self._ended(work, key, _outcome_of(found))
        outcome = await self._wait(step, key, limits, running, adopted=found is not None)
        if outcome.status is Status.COMPLETED and step.type is StepType.SERVICE:
            service = KeptService(
                key=key,
                instance_id=step.instance_id,
                grace_s=step.container.stop_grace_period_s,
            )
            await self._journal.keep_service(service)
            self._watch_service(service)
        return await self._ended(work, key, outcome)

    async def _wait(
        self,
        step: GrantedStep,
        key: LogKey,
        limits: _Limits,
        running: Outcome,
        *,
        adopted: bool,
    ) -> Outcome:
        """Wait for the end of a running try, and end it on cancel or timeout.

        A service is done when it has run for a moment.
        """
        timeout_s = step.timeout_s
        if timeout_s is not None and adopted and running.started_at is not None:
            # Its start was before ours, so the wall clock has to say how long ago.
            elapsed_s = (self._clock.now() - running.started_at) / NANOSECONDS_PER_S
            timeout_s = max(0.0, timeout_s - elapsed_s)
        service = step.type is StepType.SERVICE
        ending = asyncio.ensure_future(self._runtime.wait(key))
        try:
            wait_s = self._settings.service_settle_s if service else timeout_s
            await _first_of([ending, *limits.waits()], timeout_s=wait_s)
            if ending.done():
                outcome = _outcome_of(ending.result())
                if service and outcome.status is Status.COMPLETED:
                    return replace(
                        outcome,
                        status=Status.FAILED,
                        reason=Reason.EXIT_CODE,
                        message="a service must go on running, and this one ended at once",
                    )
                return outcome
            why = limits.outcome()
            if why is None and service:
                return replace(running, status=Status.COMPLETED, ended_at=self._clock.now())
            if why is None:
                message = _timeout_message("step", step.timeout_s)
                why = Outcome(status=Status.FAILED, reason=Reason.TIMEOUT, message=message)
            await self._runtime.stop(key, grace_s=step.container.stop_grace_period_s)
            ended = await ending
        finally:
            ending.cancel()
        return replace(
            _outcome_of(ended), status=why.status, reason=why.reason, message=why.message
        )

    async def _ended(self, work: _Work, key: LogKey, outcome: Outcome) -> Outcome:
        await self._journal.end_try(key, outcome)
        work.tries[key] = outcome
        return outcome

    def _elapsed_s(self, work: _Work) -> float:
        """Return how long ago the first try started; 0 for a dispatch that is new."""
        starts = [
            outcome.started_at
            for outcome in work.tries.values()
            if outcome is not None and outcome.started_at is not None
        ]
        return (self._clock.now() - min(starts)) / NANOSECONDS_PER_S if starts else 0.0

    def _follow_log(self, key: LogKey, outcome: Outcome, *, new: bool = False) -> None:
        def source(position: LogPosition, live: asyncio.Event) -> AsyncIterator[LogBlock]:
            return self._runtime.read_log(key, position, live=live)

        if outcome.started_at is not None:
            self._uploader.begin(key, source, new=new)

    def _report(
        self,
        work: _Work,
        step: GrantedStep,
        outcome: Outcome,
        attempt: int,
        log: LogEnd | None = None,
    ) -> None:
        self._reporter.report(
            work.dispatch,
            StepReport(
                pipeline_id=work.dispatch.pipeline_id,
                step=step.name,
                status=outcome.status,
                pipeline_attempt=work.dispatch.attempt,
                attempt=attempt,
                run=1,
                started_at=outcome.started_at,
                ended_at=outcome.ended_at,
                reason=outcome.reason,
                message=outcome.message,
                exit_code=outcome.exit_code,
                signal=outcome.signal,
                log_length_bytes=log.length_bytes if log is not None else None,
                log_hash=log.hash if log is not None else b"",
                instance_id=step.instance_id if step.type is StepType.SERVICE else "",
            ),
        )

    async def _report_end(
        self, work: _Work, step: GrantedStep, key: LogKey, outcome: Outcome
    ) -> None:
        """Report a step's end, after its log where that comes within the wait (rule RA4)."""
        lives_on = step.type is StepType.SERVICE and outcome.status is Status.COMPLETED
        log = None
        if outcome.started_at is not None and not lives_on:
            log = await self._uploader.finish(key, self._settings.log_wait_s)
        self._report(work, step, outcome, key.attempt, log)

    async def _forget(self, work: _Work) -> None:
        """Remove what a released dispatch left on the host: journal first, then the remains.

        The other order could remove a container while the journal still asks for it, and the next
        start of the agent would take it for one that was never created (P1).
        """
        await self._journal.release(work.dispatch)
        del self._works[work.dispatch]
        for key in work.tries:
            if key not in self._services:
                await self._clean(key)

    async def _clean(self, key: LogKey) -> None:
        """Remove an ended run and its log from the host, once the server has all of the log."""
        await self._uploader.forget(key)
        await self._runtime.remove(key)

    def _watch_service(self, service: KeptService) -> None:
        self._services[service.key] = service
        _ = self._supervisor.start(f"service {service.key.step}", self._service(service))

    async def _service(self, service: KeptService) -> None:
        """Carry a service's log until it ends, then forget it."""
        key = service.key
        found = await self._runtime.find(key)
        if found is not None:
            self._follow_log(key, Outcome(status=Status.RUNNING, started_at=found.started_at))
            ended = await self._runtime.wait(key)
            _log.info(
                "service ended",
                extra={
                    "event": "service.ended",
                    "pipeline_id": key.pipeline_id,
                    "step": key.step,
                    "exit_code": ended.exit_code,
                },
            )
        await self._journal.forget_service(key)
        del self._services[key]
        if not any(key in work.tries for work in self._works.values()):
            await self._clean(key)


@dataclass(frozen=True, slots=True)
class _Limits:
    """What ends a running step before its own end: a cancel, or the pipeline's timeout.

    A clean-up step (`when: always`) started after the cancel or the timeout is left alone by it;
    only force ends it.
    """

    work: _Work
    step: GrantedStep
    overdue: asyncio.Event
    cancelled_before: bool = False
    overdue_before: bool = False

    def __post_init__(self) -> None:
        if self.step.condition is Condition.ALWAYS:
            object.__setattr__(self, "cancelled_before", self.work.cancelled.is_set())
            object.__setattr__(self, "overdue_before", self.overdue.is_set())

    @property
    def reached(self) -> bool:
        """Whether the step must end."""
        return self.outcome() is not None

    def outcome(self) -> Outcome | None:
        """Return how the step ends because of a limit, or None while none is reached."""
        work = self.work
        if work.forced.is_set() or (work.cancelled.is_set() and not self.cancelled_before):
            return Outcome(
                status=Status.CANCELLED,
                reason=work.cancel.reason if work.cancel else Reason.CANCELLED_BY_USER,
                message=work.cancel.message if work.cancel else "",
            )
        if self.overdue.is_set() and not self.overdue_before:
            timeout_s = work.order.timeout_s if work.order else None
            return Outcome(
                status=Status.FAILED,
                reason=Reason.TIMEOUT,
                message=_timeout_message("pipeline", timeout_s),
            )
        return None

    def waits(self) -> list[Coroutine[Any, Any, Any]]:
        """Return one coroutine for each limit that can still be reached."""
        waits = [self.work.forced.wait()]
        if not self.cancelled_before:
            waits.append(self.work.cancelled.wait())
        if not self.overdue_before:
            waits.append(self.overdue.wait())
        return waits


async def _first_of(
    waits: Sequence[Coroutine[Any, Any, Any] | asyncio.Future[Any]], *, timeout_s: float | None
) -> None:
    """Wait until one of `waits` is done, at most `timeout_s`; coroutines are then cancelled."""
    futures = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future, wait in zip(futures, waits, strict=True):
            if future is not wait:
                future.cancel()


def _known(tries: tuple[Try, ...]) -> dict[LogKey, Outcome | None]:
    return {made.key: made.outcome for made in tries}


def _first_key(order: ExecuteOrder) -> LogKey | None:
    step = order.steps[0]
    if step.condition is Condition.FAILURE or not step.attempts:
        return None
    return LogKey(order.dispatch.pipeline_id, step.name, step.first_attempt)


def _wanted(step: GrantedStep, work: _Work) -> bool:
    if step.condition is Condition.ALWAYS:
        return True
    if work.cancelled.is_set():
        return False
    return (work.failed is not None) is (step.condition is Condition.FAILURE)


def _outcome_of(ended: Ended) -> Outcome:
    well = ended.exit_code == 0
    return Outcome(
        status=Status.COMPLETED if well else Status.FAILED,
        reason=Reason.NONE if well else ended.reason,
        message=ended.message,
        exit_code=ended.exit_code,
        signal=ended.signal,
        started_at=ended.started_at,
        ended_at=ended.ended_at,
    )


def _not_started(reason: Reason, message: str) -> Outcome:
    return Outcome(status=Status.FAILED, reason=reason, message=message)


def _timeout_message(what: str, timeout_s: float | None) -> str:
    return f"ended: the {what}'s timeout of {timeout_s or 0:g} s had passed"


def _pipeline_end(work: _Work) -> PipelineReport:
    if work.cancel is not None:
        status, reason, message = Status.CANCELLED, work.cancel.reason, work.cancel.message
    elif work.failed is not None:
        status, reason, message = Status.FAILED, work.failed.reason, work.failed.message
    else:
        status, reason, message = Status.COMPLETED, Reason.NONE, ""
    return PipelineReport(
        pipeline_id=work.dispatch.pipeline_id,
        status=status,
        attempt=work.dispatch.attempt,
        reason=reason,
        message=message,
    )
