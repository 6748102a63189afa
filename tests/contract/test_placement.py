"""What nodes have, what dispatches take of it, and who frees it: F7, RA3, RC5."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from tests.support.fake_agent import FakeAgent, acknowledged, cancel, get, held, step, whole
from tests.support.plane import USER, ControlPlane, PlaneSettings, registration
from tests.support.time import FakeClock, until

from gamenode.domain.command import (
    Dispatch,
    ExecuteOrder,
    HeldPipeline,
    LivingInstances,
    OrderOutcome,
    Statement,
)
from gamenode.domain.container import PortRange
from gamenode.domain.inventory import Cpu, Gpu, Hardware, Inventory, Memory
from gamenode.domain.node import Maintenance, Offer
from gamenode.domain.pipeline import Pipeline, Reason, Status
from gamenode.domain.placement import Reserved
from gamenode.server.pipelines.dispatcher import DispatcherSettings

GIB = 1024**3
HOST = Inventory(
    hardware=Hardware(
        cpu=(Cpu(cores=4),),
        memory=Memory(total_bytes=8 * GIB),
        gpu=(Gpu(uuid="GPU-1", memory_bytes=8 * GIB),),
    )
)
OFFER = Offer(gpu_slots=2, ports=PortRange(20000, 20001))
GAME = """
name: game
placement: {cpu: 1, memory: 1GiB, gpu: {slots: 1, memory: 3GiB}}
concurrency: {group: games, limit: 5}
steps:
  - name: one
    type: service
    container: {image: a, ports: ["7777:7777/udp", "8080"]}
"""
SLOT = "{name: w, placement: {gpu: {slots: 2}}, steps: [{name: one, container: {image: a}}]}"
PORT = "{name: w, steps: [{name: one, container: {image: a, ports: ['7777:1']}}]}"
GROUP = "{name: w, concurrency: {group: g, limit: 1}, steps: [{name: one, container: {image: a}}]}"
PLAIN = "{name: w, steps: [{name: one, container: {image: a}}]}"


@pytest_asyncio.fixture
async def plane(tmp_path: Path, database_url: str) -> AsyncIterator[ControlPlane]:
    settings = PlaneSettings(dispatch=DispatcherSettings(refused_wait_s=0.0))
    opened = ControlPlane(tmp_path, clock=FakeClock(), url=database_url, settings=settings)
    await opened.feed.start()
    yield opened
    await opened.stop()


async def join(
    plane: ControlPlane,
    node_id: str = "n1",
    *,
    held: tuple[HeldPipeline, ...] = (),
    living: Collection[str] = (),
    after: FakeAgent | None = None,
) -> FakeAgent:
    """Register a node that has something to give (or go on with it), and state what it holds."""
    if after is None:
        said = replace(registration(node_id), inventory=HOST, offer=OFFER)
        answer, number = await plane.nodes.register(said), 1
    else:
        answer, number = after.answer, after.connection.stream_number + 1
    statement = Statement(
        node_id=node_id,
        session_id=answer.session_id,
        stream_number=number,
        state_version=1,
        maintenance=Maintenance.NORMAL,
        held=held,
        boot_id="boot-1",
        instances=LivingInstances(frozenset(living)),
    )
    connection = await plane.nodes.attach(statement)
    assert connection is not None
    await plane.pipelines.reconcile(connection, statement)
    return FakeAgent(plane, answer, connection)


async def start(plane: ControlPlane, agent: FakeAgent, file: str, **request: Any) -> ExecuteOrder:
    """Create a pipeline, and have the agent take it."""
    before = len(await agent.orders())
    created = await plane.create(file, **request)
    await plane.dispatcher.sweep()
    order = await agent.take(orders=before + 1)
    assert isinstance(order, ExecuteOrder)
    await acknowledged(plane, created.id)
    return order


async def waits(plane: ControlPlane, file: str) -> Pipeline:
    """Create a pipeline that finds no room."""
    created = await plane.create(file)
    await plane.dispatcher.sweep()
    found = await get(plane, created)
    assert found.node_id == ""
    return found


async def placed(plane: ControlPlane, pipeline: Pipeline) -> bool:
    await plane.dispatcher.sweep()
    return bool((await get(plane, pipeline)).node_id)


async def bind(plane: ControlPlane, pipelines: Collection[Pipeline], *on: str) -> int:
    """Bind each to a node, past the dispatcher and at the same time; return how many were."""
    queue = await plane.service.queue({})
    rows = await plane.service.queued((), 100)
    demands = {row.id: queue.demands[row.demand_id] for row in rows}
    orders = await asyncio.gather(
        *(
            plane.bind(each.id, on[n % len(on)], demand=demands[each.id])
            for n, each in enumerate(pipelines)
        )
    )
    return len([order for order in orders if order is not None])


# What reaches the container


async def test_what_was_assigned_is_in_the_order_and_again_in_a_resend(plane: ControlPlane) -> None:
    agent = await join(plane)
    created = await plane.create(GAME)
    await plane.dispatcher.sweep()
    order = await agent.take()
    assert isinstance(order, ExecuteOrder)
    container = order.steps[0].container
    assert container.ports == ("7777:7777/udp", "20000:8080")
    assert [d.device_ids for d in container.devices_reserved] == [("GPU-1",)]
    again = await plane.service.order(Dispatch(created.id, 1))
    assert again is not None
    assert again.steps == order.steps


async def test_a_gpu_goes_only_to_the_containers_that_reserve_one(plane: ControlPlane) -> None:
    agent = await join(plane)
    order = await start(
        plane,
        agent,
        "{name: w, placement: {gpu: {}}, steps: [{name: one, container: {image: a}}, {name: two, "
        "container: {image: a, deploy: {resources: {reservations: {devices: "
        "[{capabilities: [gpu, video], count: 1}]}}}}}]}",
    )
    one, two = (s.container.devices_reserved for s in order.steps)
    assert one == ()
    assert [(d.capabilities, d.count, d.device_ids) for d in two] == [
        (("gpu", "video"), 0, ("GPU-1",))
    ]


# Races


@pytest.mark.parametrize("file", [SLOT, PORT, GROUP])
async def test_of_two_that_want_the_last_of_something_one_is_bound(
    plane: ControlPlane, file: str
) -> None:
    await join(plane)
    both = [await plane.create(file) for _ in range(2)]
    assert await bind(plane, both, "n1") == 1


async def test_a_group_is_full_on_every_node(plane: ControlPlane) -> None:
    await join(plane, "n1")
    await join(plane, "n2")
    both = [await plane.create(GROUP) for _ in range(2)]
    assert await bind(plane, both, "n1", "n2") == 1


async def test_no_sequence_of_starts_and_ends_gives_out_more_than_there_is(
    plane: ControlPlane,
) -> None:
    random = Random(7)
    agent = await join(plane)
    running: list[str] = []
    for _ in range(12):
        before = len(await agent.orders())
        file = random.choice([GAME, SLOT, PORT, GROUP, PLAIN])
        created = await plane.create(file)
        if await placed(plane, created):
            await agent.take(orders=before + 1)
            running.append(created.id)
        taken = (await plane.service.reserved()).get("n1", Reserved())
        assert taken.pipelines == len(running)
        assert (taken.cpu_millis <= 4000, taken.memory_bytes <= 8 * GIB) == (True, True)
        assert all(gpu.slots <= 2 for gpu in taken.gpus.values())
        if random.random() < 0.5 and running:
            ended = running.pop(random.randrange(len(running)))
            await agent.report(whole(ended, Status.FAILED))
            await plane.pipelines.hear_instances(agent.connection, LivingInstances())
        for waiting in await plane.service.list(limit=100, status=Status.PENDING):
            if not waiting.node_id:
                await cancel(plane, waiting.id)


# Who frees it


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
async def test_the_end_that_the_agent_states_frees_what_a_pipeline_had(
    plane: ControlPlane, status: Status
) -> None:
    agent = await join(plane)
    order = await start(plane, agent, SLOT)
    waiting = await waits(plane, SLOT)
    assert waiting.message == "1 node: 1 has no GPU with 2 free slots"
    await agent.report(whole(order.dispatch.pipeline_id, status))
    assert await placed(plane, waiting)


async def test_a_forced_cancel_keeps_it_until_the_agent_states_the_end(plane: ControlPlane) -> None:
    agent = await join(plane)
    order = await start(plane, agent, SLOT)
    await cancel(plane, order.dispatch.pipeline_id, force=True)
    waiting = await waits(plane, SLOT)
    await agent.report(whole(order.dispatch.pipeline_id, Status.CANCELLED))
    assert await placed(plane, waiting)


@pytest.mark.parametrize("holds", [True, False])
async def test_a_forced_cancel_keeps_it_while_the_statement_has_the_dispatch(
    plane: ControlPlane, holds: bool
) -> None:
    agent = await join(plane)
    order = await start(plane, agent, SLOT)
    await cancel(plane, order.dispatch.pipeline_id, force=True)
    waiting = await waits(plane, SLOT)
    stated = (held(order.dispatch.pipeline_id),) if holds else ()
    await join(plane, held=stated, after=agent)
    assert await placed(plane, waiting) is not holds


async def test_a_refusal_frees_it(plane: ControlPlane) -> None:
    agent = await join(plane)
    await plane.create(SLOT)
    await plane.dispatcher.sweep()
    await agent.take(OrderOutcome.REFUSED, "POLICY")
    later = await plane.create(SLOT)
    await until(lambda: placed(plane, later), timeout_s=5.0, every_s=0.005)


async def test_what_a_node_lost_is_free(plane: ControlPlane) -> None:
    agent = await join(plane)
    order = await start(plane, agent, SLOT)
    waiting = await waits(plane, SLOT)
    await join(plane, after=agent)
    assert (await get(plane, order.dispatch.pipeline_id)).reason == "NODE_LOST"
    assert await placed(plane, waiting)


async def test_a_removed_node_holds_nothing(plane: ControlPlane) -> None:
    agent = await join(plane)
    await start(plane, agent, GAME)
    await plane.pipelines.remove_node("n1", force=True, reason="a test", by=USER)
    assert await plane.service.reserved() == {}
    assert await plane.service.running() == {}


async def test_what_was_not_acknowledged_and_is_sent_again_keeps_it(plane: ControlPlane) -> None:
    agent = await join(plane)
    created = await plane.create(SLOT)
    await plane.dispatcher.sweep()
    again = await join(plane, after=agent)
    await plane.dispatcher.sweep()
    order = await again.take()
    assert isinstance(order, ExecuteOrder)
    assert order.dispatch == Dispatch(created.id, 1)
    assert (await waits(plane, SLOT)).node_id == ""


# Services


async def game_over(agent: FakeAgent, order: ExecuteOrder) -> str:
    """End a pipeline whose service lives on; return its instance."""
    pipeline_id = order.dispatch.pipeline_id
    await agent.report(step(pipeline_id, Status.COMPLETED), whole(pipeline_id, Status.COMPLETED))
    return order.steps[0].instance_id


async def test_a_service_keeps_what_it_has_while_it_lives_but_not_its_turn(
    plane: ControlPlane,
) -> None:
    agent = await join(plane)
    instance = await game_over(agent, await start(plane, agent, GAME))
    assert await plane.service.running() == {}
    living = LivingInstances(frozenset({instance, "another"}))
    await plane.pipelines.hear_instances(agent.connection, living)
    waiting = await waits(plane, PORT.replace("7777:1", "7777:1/udp"))
    assert waiting.message == "1 node: 1 has port 7777/udp in use"
    taken = (await plane.service.reserved())["n1"]
    assert (taken.pipelines, taken.cpu_millis) == (0, 1000)
    await plane.pipelines.hear_instances(agent.connection, LivingInstances())
    assert await placed(plane, waiting)


@pytest.mark.parametrize("lives", [True, False])
async def test_a_statement_says_whether_a_service_lives(plane: ControlPlane, lives: bool) -> None:
    agent = await join(plane)
    instance = await game_over(agent, await start(plane, agent, GAME))
    await join(plane, after=agent, living=[instance] if lives else [])
    assert ("n1" in await plane.service.reserved()) is lives


async def test_what_a_running_dispatch_has_is_not_freed_by_what_lives(plane: ControlPlane) -> None:
    agent = await join(plane)
    await start(plane, agent, GAME)
    await plane.pipelines.hear_instances(agent.connection, LivingInstances())
    assert (await plane.service.reserved())["n1"].pipelines == 1


async def test_what_lives_is_not_told_by_an_overtaken_stream(plane: ControlPlane) -> None:
    before = await join(plane)
    agent = await join(plane, after=before)
    await game_over(agent, await start(plane, agent, GAME))
    await plane.pipelines.hear_instances(before.connection, LivingInstances())
    assert "n1" in await plane.service.reserved()


# The queue


async def test_the_queue_goes_by_priority_then_age_and_nothing_holds_it_up(
    plane: ControlPlane,
) -> None:
    agent = await join(plane)
    first = await start(plane, agent, SLOT)
    never = await plane.create(PLAIN, selector="zone=b", priority=9)
    old = await plane.create(SLOT)
    urgent = await plane.create(SLOT, priority=5)
    plain = await plane.create(PLAIN)
    assert await placed(plane, plain)
    await agent.report(whole(first.dispatch.pipeline_id, Status.COMPLETED))
    assert await placed(plane, urgent)
    found = await get(plane, old)
    assert [(w.reason, w.nodes, w.passes) for w in found.waiting] == [("GPU_SLOTS", ("n1",), True)]
    found = await get(plane, never)
    assert found.message == "1 node: 1 does not match zone=b"
    assert [(w.reason, w.passes) for w in found.waiting] == [("SELECTOR", False)]


@pytest.mark.parametrize("other", [False, True])
async def test_what_no_runtime_honours_fails_at_once_unless_another_node_may_take_it(
    plane: ControlPlane, other: bool
) -> None:
    await plane.nodes.register(replace(registration("n1"), step_runtimes=frozenset({"process"})))
    if other:
        await plane.nodes.register(replace(registration("n2"), step_runtimes=frozenset({"docker"})))
    created = await plane.create(
        "name: w\nsteps: [{name: one, container: {image: a, privileged: true}}]"
    )
    await plane.dispatcher.sweep()
    found = await get(plane, created)
    if other:
        assert (found.status, found.reason) == (Status.PENDING, Reason.NONE)
        return
    assert (found.status, found.reason) == (Status.FAILED, Reason.UNSUPPORTED)
    assert found.message == "1 node: 1 cannot honour privileged"
    assert [(one.status, one.reason) for one in found.steps] == [(Status.CANCELLED, Reason.SKIPPED)]


async def test_a_pipeline_that_was_placed_waits_for_nothing(plane: ControlPlane) -> None:
    waiting = await waits(plane, SLOT)
    assert waiting.message == "no node is registered"
    await join(plane)
    assert await placed(plane, waiting)
    found = await get(plane, waiting)
    assert (found.message, found.waiting) == ("", ())
    assert await plane.service.explained() == {}


async def test_while_nothing_changes_the_queue_is_not_looked_at(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await join(plane)
    await waits(
        plane, "{name: w, placement: {cpu: 99}, steps: [{name: one, container: {image: a}}]}"
    )
    looks = 0
    queue = plane.service.queue

    async def counted(known: Any) -> Any:
        nonlocal looks
        looks += 1
        return await queue(known)

    monkeypatch.setattr(plane.service, "queue", counted)
    await plane.dispatcher.sweep()
    for _ in range(5):
        plane.dispatcher._queue_wake._event.clear()
        monkeypatch.setattr(plane.dispatcher, "_until_next_look_s", lambda: 0.0)
        await plane.dispatcher._place_when_due()
    assert looks == 1
    await plane.create(PLAIN)  # no bell rings, but the mark has moved
    plane.dispatcher._queue_wake._event.clear()
    await plane.dispatcher._place_when_due()
    assert looks == 2
