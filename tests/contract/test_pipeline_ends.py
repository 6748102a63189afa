"""How pipelines end when their nodes do not do as they should: RA1, RA3, RL3, RL4, F8, F12."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.fake_agent import (
    FILE,
    FakeAgent,
    cancel,
    dispatched,
    get,
    held,
    kinds,
    step,
    whole,
)
from tests.support.plane import USER, ControlPlane, PlaneSettings, registration
from tests.support.time import FakeClock, until

from gamenode.domain.command import (
    CancelOrder,
    Closed,
    CloseReason,
    Dispatch,
    ExecuteOrder,
    ExtendOrder,
    Welcome,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogKey
from gamenode.domain.node import ConditionType
from gamenode.domain.pipeline import Pipeline, Reason, ReportOutcome, Status
from gamenode.server.pipelines.dispatcher import DispatcherSettings
from gamenode.server.pipelines.manager import PipelineSettings

FAIL = f"on_lost: fail\n{FILE}"
RESTART = f"on_lost: restart\n{FILE}"
TIMED = (
    "name: w\ntimeout: 1h\nsteps: [{name: one, timeout: 5m, container: {image: a}},"
    " {name: two, container: {image: a}}]"
)
THREE = (
    "name: w\nargs: [{name: A, default: x}]\nsteps: [{name: one, container: {image: a}},"
    " {name: two, container: {image: a}}, {name: three, when: always, container: {image: a}}]"
)


@pytest_asyncio.fixture
async def plane(tmp_path: Path, database_url: str) -> AsyncIterator[ControlPlane]:
    settings = PlaneSettings(
        dispatch=DispatcherSettings(refused_wait_s=0.0),
        pipelines=PipelineSettings(lost_fail_s=900.0, restarts_max=2),
    )
    opened = ControlPlane(tmp_path, clock=FakeClock(), url=database_url, settings=settings)
    await opened.feed.start()
    yield opened
    await opened.stop()


def pass_time(plane: ControlPlane, seconds: float) -> None:
    assert isinstance(plane.clock, FakeClock)
    plane.clock.advance(seconds)


async def running(plane: ControlPlane, agent: FakeAgent, file: str = FILE) -> str:
    """Return a pipeline whose first step runs."""
    pipeline_id = await dispatched(plane, agent, file)
    await agent.report(step(pipeline_id, Status.RUNNING))
    return pipeline_id


async def leave(plane: ControlPlane, agent: FakeAgent) -> None:
    """Take a node offline."""
    await plane.nodes.goodbye(agent.connection, "a test")


async def fence(plane: ControlPlane, node_id: str = "n1") -> None:
    await plane.pipelines.fence_node(node_id, reason="it burnt", by=USER)


def ends(pipeline: Pipeline) -> list[tuple[Status, Reason]]:
    """Return how a pipeline and its steps ended."""
    return [
        (pipeline.status, pipeline.reason),
        *((one.status, one.reason) for one in pipeline.steps),
    ]


async def lingering(plane: ControlPlane) -> list[str]:
    found = await plane.service.lingering()
    return [dispatch.pipeline_id for dispatches in found.values() for dispatch in dispatches]


# What does not wait (`on_lost: fail`)


async def test_what_does_not_wait_fails_when_its_node_has_been_away_for_too_long(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    fails, waits = await running(plane, agent, FAIL), await running(plane, agent)
    await leave(plane, agent)
    await plane.lost.sweep()
    pass_time(plane, 899.0)
    await plane.lost.sweep()
    assert (await get(plane, fails)).status is Status.RUNNING
    pass_time(plane, 1.0)
    await plane.lost.sweep()
    found = await get(plane, fails)
    assert ends(found) == [
        (Status.FAILED, Reason.NODE_LOST),
        (Status.FAILED, Reason.NODE_LOST),
        (Status.CANCELLED, Reason.SKIPPED),
    ]
    assert found.message == "node n1 has been offline for 900 s; it may still run there"
    assert found.may_still_run
    assert await lingering(plane) == [fails]
    assert (await get(plane, waits)).status is Status.RUNNING


async def test_a_node_that_came_back_in_between_gets_the_whole_time_again(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, FAIL)
    await leave(plane, agent)
    await plane.lost.sweep()
    pass_time(plane, 600.0)
    back = await FakeAgent.join(plane, after=agent, held=(held(pipeline_id),))
    pass_time(plane, 1.0)
    await leave(plane, back)
    for _ in range(2):
        await plane.lost.sweep()
        pass_time(plane, 600.0)
    assert (await get(plane, pipeline_id)).status is Status.RUNNING
    await plane.lost.sweep()
    assert (await get(plane, pipeline_id)).status is Status.FAILED


async def test_what_was_given_up_is_ended_when_its_node_is_back(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, FAIL)
    await leave(plane, agent)
    await plane.lost.sweep()
    pass_time(plane, 900.0)
    await plane.lost.sweep()
    back = await FakeAgent.join(plane, after=agent, held=(held(pipeline_id),))
    assert (await back.heard())[0] == Welcome(unwanted=(Dispatch(pipeline_id, 1),))
    await plane.dispatcher.sweep()
    order = await back.take()
    assert order == CancelOrder(
        dispatch=Dispatch(pipeline_id, 1),
        reason=Reason.NODE_LOST,
        message="on_lost: fail",
        force=True,
    )
    assert await lingering(plane) == [pipeline_id]
    late = await back.report(whole(pipeline_id, Status.CANCELLED))
    assert late[0].outcome is ReportOutcome.STALE
    assert await lingering(plane) == []
    found = await get(plane, pipeline_id)
    assert (found.status, found.may_still_run) == (Status.FAILED, False)


async def test_a_cancel_that_its_node_never_heard_of_is_what_it_ends_as(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, FAIL)
    await leave(plane, agent)
    await cancel(plane, pipeline_id)
    await plane.lost.sweep()
    pass_time(plane, 900.0)
    await plane.lost.sweep()
    found = await get(plane, pipeline_id)
    assert (found.status, found.reason) == (Status.CANCELLED, Reason.CANCELLED_BY_USER)
    assert found.may_still_run


@pytest.mark.parametrize("holds", [True, False])
async def test_a_forced_end_is_listed_until_its_node_has_let_go(
    plane: ControlPlane, holds: bool
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent)
    await cancel(plane, pipeline_id, force=True)
    assert await lingering(plane) == [pipeline_id]
    back = await FakeAgent.join(plane, after=agent, held=(held(pipeline_id),) if holds else ())
    assert await lingering(plane) == ([pipeline_id] if holds else [])
    assert (await plane.service.owed_nodes()).ends == ({"n1"} if holds else set())
    await back.report(whole(pipeline_id, Status.CANCELLED))
    assert await lingering(plane) == []


# What begins anew (`on_lost: restart`)


@pytest.mark.parametrize("reason", [Reason.NODE_DISABLED, Reason.DRAINED, Reason.AGENT_STOPPED])
async def test_what_its_node_ended_begins_anew_elsewhere(
    plane: ControlPlane, reason: Reason
) -> None:
    agent = await FakeAgent.join(plane, "n1")
    pipeline_id = await dispatched(plane, agent, RESTART)
    await agent.report(
        step(pipeline_id, Status.RUNNING),
        step(pipeline_id, Status.COMPLETED),
        step(pipeline_id, Status.RUNNING, name="two"),
        replace(step(pipeline_id, Status.CANCELLED, name="two"), reason=reason),
        replace(whole(pipeline_id, Status.CANCELLED), reason=reason),
    )
    await leave(plane, agent)
    waiting = await get(plane, pipeline_id)
    assert ends(waiting) == [
        (Status.PENDING, Reason.RETRYING),
        (Status.PENDING, Reason.NONE),
        (Status.PENDING, Reason.NONE),
    ]
    assert waiting.message == f"n1 ended attempt 1: {reason}"
    other = await FakeAgent.join(plane, "n2")
    await plane.dispatcher.sweep()
    order = await other.take()
    assert isinstance(order, ExecuteOrder)
    assert order.dispatch == Dispatch(pipeline_id, 2)
    assert [one.first_attempt for one in order.steps] == [2, 2]
    late = await FakeAgent.join(plane, "n1", after=agent, held=())
    stale = await late.report(step(pipeline_id, Status.COMPLETED, name="two"))
    assert stale[0].outcome is ReportOutcome.STALE  # P3
    await other.report(
        step(pipeline_id, Status.RUNNING, attempt=2, dispatch=2),
        step(pipeline_id, Status.COMPLETED, attempt=2, dispatch=2),
        step(pipeline_id, Status.COMPLETED, name="two", attempt=2, dispatch=2),
        whole(pipeline_id, Status.COMPLETED, dispatch=2),
    )
    done = await get(plane, pipeline_id)
    assert (done.status, done.reason, done.message) == (Status.COMPLETED, Reason.NONE, "")
    assert (done.node_id, [one.attempt for one in done.steps]) == ("n2", [2, 2])
    assert "pipeline.restarted" in await kinds(plane, pipeline_id)


async def test_a_log_stays_its_node_s_own_whoever_makes_the_next_attempt(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane, "n1")
    pipeline_id = await running(plane, agent, RESTART)
    ended = replace(
        step(pipeline_id, Status.CANCELLED), reason=Reason.NODE_DISABLED, log_length_bytes=9
    )
    whole_end = replace(whole(pipeline_id, Status.CANCELLED), reason=Reason.NODE_DISABLED)
    await agent.report(ended, whole_end)
    await leave(plane, agent)
    other = await FakeAgent.join(plane, "n2")
    await plane.dispatcher.sweep()
    await other.take()
    first, second = (LogKey(pipeline_id, "one", attempt) for attempt in (1, 2))
    for key, node_id, owns in (
        (first, "n1", True),
        (second, "n2", True),
        (first, "n2", False),
        (second, "n1", False),
    ):
        if owns:
            await plane.pipelines.check_log_owner(key, node_id)
            continue
        with pytest.raises(GameNodeError) as caught:
            await plane.pipelines.check_log_owner(key, node_id)
        assert caught.value.code is ErrorCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.EXIT_CODE, Status.FAILED),
        (Reason.OUTCOME_UNKNOWN, Status.FAILED),
        (Reason.TIMEOUT, Status.FAILED),
        (Reason.CANCELLED_BY_USER, Status.CANCELLED),
    ],
)
async def test_what_its_node_did_not_end_does_not_begin_anew(
    plane: ControlPlane, reason: Reason, status: Status
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, RESTART)
    await agent.report(replace(whole(pipeline_id, status), reason=reason))
    found = await get(plane, pipeline_id)
    assert (found.status, found.reason) == (status, reason)


async def test_a_cancelled_pipeline_does_not_begin_anew(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, RESTART)
    await cancel(plane, pipeline_id)
    await FakeAgent.join(plane, after=agent, held=())
    found = await get(plane, pipeline_id)
    assert (found.status, found.reason) == (Status.CANCELLED, Reason.CANCELLED_BY_USER)


async def test_what_its_node_does_not_know_any_more_begins_anew_so_often_and_no_more(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, RESTART)
    for dispatch in (2, 3):
        await leave(plane, agent)
        agent = await FakeAgent.join(plane, boot_id=f"boot-{dispatch}")
        assert (await get(plane, pipeline_id)).status is Status.PENDING
        await plane.dispatcher.sweep()
        order = await agent.take()
        assert isinstance(order, ExecuteOrder)
        assert order.dispatch == Dispatch(pipeline_id, dispatch)
        await agent.report(step(pipeline_id, Status.RUNNING, attempt=dispatch, dispatch=dispatch))
    await leave(plane, agent)
    await FakeAgent.join(plane, boot_id="boot-4")
    found = await get(plane, pipeline_id)
    assert (found.status, found.reason) == (Status.FAILED, Reason.NODE_LOST)


@pytest.mark.parametrize(
    ("file", "boot_id"),
    [
        (RESTART, "boot-1"),  # the journal alone was lost: what it knew of may live
        (
            RESTART.replace("image: a", "image: a, restart: always").replace(
                "{name: one", "{name: one, type: service"
            ),
            "boot-2",
        ),
    ],
)
async def test_what_may_live_on_a_host_that_lost_its_journal_does_not_begin_anew(
    plane: ControlPlane, file: str, boot_id: str
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, file)
    await leave(plane, agent)
    await FakeAgent.join(plane, boot_id=boot_id)
    found = await get(plane, pipeline_id)
    assert (found.status, found.reason) == (Status.FAILED, Reason.NODE_LOST)


async def test_time_alone_never_makes_a_second_attempt(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent, RESTART)
    await leave(plane, agent)
    await FakeAgent.join(plane, "n2")
    for _ in range(3):
        pass_time(plane, 1e6)
        await plane.lost.sweep()
        await plane.dispatcher.sweep()
    found = await get(plane, pipeline_id)
    assert (found.status, found.node_id, found.attempt) == (Status.RUNNING, "n1", 1)


# Fencing


async def test_a_fence_frees_what_was_bound(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    waits, restarts = await running(plane, agent), await running(plane, agent, RESTART)
    wanted, forced = await running(plane, agent), await running(plane, agent)
    await leave(plane, agent)
    await cancel(plane, wanted)
    await cancel(plane, forced, force=True)
    await fence(plane)
    found = {one: await get(plane, one) for one in (waits, restarts, wanted)}
    assert (found[waits].status, found[waits].reason) == (Status.FAILED, Reason.NODE_LOST)
    assert found[waits].message == "node n1 was fenced by tester: it burnt"
    assert (found[restarts].status, found[restarts].node_id) == (Status.PENDING, "")
    assert found[wanted].status is Status.CANCELLED
    assert await lingering(plane) == []
    assert not any(await plane.service.owed_nodes())
    node = await plane.nodes.get("n1")
    assert [(c.type, c.reason) for c in node.conditions] == [(ConditionType.FENCED, "it burnt")]
    other = await FakeAgent.join(plane, "n2")
    await plane.dispatcher.sweep()
    order = await other.take()
    assert isinstance(order, ExecuteOrder)
    assert order.dispatch == Dispatch(restarts, 2)


async def test_a_fenced_host_that_lives_after_all_must_end_everything(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    kept, restarts = await running(plane, agent), await running(plane, agent, RESTART)
    await leave(plane, agent)
    await fence(plane)
    # Its old session says nothing any more.
    assert plane.nodes.session_of("n1", agent.answer.session_id) is None
    reported = await plane.service.apply(
        [whole(kept, Status.COMPLETED)],
        node_id="n1",
        session=agent.connection.session,
        now=plane.clock.now(),
    )
    assert reported is None
    back = await FakeAgent.join(
        plane, after=agent, new_session=True, held=(held(kept), held(restarts))
    )
    assert not back.answer.continuation
    welcome = (await back.heard())[0]
    assert isinstance(welcome, Welcome)
    assert set(welcome.unwanted) == {Dispatch(kept, 1), Dispatch(restarts, 1)}
    late = await back.report(whole(restarts, Status.COMPLETED), whole(kept, Status.COMPLETED))
    assert {result.outcome for result in late} == {ReportOutcome.STALE}
    assert (await plane.nodes.get("n1")).conditions == ()
    await plane.dispatcher.sweep()
    assert (await get(plane, restarts)).attempt == 2  # it is a node like any other again


async def test_a_fence_of_what_is_online_or_unknown_is_refused(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent)
    with pytest.raises(GameNodeError) as caught:
        await fence(plane)
    assert caught.value.code is ErrorCode.CONFLICT
    assert "gamenode nodes disable n1" in caught.value.hint
    assert (await get(plane, pipeline_id)).status is Status.RUNNING
    with pytest.raises(GameNodeError) as caught:
        await fence(plane, "n9")
    assert caught.value.code is ErrorCode.NODE_NOT_FOUND


async def test_a_fence_again_changes_nothing(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    await leave(plane, agent)
    await fence(plane)
    epoch, told = (await plane.nodes.get("n1")).session_epoch, len(await plane.events())
    await fence(plane)
    assert ((await plane.nodes.get("n1")).session_epoch, len(await plane.events())) == (epoch, told)


async def test_a_fenced_simple_client_is_back_with_a_heartbeat_and_gets_no_second_attempt(
    plane: ControlPlane,
) -> None:
    await plane.nodes.register(registration(boot_id=""))
    file = RESTART.replace("name: w", "name: w\nplacement: {node: n1}")
    created = await plane.create(file)
    assert await plane.bind(created.id) is not None
    pass_time(plane, 60.0)
    await plane.nodes.judge_once()
    await fence(plane)
    assert (await get(plane, created)).status is Status.PENDING
    assert await plane.bind(created.id) is None  # RL4


# Extension


async def extended(plane: ControlPlane, pipeline_id: str, by_s: float, key: str = "") -> Pipeline:
    return await plane.pipelines.extend(pipeline_id, by_s, key=key, by=USER)


async def test_an_extension_reaches_its_node_as_a_total_until_it_is_known_there(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent, TIMED)
    assert (await extended(plane, pipeline_id, 60.0)).extended_s == 60.0
    await plane.dispatcher.sweep()
    await agent.take(orders=2)
    await until(lambda: not plane.dispatcher._extending, timeout_s=5.0, every_s=0.005)
    assert (await extended(plane, pipeline_id, 30.0)).extended_s == 90.0
    await plane.dispatcher.sweep()
    assert (await agent.orders())[1:] == [
        ExtendOrder(dispatch=Dispatch(pipeline_id, 1), extended_s=60.0),
        ExtendOrder(dispatch=Dispatch(pipeline_id, 1), extended_s=90.0),
    ]
    await plane.nodes.detach(agent.connection, "gone before it answered")
    back = await FakeAgent.join(plane, after=agent, held=(held(pipeline_id),))

    async def sent_again() -> bool:
        await plane.dispatcher.sweep()
        return len(await back.orders()) == 1

    agent.connection.close(Closed(reason=CloseReason.SHUTDOWN))
    await until(sent_again, timeout_s=5.0, every_s=0.005)
    await back.take()
    await until(lambda: not plane.dispatcher._extending, timeout_s=5.0, every_s=0.005)
    await plane.dispatcher.sweep()
    assert len(await back.orders()) == 1


async def test_a_queued_pipeline_is_extended_with_its_order(plane: ControlPlane) -> None:
    created = await plane.create(TIMED)
    await extended(plane, created.id, 60.0)
    agent = await FakeAgent.join(plane)
    await plane.dispatcher.sweep()
    order = await agent.take()
    assert isinstance(order, ExecuteOrder)
    assert (order.extended_s, order.timeout_s) == (60.0, 3600.0)
    await agent.report(step(created.id, Status.RUNNING))
    await plane.dispatcher.sweep()
    assert len(await agent.orders()) == 1


async def test_the_same_key_extends_once(plane: ControlPlane) -> None:
    created = await plane.create(TIMED)
    for _ in range(2):
        assert (await extended(plane, created.id, 60.0, "k")).extended_s == 60.0
    with pytest.raises(GameNodeError) as caught:
        await extended(plane, created.id, 61.0, "k")
    assert caught.value.code is ErrorCode.CONFLICT


async def test_what_has_no_limit_or_no_time_left_is_not_extended(plane: ControlPlane) -> None:
    unlimited, over = await plane.create(FILE), await plane.create(TIMED)
    await cancel(plane, over.id)
    agent = await FakeAgent.join(plane)
    await cancel(plane, unlimited.id)
    ending = await running(plane, agent, TIMED)
    await cancel(plane, ending)
    other = await plane.create(FILE)
    for pipeline_id, words in (
        (other.id, "has no limit"),
        (over.id, "has ended already"),
        (ending, "is being cancelled"),
    ):
        with pytest.raises(GameNodeError, match=words) as caught:
            await extended(plane, pipeline_id, 1.0)
        assert caught.value.code is ErrorCode.CONFLICT
    with pytest.raises(GameNodeError) as caught:
        await extended(plane, "none", 1.0)
    assert caught.value.code is ErrorCode.PIPELINE_NOT_FOUND


# Retry


async def failed(plane: ControlPlane, agent: FakeAgent) -> str:
    """Return a pipeline whose second step failed."""
    pipeline_id = await running(plane, agent, THREE)
    await agent.report(
        step(pipeline_id, Status.COMPLETED),
        step(pipeline_id, Status.RUNNING, name="two"),
        step(pipeline_id, Status.FAILED, name="two"),
        step(pipeline_id, Status.COMPLETED, name="three"),
        whole(pipeline_id, Status.FAILED),
    )
    return pipeline_id


async def retried(
    plane: ControlPlane, pipeline_id: str, *, from_failed: bool = False, key: str = ""
) -> Pipeline:
    return await plane.pipelines.retry(pipeline_id, from_failed=from_failed, key=key, by=USER)


async def test_a_retry_runs_everything_again_and_names_what_it_repeats(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    first = await failed(plane, agent)
    again = await retried(plane, first)
    assert (again.retry_of, again.args, again.node_id) == (first, {"A": "x"}, "")
    assert {one.status for one in again.steps} == {Status.PENDING}
    await plane.dispatcher.sweep()
    order = await agent.take(orders=2)
    assert isinstance(order, ExecuteOrder)
    assert [(one.name, one.first_attempt) for one in order.steps] == [
        ("one", 1),
        ("two", 1),
        ("three", 1),
    ]


async def test_a_retry_from_the_failed_step_leaves_out_what_went_well(
    plane: ControlPlane,
) -> None:
    await FakeAgent.join(plane, "n0")  # not where it ran, and with nothing to do
    agent = await FakeAgent.join(plane, "n1")
    pipeline = await plane.create(THREE, node="n1")
    await plane.dispatcher.sweep()
    await agent.take()
    await agent.report(
        step(pipeline.id, Status.RUNNING),
        step(pipeline.id, Status.COMPLETED),
        step(pipeline.id, Status.FAILED, name="two"),
        whole(pipeline.id, Status.FAILED),
    )
    first = pipeline.id
    for number in (2, 3):
        again = await retried(plane, first, from_failed=True)
        assert ends(again)[1:] == [
            (Status.CANCELLED, Reason.SKIPPED),
            (Status.PENDING, Reason.NONE),
            (Status.PENDING, Reason.NONE),
        ]
        assert again.steps[0].message == f"completed in pipeline {pipeline.id}"
        await plane.dispatcher.sweep()
        order = await agent.take(orders=number)
        assert isinstance(order, ExecuteOrder)
        assert [one.name for one in order.steps] == ["two", "three"]
        results = await agent.report(
            step(again.id, Status.RUNNING, name="two"),
            step(again.id, Status.FAILED, name="two"),
            whole(again.id, Status.FAILED),
        )
        assert {result.outcome for result in results} == {ReportOutcome.APPLIED}
        first = again.id
    assert (await plane.service.original(first)).ran == {"two", "three"}
    whole_again = await retried(plane, first)
    assert [one.status for one in whole_again.steps] == [Status.PENDING] * 3


async def test_only_what_went_badly_is_retried_and_the_same_key_retries_once(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane)
    other = await failed(plane, agent)
    queued = await plane.create(FILE)
    with pytest.raises(GameNodeError, match="is PENDING") as caught:
        await retried(plane, queued.id)
    assert caught.value.code is ErrorCode.CONFLICT
    await cancel(plane, queued.id)
    made = [await retried(plane, queued.id, key="k") for _ in range(2)]
    assert made[0].id == made[1].id
    with pytest.raises(GameNodeError) as caught:
        await retried(plane, other, key="k")
    assert caught.value.code is ErrorCode.CONFLICT
    with pytest.raises(GameNodeError) as caught:
        await retried(plane, "none")
    assert caught.value.code is ErrorCode.PIPELINE_NOT_FOUND


async def test_what_may_still_run_is_not_continued_beside_itself(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await running(plane, agent)
    await cancel(plane, pipeline_id, force=True)
    with pytest.raises(GameNodeError, match="may still run on node n1") as caught:
        await retried(plane, pipeline_id, from_failed=True)
    assert caught.value.code is ErrorCode.CONFLICT
    await agent.report(whole(pipeline_id, Status.CANCELLED))
    assert (await retried(plane, pipeline_id, from_failed=True)).retry_of == pipeline_id
