"""Runs the pipelines that this node accepted: step after step, through cancels and crashes.

Every dispatch is one task. After a restart of the agent the same task runs again from the journal:
what was tried before is found on the host and adopted, never started a second time (P1, RA2).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import traceback
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Sequence,
)
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from gamenode.agent.journal import (
    Held,
    Journal,
    JournaledTry,
    KeptService,
    Outcome,
    Try,
    certainly_unwritten,
)
from gamenode.agent.policy import Policy
from gamenode.agent.runtime import (
    Ended,
    Found,
    LogBlock,
    Progress,
    Pull,
    Running,
    Runtime,
    StartError,
)
from gamenode.agent.secrets import Secrets
from gamenode.agent.uploader import LogUploader
from gamenode.domain.command import (
    CancelOrder,
    Dispatch,
    ExecuteOrder,
    ExtendOrder,
    GrantedStep,
    LivingInstances,
    OrderAnswer,
    OrderOutcome,
    StateConfirmation,
    StateOrder,
    WorkOrder,
)
from gamenode.domain.errors import GameNodeError
from gamenode.domain.log import LogEnd, LogKey, LogPosition, LogStream
from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import (
    NODE_ENDED,
    Condition,
    PipelineReport,
    Reason,
    Report,
    Status,
    StepReport,
    StepType,
)
from gamenode.domain.verification import HostAttempt, RunState
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock, Instant
from gamenode.lib.groups import QueueFullError
from gamenode.lib.tasks import Supervisor

_log = logging.getLogger(__name__)
_ABANDONED: Final = (
    "not started: the agent's journal does not continue the node's last session (a restored or"
    " copied data folder), so it is not known whether this has run"
)
_GONE: Final = (
    "it was started, and nothing of it is on this host any more: somebody has removed it, and what"
    " it did is not known"
)
_RUN_STATES: Final = {
    type(None): RunState.ABSENT,
    Running: RunState.RUNNING,
    Ended: RunState.ENDED,
}


class Reporter(Protocol):
    """Takes reports in order and delivers them until each is acknowledged."""

    def report(self, dispatch: Dispatch, report: Report) -> None:
        """Deliver `report` of `dispatch`, after those handed in before."""

    def instances_changed(self) -> None:
        """Deliver which instances live, after the reports handed in before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """Bounds of the runner."""

    pipelines_max: int = 1_000
    """More dispatches than this at once are refused."""
    log_wait_s: float = 5.0
    """How long the report of an end waits for the rest of the log (rule RA4)."""
    backoff_s_max: float = 300.0
    """The longest wait between two tries of a step."""
    service_settle_s: float = 0.5
    """A service that ends sooner has failed to start."""
    clean_up_s_max: float = 10.0
    """How long clean-up steps may take when everything is ended."""
    repeat_s: float = 1.0
    """How long a dispatch waits after something unexpected, before it goes on."""
    message_chars_max: int = 1_000
    """How much of what a runtime says of an end is reported."""
    pull_report_s: float = 2.0
    """How often it is reported how far an image has come, at most."""
    clean_up_period_s: float = 600.0
    """How often it is looked for what nobody needs on this host any more."""
    orphans_age_s: float = 3600.0
    """An ended run that the journal does not know is removed when it ended so long ago."""
    look_s_max: float = 10.0
    """How long it may take to find out what the host holds, when the server asks."""
    stated_attempts_max: int = 20_000
    """How many attempts one such answer holds; an agent with more refuses."""


class _Deadline:
    """When a pipeline's own limit is reached; it can be moved until then."""

    def __init__(self) -> None:
        """Have none yet."""
        self.passed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def start(self, left_s: float) -> None:
        """Have it pass in `left_s`; at once, so that what begins next finds it, if none is left."""
        if left_s <= 0:
            self.passed.set()
        else:
            self._timer = asyncio.get_running_loop().call_later(left_s, self.passed.set)

    def move(self, by_s: float) -> None:
        """Put it off by `by_s`; nothing where there is none, or it has passed."""
        if self._timer is not None and not self.passed.is_set():
            left_s = self._timer.when() - asyncio.get_running_loop().time()
            self._timer.cancel()
            self.start(left_s + by_s)

    def stop(self) -> None:
        """Have none any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@dataclass(slots=True)
class _Work:
    """One dispatch while it is held."""

    dispatch: Dispatch
    order: ExecuteOrder | None
    tries: dict[LogKey, Try] = field(default_factory=dict)
    accepted_s: float = 0.0
    """When it was accepted, on the monotonic clock, by which alone time runs out (rule RA6)."""
    started_s: dict[LogKey, float] = field(default_factory=dict)
    """When each try came to run, on the same clock."""
    fresh: LogKey | None = None
    """The try that was journaled a moment ago, so that the host need not be asked about it."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)
    cancel: CancelOrder | None = None
    journaled_cancel: CancelOrder | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    failed: Outcome | None = None
    """The end that decides the pipeline's, once a step went wrong."""
    confirmed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the server has heard that this is held, by the agent that runs now."""
    abandoned: bool = False
    """Whether the journal may be older than what has happened: nothing more is started (RL3)."""
    deadline: _Deadline = field(default_factory=_Deadline)
    extended_s: float = 0.0
    """By how much its limits have been extended, in all."""
    journaled_extended_s: float = 0.0
    extended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, whenever that grows."""

    def limit_s(self, timeout_s: float | None) -> float | None:
        """Return a limit of the order as it is now."""
        return None if timeout_s is None else timeout_s + self.extended_s

    def extend(self, extended_s: float) -> None:
        """Let every limit grow to what `extended_s` in all makes of it."""
        self.deadline.move(extended_s - self.extended_s)
        self.extended_s = extended_s
        before, self.extended = self.extended, asyncio.Event()
        before.set()


class Runner:
    """The pipelines of one node."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        journal: Journal,
        uploader: LogUploader,
        reporter: Reporter,
        policy: Policy,
        secrets: Secrets,
        clock: Clock,
        settings: RunnerSettings,
    ) -> None:
        """Hold nothing yet; `resume` brings back what the journal holds."""
        self._runtime = runtime
        self._journal = journal
        self._uploader = uploader
        self._reporter = reporter
        self._policy = policy
        self._secrets = secrets
        self._clock = clock
        self._settings = settings
        self._supervisor = Supervisor()
        self._works: dict[Dispatch, _Work] = {}
        self._turns: WeakValueDictionary[Dispatch, asyncio.Lock] = WeakValueDictionary()
        self._state_version, self._maintenance = journal.state()
        self._journaled_version = self._state_version
        self._state_lock = asyncio.Lock()
        self._services: dict[LogKey, KeptService] = {}

    def resume(self) -> None:
        """Go on with everything that the journal holds.

        What lives is looked after at once. Nothing is started before `confirm`: a journal that was
        restored from a copy holds work that has ended since, and whose remains are gone (P1, RL3).
        """
        services, held = self._journal.services(), self._journal.held()
        self._secrets.resume(
            (one.order for one in held if one.order is not None),
            (service.key.pipeline_id for service in services),
        )
        for service in services:
            self._watch_service(service)
        for one in held:
            self._begin(one)
        self._supervisor.keep("clean-up", self._clean_up)

    def held(self) -> list[Dispatch]:
        """Return every dispatch that the server has not released."""
        return [d for d, work in self._works.items() if not work.released.is_set()]

    async def take(self, order: WorkOrder) -> OrderAnswer:
        """Accept an order durably, or refuse it. Repeats are harmless.

        Raises:
            Exception: the journal could not be written; the order must not be answered, since it
                is not known what a restart will find. It comes again.

        Source: RL2, RA2.
        """
        match order:
            case ExecuteOrder():
                async with self._turn(order.dispatch):
                    return await self._execute(order)
            case CancelOrder():
                return await self.cancel(order)
            case ExtendOrder():
                async with self._turn(order.dispatch):
                    return await self._extend(order)
            case StateOrder():
                return await self._change_state(order)

    async def cancel(self, order: CancelOrder) -> OrderAnswer:
        """End a dispatch: its running step now, the rest never starts, clean-up steps still do.

        With `force` clean-up steps are ended too. For a dispatch that is not held, the cancel
        itself is held, so that a late Execute finds it (rule RL2).

        Raises:
            Exception: the journal could not be written; what runs is ended all the same.
        """
        async with self._turn(order.dispatch):
            work = self._works.get(order.dispatch)
            if work is None:
                await self._journal.cancel(order)
                self._begin(
                    Held(
                        dispatch=order.dispatch,
                        order=None,
                        accepted_at=None,
                        cancel=order,
                        tries=(),
                    )
                )
                return OrderAnswer(outcome=OrderOutcome.ACCEPTED)
            known = work.journaled_cancel
            if work.ended.is_set() or (known is not None and (known.force or not order.force)):
                return OrderAnswer(outcome=OrderOutcome.REPEATED)
            # In memory first: a full disk must not keep a step running (P11).
            work.cancel = replace(work.cancel or order, force=order.force)
            work.cancelled.set()
            if order.force:
                work.forced.set()
            await self._journal.cancel(work.cancel)
            work.journaled_cancel = work.cancel
            return OrderAnswer(outcome=OrderOutcome.ACCEPTED)

    async def _extend(self, order: ExtendOrder) -> OrderAnswer:
        """Let a dispatch take longer; what its time was up for already is not undone (F8)."""
        work = self._works.get(order.dispatch)
        if work is None or work.order is None or work.ended.is_set():
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="NOT_HELD",
                message="it does not run here",
            )
        if work.deadline.passed.is_set():
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED, reason=Reason.TIMEOUT, message="its time was up"
            )
        if order.extended_s <= work.journaled_extended_s:
            return OrderAnswer(outcome=OrderOutcome.REPEATED)
        # In memory first: a full disk must not let its time run out.
        if order.extended_s > work.extended_s:
            work.extend(order.extended_s)
        await self._journal.extend(order)
        work.journaled_extended_s = order.extended_s
        return OrderAnswer(outcome=OrderOutcome.ACCEPTED)

    def release(self, dispatch: Dispatch) -> None:
        """Forget a dispatch: the server has its end on disk, and asks what it left."""
        work = self._works.get(dispatch)
        if work is None:
            return
        work.released.set()
        # Of what was cancelled before it came, only the server knows if it would have left any.
        if work.order is None or any(s.type is StepType.SERVICE for s in work.order.steps):
            self._reporter.instances_changed()

    def living_instances(self) -> LivingInstances:
        """Return what services left running, and has not ended."""
        return LivingInstances(frozenset(kept.instance_id for kept in self._services.values()))

    def abandon(self) -> None:
        """Start nothing any more of what is held now; what runs may end.

        The server does not take this session for a continuation of the one before: a journal that
        was restored or copied says of what others have run since that it has not begun.

        Source: RL3, promise P1.
        """
        for work in self._works.values():
            work.abandoned = True

    def confirm(self) -> None:
        """Let what the journal holds go on: the server has heard of it, and unwanted is ended.

        Until then what runs is adopted, and nothing is created.

        Source: RL1, RL3, promise P1.
        """
        for work in self._works.values():
            work.confirmed.set()

    async def state_attempts(self) -> OrderAnswer:
        """Return every run that the journal or the host holds; refuse where that cannot be said.

        Source: P1, P2; `gamenode verify attempts`.
        """
        try:
            async with asyncio.timeout(self._settings.look_s_max):
                # The host first: what is on it was journaled before, so that a run that begins
                # meanwhile never looks like one without an entry.
                on_host = await self._runtime.runs()
                journaled = await self._journal.tries()
        except (TimeoutError, GameNodeError, sqlite3.Error, QueueFullError) as error:
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="UNAVAILABLE",
                message=f"host or journal cannot be read now: {error or 'it takes too long'}",
            )
        keys = on_host.keys() | journaled.keys()
        if len(keys) > self._settings.stated_attempts_max:
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="TOO_MANY",
                message=f"{len(keys)} attempts are more than one answer holds",
            )
        return OrderAnswer(
            outcome=OrderOutcome.ACCEPTED,
            attempts=tuple(
                _host_attempt(key, on_host.get(key), journaled.get(key)) for key in keys
            ),
        )

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
        """End what is held and lives now; what comes meanwhile, of a later state, goes on."""
        works = [work for work in self._works.values() if not work.ended.is_set()]
        services = set(self._services)
        running = sum(
            made.outcome is None for work in self._works.values() for made in work.tries.values()
        )
        for force in (False, True):
            left = [work for work in works if not work.ended.is_set()]
            for work in left:
                await self.cancel(
                    CancelOrder(
                        dispatch=work.dispatch,
                        reason=reason,
                        message=message,
                        force=force,
                    )
                )
            # What is ended by force has only its stop grace left; nothing may live on return.
            with suppress(TimeoutError):
                async with asyncio.timeout(None if force else self._settings.clean_up_s_max):
                    for work in left:
                        await work.ended.wait()
        services.update(key for work in works for key in work.tries)
        return running + await self._stop_services(services)

    async def _stop_services(self, keys: Collection[LogKey]) -> int:
        """End the services among these runs; return how many lived, once none does any more."""
        living = [service for key, service in self._services.items() if key in keys]
        async with asyncio.TaskGroup() as group:
            for service in living:
                group.create_task(self._runtime.stop(service.key, grace_s=service.grace_s))
        return len(living)

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
            if order.version > self._journaled_version:
                await self._journal.obey(order.version, order.target)
                self._journaled_version = order.version
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
        first = _first_key(order) if self._unsupported(order) is None else None
        now = self._clock.now()
        work = _Work(
            order.dispatch,
            order,
            accepted_s=self._clock.monotonic_s(),
            fresh=first,
            extended_s=order.extended_s,
            journaled_extended_s=order.extended_s,
        )
        work.confirmed.set()
        if first is not None:
            work.tries[first] = Try(key=first)
        # In the table before the journal answers: a statement made meanwhile must not leave it out.
        self._works[order.dispatch] = work
        kept = False
        try:
            await self._secrets.keep(order)
            kept = True
            await self._journal.accept(order, first, now=now)
        except BaseException as error:
            del self._works[order.dispatch]
            work.ended.set()
            # Refused means that it never will run here, so that another node may take it (P2).
            unwritten = isinstance(error, Exception) and (not kept or certainly_unwritten(error))
            if not unwritten:
                raise
            await self._forget_secrets(order.dispatch.pipeline_id)
            return OrderAnswer(
                outcome=OrderOutcome.REFUSED,
                reason="JOURNAL",
                message=f"the agent cannot write its journal: {error or 'too much waits for it'}",
            )
        self._start(work)
        return OrderAnswer(outcome=OrderOutcome.ACCEPTED)

    def _turn(self, dispatch: Dispatch) -> asyncio.Lock:
        """Return the lock by which orders about one dispatch take turns, in their order."""
        turn = self._turns.get(dispatch)
        if turn is None:
            turn = self._turns[dispatch] = asyncio.Lock()
        return turn

    def _begin(self, held: Held) -> None:
        work = _Work(
            held.dispatch,
            held.order,
            tries={made.key: made for made in held.tries},
            accepted_s=self._monotonic_of(held.accepted_at),
            cancel=held.cancel,
            journaled_cancel=held.cancel,
            abandoned=held.abandoned,
            extended_s=held.order.extended_s if held.order else 0.0,
            journaled_extended_s=held.order.extended_s if held.order else 0.0,
        )
        if held.cancel is not None:
            work.cancelled.set()
            if held.cancel.force:
                work.forced.set()
        self._works[held.dispatch] = work
        self._start(work)

    def _monotonic_of(self, at: Instant | None) -> float:
        """Return when `at` was on the monotonic clock; for what began before this agent did.

        Only the wall clock bridges a restart, and only once: what it does later changes nothing.
        Where it went back meanwhile, all of the time counts anew.
        """
        now_s = self._clock.monotonic_s()
        if at is None:
            return now_s
        return now_s - max(0.0, (self._clock.now() - at) / NANOSECONDS_PER_S)

    def _start(self, work: _Work) -> None:
        name = f"pipeline {work.dispatch.pipeline_id}"
        _ = self._supervisor.start(name, self._run(work))

    async def _run(self, work: _Work) -> None:
        pipeline_id = work.dispatch.pipeline_id
        if work.order is not None:
            await self._insist(pipeline_id, partial(self._run_steps, work, work.order))
        if work.cancel is not None and work.cancel.reason in NODE_ENDED:
            # At this word another node may begin all of it anew, its services too (P2).
            await self._insist(pipeline_id, partial(self._stop_services, work.tries))
        work.ended.set()
        self._reporter.report(work.dispatch, self._pipeline_end(work))
        await work.released.wait()
        await self._insist(pipeline_id, partial(self._forget, work))

    async def _insist(self, pipeline_id: str, call: Callable[[], Awaitable[object]]) -> None:
        """Call until it goes well; whatever it was, the journal says how to go on."""
        while True:
            try:
                await call()
            except Exception:  # noqa: BLE001 - the last resort of everything that is held
                # Whatever it was, its words may hold what a step was given.
                trace = self._secrets.mask(pipeline_id, traceback.format_exc())
                _log.error(
                    "pipeline goes on after an unexpected failure",
                    extra={
                        "event": "runner.failed",
                        "pipeline_id": pipeline_id,
                        "exception": trace,
                    },
                )
                await asyncio.sleep(self._settings.repeat_s)
            else:
                return

    async def _run_steps(self, work: _Work, order: ExecuteOrder) -> None:
        work.deadline = _Deadline()
        overdue = work.deadline.passed
        limit_s = work.limit_s(order.timeout_s)
        if limit_s is not None:
            work.deadline.start(work.accepted_s + limit_s - self._clock.monotonic_s())
        work.failed = None
        unsupported = self._unsupported(order)
        if unsupported is not None and not work.tries:
            self._report_unsupported(work, order, *unsupported)
            return
        try:
            for step in order.steps:
                if overdue.is_set() and work.failed is None:
                    work.failed = Outcome(
                        status=Status.FAILED,
                        reason=Reason.TIMEOUT,
                        message=_timeout_message("pipeline", work.limit_s(order.timeout_s)),
                    )
                if _wanted(step, work):
                    await self._run_step(work, step, overdue)
                else:
                    skipped = Outcome(status=Status.CANCELLED, reason=Reason.SKIPPED)
                    self._report(work, step, skipped, step.first_attempt)
        finally:
            work.deadline.stop()

    def _unsupported(self, order: ExecuteOrder) -> tuple[GrantedStep, Outcome] | None:
        """Return the first step that cannot be run as it is written, and its end; or None."""
        for step in order.steps:
            if keys := self._runtime.unsupported(step.container):
                message = (
                    f"step {step.name}: the {self._runtime.name} runtime of this node does not"
                    f" support {', '.join(keys)}"
                )
                return step, _not_started(Reason.UNSUPPORTED, message)
        return None

    def _report_unsupported(
        self, work: _Work, order: ExecuteOrder, failed: GrantedStep, outcome: Outcome
    ) -> None:
        """Fail a step before any is started, since none of them could change that."""
        work.failed = outcome
        skipped = Outcome(status=Status.CANCELLED, reason=Reason.SKIPPED)
        for step in order.steps:
            end = outcome if step is failed else skipped
            self._report(work, step, end, step.first_attempt)

    async def _run_step(self, work: _Work, step: GrantedStep, overdue: asyncio.Event) -> None:
        """Try a step until it goes well, no try is left, or nobody wants it any more."""
        limits = _limits(work, step, overdue)
        for number in range(step.attempts):
            key = replace(limits.first, attempt=step.first_attempt + number)
            made = work.tries.get(key)
            if made is not None and made.outcome is not None:
                # It ended before a restart of the agent; the rest of its log may be here still.
                outcome = made.outcome
                self._follow_log(key, outcome)
                if replace(key, attempt=key.attempt + 1) in work.tries:
                    continue  # the next one has begun, and must be looked after
            else:
                outcome = await self._try(work, step, key, limits)
            # What a node does not allow, it does not allow the next time either; and what was
            # started, and nobody knows to have ended, may live beside the next one (P2).
            unseen = outcome.started_at is not None and outcome.ended_at is None
            last = (
                number + 1 == step.attempts
                or outcome.reason is Reason.POLICY
                or unseen
                or work.abandoned
            )
            if outcome.status is Status.FAILED and not last:
                if not limits.reached:
                    retrying = replace(
                        outcome, status=Status.RUNNING, reason=Reason.RETRYING, ended_at=None
                    )
                    self._report(work, step, retrying, key.attempt)
                    wait_s = min(step.backoff_s * 2.0**number, self._settings.backoff_s_max)
                    await _first_of(limits.waits(), timeout_s=wait_s)
                why = limits.outcome()
                if why is None:
                    continue
                # It has tries left, so it ends for what keeps it from them (rule RA5).
                outcome = replace(
                    outcome, status=why.status, reason=why.reason, message=why.message
                )
            await self._report_end(work, step, key, outcome)
            if outcome.status is not Status.COMPLETED and work.failed is None:
                work.failed = outcome
            return

    async def _try(self, work: _Work, step: GrantedStep, key: LogKey, limits: _Limits) -> Outcome:
        """Make one try, or adopt the one that the journal knows; return its end, on disk."""
        found = None
        fresh, work.fresh = work.fresh, None
        if key not in work.tries:
            begun = Try(
                key=key,
                after_cancel=limits.cancelled_before,
                after_timeout=limits.overdue_before,
            )
            await self._journal.begin_try(work.dispatch, begun)
            work.tries[key] = begun
        elif key != fresh:
            found = await self._runtime.find(key)
        if found is None:
            await _first_of([work.confirmed.wait(), *limits.waits()], timeout_s=None)
            if work.abandoned and not limits.reached:
                return await self._ended(work, key, _not_started(Reason.NODE_LOST, _ABANDONED))
            if (gone_since := work.tries[key].started_at) is not None:
                # Somebody has removed it, and what it did is done: it must not run twice (P1).
                outcome = Outcome(
                    status=Status.FAILED,
                    reason=Reason.OUTCOME_UNKNOWN,
                    message=_GONE,
                    started_at=gone_since,
                )
                self._follow_log(key, outcome)
                return await self._ended(work, key, outcome)
            try:
                started = await self._start_try(work, step, key, limits)
            except StartError as error:
                return await self._ended(work, key, _not_started(error.reason, error.message))
            except GameNodeError as error:
                return await self._ended(
                    work, key, _not_started(Reason.START_FAILED, error.message)
                )
            if isinstance(started, Outcome):
                return await self._ended(work, key, started)
            started_at = started
            work.started_s[key] = self._clock.monotonic_s()
        else:
            started_at = found.started_at
            work.started_s.setdefault(key, self._monotonic_of(started_at))
        running = Outcome(status=Status.RUNNING, started_at=started_at)
        self._follow_log(key, running, new=found is None)
        self._report(work, step, running, key.attempt)
        if found is None:
            await self._keep_start(work, key, started_at)
        if isinstance(found, Ended):
            return await self._ended(work, key, _outcome_of(found))
        outcome = await self._wait(step, key, limits, running)
        if outcome.status is not Status.COMPLETED or step.type is not StepType.SERVICE:
            return await self._ended(work, key, outcome)
        service = KeptService(
            key=key, instance_id=step.instance_id, grace_s=step.container.stop_grace_period_s
        )
        outcome = await self._ended(work, key, outcome, service=service)
        self._watch_service(service)
        return outcome

    async def _keep_start(self, work: _Work, key: LogKey, started_at: Instant) -> None:
        """Journal that a run was started; it goes on where that cannot be written now."""
        try:
            await self._journal.start_try(key, started_at)
        except (sqlite3.Error, QueueFullError) as error:
            _log.warning(
                "the start of a step is not in the journal: %s",
                error,
                extra={"event": "runner.start_unkept", "pipeline_id": key.pipeline_id},
            )
        else:
            work.tries[key] = replace(work.tries[key], started_at=started_at)

    async def _start_try(
        self, work: _Work, step: GrantedStep, key: LogKey, limits: _Limits
    ) -> Instant | Outcome:
        """Start a run; return when it started, or why it never did.

        What takes long comes before the start, where a cancel can still prevent it (P11).

        Raises:
            StartError: it certainly did not start; POLICY, this node does not allow it.
            GameNodeError: the container's texts cannot be filled in.
        """
        pipeline_id = key.pipeline_id
        if missing := self._secrets.missing(pipeline_id, step.container):
            raise StartError(
                Reason.SECRET_MISSING,
                f"this node has no value of {', '.join(missing)} any more: run the pipeline again",
            )
        envs = work.order.envs if work.order else {}
        filled = self._secrets.fill(pipeline_id, step.container, envs)
        # Asked before, so that nothing is fetched for nothing, and right before the start, since a
        # path may lead elsewhere by then.
        container = await self._policy.admit(filled, runtime=self._runtime.name)
        if limits.outcome() is None:
            progress = self._pull_reports(work, step, key)
            preparing = asyncio.ensure_future(self._runtime.prepare(container, progress=progress))
            try:
                await _first_of([preparing, *limits.waits()], timeout_s=None)
                if preparing.done():
                    preparing.result()
            finally:
                preparing.cancel()
        why = limits.outcome()
        if why is not None:
            return why
        container = await self._policy.admit(filled, runtime=self._runtime.name)
        service = step.type is StepType.SERVICE
        return await self._runtime.start(key, container, service=service)

    def _pull_reports(self, work: _Work, step: GrantedStep, key: LogKey) -> Progress:
        """Return what reports a pull: at once, then at most every so often."""
        reported_s: float | None = None

        def report(pull: Pull) -> None:
            nonlocal reported_s
            now_s = self._clock.monotonic_s()
            if reported_s is not None and now_s - reported_s < self._settings.pull_report_s:
                return
            reported_s = now_s
            pulling = Outcome(
                status=Status.RUNNING, reason=Reason.PULLING, message=_pull_message(pull)
            )
            self._report(work, step, pulling, key.attempt)

        return report

    async def _wait(
        self, step: GrantedStep, key: LogKey, limits: _Limits, running: Outcome
    ) -> Outcome:
        """Wait for the end of a running try, and end it on cancel or timeout.

        A service is done when it has run for a moment.
        """
        service = step.type is StepType.SERVICE
        ending = asyncio.ensure_future(self._runtime.wait(key))
        try:
            if service:
                settle_s = self._settings.service_settle_s
                await _first_of([ending, *limits.waits()], timeout_s=settle_s)
            else:
                await self._until_due(ending, step, key, limits)
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
                message = _timeout_message("step", limits.work.limit_s(step.timeout_s))
                why = Outcome(status=Status.FAILED, reason=Reason.TIMEOUT, message=message)
            await self._runtime.stop(key, grace_s=step.container.stop_grace_period_s)
            ended = await ending
        finally:
            ending.cancel()
        return replace(
            _outcome_of(ended), status=why.status, reason=why.reason, message=why.message
        )

    async def _until_due(
        self, ending: asyncio.Future[Ended], step: GrantedStep, key: LogKey, limits: _Limits
    ) -> None:
        """Wait for a try's end, for what ends it, or until its own time is up, which may grow."""
        work = limits.work
        while True:
            extended = work.extended
            limit_s = work.limit_s(step.timeout_s)
            left_s = None
            if limit_s is not None:
                left_s = max(0.0, work.started_s[key] + limit_s - self._clock.monotonic_s())
            await _first_of([ending, *limits.waits(), extended.wait()], timeout_s=left_s)
            if ending.done() or limits.reached or not extended.is_set():
                return

    async def _ended(
        self, work: _Work, key: LogKey, outcome: Outcome, *, service: KeptService | None = None
    ) -> Outcome:
        message = self._secrets.mask(key.pipeline_id, outcome.message)
        outcome = replace(outcome, message=self._sayable(message))
        await self._journal.end_try(key, outcome, service=service)
        work.tries[key] = replace(work.tries[key], outcome=outcome)
        return outcome

    def _sayable(self, message: str) -> str:
        """Return a message as it can be reported; a runtime says whatever it likes."""
        return message[: self._settings.message_chars_max].replace(
            "\0", "\N{REPLACEMENT CHARACTER}"
        )

    def _follow_log(self, key: LogKey, outcome: Outcome, *, new: bool = False) -> None:
        def source(position: LogPosition, live: asyncio.Event) -> AsyncIterator[LogBlock]:
            read = self._runtime.read_log if new else self._what_is_left
            return self._secrets.log(key.pipeline_id, read(key, position, live=live))

        if outcome.started_at is not None:
            self._uploader.begin(key, source, new=new)

    async def _what_is_left(
        self, key: LogKey, position: LogPosition, *, live: asyncio.Event
    ) -> AsyncIterator[LogBlock]:
        """Yield what a run printed; where somebody has removed it meanwhile, say so."""
        if await self._runtime.find(key) is None:
            record = b"what follows was removed from this node before it was read\n"
            yield LogBlock(stream=LogStream.GAMENODE, data=record, at=self._clock.now())
            return
        blocks = self._runtime.read_log(key, position, live=live)
        try:
            async for block in blocks:
                yield block
        finally:
            if isinstance(blocks, AsyncGenerator):
                await blocks.aclose()

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
        """Remove what a released dispatch left on the host: logs, journal, then the remains.

        What is not in the journal any more, a restarted agent does not upload (RA4). And a
        container that goes while the journal still asks for it, the next start of the agent would
        take for one that was never created (P1).
        """
        for key in work.tries:
            if key not in self._services:
                await self._uploader.forget(key)
        async with self._turn(work.dispatch):
            await self._journal.release(work.dispatch)
            self._works.pop(work.dispatch, None)
        await self._forget_secrets(work.dispatch.pipeline_id)
        for key in work.tries:
            if key not in self._services:
                await self._clean(key)

    async def _forget_secrets(self, pipeline_id: str) -> None:
        """Forget a pipeline's secrets once no dispatch of it is held and no service of it lives."""

        def needed() -> bool:
            return any(d.pipeline_id == pipeline_id for d in self._works) or any(
                key.pipeline_id == pipeline_id for key in self._services
            )

        await self._secrets.forget(pipeline_id, unless=needed)

    async def _clean(self, key: LogKey) -> None:
        """Remove an ended run and its log from the host, once the server has all of the log."""
        await self._uploader.forget(key)
        await self._runtime.remove(key)

    async def _clean_up(self) -> None:
        """Remove from the host what nobody needs any more, now and from time to time."""
        await self._remove_remains(older_s=0.0)
        while True:
            await self._runtime.tidy()
            await asyncio.sleep(self._settings.clean_up_period_s)
            await self._remove_remains(older_s=self._settings.orphans_age_s)

    async def _remove_remains(self, *, older_s: float) -> None:
        """Remove what a crash left between a release in the journal and on the host."""
        for key, found in (await self._runtime.runs()).items():
            if not isinstance(found, Ended) or self._is_known(key):
                continue
            if (self._clock.now() - found.ended_at) / NANOSECONDS_PER_S >= older_s:
                await self._runtime.remove(key)

    def _is_known(self, key: LogKey) -> bool:
        return key in self._services or any(key in work.tries for work in self._works.values())

    def _watch_service(self, service: KeptService) -> None:
        self._services[service.key] = service
        watch = self._insist(service.key.pipeline_id, partial(self._service, service))
        _ = self._supervisor.start(f"service {service.key.step}", watch)

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
        if not any(key in work.tries for work in self._works.values()):
            await self._uploader.forget(key)
        await self._journal.forget_service(key)
        self._services.pop(key, None)
        self._reporter.instances_changed()
        await self._forget_secrets(key.pipeline_id)
        if not self._is_known(key):
            await self._clean(key)

    def _pipeline_end(self, work: _Work) -> PipelineReport:
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
            message=self._sayable(message),
        )


@dataclass(frozen=True, slots=True)
class _Limits:
    """What ends a running step before its own end: a cancel, or the pipeline's timeout.

    A clean-up step (`when: always`) started after the cancel or the timeout is left alone by it;
    only force ends it.
    """

    work: _Work
    first: LogKey
    """The first try at the step."""
    overdue: asyncio.Event
    cancelled_before: bool
    overdue_before: bool

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
            limit_s = work.limit_s(work.order.timeout_s) if work.order else None
            return Outcome(
                status=Status.FAILED,
                reason=Reason.TIMEOUT,
                message=_timeout_message("pipeline", limit_s),
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


def _limits(work: _Work, step: GrantedStep, overdue: asyncio.Event) -> _Limits:
    """Return what ends a step that begins now, or began before a restart of the agent."""
    first = LogKey(work.dispatch.pipeline_id, step.name, step.first_attempt)
    begun = work.tries.get(first)
    always = step.condition is Condition.ALWAYS
    return _Limits(
        work,
        first,
        overdue,
        cancelled_before=begun.after_cancel if begun else always and work.cancelled.is_set(),
        overdue_before=begun.after_timeout if begun else always and overdue.is_set(),
    )


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


def _host_attempt(key: LogKey, found: Found | None, journaled: JournaledTry | None) -> HostAttempt:
    told = found or journaled
    ended = found if isinstance(found, Ended) else journaled if found is None else None
    return HostAttempt(
        key=key,
        in_journal=journaled is not None,
        state=_RUN_STATES[type(found)],
        started_at=told.started_at if told is not None else None,
        ended_at=ended.ended_at if ended is not None else None,
        ending=journaled is not None and journaled.ending,
    )


def _first_key(order: ExecuteOrder) -> LogKey | None:
    step = order.steps[0]
    if step.condition is Condition.FAILURE or not step.attempts:
        return None
    return LogKey(order.dispatch.pipeline_id, step.name, step.first_attempt)


def _wanted(step: GrantedStep, work: _Work) -> bool:
    if any(key.step == step.name for key in work.tries):
        return True  # it has begun, before a restart of the agent; its end must be seen to
    if step.condition is Condition.ALWAYS:
        return not work.forced.is_set()
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


def _pull_message(pull: Pull) -> str:
    message = f"pulling {pull.image}"
    if pull.total_bytes:
        message += f": {pull.done_bytes / 1e6:.1f} of {pull.total_bytes / 1e6:.1f} MB"
    return message


def _timeout_message(what: str, timeout_s: float | None) -> str:
    return f"ended: the {what}'s timeout of {timeout_s or 0:g} s had passed"
