"""Server and agents agree again, whatever was lost: P1 to P4, P9, P10.

Each example is a seed: pipelines on two nodes, and a minute of breaks, repeats, delays, crashes,
restarts and cancels. Then the network is left alone, everything must come to its end, and what
happened meanwhile is held against the promises.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from tests.support.plane import (
    USER,
    ControlPlane,
    CountingIds,
    Network,
    NodeAgent,
    RecordingHost,
)
from tests.support.time import LoopClock, until, virtual_time

from gamenode.agent.runtime import RunKey
from gamenode.domain.errors import GameNodeError
from gamenode.domain.pipeline import Pipeline, Reason, Status

EXAMPLES = 60
EXAMPLES_A_TEST = 10
SOAK_EXAMPLES = 2_000

STEP = """
  - name: {name}
    type: {type}
    when: {when}
    retries: {{max: {retries}, backoff: 1s}}
    container:
      image: a
      stop_grace_period: 2s
      environment:
        FAKE_DURATION_S: "{duration_s}"
        FAKE_PREPARE_S: "{prepare_s}"
        FAKE_EXIT_CODE: "{exit_code}"
        FAKE_LOG_LINES: "3"
        {stubborn}
"""


def random_file(random: Random) -> str:
    """Return a pipeline file of one to three steps; some fail, some clean up."""
    steps = "".join(
        STEP.format(
            name=f"s{number}",
            type=random.choice(["task", "task", "task", "service"]),
            when="always" if number == 2 else "success",
            retries=random.choice([0, 0, 2]),
            duration_s=random.choice([0, 0.5, 3, 8]),
            prepare_s=random.choice([0, 0, 2]),
            exit_code=random.choice([0, 0, 0, 1]),
            stubborn=random.choice(["", 'FAKE_IGNORE_STOP: "1"']),
        )
        for number in range(random.randint(1, 3))
    )
    return f"name: work\nsteps:{steps}"


class World:
    """One example: everything that an example's faults can reach."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.clock = LoopClock()
        self.random = random
        self._folder = folder
        self._ids = CountingIds()
        self.network = Network(random, delay_s_max=random.choice([0.0, 0.02, 0.5]))
        self.network.repeat_ratio = random.choice([0.0, 0.2])
        self.agents = [
            NodeAgent(
                folder,
                node_id=node_id,
                network=self.network,
                clock=self.clock,
                random=random,
                host=RecordingHost(clock=self.clock),
            )
            for node_id in ("n1", "n2")
        ]
        self.pipelines: dict[str, str] = {}
        """The id of each pipeline, by its idempotency key."""
        self.forced: set[str] = set()

    @property
    def plane(self) -> ControlPlane:
        assert self.network.plane is not None
        return self.network.plane

    async def start_server(self) -> None:
        plane = ControlPlane(self._folder, clock=self.clock, random=self.random, ids=self._ids)
        await plane.start()
        self.network.plane = plane

    async def stop_server(self) -> None:
        plane, self.network.plane = self.plane, None
        self.network.break_streams()
        await plane.stop()

    async def create(self, key: str) -> None:
        file = random_file(Random(key))
        created = await self.plane.create(file, idempotency_key=key)
        assert self.pipelines.setdefault(key, created.id) == created.id  # P10

    async def cancel(self) -> None:
        force = self.random.random() < 0.2
        pipeline_id = self.random.choice(list(self.pipelines.values()))
        if force:
            self.forced.add(pipeline_id)
        with suppress(GameNodeError):  # it has ended otherwise
            await self.plane.pipelines.cancel(pipeline_id, reason="", force=force, by=USER)

    async def restart_server(self) -> None:
        await self.stop_server()
        await asyncio.sleep(self.random.choice([0.1, 3.0, 50.0]))
        await self.start_server()

    async def restart_agent(self) -> None:
        agent = self.random.choice(self.agents)
        await agent.kill()
        await asyncio.sleep(self.random.choice([0.0, 1.0, 60.0]))
        agent.start()

    async def break_streams(self) -> None:
        self.network.break_streams()

    async def silence_streams(self) -> None:
        for stream in self.network.streams:
            stream.silence()

    async def lose_answers(self) -> None:
        """Let the server hear everything and its words go nowhere, for a while."""
        for stream in self.network.streams:
            stream.silence(server=True)
        await asyncio.sleep(self.random.choice([0.5, 4.0]))
        self.network.break_streams()

    async def cancel_and_crash(self) -> None:
        """Kill the agents in the middle of ending what runs."""
        await self.cancel()
        await asyncio.sleep(self.random.choice([0.0, 0.05, 1.0]))
        for _ in range(self.random.randrange(40)):
            await asyncio.sleep(0)
        for agent in self.agents:
            await agent.kill()
        for agent in self.agents:
            agent.start()

    async def cut(self) -> None:
        self.network.cut = True
        self.network.break_streams()
        await asyncio.sleep(self.random.choice([1.0, 10.0, 70.0]))
        self.network.cut = False

    async def wait(self) -> None:
        await asyncio.sleep(self.random.choice([0.001, 0.05, 1.0, 4.0]))
        for _ in range(self.random.randrange(20)):
            await asyncio.sleep(0)

    async def disturb(self) -> None:
        faults: list[Callable[[], Awaitable[None]]] = [
            self.cancel,
            self.restart_server,
            self.restart_agent,
            self.restart_agent,
            self.break_streams,
            self.lose_answers,
            self.lose_answers,
            self.cancel_and_crash,
            self.cancel_and_crash,
            self.silence_streams,
            self.cut,
        ]
        for _ in range(self.random.randint(3, 10)):
            await self.wait()
            await self.random.choice(faults)()

    async def all(self) -> list[Pipeline]:
        return [await self.plane.service.get(one) for one in self.pipelines.values()]

    async def settled(self) -> bool:
        return (
            all(pipeline.status.terminal for pipeline in await self.all())
            and all(agent.runner.held() == [] for agent in self.agents)
            and all(agent.host.runs() == () for agent in self.agents)
            and await self.plane.service.reserved() == {}
        )

    async def close(self) -> None:
        for agent in self.agents:
            await agent.kill()
        await self.stop_server()


async def run_example(folder: Path, seed: int) -> World:
    world = World(folder, Random(seed))
    await world.start_server()
    for agent in world.agents:
        agent.start()
    for number in range(world.random.randint(1, 4)):
        await world.create(f"{seed}-{number}")
        if world.random.random() < 0.3:
            await world.create(f"{seed}-{number}")
    await world.disturb()
    await until(world.settled, timeout_s=600.0, every_s=2.0)  # P9
    return world


def check_runs(world: World) -> None:
    intervals: dict[RunKey, tuple[float, float]] = {}
    for agent in world.agents:
        host = agent.host
        assert isinstance(host, RecordingHost)
        assert len(set(host.starts)) == len(host.starts), "a run started twice (P1)"
        for run, lived in host.intervals().items():
            assert run not in intervals, "a run started on two nodes (P1)"
            intervals[run] = lived
    for (run, lived), (other, other_lived) in itertools.combinations(intervals.items(), 2):
        if (run.pipeline_id, run.step) == (other.pipeline_id, other.step):
            apart = lived[1] <= other_lived[0] or other_lived[1] <= lived[0]
            assert apart, "two tries at a step overlap (P2)"


async def check_events(world: World) -> None:
    over: set[str] = set()
    for event in await world.plane.events():
        if not event.status or event.type.startswith(("node.", "error.")):
            continue
        assert event.entity_id not in over, f"{event.type} after the end (P4)"
        if Status(event.status).terminal:
            over.add(event.entity_id)


async def check_outcomes(world: World) -> None:
    for pipeline in await world.all():
        if pipeline.id in world.forced:
            continue
        statuses = {step.status for step in pipeline.steps if step.reason is not Reason.SKIPPED}
        if pipeline.status is Status.COMPLETED:
            assert statuses <= {Status.COMPLETED}
        if pipeline.status is Status.FAILED:
            # No node was lost, so a failure is that of a step.
            assert Status.FAILED in statuses, pipeline
        if pipeline.status is Status.CANCELLED:
            assert pipeline.cancel_requested_at is not None, "nobody wanted its end"


@virtual_time
async def check_example(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = await run_example(Path(folder), seed)
        try:
            check_runs(world)
            await check_events(world)
            await check_outcomes(world)
        finally:
            await world.close()


@pytest.mark.parametrize("first", range(0, EXAMPLES, EXAMPLES_A_TEST))
def test_whatever_is_lost_everything_ends_once_and_well(first: int) -> None:
    for seed in range(first, first + EXAMPLES_A_TEST):
        check_example(seed)


@pytest.mark.soak
def test_the_same_many_times() -> None:
    for seed in range(EXAMPLES, SOAK_EXAMPLES):
        check_example(seed)
