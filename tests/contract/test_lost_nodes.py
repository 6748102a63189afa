"""Nodes that are away, fenced, or back after all, with real agents: RA1, RA3, RL3, F8, P1, P2."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from tests.support.lone import World, step, world_in
from tests.support.plane import USER, NodeAgent, PlaneSettings, RecordingHost
from tests.support.time import until, virtual_time

from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import Reason, Status
from gamenode.server.pipelines.manager import PipelineSettings

LOST_S = 300.0
SETTINGS = PlaneSettings(pipelines=PipelineSettings(lost_fail_s=LOST_S))


async def runs(world: World, head: str, duration_s: int = 9999) -> None:
    """Have a pipeline run on the agent."""
    world.agent.start()
    await world.connected()
    await world.create(step(duration_s=duration_s), step("two"), head=head)
    await world.started()


async def cut_off(world: World) -> None:
    """Cut the line, until the node counts as offline."""
    world.network.cut = True
    world.network.break_streams()
    await until(_is_away(world))


def _is_away(world: World) -> Callable[[], Awaitable[bool]]:
    async def away() -> bool:
        return not (await world.plane.nodes.get("n1")).online

    return away


def another(world: World, folder: Path) -> NodeAgent:
    """Return an agent on another host."""
    return NodeAgent(
        folder,
        node_id="n2",
        network=world.network,
        clock=world.clock,
        host=RecordingHost(clock=world.clock),
    )


@virtual_time
async def test_what_was_given_up_is_ended_once_its_node_is_back(tmp_path: Path) -> None:
    async with world_in(tmp_path, SETTINGS) as world:
        await runs(world, "on_lost: fail")
        await cut_off(world)
        away_s = world.clock.monotonic_s()
        await until(world.ended, timeout_s=LOST_S + 60.0, every_s=0.5)
        assert LOST_S - 0.5 <= world.clock.monotonic_s() - away_s <= LOST_S + 3.0
        found = await world.get()
        assert (found.status, found.reason) == (Status.FAILED, Reason.NODE_LOST)
        assert found.may_still_run
        assert len(world.agent.host.runs()) == 1
        world.network.cut = False
        await until(lambda: world.agent.host.runs() == ())
        await until(lambda: world.agent.runner.held() == [])
        assert await world.get() == replace(found, may_still_run=False, reservation=None)
        assert await world.plane.service.lingering() == {}


@virtual_time
async def test_a_server_that_was_away_itself_gives_the_node_the_whole_time(tmp_path: Path) -> None:
    async with world_in(tmp_path, SETTINGS) as world:
        await runs(world, "on_lost: fail")
        await cut_off(world)
        await world.stop_server()
        await asyncio.sleep(3 * LOST_S)
        await world.start_server()
        await asyncio.sleep(LOST_S - 10.0)
        assert not await world.ended()
        await until(world.ended, timeout_s=20.0)


@virtual_time
async def test_a_restart_waits_for_the_word_of_its_node_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    async with world_in(tmp_path, SETTINGS) as world:
        await runs(world, "on_lost: restart")
        (tmp_path / "n2").mkdir()
        other = another(world, tmp_path / "n2")
        other.start()
        await cut_off(world)
        await asyncio.sleep(3 * LOST_S)
        assert other.host.starts == []
        world.network.cut = False
        await world.connected()
        await world.plane.nodes.change_state(
            "n1", Maintenance.DISABLED, drain=None, by=USER, reason="sold"
        )
        await until(lambda: len(other.host.starts) == 1, timeout_s=120.0)
        assert world.agent.host.runs() == ()  # P2
        found = await world.get()
        assert (found.node_id, found.attempt) == ("n2", 2)
        await other.kill()


@virtual_time
async def test_a_fence_starts_elsewhere_and_the_host_that_lives_after_all_ends_its_own(
    tmp_path: Path,
) -> None:
    async with world_in(tmp_path, SETTINGS) as world:
        await runs(world, "on_lost: restart")
        (tmp_path / "n2").mkdir()
        other = another(world, tmp_path / "n2")
        await cut_off(world)
        await world.plane.pipelines.fence_node("n1", reason="it burnt", by=USER)
        world.network.cut = False
        other.start()
        await until(lambda: len(other.host.starts) == 1)
        await until(lambda: world.agent.host.runs() == ())
        await until(lambda: world.agent.runner.held() == [])
        assert world.starts == 1
        found = await world.get()
        assert (found.status, found.node_id, found.attempt) == (Status.RUNNING, "n2", 2)
        node = await world.plane.nodes.get("n1")
        assert (node.online, node.conditions) == (True, ())
        await other.kill()


@virtual_time
async def test_an_extension_of_what_is_cut_off_arrives_with_the_line(tmp_path: Path) -> None:
    async with world_in(tmp_path, SETTINGS) as world:
        await runs(world, "timeout: 10m", duration_s=1200)
        await cut_off(world)
        await world.plane.pipelines.extend(world.pipeline_id, 900.0, key="", by=USER)
        await asyncio.sleep(60.0)
        world.network.cut = False
        await until(world.ended, timeout_s=2000.0, every_s=1.0)
        assert (await world.get()).status is Status.COMPLETED
