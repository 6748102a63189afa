"""One pipeline's life between a server and an agent, on a line that fails at will."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from tests.support.plane import (
    USER,
    ControlPlane,
    CountingIds,
    Network,
    NodeAgent,
    PlaneSettings,
    RecordingHost,
)
from tests.support.time import LoopClock, until

from gamenode.domain.pipeline import Pipeline

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
    """A server, an agent, and what lies between them; in virtual time."""

    def __init__(self, folder: Path, settings: PlaneSettings | None = None) -> None:
        self._folder = folder
        self._settings = settings
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
        plane = ControlPlane(self._folder, clock=self.clock, ids=self._ids, settings=self._settings)
        await plane.start()
        self.network.plane = plane

    async def stop_server(self) -> None:
        plane, self.network.plane = self.plane, None
        self.network.break_streams()
        await plane.stop()

    async def connected(self) -> None:
        await until(lambda: self.plane.nodes.connection("n1") is not None)

    async def create(self, *steps: str, head: str = "") -> None:
        """Create the pipeline that everything here is about; `head` goes before its steps."""
        file = f"name: w\n{head}\nsteps:{''.join(steps)}"
        self.pipeline_id = (await self.plane.create(file)).id

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

    async def reached(self) -> bool:
        """Return whether the agent knows, or knew, that the pipeline must end."""
        knows = any(work.cancelled.is_set() for work in self.agent.runner._works.values())
        return knows or await self.ended()


@asynccontextmanager
async def world_in(folder: Path, settings: PlaneSettings | None = None) -> AsyncIterator[World]:
    """Have a server that runs, and an agent that does not yet."""
    world = World(folder, settings)
    await world.start_server()
    try:
        yield world
    finally:
        await world.agent.kill()
        await world.stop_server()
