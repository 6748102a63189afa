"""Hosts that are not who they were: re-imaged, cloned, restored (RL3, RA2, P1, P2)."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.support.plane import USER, ControlPlane, Network, NodeAgent, RecordingHost
from tests.support.time import LoopClock, until, virtual_time

from gamenode.domain.node import ConditionType, Link
from gamenode.domain.pipeline import Pipeline, Reason, Status

FILE = """
name: w
steps:
  - name: one
    container: {image: a, environment: {FAKE_DURATION_S: "20"}}
  - name: two
    container: {image: a, environment: {FAKE_DURATION_S: "20"}}
"""


@dataclass
class World:
    """A server, a node `n1`, and the folder of its agent."""

    folder: Path
    clock: LoopClock = field(default_factory=LoopClock)

    def __post_init__(self) -> None:
        self.plane = ControlPlane(self.folder, clock=self.clock)
        self.network = Network(Random(1))
        self.network.plane = self.plane
        self.agents: list[NodeAgent] = []
        self.hosts: list[RecordingHost] = []

    def host(self, name: str) -> NodeAgent:
        """Start an agent that says that it is `n1`, on a host of its own."""
        machine = RecordingHost(clock=self.clock)
        data = self.folder / name
        data.mkdir(exist_ok=True)
        agent = NodeAgent(data, network=self.network, clock=self.clock, host=machine)
        agent.boot_id = f"boot-of-{name}"
        self.hosts.append(machine)
        self.agents.append(agent)
        agent.start()
        return agent

    async def running(self, step: str) -> Pipeline:
        """Start a pipeline and wait until a step of it runs."""
        pipeline = await self.plane.create(FILE)

        async def runs() -> bool:
            found = await self.plane.service.get(pipeline.id)
            return any(s.name == step and s.status is Status.RUNNING for s in found.steps)

        await until(runs)
        return pipeline

    async def ended(self, pipeline: Pipeline) -> Pipeline:
        """Wait for a pipeline's end."""

        async def over() -> bool:
            return (await self.plane.service.get(pipeline.id)).status.terminal

        await until(over, timeout_s=300.0)
        return await self.plane.service.get(pipeline.id)

    def starts(self) -> list[str]:
        """Return the step of every container there ever was, on any host."""
        return [run.step for host in self.hosts for run in host.starts]

    async def conditions(self) -> list[ConditionType]:
        """Return what holds on the node."""
        return [condition.type for condition in (await self.plane.nodes.get("n1")).conditions]

    async def connected(self) -> None:
        """Wait for the node's stream."""
        await until(lambda: self.plane.nodes.connection("n1") is not None)


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    made = World(folder)
    await made.plane.start()
    try:
        yield made
    finally:
        for agent in made.agents:
            await agent.kill()
        await made.plane.stop()


def snapshot(agent: NodeAgent, folder: Path) -> None:
    """Copy an agent's data, as a backup of a running host does."""
    folder.mkdir(exist_ok=True)
    one = sqlite3.connect(agent.journal_path)
    other = sqlite3.connect(folder / agent.journal_path.name)
    one.backup(other)
    one.close()
    other.close()


def restore(folder: Path, agent: NodeAgent) -> None:
    """Put a snapshot in the place of an agent's data."""
    for path in agent.journal_path.parent.glob(f"{agent.journal_path.name}*"):
        path.unlink()
    shutil.copy(folder / agent.journal_path.name, agent.journal_path)


@virtual_time
async def test_a_reimaged_host_starts_nothing_again_and_its_work_says_why_it_is_lost(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        agent = w.host("first")
        await w.connected()
        pipeline = await w.running("one")
        await agent.kill()
        w.host("reimaged")
        ended = await w.ended(pipeline)
        assert (ended.status, ended.reason) == (Status.FAILED, Reason.NODE_LOST)
        assert "its journal does not know this attempt" in ended.message
        await asyncio.sleep(60.0)
        assert w.starts() == ["one"]


@virtual_time
async def test_a_restored_snapshot_starts_nothing_again_and_its_work_says_why_it_is_lost(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        agent = w.host("n1")
        await w.connected()
        pipeline = await w.running("one")
        snapshot(agent, tmp_path / "snapshot")
        await agent.kill()
        agent.start()  # a session that the snapshot does not know
        await until(lambda: w.starts() == ["one", "two"])
        await agent.kill()
        restore(tmp_path / "snapshot", agent)
        # The container of step one was removed meanwhile, and nothing says that it has run.
        for run in list(agent.host.runs()):
            agent.host.forget(run)
        # A crash right after the registration must not make the next one a good continuation.
        w.network.delay_s_max = 5.0
        agent.start()
        await until(lambda: agent.session._answer is not None)
        assert w.plane.nodes.connection("n1") is None
        await agent.kill()
        w.network.delay_s_max = 0.0
        agent.start()
        ended = await w.ended(pipeline)
        assert (ended.status, ended.reason) == (Status.FAILED, Reason.NODE_LOST)
        assert "restored or copied data folder" in ended.message
        assert w.starts() == ["one", "two"]


@virtual_time
async def test_a_snapshot_from_before_a_pipeline_ended_does_not_run_it_again(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        agent = w.host("n1")
        await w.connected()
        pipeline = await w.running("one")
        snapshot(agent, tmp_path / "snapshot")
        assert (await w.ended(pipeline)).status is Status.COMPLETED
        await asyncio.sleep(5.0)
        await agent.kill()
        restore(tmp_path / "snapshot", agent)
        agent.start()
        await asyncio.sleep(60.0)
        assert (await w.ended(pipeline)).status is Status.COMPLETED
        assert w.starts() == ["one", "two"]
        assert agent.runner.held() == []


@virtual_time
async def test_a_cloned_host_is_refused_starts_nothing_and_the_node_names_the_cause(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        first = w.host("first")
        await w.connected()
        pipeline = await w.running("one")
        snapshot(first, tmp_path / "clone")
        clone = w.host("clone")

        async def named() -> bool:
            return ConditionType.DUPLICATE_IDENTITY in await w.conditions()

        await until(named)
        assert (await w.ended(pipeline)).status is Status.COMPLETED
        assert w.starts() == ["one", "two"]
        assert await named()
        assert (await w.plane.nodes.get("n1")).link is Link.CONNECTED
        await clone.kill()
        await asyncio.sleep(90.0)
        assert not await named()


@virtual_time
async def test_a_broken_stream_in_a_nodes_first_session_ends_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.host("first")
        await w.connected()
        pipeline = await w.running("one")
        w.network.break_streams()
        assert (await w.ended(pipeline)).status is Status.COMPLETED


@virtual_time
async def test_what_was_force_cancelled_meanwhile_does_not_go_on_when_its_agent_is_back(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        agent = w.host("first")
        await w.connected()
        pipeline = await w.running("one")
        await agent.kill()
        await w.plane.pipelines.cancel(pipeline.id, reason="", force=True, by=USER)
        await asyncio.sleep(30.0)  # step one has ended
        agent.start()
        await asyncio.sleep(30.0)
        assert w.starts() == ["one"]
        assert agent.runner.held() == []
