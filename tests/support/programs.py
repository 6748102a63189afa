"""Programs that share one event loop, and can be killed between any two steps, as by `kill -9`.

Whatever runs in a program's context is a step of it: each callback, each stretch of a task between
two awaits, each piece of work for a thread. A dead program takes no step any more. No `finally`
runs, nothing is written, nobody is told, but for what the kernel would do: `on_death`.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar
from typing import Any, TypeVar
from weakref import WeakSet

T = TypeVar("T")

_PROGRAM: ContextVar[Program | None] = ContextVar("program", default=None)


def program_of(context: Context | None) -> Program | None:
    """Return whose step a callback in `context` (None: the present one) will be."""
    return _PROGRAM.get() if context is None else context.get(_PROGRAM)


class DiedError(Exception):
    """The program died before it answered."""


class Program:
    """One running program. A restart is another one."""

    def __init__(self, name: str, *, on_death: Callable[[], None] = lambda: None) -> None:
        """Live; `on_death` is what the kernel does with what a dead program leaves behind."""
        self.name = name
        self.alive = True
        self.steps = 0
        """How many it has taken."""
        self._dies_at: int | None = None
        self._on_death = on_death
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._remains: list[asyncio.Task[Any]] = []

    def owns(self, task: asyncio.Task[Any]) -> None:
        """Note a task that was made in this program's context."""
        self._tasks.add(task)

    def enter(self, call: Callable[[], T]) -> T:
        """Return what `call` returns; what it starts is this program's."""
        context = contextvars.copy_context()
        context.run(_PROGRAM.set, self)
        return context.run(call)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin `work` in this program."""
        return self.enter(lambda: asyncio.get_running_loop().create_task(work))

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns, done in this program; a cancelled caller cancels it.

        Raises:
            DiedError: the program died; how far the work has come, nobody knows.
            Exception: what it raised.
        """
        if not self.alive:
            work.close()
            raise DiedError(self.name)
        return await self.result(self.start(work))

    async def result(self, task: asyncio.Task[T]) -> T:
        """Return what a task of this program returns, as `call` does."""
        try:
            waits: list[asyncio.Future[Any]] = [task, self._death]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self.alive:
                task.cancel()
        if not task.done():
            raise DiedError(self.name)
        return task.result()

    def step(self, callback: Callable[..., object], *args: Any) -> None:
        """Take a step, unless it is dead, or dies at this very step."""
        if self.alive:
            self.steps += 1
            if self.steps == self._dies_at:
                self.kill()
        if self.alive:
            callback(*args)

    def kill(self, *, in_steps: int = 0) -> None:
        """Die now, or instead of the step that is so many away."""
        if in_steps:
            self._dies_at = self.steps + in_steps
            return
        if self.alive:
            self.alive = False
            self._remains = [task for task in self._tasks if not task.done()]
            self._death.set_result(None)
            self._on_death()

    def spare(self) -> None:
        """Do not die at the step that was named."""
        self._dies_at = None

    def drop_remains(self) -> None:
        """Close what it was at when it was killed."""
        for task in self._remains:
            task._log_destroy_pending = False  # type: ignore[attr-defined] # asyncio's own
            coroutine = task.get_coro()
            assert coroutine is not None
            # A task group hands the GeneratorExit on in a group of its own.
            with suppress(RuntimeError, BaseExceptionGroup):
                coroutine.close()
        self._remains.clear()


def bury(programs: Iterable[Program]) -> None:
    """Drop what dead programs were at, once their loop is closed.

    Only now their `finally` blocks run, where nothing is left that they could reach; what they say
    about that is of no use to anybody.
    """
    with _unheard():
        for program in programs:
            program.drop_remains()
        gc.collect()
        gc.freeze()  # what is left is looked at no more, or each collection takes longer


def collect_buried() -> None:
    """Collect all that was buried, so that no later test hears of it."""
    gc.unfreeze()
    with _unheard():
        gc.collect()


@contextmanager
def _unheard() -> Iterator[None]:
    unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None
    # Or a `finally` that shields something makes a task of the next test's loop.
    asyncio.set_event_loop(None)
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        sys.unraisablehook = unraisable
