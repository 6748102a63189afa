from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gamenode.lib.groups import GroupWorker


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
