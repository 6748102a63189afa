"""Time that passes only when nothing else is left to do.

`@virtual_time` runs a coroutine on a loop whose clock jumps to the next timer whenever the loop
would wait for it. What is handed to threads is done by the loop, so that nothing depends on when
they run.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, ParamSpec, TypeVar

from tests.support.programs import program_of

from gamenode.lib.clock import NANOSECONDS_PER_S, Instant

P = ParamSpec("P")
T = TypeVar("T")

START_AT = Instant(1_800_000_000 * NANOSECONDS_PER_S)


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
    """A loop that never waits: for a timer, its clock jumps; a thread's work is done in its place.

    So one seed gives one order of events, every time.
    """

    def __init__(self) -> None:
        self._virtual_s = 0.0
        self._disk_free_s = 0.0
        self.disk_s = 0.0
        """How long each piece of work takes that is handed to threads, one after the other."""
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self._virtual_s

    def call_soon(  # type: ignore[override]  # the parent's is typed by its arguments
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Call back as a step of the program that asks for it, if there is one."""
        program = program_of(context)
        if program is None:
            return super().call_soon(callback, *args, context=context)
        return super().call_soon(program.step, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # the parent's is typed by its arguments
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call back at a time, as a step of the program that asks for it, if there is one."""
        program = program_of(context)
        if program is not None:
            callback, args = program.step, (callback, *args)
        return super().call_at(when, self._call_timer, when, callback, args, context=context)

    def _call_timer(self, when: float, callback: Callable[..., object], args: Any) -> None:
        # The parent takes timers that are due within its clock's resolution; by the clock that
        # their callers ask, they would come too early.
        self._virtual_s = max(self._virtual_s, when)
        callback(*args)

    def create_task(  # type: ignore[override]  # the parent's has more forms
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """Make a task of the program that asks for it, if there is one."""
        task = super().create_task(coro, name=name, context=context)
        program = program_of(context)
        if program is not None:
            program.owns(task)
        return task

    def run_in_executor(  # type: ignore[override]  # the parent's is typed by its arguments
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """Do the work on the loop, in a step of its own."""
        del executor
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - as a thread hands on whatever it was
                future.set_exception(error)
            else:
                future.set_result(result)

        if self.disk_s:
            self._disk_free_s = max(self._disk_free_s, self._virtual_s) + self.disk_s
            self.call_at(self._disk_free_s, work)
        else:
            self.call_soon(work)
        return future

    def waited(self, timeout_s: float | None) -> float:
        """Return how long to wait really, after passing the time instead."""
        if timeout_s is None:
            raise RuntimeError("nothing will ever happen: no timer is set")
        self._virtual_s += max(0.0, timeout_s)
        return 0.0


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        self._loop.waited(timeout)
        return super().select(0)


def virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Run an async test, or any coroutine function, in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(test(*args, **kwargs))

    del run.__wrapped__  # or pytest takes it for a coroutine function
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]  # its fixtures
    return run


def run_virtually(work: Coroutine[Any, Any, T], *, disk_s: float = 0.0) -> T:
    """Return what `work` returns, run in virtual time; what it leaves behind is dropped."""
    loop = VirtualTimeLoop()
    loop.disk_s = disk_s
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


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
