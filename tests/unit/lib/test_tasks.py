from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from gamenode.lib.tasks import Supervisor, Wake, every, until_one_ends

TIMEOUT_S = 5.0


class _BusyError(Exception):
    """What a loop may meet on a good day."""


async def test_a_loop_that_fails_is_started_again_and_said_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = asyncio.Event()
    failures: Iterator[Exception | None] = iter([ValueError("first"), ValueError("first"), None])

    async def loop() -> None:
        if (failure := next(failures)) is not None:
            raise failure
        ended.set()

    supervisor = Supervisor(restart_s=0.0)
    supervisor.keep("loop", loop)
    async with asyncio.timeout(TIMEOUT_S):
        await ended.wait()
    await supervisor.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert all(record.exc_info for record in caplog.records)


async def test_an_expected_failure_is_said_in_one_line_and_once_in_a_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = asyncio.Event()
    failures: Iterator[Exception | None] = iter(
        [_BusyError("full"), _BusyError("full"), ValueError("other"), _BusyError("full"), None]
    )

    async def loop() -> None:
        if (failure := next(failures)) is not None:
            raise failure
        ended.set()

    supervisor = Supervisor(restart_s=0.0, expected=_BusyError)
    supervisor.keep("loop", loop)
    async with asyncio.timeout(TIMEOUT_S):
        await ended.wait()
    await supervisor.close()
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.ERROR, logging.WARNING]
    assert "full" in caplog.records[0].getMessage()
    assert not caplog.records[0].exc_info


async def test_closing_ends_every_task_also_one_that_is_started_meanwhile() -> None:
    supervisor = Supervisor()
    ended: list[str] = []

    async def sleep(name: str) -> None:
        try:
            await asyncio.sleep(TIMEOUT_S)
        finally:
            ended.append(name)

    _ = supervisor.start("one", sleep("one"))
    supervisor.keep("two", lambda: sleep("two"))
    await asyncio.sleep(0)
    await supervisor.close()
    assert sorted(ended) == ["one", "two"]
    with pytest.raises(RuntimeError, match="after its owner closed"):
        _ = supervisor.start("late", sleep("late"))


async def test_a_bell_wakes_once_however_often_it_rang() -> None:
    wake = Wake()
    wake.ring()
    wake.ring()
    assert await wake.wait(TIMEOUT_S)
    assert not await wake.wait(0.0)


async def test_the_failure_of_a_periodic_call_ends_its_loop() -> None:
    calls: list[int] = []

    async def call() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise _BusyError

    with pytest.raises(_BusyError):
        await every(0.0, call)
    assert len(calls) == 3


async def test_the_first_end_cancels_the_others_and_is_what_is_raised() -> None:
    cancelled = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fails() -> None:
        await asyncio.sleep(0)
        raise _BusyError

    with pytest.raises(_BusyError):
        await until_one_ends(waits(), fails())
    assert cancelled.is_set()


async def test_a_supervisor_that_finishes_waits_for_its_tasks_and_takes_no_more() -> None:
    supervisor, go, done = Supervisor(), asyncio.Event(), []

    async def work() -> None:
        await go.wait()
        done.append(1)

    _ = supervisor.start("work", work())
    finishing = asyncio.ensure_future(supervisor.finish())
    await asyncio.sleep(0)
    assert not finishing.done()
    go.set()
    await finishing
    assert done == [1]
    with pytest.raises(RuntimeError, match="closed"):
        _ = supervisor.start("late", work())


async def test_a_task_that_is_closed_before_it_begins_leaves_nothing_unawaited() -> None:
    supervisor = Supervisor()
    begun: list[bool] = []

    async def begins() -> None:
        begun.append(True)

    _ = supervisor.start("never", begins())  # a warning, if nobody closed its coroutine
    await supervisor.close()
    assert begun == []


async def test_a_cancel_reaches_all_that_run_side_by_side() -> None:
    cancelled: list[bool] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(TIMEOUT_S)
        finally:
            cancelled.append(True)

    running = asyncio.ensure_future(until_one_ends(waits(), waits()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cancelled == [True, True]
