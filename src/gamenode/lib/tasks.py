"""Loops and tasks that somebody owns."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

_log = logging.getLogger(__name__)


class Supervisor:
    """Owns the background tasks of one object and ends them with it.

    A loop started with `keep` is started again after a failure, `restart_s` later, since one bad
    row must not stop the work on all others; the failure is logged with its traceback. A task
    started with `start` runs once. A failure that is one of `expected` says all in its message: it
    is logged in one line, and once while a loop meets nothing else.
    """

    def __init__(
        self, *, restart_s: float = 1.0, expected: type[Exception] | tuple[()] = ()
    ) -> None:
        """Own no task yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._restart_s = restart_s
        self._expected = expected
        self._closed = False

    def keep(self, name: str, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `loop` until it returns or this supervisor closes, again after each failure."""
        _ = self._add(name, self._kept(name, loop))

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` once; a failure is logged."""
        if self._closed:
            work.close()
        task = self._add(name, self._logged(name, work))
        # One that is cancelled before its first step never gets to await it.
        task.add_done_callback(lambda _: work.close())
        return task

    async def close(self) -> None:
        """Cancel every task and wait until all have ended. Safe to repeat."""
        self._closed = True
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)

    async def finish(self) -> None:
        """Wait until every task has ended by itself; none may be started from now on."""
        self._closed = True
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _add(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._closed:
            work.close()
            message = f"{name}: started after its owner closed"
            raise RuntimeError(message)
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _kept(self, name: str, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        known = ""
        while True:
            try:
                await loop()
            except Exception as error:  # noqa: BLE001 - the last resort of every loop
                if not isinstance(error, self._expected) or str(error) != known:
                    self._say("loop failed; it starts again", error, event="loop.failed", name=name)
                known = str(error)
            else:
                return
            await asyncio.sleep(self._restart_s)

    async def _logged(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - the last resort of every task
            self._say("task failed", error, event="task.failed", name=name)

    def _say(self, message: str, error: Exception, *, event: str, name: str) -> None:
        extra = {"event": event, "task": name}
        if isinstance(error, self._expected):
            _log.warning("%s: %s: %s", name, message, error, extra=extra)
        else:
            _log.error("%s: %s", name, message, exc_info=error, extra=extra)


class Wake:
    """A bell that a loop waits for: rung once or many times since the last wait, it wakes once."""

    def __init__(self) -> None:
        """Start silent."""
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake the waiter, now or at its next wait."""
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a ring, at most `timeout_s`; return whether there was one."""
        if not self._event.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        rung = self._event.is_set()
        self._event.clear()
        return rung


async def every(period_s: float, call: Callable[[], Awaitable[None]]) -> None:
    """Call `call` again and again, `period_s` after it returned. A failure ends the loop."""
    while True:
        await call()
        await asyncio.sleep(period_s)


async def until_one_ends(*works: Coroutine[Any, Any, None]) -> None:
    """Run `works` side by side; when one ends, cancel the others and raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()
