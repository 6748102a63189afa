"""What a server holds back while its own clock cannot be believed (rule RA6)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.plane import USER, ControlPlane, registration
from tests.support.time import LoopClock, until, virtual_time

from gamenode.domain.node import Drain, Maintenance
from gamenode.lib.clock import ClockSettings, after

CALM_S = ClockSettings().calm_s


@asynccontextmanager
async def drained_for(seconds: float, folder: Path) -> AsyncIterator[ControlPlane]:
    """Run a server with a node that works again by itself after `seconds`."""
    clock = LoopClock()
    plane = ControlPlane(folder, clock=clock)
    await plane.start()
    await plane.nodes.register(registration())
    await plane.nodes.change_state(
        "n1",
        Maintenance.MAINTENANCE,
        drain=Drain(until=after(clock.now(), seconds)),
        by=USER,
        reason="a test",
    )
    try:
        yield plane
    finally:
        await plane.stop()


async def works(plane: ControlPlane) -> bool:
    return (await plane.nodes.get("n1")).maintenance is Maintenance.NORMAL


@virtual_time
async def test_a_deadline_holds_by_a_clock_that_is_calm(tmp_path: Path) -> None:
    async with drained_for(1000.0, tmp_path) as plane:
        await asyncio.sleep(990.0)
        assert not await works(plane)
        await until(lambda: works(plane), timeout_s=20.0)


@virtual_time
async def test_a_deadline_that_only_a_jump_made_pass_does_nothing(tmp_path: Path) -> None:
    async with drained_for(1000.0, tmp_path) as plane:
        assert isinstance(plane.clock, LoopClock)
        plane.clock.jump(5000.0)
        await asyncio.sleep(CALM_S / 2)
        plane.clock.jump(-5000.0)  # somebody put it right
        await asyncio.sleep(980.0 - CALM_S / 2)
        assert not await works(plane)
        await until(lambda: works(plane), timeout_s=CALM_S)


@virtual_time
async def test_a_clock_that_stays_where_it_jumped_to_is_believed_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with drained_for(1000.0, tmp_path) as plane:
        assert isinstance(plane.clock, LoopClock)
        plane.clock.jump(5000.0)
        await asyncio.sleep(CALM_S - 10.0)
        assert not await works(plane)
        await until(lambda: works(plane), timeout_s=30.0)
    assert "the wall clock jumped by +5000.0 s" in caplog.text
