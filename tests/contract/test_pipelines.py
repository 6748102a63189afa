"""Pipelines and their way to nodes: F1, F4, RL1, RL4, RA1, RA3, RA5, P2, P3, P4, P10."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.fake_agent import (
    FILE,
    FakeAgent,
    acknowledged,
    cancel,
    dispatched,
    get,
    held,
    kinds,
    step,
    whole,
)
from tests.support.groups import write_together
from tests.support.plane import (
    USER,
    ControlPlane,
    PlaneSettings,
    fill_disk,
    registration,
)
from tests.support.time import FakeClock, until

from gamenode.domain.command import (
    CancelOrder,
    Closed,
    CloseReason,
    Dispatch,
    ExecuteOrder,
    FencedOrder,
    NumberedReport,
    OrderOutcome,
    Statement,
    Welcome,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.node import Maintenance, StateChange
from gamenode.domain.pipeline import (
    Reason,
    Report,
    ReportOutcome,
    Status,
)
from gamenode.lib.clock import Instant
from gamenode.server.pipelines.dispatcher import DispatcherSettings

RETRIED = "name: w\nsteps: [{name: one, retries: {max: 2}, container: {image: a}}]"


@pytest_asyncio.fixture
async def plane(tmp_path: Path, database_url: str) -> AsyncIterator[ControlPlane]:
    settings = PlaneSettings(dispatch=DispatcherSettings(batch_max=4, refused_wait_s=0.0))
    opened = ControlPlane(tmp_path, clock=FakeClock(), url=database_url, settings=settings)
    await opened.feed.start()
    yield opened
    await opened.stop()


# Creation


async def test_the_same_key_makes_one_pipeline(plane: ControlPlane) -> None:
    first = await plane.create(FILE, idempotency_key="k")
    again = await plane.create(FILE, idempotency_key="k")
    assert again.id == first.id
    assert await kinds(plane, first.id) == ["pipeline.created"]
    assert len(await plane.service.list(limit=10)) == 1


async def test_the_same_key_for_something_else_is_a_conflict(plane: ControlPlane) -> None:
    await plane.create(FILE, idempotency_key="k")
    others: list[dict[str, Any]] = [{"file": RETRIED}, {"priority": 1}, {"node": "n1"}]
    await plane.nodes.register(registration())
    for other in others:
        with pytest.raises(GameNodeError) as caught:
            await plane.create(**{"file": FILE, "idempotency_key": "k", **other})
        assert caught.value.code is ErrorCode.CONFLICT


async def test_the_same_key_at_the_same_time_makes_one_pipeline(plane: ControlPlane) -> None:
    made = await asyncio.gather(*(plane.create(FILE, idempotency_key="k") for _ in range(8)))
    assert len({pipeline.id for pipeline in made}) == 1


# Binding


async def test_a_pipeline_is_bound_once(plane: ControlPlane) -> None:
    await FakeAgent.join(plane, "n1")
    await FakeAgent.join(plane, "n2")
    created = await plane.create(FILE)
    orders = await asyncio.gather(
        *(plane.bind(created.id, node_id) for node_id in ("n1", "n2") * 3)
    )
    assert len([order for order in orders if order is not None]) == 1
    assert (await get(plane, created)).attempt == 1


async def test_a_cancelled_pipeline_is_not_bound(plane: ControlPlane) -> None:
    await FakeAgent.join(plane)
    created = await plane.create(FILE)
    assert (await cancel(plane, created.id)).status is Status.CANCELLED
    assert await plane.bind(created.id) is None
    assert await kinds(plane, created.id) == [
        "pipeline.created",
        "pipeline.cancel_requested",
        "step.cancelled",
        "step.cancelled",
        "pipeline.cancelled",
    ]


async def test_what_has_ended_waits_for_nothing(plane: ControlPlane) -> None:
    created = await plane.create(FILE)
    await plane.dispatcher.sweep()
    assert (await get(plane, created)).message == "no node is registered"
    assert (await cancel(plane, created.id)).waiting == ()
    await plane.dispatcher.sweep()
    assert (await get(plane, created)).message == "enough"


async def test_a_node_in_maintenance_is_not_bound_to(plane: ControlPlane) -> None:
    await FakeAgent.join(plane)
    created = await plane.create(FILE)
    await plane.nodes.change_state(
        "n1", Maintenance.MAINTENANCE, drain=None, by=USER, reason="a test"
    )
    assert await plane.bind(created.id) is None


async def wanted(plane: ControlPlane, target: Maintenance, node_id: str = "n1") -> StateChange:
    """Want a state of a node."""
    node = await plane.nodes.change_state(node_id, target, drain=None, by=USER, reason="a test")
    assert node.state_change is not None
    return node.state_change


async def test_an_enabled_node_is_bound_to_once_it_has_confirmed(plane: ControlPlane) -> None:
    await FakeAgent.join(plane)
    created = await plane.create(FILE)
    await wanted(plane, Maintenance.MAINTENANCE)
    change = await wanted(plane, Maintenance.NORMAL)
    await plane.dispatcher.sweep()
    found = await get(plane, created)
    assert (found.node_id, found.attempt) == ("", 0)
    assert found.message == "1 node: 1 in maintenance"
    assert await plane.bind(created.id) is None
    changed = asyncio.Event()
    plane.nodes.on_change(changed.set)
    await plane.nodes.states.seen(change)
    assert changed.is_set()  # the dispatcher looks at once
    await plane.dispatcher.sweep()
    assert (await get(plane, created)).node_id == "n1"


async def test_a_node_that_lost_its_state_is_told_again(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane, state_version=1)
    await wanted(plane, Maintenance.MAINTENANCE)
    change = await wanted(plane, Maintenance.NORMAL)
    await plane.nodes.states.seen(change)
    assert await plane.node_service.unconfirmed_changes(9) == []
    same = await FakeAgent.join(plane, after=agent, state_version=3)
    assert await plane.node_service.unconfirmed_changes(9) == []
    await FakeAgent.join(plane, after=same, state_version=2)  # in maintenance, by its journal
    owed = await plane.node_service.unconfirmed_changes(9)
    assert [(each.version, each.target) for each in owed] == [(3, Maintenance.NORMAL)]
    assert (await plane.nodes.get("n1")).usable_as is Maintenance.MAINTENANCE


async def test_an_order_that_is_sent_again_has_the_state_version_of_its_node(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    await wanted(plane, Maintenance.MAINTENANCE)
    await plane.nodes.states.seen(await wanted(plane, Maintenance.NORMAL))
    created = await plane.create(FILE)
    await plane.dispatcher.sweep()
    first = (await agent.orders())[0]
    again = await plane.service.order(Dispatch(created.id, 1))
    assert again == first
    assert again.state_version == 3
    await plane.nodes.states.seen(await wanted(plane, Maintenance.MAINTENANCE))
    refused = await plane.service.order(Dispatch(created.id, 1))
    assert refused == replace(again, state_version=0)


async def test_a_dispatch_grants_the_next_tries(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    await plane.create(RETRIED)
    await plane.dispatcher.sweep()
    first = await agent.take(OrderOutcome.REFUSED, "BUSY")
    assert isinstance(first, ExecuteOrder)

    async def waits() -> bool:
        return (await plane.service.list(limit=1))[0].node_id == ""

    await until(waits, timeout_s=5.0, every_s=0.005)
    await plane.dispatcher.sweep()
    second = await agent.take(orders=2)
    assert isinstance(second, ExecuteOrder)
    assert (first.dispatch.attempt, second.dispatch.attempt) == (1, 2)
    assert (first.steps[0].first_attempt, second.steps[0].first_attempt) == (1, 4)


async def test_a_simple_client_gets_no_second_attempt(plane: ControlPlane) -> None:
    await plane.nodes.register(registration(boot_id=""))
    created = await plane.create(FILE, node="n1")
    now = plane.clock.now()
    order = await plane.bind(created.id)
    assert order is not None
    await plane.service.requeue(order.dispatch, "busy", now=now)
    assert await plane.bind(created.id) is None


# Orders and their answers


async def test_what_cannot_be_placed_hides_nothing(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    stuck = [await plane.create(FILE, selector="zone=none", priority=9) for _ in range(9)]
    fits = await plane.create(FILE)
    await plane.dispatcher.sweep()
    assert (await get(plane, fits)).node_id == "n1"
    await agent.take()
    for pipeline in stuck:
        assert (await get(plane, pipeline)).message == "1 node: 1 does not match zone=none"


async def test_what_is_owed_to_those_that_are_away_hides_nothing(plane: ControlPlane) -> None:
    away = await FakeAgent.join(plane, "n0")
    for _ in range(9):
        pipeline_id = await dispatched(plane, away)
        await cancel(plane, pipeline_id, force=True)
    await plane.nodes.detach(away.connection, "gone")
    here = await FakeAgent.join(plane, "n1")
    pipeline_id = await dispatched(plane, here)
    await cancel(plane, pipeline_id)
    await plane.dispatcher.sweep()
    order = await here.take(orders=2)
    assert isinstance(order, CancelOrder)
    assert order.dispatch.pipeline_id == pipeline_id


async def test_a_lost_answer_has_the_order_sent_again(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    created = await plane.create(FILE)
    await plane.dispatcher.sweep()
    assert len(await agent.orders()) == 1
    again = await FakeAgent.join(plane, after=agent)
    await until(lambda: not plane.dispatcher._sending, timeout_s=5.0, every_s=0.005)
    await plane.dispatcher.sweep()
    order = await again.take(OrderOutcome.REPEATED)
    assert isinstance(order, ExecuteOrder)
    assert order.dispatch == Dispatch(created.id, 1)
    await acknowledged(plane, created.id)


async def test_an_unanswered_order_is_not_sent_twice_at_once(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    await plane.create(FILE)
    await plane.dispatcher.sweep()
    await plane.dispatcher.sweep()
    assert len(await agent.orders()) == 1


@pytest.mark.parametrize(
    ("reason", "status", "shown"),
    [
        ("BUSY", Status.PENDING, Reason.NONE),
        ("JOURNAL", Status.PENDING, Reason.NONE),
        ("STATE_VERSION", Status.PENDING, Reason.NONE),
        ("UNSUPPORTED", Status.FAILED, Reason.UNSUPPORTED),
        ("SOMETHING_NEW", Status.FAILED, Reason.REFUSED),
    ],
)
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_refusal(
    plane: ControlPlane, reason: str, status: Status, shown: Reason, cancelled: bool
) -> None:
    agent = await FakeAgent.join(plane)
    created = await plane.create(FILE)
    await plane.dispatcher.sweep()
    if cancelled:
        await cancel(plane, created.id)
        status, shown = Status.CANCELLED, Reason.CANCELLED_BY_USER  # nothing of it ever runs
    await agent.take(OrderOutcome.REFUSED, reason)
    await until(lambda: not plane.dispatcher._sending, timeout_s=5.0, every_s=0.005)
    found = await get(plane, created)
    assert (found.status, found.reason) == (status, shown)
    if status is Status.PENDING:
        assert (found.node_id, found.message) == ("", "node n1: because")


# Cancel


async def test_a_wanted_end_waits_for_its_node_to_be_back(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await plane.nodes.detach(agent.connection, "gone")
    wanted = await cancel(plane, pipeline_id)
    assert (wanted.status, wanted.cancel_reason) == (Status.PENDING, "enough")
    await plane.dispatcher.sweep()
    back = await FakeAgent.join(plane, after=agent, held=(held(pipeline_id),))
    await plane.dispatcher.sweep()
    order = await back.take()
    assert order == CancelOrder(
        dispatch=Dispatch(pipeline_id, 1), reason=Reason.CANCELLED_BY_USER, message="enough"
    )
    assert (await get(plane, pipeline_id)).status is Status.PENDING
    await back.report(whole(pipeline_id, Status.CANCELLED))
    assert (await get(plane, pipeline_id)).status is Status.CANCELLED


async def test_a_forced_end_is_at_once_and_its_node_still_hears_of_it(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await agent.report(step(pipeline_id, Status.RUNNING))
    ended = await cancel(plane, pipeline_id, force=True)
    assert ended.status is Status.CANCELLED
    assert "node n1 may still run it" in ended.message
    await plane.dispatcher.sweep()
    order = await agent.take(orders=2)
    assert isinstance(order, CancelOrder)
    assert order.force
    late = await agent.report(
        step(pipeline_id, Status.RUNNING),
        step(pipeline_id, Status.COMPLETED),
        whole(pipeline_id, Status.COMPLETED),
    )
    assert [result.outcome for result in late] == [ReportOutcome.STALE] * 3
    assert [result.stop for result in late] == [True, False, False]
    found = await get(plane, pipeline_id)
    assert {found.status, *(one.status for one in found.steps)} == {Status.CANCELLED}


async def test_force_reaches_a_node_that_is_still_to_answer_the_plain_cancel(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await cancel(plane, pipeline_id)
    await plane.dispatcher.sweep()
    assert len(await agent.orders()) == 2
    await cancel(plane, pipeline_id, force=True)
    plain = await agent.take(orders=2)
    await until(lambda: not plane.dispatcher._cancelling, timeout_s=5.0, every_s=0.005)
    await plane.dispatcher.sweep()
    forced = await agent.take(orders=3)
    assert isinstance(plain, CancelOrder)
    assert isinstance(forced, CancelOrder)
    assert (plain.force, forced.force) == (False, True)


async def test_many_cancels_at_once_do_not_wait_for_sweeps(tmp_path: Path) -> None:
    settings = PlaneSettings(dispatch=DispatcherSettings(batch_max=3, sweep_interval_s=60.0))
    plane = ControlPlane(tmp_path, clock=FakeClock(), settings=settings)
    await plane.feed.start()
    agent = await FakeAgent.join(plane)
    count = 10
    for pipeline_id in [await dispatched(plane, agent) for _ in range(count)]:
        await cancel(plane, pipeline_id)
    running = asyncio.create_task(plane.dispatcher.run())
    plane.dispatcher.wake()
    ends = [await agent.take(orders=count + number + 1) for number in range(count)]
    assert len({end.dispatch for end in ends if isinstance(end, CancelOrder)}) == count
    running.cancel()
    await plane.stop()


async def test_cancelling_again_changes_nothing_and_what_has_ended_is_a_conflict(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await cancel(plane, pipeline_id)
    before = await kinds(plane, pipeline_id)
    await cancel(plane, pipeline_id)
    assert await kinds(plane, pipeline_id) == before
    await agent.report(whole(pipeline_id, Status.COMPLETED))  # it was faster
    with pytest.raises(GameNodeError) as caught:
        await cancel(plane, pipeline_id)
    assert caught.value.code is ErrorCode.CONFLICT


# Reports


async def test_events_are_written_with_what_they_tell(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    reports: list[Report] = [
        step(pipeline_id, Status.RUNNING),
        step(pipeline_id, Status.COMPLETED),
        step(pipeline_id, Status.RUNNING, name="two"),
        step(pipeline_id, Status.FAILED, name="two"),
        whole(pipeline_id, Status.FAILED),
    ]
    assert {r.outcome for r in await agent.report(*reports)} == {ReportOutcome.APPLIED}
    told = [
        "pipeline.created",
        "pipeline.dispatched",
        "pipeline.running",
        "step.running",
        "step.completed",
        "step.running",
        "step.failed",
        "pipeline.failed",
        "error.pipeline",
    ]
    assert await kinds(plane, pipeline_id) == told
    again = await agent.report(*reports)
    assert ReportOutcome.APPLIED not in {result.outcome for result in again}
    assert await kinds(plane, pipeline_id) == told


async def test_a_pull_shows_how_far_it_is_and_tells_of_it_once(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    pulling = replace(step(pipeline_id, Status.RUNNING), reason=Reason.PULLING)
    for part in ("pulling game:1: 1.0 of 9.0 MB", "pulling game:1: 8.0 of 9.0 MB"):
        (result,) = await agent.report(replace(pulling, message=part))
        assert result.outcome is ReportOutcome.APPLIED
        shown = (await get(plane, pipeline_id)).steps[0]
        assert (shown.reason, shown.message) == (Reason.PULLING, part)
        assert shown.started_at is None
    await agent.report(replace(step(pipeline_id, Status.RUNNING), started_at=Instant(10**18)))
    shown = (await get(plane, pipeline_id)).steps[0]
    assert (shown.reason, shown.message, shown.started_at) == (Reason.NONE, "", 10**18)
    (late,) = await agent.report(replace(pulling, message="late"))
    assert late.outcome is ReportOutcome.REPEATED
    told = await kinds(plane, pipeline_id)
    assert told[2:] == ["pipeline.running", "step.running", "step.running"]


async def test_reports_that_come_again_stop_nothing(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent, RETRIED)
    retrying = replace(step(pipeline_id, Status.RUNNING), reason=Reason.RETRYING)
    reports: list[Report] = [
        step(pipeline_id, Status.RUNNING),
        retrying,
        step(pipeline_id, Status.RUNNING, attempt=2),
    ]
    await agent.report(*reports)
    before = await kinds(plane, pipeline_id)
    for _ in range(2):  # before its end, and behind it
        assert not any(result.stop for result in await agent.report(*reports))
        assert (await kinds(plane, pipeline_id))[: len(before)] == before
        await agent.report(step(pipeline_id, Status.COMPLETED, attempt=2))
    found = await get(plane, pipeline_id)
    assert (found.steps[0].status, found.steps[0].attempt) == (Status.COMPLETED, 2)


async def test_another_node_session_or_attempt_changes_nothing(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane, "n1")
    other = await FakeAgent.join(plane, "n2")
    pipeline_id = await dispatched(plane, agent)
    foreign = await other.report(step(pipeline_id, Status.COMPLETED))
    older = await agent.report(step(pipeline_id, Status.COMPLETED, dispatch=7))
    ungranted = await agent.report(step(pipeline_id, Status.COMPLETED, attempt=2))
    unknown = await agent.report(step(pipeline_id, Status.COMPLETED, name="nine"))
    for results in (foreign, older, ungranted, unknown):
        assert [result.outcome for result in results] == [ReportOutcome.STALE]
    await FakeAgent.join(plane, "n1", after=agent, new_session=True, held=(held(pipeline_id),))
    superseded = await plane.service.apply(
        [step(pipeline_id, Status.COMPLETED)],
        node_id="n1",
        session=agent.connection.session,
        now=plane.clock.now(),
    )
    assert superseded is None
    assert [one.status for one in (await get(plane, pipeline_id)).steps] == [Status.PENDING] * 2


async def test_what_a_superseded_session_reports_is_not_acknowledged(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await plane.node_service.register(
        registration(), session_id="another", now=plane.clock.now()
    )  # the other one has not been told yet
    end = NumberedReport(sequence=1, report=whole(pipeline_id, Status.COMPLETED))
    await plane.pipelines.hear(agent.connection, [end])
    last = (await agent.heard())[-1]
    assert isinstance(last, Closed)
    assert last.reason is CloseReason.SUPERSEDED


async def test_only_a_simple_client_may_leave_the_fences_out(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane, "n1")
    pipeline_id = await dispatched(plane, agent)
    for report in (
        step(pipeline_id, Status.RUNNING, attempt=0),
        step(pipeline_id, Status.RUNNING, dispatch=0),
        whole(pipeline_id, Status.COMPLETED, dispatch=0),
    ):
        assert [r.outcome for r in await agent.report(report)] == [ReportOutcome.STALE]
    await plane.nodes.register(registration("n2", boot_id=""))
    created = await plane.create(FILE, node="n2")
    await plane.dispatcher.sweep()
    session = plane.nodes.session_of("n2", "")
    result = await plane.pipelines.update_step_status(
        step(created.id, Status.RUNNING, attempt=0, dispatch=0), node_id="n2", session=session
    )
    assert result.outcome is ReportOutcome.APPLIED
    with pytest.raises(GameNodeError) as caught:
        await plane.pipelines.update_step_status(
            step(created.id, Status.RUNNING, name="nine"), node_id="n2", session=session
        )
    assert caught.value.code is ErrorCode.STEP_NOT_FOUND


async def test_an_end_of_the_pipeline_ends_its_steps(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await agent.report(step(pipeline_id, Status.RUNNING))
    await agent.report(whole(pipeline_id, Status.FAILED))
    found = await get(plane, pipeline_id)
    assert [(one.status, one.reason) for one in found.steps] == [
        (Status.FAILED, Reason.NONE),
        (Status.CANCELLED, Reason.SKIPPED),
    ]


# Statements


async def test_a_statement_settles_what_is_held_and_what_is_not(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    kept = await dispatched(plane, agent)
    lost = await dispatched(plane, agent)
    unwanted = await dispatched(plane, agent)
    ended = await dispatched(plane, agent)
    await cancel(plane, unwanted, force=True)
    back = await FakeAgent.join(
        plane,
        after=agent,
        held=(held(kept), held(unwanted), held(ended, whole(ended, Status.COMPLETED))),
    )
    welcome = (await back.heard())[0]
    assert welcome == Welcome(unwanted=(Dispatch(unwanted, 1),))
    assert (await get(plane, kept)).status is Status.PENDING
    assert (await get(plane, ended)).status is Status.COMPLETED
    found = await get(plane, lost)
    assert (found.status, found.reason) == (Status.FAILED, Reason.NODE_LOST)


@pytest.mark.parametrize("continued", [True, False])
async def test_an_order_that_was_never_accepted_is_sent_again_only_with_continuity(
    plane: ControlPlane, continued: bool
) -> None:
    agent = await FakeAgent.join(plane)
    created = await plane.create(FILE)
    await plane.dispatcher.sweep()
    await plane.nodes.detach(agent.connection, "gone")
    agent.connection.close(Closed(reason=CloseReason.SHUTDOWN))
    await until(lambda: not plane.dispatcher._sending, timeout_s=5.0, every_s=0.005)
    back = await FakeAgent.join(plane, after=agent if continued else None, new_session=continued)
    await plane.dispatcher.sweep()
    if continued:
        assert isinstance(await back.take(), ExecuteOrder)
    else:
        assert await back.orders() == []
        assert (await get(plane, created)).reason is Reason.NODE_LOST


async def test_nothing_is_sent_before_the_welcome(plane: ControlPlane) -> None:
    answer = await plane.nodes.register(registration())
    statement = Statement(
        node_id="n1",
        session_id=answer.session_id,
        stream_number=1,
        state_version=1,
        maintenance=Maintenance.NORMAL,
        held=(),
        boot_id="boot-1",
    )
    connection = await plane.nodes.attach(statement)
    assert connection is not None
    created = await plane.create(FILE)
    await plane.dispatcher.sweep()
    assert (await get(plane, created)).node_id == ""
    await plane.pipelines.reconcile(connection, statement)
    await plane.dispatcher.sweep()
    words = await FakeAgent(plane, answer, connection).heard()
    assert isinstance(words[0], Welcome)
    assert any(isinstance(word, FencedOrder) for word in words)


async def test_a_statement_that_a_newer_stream_has_overtaken_loses_nothing(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    newer = await FakeAgent.join(plane, after=agent)
    pipeline_id = await dispatched(plane, newer)
    late = await plane.service.reconcile(
        [], session=agent.connection.session, stream_number=1, now=plane.clock.now()
    )
    assert late is None
    assert (await get(plane, pipeline_id)).status is Status.PENDING


async def test_a_statement_is_settled_once_even_if_the_disk_was_full_in_between(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await FakeAgent.join(plane)
    lost = await dispatched(plane, agent)
    answer = agent.answer
    statement = Statement(
        node_id="n1",
        session_id=answer.session_id,
        stream_number=2,
        state_version=1,
        maintenance=Maintenance.NORMAL,
        held=(),
        boot_id="boot-1",
    )
    connection = await plane.nodes.attach(statement)
    assert connection is not None
    with monkeypatch.context() as full:
        fill_disk(plane, full)
        with pytest.raises(GameNodeError):
            await plane.pipelines.reconcile(connection, statement)
    again = FakeAgent(plane, answer, connection)
    assert await again.heard() == []
    await plane.pipelines.reconcile(connection, statement)
    assert isinstance((await again.heard())[0], Welcome)
    assert (await get(plane, lost)).reason is Reason.NODE_LOST


async def test_words_that_explain_a_wait_hold_up_no_cancel(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await cancel(plane, pipeline_id)
    await plane.create(FILE, selector="zone=none")
    fill_disk(plane, monkeypatch)
    await plane.dispatcher.sweep()
    assert isinstance(await agent.take(orders=2), CancelOrder)


async def test_reports_of_one_group_are_judged_each_by_itself(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    first, second = await dispatched(plane, agent), await dispatched(plane, agent)
    results = await asyncio.gather(
        agent.report(whole(first, Status.COMPLETED)),
        agent.report(whole(first, Status.FAILED)),
        agent.report(whole(second, Status.FAILED)),
    )
    outcomes = sorted(result.outcome for one in results for result in one)
    assert outcomes == [ReportOutcome.APPLIED, ReportOutcome.APPLIED, ReportOutcome.STALE]
    assert await write_together(plane.database) == []
