"""A cancel wherever a pipeline is: F4, RA3, P4, P11."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from tests.support.plane import USER, ControlPlane, CountingIds, Network, NodeAgent, RecordingHost
from tests.support.time import LoopClock, until, virtual_time

from gamenode.domain.pipeline import Pipeline, Reason, Status

GRACE_S = 3.0
STEP = """
  - name: {name}
    when: {when}
    retries: {{max: {retries}, backoff: 30s}}
    container: {{image: a, stop_grace_period: 3s, environment: {{{environment}}}}}
"""


def step(name: str = "one", when: str = "success", retries: int = 0, **environment: object) -> str:
    """Return a step of a file; its environment steers the fake runtime."""
    steered = ", ".join(f'FAKE_{key.upper()}: "{value}"' for key, value in environment.items())
    return STEP.format(name=name, when=when, retries=retries, environment=steered)


class World:
    """A server, one agent, and what lies between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.clock = LoopClock()
        self._ids = CountingIds()
        self.network = Network(Random(1), delay_s_max=0.02)
        self.agent = NodeAgent(
            folder, network=self.network, clock=self.clock, host=RecordingHost(clock=self.clock)
        )
        self.pipeline_id = ""

    @property
    def plane(self) -> ControlPlane:
        assert self.network.plane is not None
        return self.network.plane

    @property
    def starts(self) -> int:
        return len(self.agent.host.starts)

    async def start_server(self) -> None:
        plane = ControlPlane(self._folder, clock=self.clock, ids=self._ids)
        await plane.start()
        self.network.plane = plane

    async def stop_server(self) -> None:
        plane, self.network.plane = self.plane, None
        self.network.break_streams()
        await plane.stop()

    async def connected(self) -> None:
        await until(lambda: self.plane.nodes.connection("n1") is not None)

    async def create(self, *steps: str) -> None:
        self.pipeline_id = (await self.plane.create(f"name: w\nsteps:{''.join(steps)}")).id

    async def get(self) -> Pipeline:
        return await self.plane.service.get(self.pipeline_id)

    async def cancel(self) -> None:
        await self.plane.pipelines.cancel(self.pipeline_id, reason="enough", force=False, by=USER)

    async def ended(self) -> bool:
        return (await self.get()).status.terminal

    async def bound(self) -> None:
        async def is_bound() -> bool:
            return (await self.get()).node_id != ""

        await until(is_bound)

    async def started(self, count: int = 1) -> None:
        await until(lambda: self.starts == count)

    def reached(self) -> bool:
        """Return whether the agent knows that the pipeline must end."""
        return any(work.cancelled.is_set() for work in self.agent.runner._works.values())


@asynccontextmanager
async def world_in(folder: Path) -> AsyncIterator[World]:
    world = World(folder)
    await world.start_server()
    try:
        yield world
    finally:
        await world.agent.kill()
        await world.stop_server()


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
