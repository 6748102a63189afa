"""Many callers' work, done in groups on one thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from gamenode.lib.groups import GroupWorker, QueueFullError


class Held:
    """Doubles numbers, one group at a time, when it is let; some numbers are errors."""

    def __init__(self, *, queue_max: int = 100, group_max: int = 3) -> None:
        self.gate = threading.Event()
        self.groups: list[list[int]] = []
        self.finished = 0
        self.worker: GroupWorker[int, int] = GroupWorker(
            self._run,
            name="test",
            group_max=group_max,
            queue_max=queue_max,
            finished=self._finished,
        )

    def _run(self, group: Sequence[int]) -> Sequence[int | BaseException]:
        assert self.gate.wait(10.0)
        self.groups.append(list(group))
        if 666 in group:
            raise ValueError("the whole group")
        return [ValueError("this one") if number < 0 else number * 2 for number in group]

    def _finished(self) -> None:
        self.finished += 1


async def test_what_comes_while_a_group_runs_is_the_next_one_in_order() -> None:
    held = Held()
    calls = [asyncio.ensure_future(held.worker.submit(number)) for number in range(6)]
    await asyncio.sleep(0)
    held.gate.set()
    assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8, 10]
    assert held.groups == [[0], [1, 2, 3], [4, 5]]
    assert held.finished == 3
    await held.worker.close()


async def test_an_error_is_its_caller_s_alone_and_a_failed_run_everybody_s() -> None:
    held = Held()
    held.gate.set()
    await held.worker.submit(1)
    held.gate.clear()
    calls = [asyncio.ensure_future(held.worker.submit(number)) for number in (0, 1, -1, 2)]
    await asyncio.sleep(0)
    held.gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["0", "2", "this one", "4"]
    with pytest.raises(ValueError, match="the whole group"):
        await held.worker.submit(666)
    assert await held.worker.submit(4) == 8
    await held.worker.close()


async def test_a_caller_that_is_cancelled_leaves_its_work_in_the_group() -> None:
    held = Held()
    first = asyncio.ensure_future(held.worker.submit(1))
    second = asyncio.ensure_future(held.worker.submit(2))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    held.gate.set()
    await held.worker.close()
    assert held.groups == [[1], [2]]


async def test_more_than_the_bound_is_refused() -> None:
    held = Held(queue_max=2)
    calls = [asyncio.ensure_future(held.worker.submit(number)) for number in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await held.worker.submit(9)
    held.gate.set()
    assert await asyncio.gather(*calls) == [0, 2, 4]
    await held.worker.close()


async def test_workers_that_share_threads_keep_their_order_and_leave_the_threads_open() -> None:
    with ThreadPoolExecutor(2) as pool:
        carried_out: list[list[int]] = [[], []]

        def carry_out(number: int, items: Sequence[int]) -> Sequence[int]:
            carried_out[number] += items
            return items

        workers = [
            GroupWorker[int, int](
                partial(carry_out, number),
                name="test",
                group_max=3,
                queue_max=100,
                pool=pool,
            )
            for number in range(2)
        ]
        answers = await asyncio.gather(
            *(worker.submit(item) for item in range(50) for worker in workers)
        )
        assert answers == [item for item in range(50) for _ in workers]
        assert carried_out == [list(range(50))] * 2
        for worker in workers:
            await worker.close()
        assert pool.submit(lambda: 1).result() == 1
