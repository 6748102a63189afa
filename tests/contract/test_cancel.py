"""A cancel wherever a pipeline is: F4, RA3, P4, P11."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.lone import GRACE_S, World, step, world_in
from tests.support.time import until, virtual_time

from gamenode.domain.pipeline import Reason, Status

# Where it is when the cancel comes


async def queued(world: World) -> None:
    await world.create(step(duration_s=600))


async def dispatched(world: World) -> None:
    """Its Execute never arrives."""
    world.agent.start()
    await world.connected()
    for stream in world.network.streams:
        stream.silence(server=True)
    await world.create(step(duration_s=600))
    await world.bound()


async def pulling(world: World) -> None:
    world.agent.start()
    await world.connected()
    await world.create(step(prepare_s=600))
    await until(lambda: bool(world.agent.runner.held()))
    await asyncio.sleep(5.0)


async def running(world: World) -> None:
    world.agent.start()
    await world.connected()
    await world.create(step(duration_s=600), step("two"))
    await world.started()


async def stubborn(world: World) -> None:
    world.agent.start()
    await world.connected()
    await world.create(step(duration_s=600, ignore_stop=1))
    await world.started()


async def starting(world: World) -> None:
    """Its container is being created, which nothing interrupts."""
    world.agent.start()
    await world.connected()
    await world.create(step(start_s=2, duration_s=600))
    await until(lambda: bool(world.agent.runner.held()))
    await asyncio.sleep(1.0)


async def between_retries(world: World) -> None:
    world.agent.start()
    await world.connected()
    await world.create(step(retries=5, exit_code=1))

    async def waits() -> bool:
        return (await world.get()).steps[0].reason is Reason.RETRYING

    await until(waits)


async def cleaning_up(world: World) -> None:
    world.agent.start()
    await world.connected()
    await world.create(step(exit_code=1), step("tidy", when="always", duration_s=600))
    await world.started(2)


# What happens between the cancel and the moment in which the agent can hear of it


async def nothing(world: World) -> None:
    if world.agent.running is None:
        world.agent.start()


async def offline(world: World) -> None:
    world.network.cut = True
    world.network.break_streams()
    await asyncio.sleep(120.0)
    assert not (await world.plane.nodes.get("n1")).online
    assert not await world.ended()
    world.network.cut = False


async def stream_breaks(world: World) -> None:
    world.network.break_streams()


async def server_restarts(world: World) -> None:
    await world.stop_server()
    await asyncio.sleep(20.0)
    await world.start_server()


async def agent_restarts(world: World) -> None:
    await world.agent.kill()
    await asyncio.sleep(20.0)
    world.agent.start()


Act = Callable[[World], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    where: Act
    meanwhile: Act = nothing
    starts: int = 1
    """How many runs there were in the end."""
    reason: Reason = Reason.CANCELLED_BY_USER
    """The first step's."""

    def __str__(self) -> str:
        return f"{self.where.__name__}-{self.meanwhile.__name__}"


CASES = [
    Case(queued, starts=0, reason=Reason.SKIPPED),
    Case(queued, server_restarts, starts=0, reason=Reason.SKIPPED),
    Case(dispatched, stream_breaks, starts=0, reason=Reason.SKIPPED),
    Case(dispatched, offline, starts=0, reason=Reason.SKIPPED),
    Case(dispatched, server_restarts, starts=0, reason=Reason.SKIPPED),
    Case(dispatched, agent_restarts, starts=0, reason=Reason.SKIPPED),
    Case(pulling, starts=0),
    Case(pulling, offline, starts=0),
    Case(pulling, server_restarts, starts=0),
    Case(pulling, agent_restarts, starts=0),
    Case(starting),
    Case(starting, stream_breaks),
    Case(running),
    Case(running, offline),
    Case(running, stream_breaks),
    Case(running, server_restarts),
    Case(running, agent_restarts),
    Case(stubborn),
    Case(stubborn, offline),
    Case(stubborn, server_restarts),
    Case(stubborn, agent_restarts),
    Case(between_retries),
    Case(between_retries, stream_breaks),
    Case(between_retries, agent_restarts),
    Case(cleaning_up, starts=2, reason=Reason.EXIT_CODE),
    Case(cleaning_up, offline, starts=2, reason=Reason.EXIT_CODE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@virtual_time
async def test_a_cancel_ends_a_pipeline_wherever_it_is(tmp_path: Path, case: Case) -> None:
    async with world_in(tmp_path) as world:
        await case.where(world)
        if case.meanwhile is not nothing:
            world.network.cut = True  # the agent hears of it afterwards
            world.network.break_streams()
        await world.cancel()
        world.network.cut = False
        await case.meanwhile(world)
        if not await world.ended():
            await until(world.reached, timeout_s=30.0, every_s=0.01)
            reached_s = world.clock.monotonic_s()
            await until(world.ended, timeout_s=30.0, every_s=0.01)
            assert world.clock.monotonic_s() - reached_s <= GRACE_S + 5.0
        found = await world.get()
        assert (found.status, found.reason) == (Status.CANCELLED, Reason.CANCELLED_BY_USER)
        assert found.steps[0].reason is case.reason
        assert all(one.status.terminal for one in found.steps)
        if world.agent.running is None:
            world.agent.start()
        await asyncio.sleep(120.0)  # a cancelled pipeline never runs again (P4)
        assert world.starts == case.starts
        assert world.agent.host.runs() == ()
        assert await world.get() == found
