"""`plan` and `explain` over real rows, on both databases: F10."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.fake_agent import FakeAgent, dispatched, step, whole
from tests.support.plane import USER, ControlPlane, registration
from tests.support.time import FakeClock

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.explanation import Cause, Explanation
from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import NewPipeline, Reason, Status, StepReport
from gamenode.domain.placement import Misfit
from gamenode.server.pipelines.planner import Planner

FILE = "name: w\nsteps: [{name: one, container: {image: a}}]"
ZONE_B = f"{FILE}\nplacement: {{selector: zone=b}}"
ROOT = f"{FILE}\nenvs: [ROOT]"
PORT = f"{FILE}\nargs: [PORT, MAP]"


@pytest_asyncio.fixture
async def plane(tmp_path: Path, database_url: str) -> AsyncIterator[ControlPlane]:
    opened = ControlPlane(tmp_path, clock=FakeClock(), url=database_url)
    await opened.feed.start()
    yield opened
    await opened.stop()


@pytest.fixture
def planner(plane: ControlPlane) -> Planner:
    return Planner(
        pipelines=plane.pipelines, service=plane.service, nodes=plane.nodes, clock=plane.clock
    )


async def disable(plane: ControlPlane, node_id: str) -> None:
    await plane.nodes.change_state(
        node_id, Maintenance.MAINTENANCE, drain=None, by=USER, reason="fans"
    )


def causes(explanation: Explanation) -> list[str]:
    return [each.reason for each in explanation.reasons]


async def test_a_plan_says_what_a_creation_would_find_and_makes_nothing(
    plane: ControlPlane, planner: Planner
) -> None:
    await FakeAgent.join(plane, "n1")
    await FakeAgent.join(plane, "n2")
    await disable(plane, "n2")
    plan = await planner.plan(NewPipeline(file=FILE))
    assert (plan.name, plan.survey.node_id) == ("w", "n1")
    assert [(v.node_id, [o.misfit for o in v.objections]) for v in plan.survey.verdicts] == [
        ("n1", []),
        ("n2", [Misfit.MAINTENANCE]),
    ]
    assert await plane.service.list(limit=10) == []
    await plane.create(FILE)
    await plane.dispatcher.sweep()
    (created,) = await plane.service.list(limit=10)
    assert created.node_id == plan.survey.node_id


async def test_a_plan_takes_node_selector_and_envs_from_request_and_file(
    plane: ControlPlane, planner: Planner
) -> None:
    await FakeAgent.join(plane, "n1")
    never = await planner.plan(NewPipeline(file=ZONE_B, selector="!broken"))
    assert never.survey.never
    missing = await planner.plan(NewPipeline(file=ROOT))
    assert [each.reason for each in missing.survey.reasons] == [Misfit.ENV_MISSING]
    given = await planner.plan(NewPipeline(file=ROOT, envs={"ROOT": "/srv"}))
    assert given.survey.node_id == "n1"


async def test_a_plan_refuses_what_a_creation_would_with_every_mistake(
    plane: ControlPlane, planner: Planner
) -> None:
    await plane.nodes.register(registration("n1"))
    with pytest.raises(GameNodeError) as caught:
        await planner.plan(NewPipeline(file=PORT))
    assert [violation.field for violation in caught.value.violations] == ["args.PORT", "args.MAP"]
    with pytest.raises(GameNodeError) as unknown:
        await planner.plan(NewPipeline(file=FILE, node="n9"))
    assert unknown.value.code is ErrorCode.NODE_NOT_FOUND


async def test_the_queue_is_counted_by_priority_then_age(
    plane: ControlPlane, planner: Planner
) -> None:
    await plane.nodes.register(registration("n1"))
    created = [await plane.create(FILE, priority=priority) for priority in (0, 5, 0, 5, 0)]
    places = [(await planner.explain(each.id)).reasons[-1].message for each in created]
    assert places == [f"{place} of 5 in the queue" for place in (3, 1, 4, 2, 5)]
    first = await planner.explain(created[0].id)
    assert causes(first) == [Misfit.OFFLINE, Cause.QUEUE]
    assert first.survey is not None


async def test_it_is_explained_from_dispatch_to_end(plane: ControlPlane, planner: Planner) -> None:
    agent = await FakeAgent.join(plane, "n1")
    pipeline_id = await dispatched(plane, agent, FILE)
    assert causes(await planner.explain(pipeline_id)) == [Cause.DISPATCHED]
    await agent.report(step(pipeline_id, Status.RUNNING))
    assert causes(await planner.explain(pipeline_id)) == [Cause.RUNNING]
    await plane.pipelines.cancel(pipeline_id, reason="wrong", force=False, by=USER)
    wanted = await planner.explain(pipeline_id)
    assert wanted.reasons[0].message == (
        "tester wanted its end (wrong) 0.0s ago, and its node has not heard of it yet"
    )
    await plane.nodes.goodbye(agent.connection, "power")
    away = await planner.explain(pipeline_id)
    assert causes(away) == [Cause.CANCEL_WANTED, Cause.UNREACHABLE, Cause.RUNNING]
    failed = StepReport(
        pipeline_id=pipeline_id,
        step="one",
        status=Status.FAILED,
        reason=Reason.EXIT_CODE,
        exit_code=3,
        message="exit code 3",
        pipeline_attempt=1,
        attempt=1,
        run=1,
    )
    await agent.report(failed)
    over = await planner.explain(pipeline_id)
    assert over.reasons[-1].message == "every step has ended, and node n1 is about to say so"


async def test_an_unknown_pipeline_is_not_found(planner: Planner) -> None:
    with pytest.raises(GameNodeError) as caught:
        await planner.explain("019ab000-0000-7000-8000-000000000009")
    assert caught.value.code is ErrorCode.PIPELINE_NOT_FOUND


async def test_what_a_pipeline_holds_is_shown_until_its_node_says_that_it_ended(
    plane: ControlPlane,
) -> None:
    agent = await FakeAgent.join(plane, "n1")
    file = (
        "name: w\nsteps: [{name: one, retries: {max: 2}, container: {image: a, ports: ['81:80']}}]"
    )
    pipeline_id = await dispatched(plane, agent, file)
    bound = await plane.service.get(pipeline_id)
    assert bound.reservation is not None
    assert bound.reservation.ports == ("81/tcp",)
    assert bound.steps[0].granted_to == 3
    (listed,) = await plane.service.list(limit=10)
    assert listed.reservation == bound.reservation
    await agent.report(whole(pipeline_id, Status.COMPLETED))
    assert (await plane.service.get(pipeline_id)).reservation is None
