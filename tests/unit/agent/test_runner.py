"""The runner alone on its host: RA2, RA4, RA5, RL2, RM1, P1, P2, P4, P11, P12."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.plane import RecordingHost
from tests.support.time import LoopClock, until, virtual_time

from gamenode.agent.journal import Journal, Outcome
from gamenode.agent.policy import OpenPolicy
from gamenode.agent.runner import Runner, RunnerSettings
from gamenode.agent.runtime.fake import FakeRuntime
from gamenode.agent.secrets import Secrets, SecretSettings
from gamenode.agent.spool.logs import LogSpool
from gamenode.agent.uploader import LogUploader, UploaderSettings
from gamenode.domain.command import (
    CancelOrder,
    Dispatch,
    ExecuteOrder,
    ExtendOrder,
    GrantedStep,
    OrderOutcome,
    StateOrder,
)
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition
from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import (
    Condition,
    ContainerSpec,
    PipelineReport,
    Reason,
    Report,
    Status,
    StepReport,
    StepType,
)
from gamenode.lib.clock import Instant
from gamenode.lib.groups import QueueFullError

DISPATCH = Dispatch("p", 1)
LATER = Dispatch("later", 1)
STOP_GRACE_S = 2.0


def step(
    name: str = "one",
    *,
    condition: Condition = Condition.SUCCESS,
    service: bool = False,
    attempts: int = 1,
    timeout_s: float | None = None,
    **environment: object,
) -> GrantedStep:
    return GrantedStep(
        name=name,
        type=StepType.SERVICE if service else StepType.TASK,
        condition=condition,
        timeout_s=timeout_s,
        first_attempt=1,
        attempts=attempts,
        backoff_s=1.0,
        container=ContainerSpec(
            stop_grace_period_s=STOP_GRACE_S,
            environment={f"FAKE_{key.upper()}": str(value) for key, value in environment.items()},
        ),
        instance_id="i" if service else "",
    )


def order(*steps: GrantedStep, timeout_s: float | None = None) -> ExecuteOrder:
    return ExecuteOrder(dispatch=DISPATCH, name="w", steps=steps, timeout_s=timeout_s)


def cancel(*, force: bool = False) -> CancelOrder:
    return CancelOrder(
        dispatch=DISPATCH, reason=Reason.CANCELLED_BY_USER, message="enough", force=force
    )


class TakesEverything:
    """A server's side of logs."""

    def __init__(self) -> None:
        self.lengths: dict[LogKey, int] = {}
        self.logs: dict[LogKey, bytes] = {}
        self.here = asyncio.Event()
        self.here.set()

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        await self.here.wait()
        length = self.lengths.get(key, 0)
        if offset == length:
            length = self.lengths[key] = offset + len(chunk)
            self.logs[key] = self.logs.get(key, b"") + chunk
        return AppendAnswer(next_offset=length, position=position, hash=b"")


class Full(Journal):
    """A journal whose disk may be full, or whose outcome may not be known."""

    error_code = 0

    async def _fail(self) -> None:
        if self.error_code:
            error = sqlite3.OperationalError("as the test wants")
            error.sqlite_errorcode = self.error_code
            raise error

    async def accept(self, order: ExecuteOrder, first_try: LogKey | None, *, now: Instant) -> None:
        await asyncio.sleep(0.1)
        await self._fail()
        await super().accept(order, first_try, now=now)

    async def cancel(self, order: CancelOrder) -> None:
        await asyncio.sleep(0.1)
        await self._fail()
        await super().cancel(order)

    async def extend(self, order: ExtendOrder) -> None:
        await self._fail()
        await super().extend(order)

    async def obey(self, version: int, maintenance: Maintenance) -> None:
        await self._fail()
        await super().obey(version, maintenance)

    async def release(self, dispatch: Dispatch) -> None:
        await self._fail()
        await super().release(dispatch)


@dataclass
class Node:
    """A host, and the agent's part that runs on it; `restart` is a crash and a new start."""

    folder: Path
    clock: LoopClock = field(default_factory=LoopClock)
    reports: list[Report] = field(default_factory=list)
    living: list[frozenset[str]] = field(default_factory=list)
    """What lived at each time that the server was to be told of it."""
    server: TakesEverything = field(default_factory=TakesEverything)
    envs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.host = RecordingHost(clock=self.clock)
        self.begin()

    def begin(self, *, continued: bool | None = True) -> None:
        """Start the agent's part; `continued` is what its server says, None: it is away."""
        self.journal_path = self.folder / "journal.db"
        self.journal = Full(self.journal_path)
        self.uploader = LogUploader(
            link=self.server, spool=LogSpool(self.folder / "spool"), settings=UploaderSettings()
        )
        self.secrets = Secrets(
            self.folder / "secrets",
            envs=self.envs,
            secret_envs=self.envs.keys() - {"OPEN"},
            clock=self.clock,
            settings=SecretSettings(),
        )
        self.runner = Runner(
            runtime=FakeRuntime(self.host),
            journal=self.journal,
            uploader=self.uploader,
            reporter=self,
            policy=OpenPolicy(),
            secrets=self.secrets,
            clock=self.clock,
            settings=RunnerSettings(),
        )
        self.runner.resume()
        if continued is False:
            self.runner.abandon()
        if continued is not None:
            self.runner.confirm()

    def instances_changed(self) -> None:
        self.living.append(self.runner.living_instances().ids)

    def report(self, dispatch: Dispatch, report: Report) -> None:
        assert dispatch in {DISPATCH, LATER}
        if dispatch == DISPATCH:
            self.reports.append(report)

    async def crash(self) -> None:
        await self.runner.close()
        await self.uploader.close()
        await self.journal.close()
        self.reports.clear()

    async def restart(self, *, continued: bool | None = True) -> None:
        await self.crash()
        self.begin(continued=continued)

    def end(self) -> PipelineReport | None:
        """Return the pipeline's end, as it was reported."""
        ends = [report for report in self.reports if isinstance(report, PipelineReport)]
        assert len(set(ends)) <= 1
        return ends[0] if ends else None

    def step(self, name: str = "one") -> StepReport:
        """Return the last report of a step."""
        reports = [r for r in self.reports if isinstance(r, StepReport) and r.step == name]
        return reports[-1]

    async def ended(self) -> Status:
        await until(lambda: self.end() is not None)
        end = self.end()
        assert end is not None
        return end.status

    async def started(self, count: int = 1) -> None:
        await until(lambda: len(self.host.starts) == count, every_s=0.01)

    async def released(self) -> None:
        """Let the server have the end on its disk."""
        self.runner.release(DISPATCH)
        await until(lambda: not self.runner._works)
        await asyncio.sleep(1.0)


@asynccontextmanager
async def on_a_node(folder: Path) -> AsyncIterator[Node]:
    node = Node(folder)
    try:
        yield node
        assert len(set(node.host.starts)) == len(node.host.starts)  # P1
    finally:
        await node.crash()


# Pulls


def pulls(node: Node) -> list[str]:
    steps = [report for report in node.reports if isinstance(report, StepReport)]
    assert all(it.started_at is None for it in steps if it.reason is Reason.PULLING)
    return [it.message for it in steps if it.reason is Reason.PULLING]


@virtual_time
async def test_a_pull_is_reported_now_and_then_and_the_steps_timeout_begins_after_it(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        one = step(pull_bytes=40_000_000, prepare_s=20, duration_s=4, timeout_s=5.0)
        await node.runner.take(order(replace(one, container=replace(one.container, image="g:1"))))
        assert await node.ended() is Status.COMPLETED
        assert pulls(node) == [f"pulling g:1: {done}.0 of 40.0 MB" for done in (0, 10, 20, 30)]
        started = [r for r in node.reports if isinstance(r, StepReport) and not r.reason]
        assert started[0].status is Status.RUNNING
        assert started[0].started_at is not None


@virtual_time
async def test_a_fast_pull_is_reported_once_and_what_is_here_never(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        fetched = step(pull_bytes=8, prepare_s=1.5)
        await node.runner.take(order(fetched, step("two", prepare_s=1.5)))
        assert await node.ended() is Status.COMPLETED
        assert len(pulls(node)) == 1


@virtual_time
async def test_a_cancel_ends_a_pull_at_once(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(pull_bytes=8, prepare_s=3600)))
        await until(lambda: bool(pulls(node)))
        asked_s = node.clock.monotonic_s()
        await node.runner.take(cancel())
        assert await node.ended() is Status.CANCELLED
        assert node.clock.monotonic_s() - asked_s < 1.0  # P11
        assert node.host.starts == []


@virtual_time
async def test_only_old_remains_go_while_the_agent_runs(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await asyncio.sleep(1.0)
        orphan = LogKey("gone", "one", 1, 1)
        await node.host.start(orphan, ContainerSpec(), service=False)
        await asyncio.sleep(RunnerSettings().orphans_age_s - 10.0)
        assert node.host.runs() == (orphan,)
        await asyncio.sleep(RunnerSettings().clean_up_period_s + 20.0)
        assert node.host.runs() == ()


# Orders


@virtual_time
async def test_a_doubled_execute_starts_once(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        one = order(step(duration_s=1))
        answers = await asyncio.gather(node.runner.take(one), node.runner.take(one))
        assert [a.outcome for a in answers] == [OrderOutcome.ACCEPTED, OrderOutcome.REPEATED]
        assert await node.ended() is Status.COMPLETED
        assert (await node.runner.take(one)).outcome is OrderOutcome.REPEATED
        await node.restart()
        assert (await node.runner.take(one)).outcome is OrderOutcome.REPEATED


@virtual_time
async def test_a_cancel_before_its_execute_is_held_and_the_execute_refused(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        # Side by side, as late words arrive; the order of their arrival counts.
        cancelled, refused = await asyncio.gather(
            node.runner.take(cancel()), node.runner.take(order(step()))
        )
        assert cancelled.outcome is OrderOutcome.ACCEPTED
        assert (refused.outcome, refused.reason) == (OrderOutcome.REFUSED, "CANCELLED_BY_USER")
        await node.restart()
        assert (await node.runner.take(order(step()))).outcome is OrderOutcome.REFUSED
        assert await node.ended() is Status.CANCELLED
        assert node.host.starts == []
        await node.released()
        assert node.living == [
            frozenset()
        ]  # it might have been a service; its server waits to hear
        assert node.journal.held() == []


@virtual_time
async def test_an_execute_then_its_cancel_runs_nothing_on(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        accepted, cancelled = await asyncio.gather(
            node.runner.take(order(step(duration_s=99))), node.runner.take(cancel())
        )
        assert accepted.outcome is cancelled.outcome is OrderOutcome.ACCEPTED
        assert await node.ended() is Status.CANCELLED
        assert node.clock.monotonic_s() < STOP_GRACE_S + 5.0


@virtual_time
async def test_a_full_disk_refuses_and_a_repeat_is_looked_at_anew(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.journal.error_code = sqlite3.SQLITE_FULL
        answers = await asyncio.gather(
            node.runner.take(order(step())), node.runner.take(order(step()))
        )
        assert {(a.outcome, a.reason) for a in answers} == {(OrderOutcome.REFUSED, "JOURNAL")}
        assert node.runner.held() == []
        node.journal.error_code = 0
        assert (await node.runner.take(order(step()))).outcome is OrderOutcome.ACCEPTED
        assert await node.ended() is Status.COMPLETED


@virtual_time
async def test_what_may_be_in_the_journal_is_not_refused(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.journal.error_code = sqlite3.SQLITE_IOERR
        with pytest.raises(sqlite3.OperationalError):
            await node.runner.take(order(step()))
        assert node.runner.held() == []
        # It had landed all the same.
        node.journal.error_code = 0
        await node.journal.accept(order(step()), LogKey("p", "one", 1), now=node.clock.now())
        assert (await node.runner.take(order(step()))).outcome is OrderOutcome.ACCEPTED
        assert await node.ended() is Status.COMPLETED


@virtual_time
async def test_a_full_queue_of_the_journal_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_a_node(tmp_path) as node:

        async def full(*_: object, **__: object) -> None:
            raise QueueFullError

        monkeypatch.setattr(node.journal, "accept", full)
        answer = await node.runner.take(order(step()))
        assert (answer.outcome, answer.reason) == (OrderOutcome.REFUSED, "JOURNAL")


@virtual_time
async def test_a_cancel_that_cannot_be_journaled_ends_what_runs_and_comes_again(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=99)))
        await node.started()
        node.journal.error_code = sqlite3.SQLITE_FULL
        with pytest.raises(sqlite3.OperationalError):
            await node.runner.take(cancel())
        assert await node.ended() is Status.CANCELLED


@virtual_time
async def test_a_cancel_is_a_repeat_only_once_it_is_on_disk(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=99, ignore_stop=1)))
        await node.started()
        node.journal.error_code = sqlite3.SQLITE_FULL
        with pytest.raises(sqlite3.OperationalError):
            await node.runner.take(cancel())
        node.journal.error_code = 0
        assert (await node.runner.take(cancel())).outcome is OrderOutcome.ACCEPTED
        assert (await node.runner.take(cancel())).outcome is OrderOutcome.REPEATED
        assert (await node.runner.take(cancel(force=True))).outcome is OrderOutcome.ACCEPTED
        held = node.journal.held()
        assert held[0].cancel is not None
        assert held[0].cancel.force


@virtual_time
async def test_a_release_that_cannot_be_journaled_is_repeated(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step()))
        await node.ended()
        node.journal.error_code = sqlite3.SQLITE_FULL
        node.runner.release(DISPATCH)
        await asyncio.sleep(5.0)
        assert node.host.runs() != ()  # the journal first, then the remains
        node.journal.error_code = 0
        await node.released()
        assert node.host.runs() == ()
        assert node.journal.held() == []


# Cancel


@pytest.mark.parametrize(
    ("slow", "at_s", "starts"),
    [
        ({"prepare_s": 600}, 1.0, 0),
        ({"start_s": 1, "duration_s": 600}, 0.5, 1),
        ({"duration_s": 600}, 1.0, 1),
        ({"duration_s": 600, "ignore_stop": 1}, 1.0, 1),
    ],
)
def test_a_cancel_ends_a_step_within_its_grace_and_5_s(
    tmp_path: Path, slow: dict[str, Any], at_s: float, starts: int
) -> None:
    @virtual_time
    async def check() -> None:
        async with on_a_node(tmp_path) as node:
            await node.runner.take(order(step(**slow), step("two")))
            await asyncio.sleep(at_s)
            await node.runner.take(cancel())
            before_s = node.clock.monotonic_s()
            assert await node.ended() is Status.CANCELLED
            assert node.clock.monotonic_s() - before_s < STOP_GRACE_S + 5.0
            assert len(node.host.starts) == starts
            assert (node.step().status, node.step().message) == (Status.CANCELLED, "enough")
            assert node.step("two").reason is Reason.SKIPPED

    check()


@virtual_time
async def test_a_cancel_during_a_backoff_makes_no_more_tries(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(attempts=3, exit_code=1)))
        await until(lambda: bool(node.reports) and node.step().reason is Reason.RETRYING)
        await node.runner.take(cancel())
        assert await node.ended() is Status.CANCELLED
        assert len(node.host.starts) == 1


@virtual_time
async def test_a_clean_up_runs_after_a_cancel_and_force_ends_it(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=600)
        await node.runner.take(order(step(duration_s=600), tidy))
        await node.started()
        await node.runner.take(cancel())
        await node.started(2)
        await asyncio.sleep(60.0)
        assert node.end() is None
        await node.runner.take(cancel(force=True))
        assert await node.ended() is Status.CANCELLED
        assert node.clock.monotonic_s() < 60.0 + 2 * (STOP_GRACE_S + 5.0)


@pytest.mark.parametrize("force", [False, True])
def test_a_clean_up_that_runs_when_the_cancel_comes_is_ended_also_after_a_restart(
    tmp_path: Path, force: bool
) -> None:
    @virtual_time
    async def check() -> None:
        async with on_a_node(tmp_path) as node:
            await node.runner.take(
                order(step("tidy", condition=Condition.ALWAYS, duration_s=600, ignore_stop=1))
            )
            await node.started()
            await node.runner.take(cancel(force=force))
            await node.restart()
            assert await node.ended() is Status.CANCELLED
            assert node.clock.monotonic_s() < 20.0

    check()


@virtual_time
async def test_a_clean_up_begun_after_the_cancel_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=30)
        await node.runner.take(order(step(duration_s=600), tidy))
        await node.started()
        await node.runner.take(cancel())
        await node.started(2)
        await node.restart()
        assert await node.ended() is Status.CANCELLED
        assert node.step("tidy").status is Status.COMPLETED


@virtual_time
async def test_force_is_remembered(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=600)
        await node.runner.take(order(step(duration_s=600, ignore_stop=1), tidy))
        await node.started()
        await node.runner.take(cancel(force=True))
        await node.restart()
        assert await node.ended() is Status.CANCELLED
        assert len(node.host.starts) == 1


# Restarts


@virtual_time
async def test_a_running_step_is_found_and_ended_after_a_cancel_and_a_restart(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=600, ignore_stop=1)))
        await node.started()
        await node.runner.take(cancel())
        await node.restart()
        assert await node.ended() is Status.CANCELLED
        await node.released()
        assert node.host.runs() == ()


@virtual_time
async def test_a_running_retry_is_found_after_a_cancel_and_a_restart(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(attempts=2, duration_s=20, exit_code=1, ignore_stop=1)))
        await node.started(2)
        await node.runner.take(cancel())
        await node.restart()
        assert await node.ended() is Status.CANCELLED
        assert node.step().attempt == 2
        await node.released()
        assert node.host.runs() == ()


@virtual_time
async def test_a_restart_says_nothing_of_tries_that_others_have_followed(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        flaky = step(attempts=3, exit_code=1, duration_s=1)
        await node.runner.take(order(flaky))
        await node.started(3)
        await node.restart()
        await node.ended()
        assert {r.attempt for r in node.reports if isinstance(r, StepReport)} == {3}


@virtual_time
async def test_a_timeout_that_passed_during_a_restart_leaves_the_clean_up_alone(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=30)
        await node.runner.take(order(step(duration_s=50), tidy, timeout_s=20.0))
        await node.started()
        await node.crash()
        await asyncio.sleep(30.0)
        node.begin()
        assert await node.ended() is Status.FAILED
        assert (node.step().status, node.step().reason) == (Status.FAILED, Reason.TIMEOUT)
        assert node.step("tidy").status is Status.COMPLETED


@virtual_time
async def test_a_clean_up_begins_after_a_timeout_that_passed_during_a_restart(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=5)
        never_started = Outcome(status=Status.FAILED, reason=Reason.START_FAILED)
        first = LogKey("p", "one", 1)
        await node.journal.accept(order(step(), tidy, timeout_s=20.0), first, now=node.clock.now())
        await node.journal.end_try(first, never_started)
        await node.crash()
        await asyncio.sleep(30.0)
        node.begin()
        assert await node.ended() is Status.FAILED
        assert node.step("tidy").status is Status.COMPLETED


@virtual_time
async def test_logs_go_up_before_the_journal_forgets(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.server.here.clear()
        await node.runner.take(order(step(log_lines=9)))
        assert await node.ended() is Status.COMPLETED
        assert node.step().log_length_bytes is not None
        node.runner.release(DISPATCH)
        await asyncio.sleep(1.0)
        assert node.runner.held() == []
        await node.crash()
        node.server.here.set()
        node.begin()
        await node.ended()
        await node.released()
        assert node.server.lengths == {LogKey("p", "one", 1): node.step().log_length_bytes}
        assert node.host.runs() == ()


@virtual_time
async def test_what_a_crash_left_behind_a_release_is_removed(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.host.start(LogKey("gone", "one", 1), ContainerSpec(), service=False)
        await node.restart()
        await until(lambda: node.host.runs() == ())


@virtual_time
async def test_what_a_restart_brings_back_starts_nothing_before_the_server_agrees(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=5), step("two")))
        await node.started()
        await node.restart(continued=None)
        await asyncio.sleep(60)
        assert node.step().status is Status.COMPLETED  # what lived was looked after
        assert len(node.host.starts) == 1
        node.runner.confirm()
        assert await node.ended() is Status.COMPLETED
        assert len(node.host.starts) == 2


@virtual_time
async def test_what_a_restart_brings_back_and_nobody_wants_never_starts(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=5), step("two")))
        await node.started()
        await node.restart(continued=None)
        await node.runner.take(cancel(force=True))
        node.runner.confirm()
        assert await node.ended() is Status.CANCELLED
        assert len(node.host.starts) == 1


SCENARIOS: Mapping[str, Callable[[], ExecuteOrder]] = {
    "steps": lambda: order(
        step(duration_s=1, log_lines=2),
        step("two", attempts=2, exit_code=1, prepare_s=0.5),
        step("three", condition=Condition.FAILURE, start_s=0.5),
        step("four", condition=Condition.ALWAYS),
    ),
    "service": lambda: order(step(service=True), step("two")),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("first", range(0, 120, 40))
def test_a_crash_at_any_moment_changes_nothing_in_the_end(
    tmp_path: Path, scenario: str, first: int
) -> None:
    @virtual_time
    async def outcome(folder: Path, moment: int | None) -> list[tuple[object, ...]]:
        async with on_a_node(folder) as node:
            taking = asyncio.ensure_future(node.runner.take(SCENARIOS[scenario]()))
            if moment is not None:
                for _ in range(moment):
                    await asyncio.sleep(0)
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)
                await node.restart()
            await node.runner.take(SCENARIOS[scenario]())
            await node.ended()
            steps = [node.step(s.name) for s in SCENARIOS[scenario]().steps]
            end = node.end()
            assert end is not None
            await node.released()
            assert node.journal.held() == []
            services = [service.key for service in node.journal.services()]
            assert list(node.host.runs()) == services
            found: list[tuple[object, ...]] = [(s.status, s.reason, s.attempt) for s in steps]
            return [*found, (end.status, end.reason), tuple(services)]

    moments: list[int | None] = [None, *range(first, first + 40, 2)]
    for moment in moments:
        (tmp_path / f"{moment}").mkdir()
    usual, *others = (outcome(tmp_path / f"{moment}", moment) for moment in moments)
    assert others == [usual] * len(others)


# Ends


@virtual_time
async def test_a_restarted_agent_creates_nothing_before_its_server_has_heard_what_it_holds(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=5), step("two")))
        await node.started()
        await node.restart(continued=None)
        await asyncio.sleep(60.0)
        assert [key.step for key in node.host.starts] == ["one"]  # adopted, and ended
        node.runner.confirm()
        assert await node.ended() is Status.COMPLETED


@virtual_time
async def test_what_a_journal_that_continues_nothing_has_begun_is_adopted_and_nothing_else_starts(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(
            order(
                step(duration_s=5),
                step("two", attempts=3),
                step("tidy", condition=Condition.ALWAYS),
            )
        )
        await node.started()
        await node.restart(continued=False)
        assert await node.ended() is Status.FAILED
        end = node.end()
        assert end is not None
        assert end.reason is Reason.NODE_LOST
        assert "restored or copied" in end.message
        assert [key.step for key in node.host.starts] == ["one"]
        assert node.step("one").status is Status.COMPLETED
        assert node.step("tidy").reason is Reason.NODE_LOST


def snapshot(source: Path, target: Path) -> None:
    """Copy a journal that nobody has open over another."""
    with sqlite3.connect(source) as one, sqlite3.connect(target) as other:
        one.backup(other)
    one.close()
    other.close()


@virtual_time
async def test_a_restored_journal_does_not_start_again_what_has_run(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=5)))
        await node.started()
        await node.crash()
        snapshot(node.journal_path, tmp_path / "snapshot")
        node.begin()
        assert await node.ended() is Status.COMPLETED
        await node.released()  # and its container is gone
        await node.crash()
        snapshot(tmp_path / "snapshot", node.journal_path)
        node.begin(continued=False)
        assert await node.ended() is Status.FAILED
        assert node.step().reason is Reason.NODE_LOST
        assert len(node.host.starts) == 1


@virtual_time
async def test_what_somebody_removed_while_the_agent_was_away_does_not_run_twice(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=50, attempts=3)))
        await node.started()
        await asyncio.sleep(1.0)
        await node.crash()
        node.host.forget(LogKey("p", "one", 1))
        node.begin()
        assert await node.ended() is Status.FAILED
        assert node.step().reason is Reason.OUTCOME_UNKNOWN
        assert "somebody has removed it" in node.step().message
        assert len(node.host.starts) == 1
        await node.restart()  # before the server has acknowledged it
        assert await node.ended() is Status.FAILED
        assert len(node.host.starts) == 1
        await node.released()
        (log,) = node.server.logs.values()
        assert log.endswith(b"what follows was removed from this node before it was read\n")


@virtual_time
async def test_a_cancel_ends_what_waits_for_the_server_to_hear_of_it(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=1), step("two")))
        await node.started()
        await node.restart(continued=None)
        await asyncio.sleep(5.0)
        await node.runner.take(cancel())
        assert await node.ended() is Status.CANCELLED
        assert [key.step for key in node.host.starts] == ["one"]


@virtual_time
async def test_a_step_timeout_ends_the_step(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=600, timeout_s=5.0)))
        assert await node.ended() is Status.FAILED
        assert node.step().reason is Reason.TIMEOUT
        assert node.clock.monotonic_s() < 5.0 + STOP_GRACE_S + 5.0


def extend(extended_s: float) -> ExtendOrder:
    return ExtendOrder(dispatch=DISPATCH, extended_s=extended_s)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("limit", ["step", "pipeline"])
@virtual_time
async def test_an_extension_moves_a_limit_while_it_is_waited_for(
    tmp_path: Path, limit: str, restarts: bool
) -> None:
    async with on_a_node(tmp_path) as node:
        step_s, whole_s = (3.0, None) if limit == "step" else (None, 3.0)
        await node.runner.take(order(step(duration_s=99, timeout_s=step_s), timeout_s=whole_s))
        await node.started()
        await asyncio.sleep(2.0)
        for extended_s in (1.0, 10.0):
            answer = await node.runner.take(extend(extended_s))
            assert answer.outcome is OrderOutcome.ACCEPTED
        for late in (1.0, 10.0):  # a total: a late or doubled one changes nothing
            answer = await node.runner.take(extend(late))
            assert answer.outcome is OrderOutcome.REPEATED
        if restarts:
            await node.restart()
        await asyncio.sleep(10.0)
        assert node.end() is None
        assert await node.ended() is Status.FAILED
        assert 13.0 <= node.clock.monotonic_s() < 13.5 + STOP_GRACE_S
        end = node.end()
        assert end is not None
        assert end.reason is Reason.TIMEOUT
        assert end.message == f"ended: the {limit}'s timeout of 13 s had passed"
        assert (node.step().status, node.step().reason) == (Status.FAILED, Reason.TIMEOUT)


@virtual_time
async def test_an_extension_comes_with_an_order_that_is_sent_again(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        longer = replace(order(step(duration_s=99, timeout_s=3.0)), extended_s=10.0)
        await node.runner.take(longer)
        await node.restart()
        assert (await node.runner.take(extend(10.0))).outcome is OrderOutcome.REPEATED
        assert await node.ended() is Status.FAILED
        assert node.clock.monotonic_s() >= 13.0


@virtual_time
async def test_what_is_over_or_not_held_is_not_extended(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        answer = await node.runner.take(extend(1.0))
        assert (answer.outcome, answer.reason) == (OrderOutcome.REFUSED, "NOT_HELD")
        await node.runner.take(order(step(duration_s=99, ignore_stop=1), timeout_s=3.0))
        await asyncio.sleep(4.0)  # it is being ended
        answer = await node.runner.take(extend(1.0))
        assert (answer.outcome, answer.reason) == (OrderOutcome.REFUSED, Reason.TIMEOUT)
        assert await node.ended() is Status.FAILED
        answer = await node.runner.take(extend(1.0))
        assert (answer.outcome, answer.reason) == (OrderOutcome.REFUSED, "NOT_HELD")


@virtual_time
async def test_an_extension_that_cannot_be_journaled_holds_and_comes_again(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=8, timeout_s=3.0)))
        node.journal.error_code = sqlite3.SQLITE_FULL
        with pytest.raises(sqlite3.OperationalError):
            await node.runner.take(extend(10.0))
        node.journal.error_code = 0
        assert (await node.runner.take(extend(10.0))).outcome is OrderOutcome.ACCEPTED
        assert await node.ended() is Status.COMPLETED


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A way in which a pipeline ends: its steps, what is done to it, and what is to be said."""

    steps: tuple[GrantedStep, ...]
    done: Callable[[Node], Awaitable[object]] | None = None
    timeout_s: float | None = None
    status: Status = Status.FAILED
    reason: Reason
    said: tuple[tuple[Status, Reason, int | None, int | None], ...]
    """Of each step: status, reason, exit code and signal."""


async def _disable(node: Node) -> None:
    change = StateOrder(
        node_id="n1",
        version=2,
        target=Maintenance.DISABLED,
        reason="sold",
        requested_at=node.clock.now(),
    )
    await node.runner.take(change)


async def _drain(node: Node) -> None:
    change = StateOrder(
        node_id="n1",
        version=2,
        target=Maintenance.MAINTENANCE,
        reason="fans",
        requested_at=node.clock.now(),
        end_running=True,
    )
    await node.runner.take(change)


LONG = step(duration_s=99)
SKIPPED = (Status.CANCELLED, Reason.SKIPPED, None, None)
WELL = (Status.COMPLETED, Reason.NONE, 0, None)


def ended_by(reason: Reason) -> tuple[Status, Reason, None, int]:
    return (Status.CANCELLED, reason, None, 15)


ENDINGS: Mapping[str, Ending] = {
    "well": Ending(
        steps=(step(), step("two")), status=Status.COMPLETED, reason=Reason.NONE, said=(WELL, WELL)
    ),
    "an exit code": Ending(
        steps=(step(exit_code=3), step("two")),
        reason=Reason.EXIT_CODE,
        said=((Status.FAILED, Reason.EXIT_CODE, 3, None), SKIPPED),
    ),
    "a clean-up that failed": Ending(
        steps=(step(), step("two", condition=Condition.ALWAYS, exit_code=4)),
        reason=Reason.EXIT_CODE,
        said=(WELL, (Status.FAILED, Reason.EXIT_CODE, 4, None)),
    ),
    "a failure that was seen to": Ending(
        steps=(step(exit_code=3), step("two", condition=Condition.FAILURE)),
        reason=Reason.EXIT_CODE,
        said=((Status.FAILED, Reason.EXIT_CODE, 3, None), WELL),
    ),
    "no failure to see to": Ending(
        steps=(step(), step("two", condition=Condition.FAILURE)),
        status=Status.COMPLETED,
        reason=Reason.NONE,
        said=(WELL, SKIPPED),
    ),
    "a signal": Ending(
        steps=(step(signal=11),),
        reason=Reason.SIGNAL,
        said=((Status.FAILED, Reason.SIGNAL, None, 11),),
    ),
    "out of memory": Ending(
        steps=(step(signal=9, end_reason="OOM_KILLED"),),
        reason=Reason.OOM_KILLED,
        said=((Status.FAILED, Reason.OOM_KILLED, None, 9),),
    ),
    "an outcome that nobody knows": Ending(
        steps=(step(exit_code=1, end_reason="OUTCOME_UNKNOWN"),),
        reason=Reason.OUTCOME_UNKNOWN,
        said=((Status.FAILED, Reason.OUTCOME_UNKNOWN, 1, None),),
    ),
    "the step's timeout": Ending(
        steps=(step(duration_s=99, timeout_s=2.0),),
        reason=Reason.TIMEOUT,
        said=((Status.FAILED, Reason.TIMEOUT, None, 15),),
    ),
    "the pipeline's timeout": Ending(
        steps=(LONG, step("two")),
        timeout_s=2.0,
        reason=Reason.TIMEOUT,
        said=((Status.FAILED, Reason.TIMEOUT, None, 15), SKIPPED),
    ),
    "the pipeline's timeout between tries": Ending(
        steps=(step(exit_code=3, attempts=9),),
        timeout_s=2.0,
        reason=Reason.TIMEOUT,
        said=((Status.FAILED, Reason.TIMEOUT, 3, None),),
    ),
    "a start that failed": Ending(
        steps=(step(start_error="no"), step("two")),
        reason=Reason.START_FAILED,
        said=((Status.FAILED, Reason.START_FAILED, None, None), SKIPPED),
    ),
    "an image that cannot be had": Ending(
        steps=(step(start_error="no", start_reason="IMAGE_PULL"),),
        reason=Reason.IMAGE_PULL,
        said=((Status.FAILED, Reason.IMAGE_PULL, None, None),),
    ),
    "what the node's policy forbids": Ending(
        steps=(step(start_error="no", start_reason="POLICY"),),
        reason=Reason.POLICY,
        said=((Status.FAILED, Reason.POLICY, None, None),),
    ),
    "what the runtime cannot do": Ending(
        steps=(step(), step("two", unsupported="privileged"), step("three")),
        reason=Reason.UNSUPPORTED,
        said=(SKIPPED, (Status.FAILED, Reason.UNSUPPORTED, None, None), SKIPPED),
    ),
    "a user": Ending(
        steps=(LONG, step("two"), step("three", condition=Condition.ALWAYS)),
        done=lambda node: node.runner.take(cancel()),
        status=Status.CANCELLED,
        reason=Reason.CANCELLED_BY_USER,
        said=(ended_by(Reason.CANCELLED_BY_USER), SKIPPED, WELL),
    ),
    "a user, by force": Ending(
        steps=(LONG, step("two", condition=Condition.ALWAYS)),
        done=lambda node: node.runner.take(cancel(force=True)),
        status=Status.CANCELLED,
        reason=Reason.CANCELLED_BY_USER,
        said=(ended_by(Reason.CANCELLED_BY_USER), SKIPPED),
    ),
    "a node that is disabled": Ending(
        steps=(LONG, step("two")),
        done=_disable,
        status=Status.CANCELLED,
        reason=Reason.NODE_DISABLED,
        said=(ended_by(Reason.NODE_DISABLED), SKIPPED),
    ),
    "a drain's deadline": Ending(
        steps=(LONG,),
        done=_drain,
        status=Status.CANCELLED,
        reason=Reason.DRAINED,
        said=(ended_by(Reason.DRAINED),),
    ),
    "an agent that stops for good": Ending(
        steps=(LONG,),
        done=lambda node: node.runner.end_everything("bye"),
        status=Status.CANCELLED,
        reason=Reason.AGENT_STOPPED,
        said=(ended_by(Reason.AGENT_STOPPED),),
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
@virtual_time
async def test_every_end_says_why_on_the_pipeline_and_on_each_step(
    tmp_path: Path, name: str
) -> None:
    ending = ENDINGS[name]
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(*ending.steps, timeout_s=ending.timeout_s))
        if ending.done is not None:
            await node.started()
            await ending.done(node)
        assert await node.ended() is ending.status
        end = node.end()
        assert end is not None
        assert end.reason is ending.reason
        said = [node.step(one.name) for one in ending.steps]
        assert tuple((r.status, r.reason, r.exit_code, r.signal) for r in said) == ending.said
        for report in said:
            assert report.message or report.reason in (Reason.NONE, Reason.SKIPPED)


@virtual_time
async def test_what_the_runtime_cannot_do_is_found_before_anything_starts_and_never_later(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(), step("two", unsupported="privileged")))
        assert await node.ended() is Status.FAILED
        assert node.host.starts == []
        await node.restart()
        assert await node.ended() is Status.FAILED
        assert node.host.starts == []


@virtual_time
@pytest.mark.parametrize("jump_s", [-100_000.0, 100_000.0])
async def test_no_jump_of_the_wall_clock_moves_a_timeout(tmp_path: Path, jump_s: float) -> None:
    async with on_a_node(tmp_path) as node:
        limited = step(duration_s=600, timeout_s=50.0)
        await node.runner.take(order(limited, timeout_s=500.0))
        await node.started()
        begun_s = node.clock.monotonic_s()
        await asyncio.sleep(10.0)
        node.clock.jump(jump_s)
        await asyncio.sleep(30.0)
        assert node.end() is None
        assert await node.ended() is Status.FAILED
        assert node.step().message == "ended: the step's timeout of 50 s had passed"
        assert 49.5 < node.clock.monotonic_s() - begun_s < 51.0


@virtual_time
async def test_a_restart_counts_the_time_before_it_by_the_wall_clock(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=600, timeout_s=50.0)))
        await node.started()
        begun_s = node.clock.monotonic_s()
        await asyncio.sleep(30.0)
        await node.restart()
        await asyncio.sleep(1.0)
        node.clock.jump(-100_000.0)  # once it is adopted, this changes nothing
        assert await node.ended() is Status.FAILED
        assert 49.5 < node.clock.monotonic_s() - begun_s < 51.0


@virtual_time
async def test_a_wall_clock_that_went_back_over_a_restart_lets_a_timeout_count_anew(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(duration_s=600, timeout_s=50.0), timeout_s=300.0))
        await node.started()
        await node.crash()
        node.clock.jump(-100_000.0)
        begun_s = node.clock.monotonic_s()
        node.begin()
        assert await node.ended() is Status.FAILED
        assert 49.5 < node.clock.monotonic_s() - begun_s < 51.0


@virtual_time
async def test_a_failed_step_is_tried_again_as_often_as_granted(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(attempts=3, exit_code=4)))
        assert await node.ended() is Status.FAILED
        assert [key.attempt for key in node.host.starts] == [1, 2, 3]
        assert (node.step().attempt, node.step().exit_code) == (3, 4)
        assert node.clock.monotonic_s() >= 1.0 + 2.0  # the backoff doubles


@virtual_time
async def test_a_step_that_cannot_start_says_why_in_words_that_can_be_sent(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(start_error="no\0luck" + "!" * 100_000)))
        assert await node.ended() is Status.FAILED
        assert node.step().reason is Reason.START_FAILED
        assert node.step().message.startswith("no\N{REPLACEMENT CHARACTER}luck")
        assert len(node.step().message) == RunnerSettings().message_chars_max


@virtual_time
async def test_a_service_lives_on_and_goes_when_it_ends(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(service=True, duration_s=100)))
        assert await node.ended() is Status.COMPLETED
        await node.released()
        assert len(node.host.runs()) == 1
        assert node.living == [{"i"}]  # said once the server has the end on disk
        await node.restart()
        assert node.runner.living_instances().ids == {"i"}
        await until(lambda: node.host.runs() == (), timeout_s=200.0)
        assert node.living == [{"i"}, set()]
        assert node.journal.services() == []


@virtual_time
async def test_a_service_that_ends_at_once_has_failed(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(order(step(service=True, duration_s=0.1)))
        assert await node.ended() is Status.FAILED
        await node.released()
        assert node.host.runs() == ()


@virtual_time
async def test_ending_everything_leaves_nothing(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=600, ignore_stop=1)
        await node.runner.take(order(step(duration_s=600), tidy))
        await node.started()
        await node.runner.end_everything("over")
        end = node.end()
        assert end is not None
        assert (end.status, end.reason) == (Status.CANCELLED, Reason.AGENT_STOPPED)
        assert all(node.host.end(run) for run in node.host.runs())


# Maintenance


def state(target: Maintenance, version: int) -> StateOrder:
    return StateOrder(
        node_id="n1", version=version, target=target, reason="", requested_at=Instant(0)
    )


@virtual_time
async def test_a_state_is_confirmed_only_once_it_is_on_disk(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.journal.error_code = sqlite3.SQLITE_FULL
        with pytest.raises(sqlite3.OperationalError):
            await node.runner.take(state(Maintenance.MAINTENANCE, 2))
        refused = await node.runner.take(order(step()))
        assert refused.reason == "STATE_VERSION"
        node.journal.error_code = 0
        answer = await node.runner.take(state(Maintenance.MAINTENANCE, 2))
        assert answer.confirmation is not None
        assert node.journal.state() == (2, Maintenance.MAINTENANCE)


@virtual_time
async def test_disabled_is_confirmed_when_nothing_lives(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        slow = step("tidy", condition=Condition.ALWAYS, duration_s=600, ignore_stop=1)
        slow = replace(slow, container=replace(slow.container, stop_grace_period_s=40.0))
        await node.runner.take(order(step(service=True), step("two", duration_s=600), slow))
        await node.started(2)
        answer = await node.runner.take(state(Maintenance.DISABLED, 2))
        assert answer.confirmation is not None
        assert answer.confirmation.remaining == ()
        assert all(node.host.end(run) for run in node.host.runs())


@virtual_time
async def test_what_comes_once_a_node_is_enabled_again_is_not_ended_with_the_rest(
    tmp_path: Path,
) -> None:
    async with on_a_node(tmp_path) as node:
        tidy = step("tidy", condition=Condition.ALWAYS, duration_s=600)
        await node.runner.take(order(step(duration_s=600), tidy))
        await node.started()
        disabling = asyncio.create_task(node.runner.take(state(Maintenance.DISABLED, 2)))
        await node.started(2)  # its clean-up, which has its time
        await node.runner.take(state(Maintenance.NORMAL, 3))
        later = replace(
            order(step("game", service=True), step("two", duration_s=600)),
            dispatch=LATER,
            state_version=3,
        )
        assert (await node.runner.take(later)).outcome is OrderOutcome.ACCEPTED
        await node.started(4)
        assert (await disabling).confirmation is not None
        assert await node.ended() is Status.CANCELLED
        assert {key.step for key in node.host.runs() if not node.host.end(key)} == {"game", "two"}


@virtual_time
async def test_what_its_node_ends_has_no_service_left_when_it_says_so(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(
            order(step("game", service=True, ignore_stop=1), step("two", duration_s=600))
        )
        await node.started(2)
        disabling = asyncio.create_task(node.runner.take(state(Maintenance.DISABLED, 2)))
        assert await node.ended() is Status.CANCELLED
        assert all(node.host.end(run) for run in node.host.runs())
        await disabling
