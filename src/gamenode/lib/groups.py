"""Many callers' work, done in groups on one thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(Exception):
    """More callers wait than the bound allows."""


class GroupWorker(Generic[Item, Result]):
    """Collects what callers submit while a group runs; that is the next group.

    `run` gets the items of one group on a thread and returns one result or exception for each, in
    order; it is never called twice at once. A caller that is cancelled leaves its item in the
    group: what was submitted is carried out (rule RC3).
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result | BaseException]],
        *,
        name: str,
        group_max: int,
        queue_max: int,
        finished: Callable[[], None] = lambda: None,
        pool: Executor | None = None,
    ) -> None:
        """Run groups of at most `group_max` items; let at most `queue_max` wait.

        Groups run in `pool`, which stays open; without one, on a thread of their own.
        `finished` is called on the event loop after each group, before its callers are answered.
        """
        self._run = run
        self._group_max = group_max
        self._queue_max = queue_max
        self._finished = finished
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._owns_pool = pool is None
        self._pool = pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._flushing: asyncio.Future[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the result of `item`, when its group is done.

        Raises:
            QueueFullError: `queue_max` items wait already.
            BaseException: what `run` answered for this item.
        """
        if len(self._waiting) >= self._queue_max:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._flushing is None:
            self._begin(loop)
        return await future

    async def close(self) -> None:
        """Carry out what waits, then end the thread, if it is this object's own."""
        while self._flushing is not None:
            await asyncio.wait([self._flushing])
        if self._owns_pool:
            self._pool.shutdown(wait=False)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        group = [self._waiting.popleft() for _ in range(min(self._group_max, len(self._waiting)))]
        self._flushing = loop.create_future()
        work = loop.run_in_executor(self._pool, self._run, [item for item, _ in group])
        work.add_done_callback(lambda done: self._finish(loop, group, done))

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        group: list[tuple[Item, asyncio.Future[Result]]],
        done: asyncio.Future[Sequence[Result | BaseException]],
    ) -> None:
        flushing = self._flushing
        self._flushing = None
        if self._waiting:
            self._begin(loop)
        if flushing is not None:
            flushing.set_result(None)
        self._finished()
        failure = done.exception()
        results = [failure] * len(group) if failure is not None else done.result()
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
