"""Time that passes only when nothing else is left to do.

`@virtual_time` runs a coroutine on a loop whose clock jumps to the next timer whenever the loop
would wait for it. Threads are waited for, so that databases and files take no time at all.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

P = ParamSpec("P")
T = TypeVar("T")

START_AT = Instant(1_800_000_000 * NANOSECONDS_PER_S)
_HANG_S = 20.0


class FakeClock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self._passed_s = 0.0
        self._jumped_s = 0.0

    def jump(self, seconds: float) -> None:
        """Set the wall clock ahead, or back; no time passes."""
        self._jumped_s += seconds

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds

    def now(self) -> Instant:
        """Return the moment it is."""
        passed_s = self.monotonic_s() + self._jumped_s
        return Instant(START_AT + round(passed_s * NANOSECONDS_PER_S))

    def monotonic_s(self) -> float:
        """Return how much time has passed."""
        return self._passed_s


class LoopClock(FakeClock):
    """The clock of the running virtual loop; threads may ask it too."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()

    def monotonic_s(self) -> float:
        """Return the loop's time."""
        return self._loop.time() + self._passed_s


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop that never waits for a timer."""

    def __init__(self) -> None:
        self._virtual_s = 0.0
        self._threads_at_work = 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self._virtual_s

    def run_in_executor(  # type: ignore[override]  # the parent's is typed by its arguments
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """Run on a thread; time stands still meanwhile."""
        self._threads_at_work += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as in later Pythons
        """Wait for the threads of `to_thread` to end; time stands still meanwhile."""
        del timeout
        self._threads_at_work += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._threads_at_work -= 1

    def waited(self, timeout_s: float | None) -> float | None:
        """Return how long to wait really, after passing the time instead."""
        if timeout_s is not None and timeout_s <= 0:
            return timeout_s
        if self._threads_at_work:
            return _HANG_S
        if timeout_s is None:
            raise RuntimeError("nothing will ever happen: no timer, no thread")
        self._virtual_s += timeout_s
        return 0.0

    def _thread_done(self, _: object) -> None:
        self._threads_at_work -= 1


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        real_s = self._loop.waited(timeout)
        found = super().select(real_s)
        if real_s == _HANG_S and not found:
            raise RuntimeError("a thread does not come back")
        return found


def virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Run an async test, or any coroutine function, in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(test(*args, **kwargs))

    del run.__wrapped__  # or pytest takes it for a coroutine function
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]  # its fixtures
    return run


async def until(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]],
    *,
    timeout_s: float = 60.0,
    every_s: float = 0.05,
) -> None:
    """Wait until `condition` holds; fail after `timeout_s`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        held = condition()
        if await held if isinstance(held, Awaitable) else held:
            return
        assert loop.time() < deadline_s, "it did not come to hold"
        await asyncio.sleep(every_s)
