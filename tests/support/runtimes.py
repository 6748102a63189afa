"""Hosts for the runtimes' tests: each runs steps with one runtime, and outlives its agent."""

from __future__ import annotations

import asyncio
import itertools
import shlex
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

from gamenode.agent.runtime import Ended, LogBlock, RunKey, Runtime
from gamenode.agent.runtime.fake import FakeHost, FakeRuntime
from gamenode.agent.runtime.process import ProcessRuntime, ProcessSettings
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec
from gamenode.lib.clock import SystemClock

_numbers = itertools.count(1)


def new_run() -> RunKey:
    """Return a key that no other test has."""
    return RunKey(f"{uuid.uuid4()}", f"step-{next(_numbers)}", 1, 1)


class RuntimeHost(Protocol):
    """A host, and how a step is written for its runtime."""

    def runtime(self) -> Runtime:
        """Return a new runtime object over the host, as an agent makes it when it starts."""

    def step(
        self,
        *,
        prints: bytes = b"",
        complains: bytes = b"",
        lasts_s: float = 0.0,
        exit_code: int = 0,
        ignores_stop: bool = False,
    ) -> ContainerSpec:
        """Return a step that prints (stdout, stderr), then lasts, then ends."""

    def broken_step(self) -> tuple[ContainerSpec, str]:
        """Return a step that cannot start, and a word of the message that says so."""


class FakeRuntimeHost:
    """The fake's host."""

    def __init__(self) -> None:
        self._host = FakeHost(clock=SystemClock())

    def runtime(self) -> Runtime:
        return FakeRuntime(self._host)

    def step(
        self,
        *,
        prints: bytes = b"",
        complains: bytes = b"",
        lasts_s: float = 0.0,
        exit_code: int = 0,
        ignores_stop: bool = False,
    ) -> ContainerSpec:
        environment = {
            "FAKE_STDOUT": prints.decode("utf-8", "surrogateescape"),
            "FAKE_STDERR": complains.decode("utf-8", "surrogateescape"),
            "FAKE_DURATION_S": str(lasts_s),
            "FAKE_EXIT_CODE": str(exit_code),
        }
        if ignores_stop:
            environment["FAKE_IGNORE_STOP"] = "yes"
        return ContainerSpec(environment=environment)

    def broken_step(self) -> tuple[ContainerSpec, str]:
        return ContainerSpec(environment={"FAKE_START_ERROR": "no luck"}), "no luck"


class ShellHost(ABC):
    """How a step is written where there is a shell."""

    image = ""

    @abstractmethod
    def runtime(self) -> Runtime:
        """Return a new runtime object over the host, as an agent makes it when it starts."""

    def step(
        self,
        *,
        prints: bytes = b"",
        complains: bytes = b"",
        lasts_s: float = 0.0,
        exit_code: int = 0,
        ignores_stop: bool = False,
    ) -> ContainerSpec:
        lines = ["trap '' TERM"] if ignores_stop else []
        for content, where in ((prints, ""), (complains, " >&2")):
            if content:
                lines.append(f"printf {shlex.quote(_octal(content))}{where}")
        if lasts_s:
            lines.append(f"sleep {lasts_s}")
        lines.append(f"exit {exit_code}")
        return ContainerSpec(image=self.image, commands=tuple(lines))

    def broken_step(self) -> tuple[ContainerSpec, str]:
        step = ContainerSpec(image=self.image, command=("true",), user="no-such-user")
        return step, "no-such-user"


def _octal(content: bytes) -> str:
    return "".join(f"\\{byte:03o}" for byte in content)


class ProcessRuntimeHost(ShellHost):
    """A folder of runs; `groups`: in control groups where the host lets us, else in sessions."""

    def __init__(self, root: Path, *, groups: bool) -> None:
        self.root = root
        self._groups = groups

    def runtime(self) -> ProcessRuntime:
        runtime = ProcessRuntime(ProcessSettings(root=self.root), clock=SystemClock())
        if not self._groups:
            runtime._groups = None
        return runtime


@asynccontextmanager
async def opened(host: RuntimeHost) -> AsyncIterator[Runtime]:
    """Open a runtime; at the end everything on its host is ended and removed."""
    runtime = host.runtime()
    try:
        yield runtime
    finally:
        for run in await runtime.runs():
            await runtime.stop(run, grace_s=0.0)
            await runtime.remove(run)
        await runtime.close()


async def ends(runtime: Runtime, run: RunKey) -> Ended:
    """Wait for the end of `run`, not for ever."""
    async with asyncio.timeout(20.0):
        return await runtime.wait(run)


async def whole_log(
    runtime: Runtime,
    run: RunKey,
    position: LogPosition | None = None,
    *,
    live: bool = True,
) -> dict[LogStream, bytes]:
    """Read a log to its end, not for ever."""
    streams: dict[LogStream, bytes] = {}
    following = asyncio.Event()
    if live:
        following.set()
    async with asyncio.timeout(20.0):
        async for block in runtime.read_log(run, position or LogPosition(), live=following):
            streams[block.stream] = streams.get(block.stream, b"") + block.data
    return streams


async def until_ended(runtime: Runtime, run: RunKey) -> Ended:
    """Ask again and again what became of `run`, as `wait` does not; not for ever."""
    async with asyncio.timeout(20.0):
        while True:
            found = await runtime.find(run)
            if isinstance(found, Ended):
                return found
            await asyncio.sleep(0.02)


async def first_block(runtime: Runtime, run: RunKey) -> LogBlock:
    """Wait until `run` prints something."""
    following = asyncio.Event()
    following.set()
    async with asyncio.timeout(20.0):
        async for block in runtime.read_log(run, LogPosition(), live=following):
            return block
    raise AssertionError("the run ended and printed nothing")


async def until_printed(runtime: Runtime, run: RunKey, text: bytes) -> None:
    """Read on until `run` has printed `text`, not for ever."""
    following = asyncio.Event()
    following.set()
    printed = b""
    async with asyncio.timeout(20.0):
        async for block in runtime.read_log(run, LogPosition(), live=following):
            printed += block.data
            if text in printed:
                return
    raise AssertionError(f"the run ended and had printed {printed!r}")


def commands_with(marker: str) -> list[int]:
    """Return the living processes of this machine whose arguments hold `marker`."""
    found = []
    for listing in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if marker.encode() in listing.read_bytes():
                found.append(int(listing.parent.name))
    return found


async def until(holds: Callable[[], bool]) -> None:
    """Wait until `holds` does, not for ever."""
    async with asyncio.timeout(20.0):
        while not holds():  # noqa: ASYNC110 - other processes bring it about
            await asyncio.sleep(0.01)
