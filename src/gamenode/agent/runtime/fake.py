"""A runtime without processes, for tests and the simulator: a step's environment steers it.

FAKE_PREPARE_S      how long it takes to fetch what a start needs, in seconds (0)
FAKE_PULL_BYTES     how much that is, told in four equal parts
FAKE_START_S        how long a start takes, in seconds (0)
FAKE_START_ERROR    the start fails with this message
FAKE_START_REASON   and for this reason (START_FAILED)
FAKE_DURATION_S     how long the run lasts, in seconds (a task 0, a service without end)
FAKE_EXIT_CODE      how it ends (0)
FAKE_SIGNAL         it ends by this signal instead
FAKE_END_REASON     and for this reason, such as OOM_KILLED, where it does not end well
FAKE_UNSUPPORTED    keys, with commas between, that cannot be honoured
FAKE_STDOUT         what it prints, as it is; so does FAKE_STDERR
FAKE_LOG_LINES      so many numbered lines on stdout, after FAKE_STDOUT
FAKE_IGNORE_STOP    set: only a kill ends it
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from signal import SIGKILL, SIGTERM
from typing import Final

from gamenode.agent.runtime import (
    BLOCK_BYTES_MAX,
    Ended,
    Found,
    LogBlock,
    Progress,
    Pull,
    RunKey,
    Running,
    StartError,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.lib.clock import Clock, Instant, after

_PULL_PARTS: Final = 4

Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class _FakeRun:
    started_at: Instant
    started_monotonic_s: float
    duration_s: float | None
    code: int
    reason: Reason | None
    ignores_stop: bool
    output: Mapping[LogStream, bytes]
    stopped: Ended | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class FakeHost:
    """The host under a fake runtime: what outlives the agent.

    Two runtimes over one host, one after the other, are an agent that was restarted.
    """

    def __init__(self, *, clock: Clock, sleep: Sleep = asyncio.sleep) -> None:
        """Run nothing yet; time passes as `clock` and `sleep` say."""
        self.clock = clock
        self.sleep = sleep
        self.starts: list[RunKey] = []
        """Every run that came to run, in order."""
        self._runs: dict[RunKey, _FakeRun] = {}
        self._starting: set[RunKey] = set()

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Start `run`, once."""
        while run in self._starting:
            await self.sleep(0.001)
        if run not in self._runs:
            env = container.environment
            self._starting.add(run)
            try:
                await self.sleep(float(env.get("FAKE_START_S", "0")))
                if "FAKE_START_ERROR" in env:
                    reason = Reason(env.get("FAKE_START_REASON", Reason.START_FAILED))
                    raise StartError(reason, env["FAKE_START_ERROR"])
                self._runs[run] = self._created(env, service=service)
                self.starts.append(run)
            finally:
                self._starting.discard(run)
        return self.get(run).started_at

    def _created(self, env: Mapping[str, str], *, service: bool) -> _FakeRun:
        lines = "".join(f"line {n}\n" for n in range(1, int(env.get("FAKE_LOG_LINES", "0")) + 1))
        duration = env.get("FAKE_DURATION_S", "" if service else "0")
        signal = int(env.get("FAKE_SIGNAL", "0"))
        return _FakeRun(
            started_at=self.clock.now(),
            started_monotonic_s=self.clock.monotonic_s(),
            duration_s=float(duration) if duration else None,
            code=128 + signal if signal else int(env.get("FAKE_EXIT_CODE", "0")),
            reason=Reason(env["FAKE_END_REASON"]) if "FAKE_END_REASON" in env else None,
            ignores_stop="FAKE_IGNORE_STOP" in env,
            output={
                LogStream.STDOUT: (env.get("FAKE_STDOUT", "") + lines).encode(),
                LogStream.STDERR: env.get("FAKE_STDERR", "").encode(),
            },
        )

    def get(self, run: RunKey) -> _FakeRun:
        """Return the state of `run`, a KeyError if it was never started."""
        return self._runs[run]

    def runs(self) -> tuple[RunKey, ...]:
        """Return every run there is."""
        return tuple(self._runs)

    def end(self, run: RunKey) -> Ended | None:
        """Return how `run` ended, None while it lives."""
        it = self.get(run)
        if it.stopped is None and self.remaining_s(run) == 0.0:
            assert it.duration_s is not None
            ended = Ended.by_code(
                it.code, started_at=it.started_at, ended_at=after(it.started_at, it.duration_s)
            )
            it.stopped = replace(ended, reason=it.reason or ended.reason)
        return it.stopped

    def remaining_s(self, run: RunKey) -> float | None:
        """Return how long `run` goes on by itself; None: without end."""
        it = self.get(run)
        if it.duration_s is None:
            return None
        return max(0.0, it.started_monotonic_s + it.duration_s - self.clock.monotonic_s())

    def kill(self, run: RunKey, signal: int) -> bool:
        """Send `signal` to `run`; return whether it has ended."""
        if self.end(run) is not None:
            return True
        it = self.get(run)
        if it.ignores_stop and signal != SIGKILL:
            return False
        it.stopped = Ended.by_code(
            128 + signal, started_at=it.started_at, ended_at=self.clock.now()
        )
        it.changed.set()
        return True

    def forget(self, run: RunKey) -> None:
        """Drop `run`."""
        self._runs.pop(run, None)


class FakeRuntime:
    """Runs steps in a `FakeHost`."""

    name = "fake"

    def __init__(self, host: FakeHost) -> None:
        """Run on `host`."""
        self._host = host

    def unsupported(self, container: ContainerSpec) -> tuple[str, ...]:
        """Return what the environment says; else it honours nothing and refuses nothing."""
        return tuple(filter(None, container.environment.get("FAKE_UNSUPPORTED", "").split(",")))

    async def prepare(self, container: ContainerSpec, *, progress: Progress) -> None:
        """Wait as the environment says."""
        whole_s = float(container.environment.get("FAKE_PREPARE_S", "0"))
        total_bytes = int(container.environment.get("FAKE_PULL_BYTES", "0"))
        if not total_bytes:
            await self._host.sleep(whole_s)
            return
        for part in range(_PULL_PARTS):
            done_bytes = total_bytes * part // _PULL_PARTS
            progress(Pull(image=container.image, done_bytes=done_bytes, total_bytes=total_bytes))
            await self._host.sleep(whole_s / _PULL_PARTS)

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Start `run` as its environment says."""
        return await self._host.start(run, container, service=service)

    async def find(self, run: RunKey) -> Found | None:
        """Return what became of `run`."""
        return self._found(run) if run in self._host.runs() else None

    def _found(self, run: RunKey) -> Found:
        return self._host.end(run) or Running(started_at=self._host.get(run).started_at)

    async def wait(self, run: RunKey) -> Ended:
        """Wait for the end of `run`: by itself, or by a stop."""
        changed = self._host.get(run).changed
        while (end := self._host.end(run)) is None:
            remaining_s = self._host.remaining_s(run)
            if remaining_s is None:
                await changed.wait()
            else:
                await self._sleep_or(changed, remaining_s)
        return end

    async def _sleep_or(self, changed: asyncio.Event, seconds: float) -> None:
        waits = [
            asyncio.ensure_future(changed.wait()),
            asyncio.ensure_future(self._host.sleep(seconds)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def stop(self, run: RunKey, *, grace_s: float) -> None:
        """End `run` with SIGTERM, after `grace_s` with SIGKILL."""
        if run not in self._host.runs() or self._host.kill(run, SIGTERM):
            return
        await self._sleep_or(self._host.get(run).changed, grace_s)
        self._host.kill(run, SIGKILL)

    async def read_log(
        self,
        run: RunKey,
        position: LogPosition,
        *,
        live: asyncio.Event,  # noqa: ARG002 - the Protocol's; here everything is printed at once
    ) -> AsyncIterator[LogBlock]:
        """Yield what the environment told it to print, then wait for the end."""
        begins = {
            LogStream.STDOUT: position.stdout_bytes,
            LogStream.STDERR: position.stderr_bytes,
        }
        for stream, text in self._host.get(run).output.items():
            for start in range(begins[stream], len(text), BLOCK_BYTES_MAX):
                block = text[start : start + BLOCK_BYTES_MAX]
                yield LogBlock(stream=stream, data=block, at=self._host.clock.now())
        await self.wait(run)

    async def remove(self, run: RunKey) -> None:
        """Forget `run`."""
        if run in self._host.runs() and self._host.end(run) is None:
            raise GameNodeError(ErrorCode.CONFLICT, f"run {run} still lives")
        self._host.forget(run)

    async def runs(self) -> Mapping[RunKey, Found]:
        """Return every run of the host."""
        return {run: self._found(run) for run in self._host.runs()}

    async def tidy(self) -> None:
        """Do nothing: it fetches nothing."""

    async def problem(self) -> str:
        """Return nothing: there is no engine that could be down."""
        return ""

    async def close(self) -> None:
        """Let go; the host goes on."""
