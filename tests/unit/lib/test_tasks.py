"""Loops and tasks that somebody owns."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.support.time import virtual_time

from gamenode.lib.tasks import Supervisor, Wake, until_one_ends


@virtual_time
async def test_a_kept_loop_starts_again_after_a_failure_and_ends_when_it_returns() -> None:
    supervisor = Supervisor(restart_s=2.0)
    begun: list[float] = []
    loop = asyncio.get_running_loop()

    async def fails_twice() -> None:
        begun.append(loop.time())
        if len(begun) < 3:
            raise ValueError("as the test wants")

    supervisor.keep("loop", fails_twice)
    await asyncio.sleep(60.0)
    assert begun == [0.0, 2.0, 4.0]
    await supervisor.close()


@virtual_time
async def test_a_task_that_fails_is_logged_and_ends_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor = Supervisor()

    async def fails() -> None:
        raise ValueError("as the test wants")

    with caplog.at_level(logging.ERROR):
        await supervisor.start("once", fails())
    assert "task failed" in caplog.text
    await supervisor.close()


@virtual_time
async def test_closing_ends_every_task_also_those_that_have_not_begun() -> None:
    supervisor = Supervisor()
    ended: list[str] = []

    async def lives(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1.0)  # takes its time
            ended.append(name)

    _ = supervisor.start("a", lives("a"))
    await asyncio.sleep(0)
    _ = supervisor.start("never begun", lives("b"))  # a warning, if nobody closed it
    await supervisor.close()
    assert ended == ["a"]
    await supervisor.close()
    with pytest.raises(RuntimeError):
        _ = supervisor.start("late", lives("c"))


@virtual_time
async def test_a_bell_is_heard_once_for_any_number_of_rings() -> None:
    wake = Wake()
    wake.ring()
    wake.ring()
    assert await wake.wait(1.0)
    assert not await wake.wait(1.0)
    waiting = asyncio.ensure_future(wake.wait(9.0))
    await asyncio.sleep(0.1)
    wake.ring()
    assert await waiting
    assert asyncio.get_running_loop().time() == pytest.approx(1.1)


@virtual_time
async def test_when_one_ends_the_others_are_cancelled_and_its_error_is_raised() -> None:
    cancelled: list[bool] = []

    async def lives() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async def fails() -> None:
        await asyncio.sleep(1.0)
        raise ValueError("as the test wants")

    with pytest.raises(ValueError, match="as the test wants"):
        await until_one_ends(lives(), fails(), lives())
    assert cancelled == [True, True]


@virtual_time
async def test_a_cancel_reaches_all() -> None:
    cancelled: list[bool] = []

    async def lives() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    running = asyncio.ensure_future(until_one_ends(lives(), lives()))
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cancelled == [True, True]
