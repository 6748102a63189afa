"""The runtime of plain processes: no isolation, no engine, nothing to install but a shell.

A small supervisor (`supervisor.sh`) starts the step, outlives the agent and keeps the exit code.
What says that a run was started is its folder (`claims`); what belongs to it is told by its
control group or session (`members`). The step's output goes to two plain files, so no reader can
hold it up. What a step's main process leaves behind when it ends is killed, as in a container.

Source: F1, RA2, RI1, promises P1, P2, P11. Needs Linux: /proc, pidfds.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from gamenode.agent.runtime import (
    BLOCK_BYTES_MAX,
    Ended,
    Found,
    LogBlock,
    Progress,
    RunKey,
    Running,
    StartError,
)
from gamenode.agent.runtime import process_spec as spec
from gamenode.agent.runtime.claims import Claim, Claims, folder_name
from gamenode.agent.runtime.members import Cgroup, signal_all
from gamenode.agent.runtime.supervisors import Supervisors
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.lib.clock import Clock, Instant
from gamenode.lib.tasks import Supervisor

_STOP_POLL_S_MAX: Final = 0.2
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings:
    """The bounds of the process runtime."""

    root: Path
    """The folder below which runs are kept; one agent's own."""
    ready_max: int = 2
    """How many supervisors wait for a run, once there was one."""
    threads_max: int = 8
    """How many blocking calls (spawns, reads) at once."""
    adoption_s: float = 5.0
    """How long a supervisor that was just started may take to show itself."""
    live_poll_s: float = 0.003
    """How often a log is looked at while somebody follows it."""
    idle_poll_s: float = 1.0
    """How often otherwise."""
    stop_poll_s: float = 0.005
    """How often it is looked whether what was told to end has ended."""


@dataclass(slots=True, eq=False)
class _Watch:
    """A run that this object looks after."""

    claim: Claim
    pidfd: int | None
    """Holds the supervisor while it lives."""
    ended: asyncio.Future[Ended]
    graces: int = 0
    """How many stops are giving the members time to end by themselves."""


class ProcessRuntime:
    """Runs steps as processes of the host."""

    name = "process"

    def __init__(self, settings: ProcessSettings, *, clock: Clock) -> None:
        """Look after the runs below `settings.root`. May block for a moment.

        Raises:
            GameNodeError: UNAVAILABLE; the host lacks a program that this takes.
        """
        try:
            self._tools = spec.Tools.find()
        except FileNotFoundError as error:
            raise GameNodeError(
                ErrorCode.UNAVAILABLE, f"the process runtime needs the program {error}"
            ) from error
        self._settings = settings
        self._clock = clock
        self._claims = Claims(settings.root, adoption_s=settings.adoption_s)
        self._supervisors = Supervisors(self._tools, self._claims, ready_max=settings.ready_max)
        self._filling: asyncio.Future[None] | None = None
        self._groups = Cgroup.parent()
        self._threads = ThreadPoolExecutor(settings.threads_max, "process-runtime")
        self._tasks = Supervisor()
        self._watches: dict[RunKey, _Watch] = {}

    def unsupported(self, container: ContainerSpec) -> tuple[str, ...]:
        """Return the keys that plain processes cannot honour on this host."""
        return spec.unsupported(container, self._tools)

    async def prepare(self, container: ContainerSpec, *, progress: Progress) -> None:
        """Do nothing: everything is on the host."""

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Claim `run` on disk, then start its supervisor. A claimed one is not started again."""
        now = self._clock.now()
        started = await self._blocking(lambda: self._start(run, container, service, now))
        if started is None:
            return (await self._watched(run)).claim.started_at
        self._fill()
        if run not in self._watches:
            claim, pid = started
            # Still this process, whatever became of it: nobody else takes the end of a child.
            self._watch(run, claim, os.pidfd_open(pid), None)
        return now

    def _start(
        self, run: RunKey, container: ContainerSpec, service: bool, now: Instant
    ) -> tuple[Claim, int] | None:
        """Do the blocking part; return the supervisor's number, None if claimed before."""
        if self._claims.read(run) is not None:
            return None
        command = spec.command(container, self._tools, work=self._claims.folder(run) / "work")
        script = command.script()
        restart = spec.restart(container, service=service)
        try:
            waiting = self._supervisors.take(self._groups, restart)
        except OSError as error:
            raise StartError(Reason.START_FAILED, f"no process can be started: {error}") from error
        claim = Claim(
            boot_id=self._claims.boot_id,
            started_at=now,
            stop_signal=spec.stop_signal(container) or signal.SIGTERM,
            restarts=restart.max != 0,
            cgroup=waiting.draft.cgroup,
        )
        try:
            self._claims.make(run, waiting.draft, claim, script, owner_id=command.user_id)
        except FileExistsError:
            self._supervisors.drop(waiting)
            return None
        except OSError as error:
            self._supervisors.drop(waiting)
            raise StartError(Reason.START_FAILED, f"the run cannot be kept: {error}") from error
        try:
            self._supervisors.go(waiting)
        except BrokenPipeError as error:
            self._claims.remove(run)
            raise StartError(Reason.START_FAILED, "its supervisor was killed") from error
        return claim, waiting.pid

    async def find(self, run: RunKey) -> Found | None:
        """Return what the folder of `run` and the processes of the host say."""
        try:
            watch = await self._watched(run)
        except KeyError:
            return None
        if watch.ended.done():
            return watch.ended.result()
        return Running(started_at=watch.claim.started_at)

    async def wait(self, run: RunKey) -> Ended:
        """Wait until the supervisor and every member of `run` are dead."""
        watch = await self._watched(run)
        # A plain await would let a cancelled waiter cancel the end for all.
        return await asyncio.shield(watch.ended)

    async def stop(self, run: RunKey, *, grace_s: float) -> None:
        """Signal every member of `run`, and kill what is left after `grace_s`."""
        try:
            watch = await self._watched(run)
        except KeyError:
            return
        if watch.claim.restarts:
            await self._end_restarts(run, watch)
        watch.graces += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._ask_to_end(run, watch)
                    await asyncio.shield(watch.ended)
        finally:
            watch.graces -= 1
        pause_s = self._settings.stop_poll_s
        while not watch.ended.done():
            await self._signal(run, watch, signal.SIGKILL)
            await asyncio.wait({watch.ended}, timeout=pause_s)
            # Longer and longer: in a session, what the supervisor runs to keep the exit code is
            # hit as well, and must come through once.
            pause_s = min(2 * pause_s, _STOP_POLL_S_MAX)

    async def _end_restarts(self, run: RunKey, watch: _Watch) -> None:
        """Tell the supervisor to start nothing again, as soon as it can hear."""
        while not watch.ended.done() and not await self._blocking(lambda: self._claims.shown(run)):
            await asyncio.wait({watch.ended}, timeout=self._settings.stop_poll_s)
        if watch.pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch.pidfd, signal.SIGTERM)

    async def _ask_to_end(self, run: RunKey, watch: _Watch) -> None:
        """Send the stop signal to every member: once, and as soon as there is one."""
        number = signal.Signals(watch.claim.stop_signal)
        while not watch.ended.done() and not await self._signal(run, watch, number):
            await asyncio.wait({watch.ended}, timeout=self._settings.stop_poll_s)

    async def _signal(self, run: RunKey, watch: _Watch, number: signal.Signals | None) -> int:
        """Send `number`, if any, to every member; return how many there were."""

        def send() -> int:
            members = self._claims.members(run, watch.claim)
            if members is None:
                return 0
            return len(members.pids()) if number is None else signal_all(members, number)

        return await self._blocking(send)

    async def read_log(
        self, run: RunKey, position: LogPosition, *, live: asyncio.Event
    ) -> AsyncIterator[LogBlock]:
        """Yield the bytes of the two files, as they grow."""
        watch = await self._watched(run)
        folder = self._claims.folder(run)
        with (
            (folder / "stdout").open("rb", buffering=0) as stdout,
            (folder / "stderr").open("rb", buffering=0) as stderr,
        ):
            sources = [
                _Source(LogStream.STDOUT, stdout.fileno(), position.stdout_bytes),
                _Source(LogStream.STDERR, stderr.fileno(), position.stderr_bytes),
            ]
            while True:
                # Asked before the files are read: what was printed until then is in them.
                last = watch.ended.done()
                idle = True
                for source in sources:
                    if (size_bytes := os.fstat(source.descriptor).st_size) < source.offset_bytes:
                        yield self._gap(source, size_bytes)
                    while block := await self._read(source):
                        idle = False
                        yield block
                if last:
                    return
                if idle:
                    await self._printed(watch, live)

    async def _read(self, source: _Source) -> LogBlock | None:
        """Read the next block; for nothing new it takes one system call and no thread."""
        if os.fstat(source.descriptor).st_size <= source.offset_bytes:
            return None
        data = await self._blocking(
            lambda: os.pread(source.descriptor, BLOCK_BYTES_MAX, source.offset_bytes)
        )
        source.offset_bytes += len(data)
        return LogBlock(stream=source.stream, data=data, at=self._clock.now()) if data else None

    def _gap(self, source: _Source, size_bytes: int) -> LogBlock:
        """Go on at the end of a file that is shorter than what was read of it, and say so."""
        lost = source.offset_bytes - size_bytes
        source.offset_bytes = size_bytes
        text = f"{source.stream} was cut: {lost} bytes that were read are gone from the host\n"
        return LogBlock(stream=LogStream.GAMENODE, data=text.encode(), at=self._clock.now())

    async def _printed(self, watch: _Watch, live: asyncio.Event) -> None:
        """Wait until it is time to look at the files again."""
        if live.is_set():
            await asyncio.wait({watch.ended}, timeout=self._settings.live_poll_s)
            return
        followed = asyncio.ensure_future(live.wait())
        either: set[asyncio.Future[Any]] = {watch.ended, followed}
        try:
            await asyncio.wait(
                either, timeout=self._settings.idle_poll_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            followed.cancel()

    async def remove(self, run: RunKey) -> None:
        """Remove the folder and the control group of `run`."""
        try:
            watch = await self._watched(run)
        except KeyError:
            return
        if not watch.ended.done():
            raise GameNodeError(ErrorCode.CONFLICT, f"{folder_name(run)} still lives")
        await self._blocking(lambda: self._remove(run, watch))
        self._watches.pop(run, None)

    def _remove(self, run: RunKey, watch: _Watch) -> None:
        if (members := self._claims.members(run, watch.claim)) is not None:
            members.remove()
        self._claims.remove(run)

    async def runs(self) -> Mapping[RunKey, Found]:
        """Return every run that has a folder."""
        found = {}
        for run in await self._blocking(self._claims.runs):
            if (state := await self.find(run)) is not None:
                found[run] = state
        return found

    def _fill(self) -> None:
        """Have supervisors ready for the runs that come next."""
        if self._filling is None or self._filling.done():
            self._filling = asyncio.get_running_loop().run_in_executor(
                self._threads, self._supervisors.fill, self._groups
            )

    async def tidy(self) -> None:
        """Do nothing: it fetches nothing."""

    async def problem(self) -> str:
        """Return nothing: there is no engine that could be down."""
        return ""

    async def close(self) -> None:
        """Let go of every supervisor."""
        for watch in self._watches.values():
            self._release(watch)
        await self._tasks.close()
        await self._blocking(self._supervisors.close)
        if self._filling is not None:
            await self._filling
        self._threads.shutdown(wait=False)

    async def _watched(self, run: RunKey) -> _Watch:
        """Return what looks after `run`; a KeyError if it was never started."""
        if (watch := self._watches.get(run)) is not None:
            return watch
        now = self._clock.now()
        attached = await self._blocking(lambda: self._claims.attach(run, now=now))
        if attached is None:
            raise KeyError(run)
        if (watch := self._watches.get(run)) is not None:
            return watch  # another asked at the same time
        pidfd = attached.supervisor.hold() if attached.supervisor else None
        return self._watch(run, attached.claim, pidfd, attached.end)

    def _watch(self, run: RunKey, claim: Claim, pidfd: int | None, end: Ended | None) -> _Watch:
        """Look after `run` from here on."""
        loop = asyncio.get_running_loop()
        watch = _Watch(claim, pidfd, loop.create_future())
        self._watches[run] = watch
        if end is not None:
            watch.ended.set_result(end)
        elif pidfd is not None:
            loop.add_reader(pidfd, self._exited, run, watch)
        else:
            self._tasks.keep("process.end", lambda: self._end(run, watch))
        return watch

    def _exited(self, run: RunKey, watch: _Watch) -> None:
        """Take the end of a supervisor, and see to what it leaves."""
        assert watch.pidfd is not None
        with suppress(ChildProcessError):  # it may be another agent's child
            os.waitid(os.P_PIDFD, watch.pidfd, os.WEXITED | os.WNOHANG)
        self._release(watch)
        self._tasks.keep("process.end", lambda: self._end(run, watch))

    async def _end(self, run: RunKey, watch: _Watch) -> None:
        """Kill what is left of `run`, then say how it ended.

        While it is being stopped, the grace is for all of it: a game may still be saving when the
        shell that started it has ended by the signal already.
        """
        pause_s = self._settings.stop_poll_s
        while await self._signal(run, watch, None if watch.graces else signal.SIGKILL):
            await asyncio.wait({watch.ended}, timeout=pause_s)
            pause_s = min(2 * pause_s, _STOP_POLL_S_MAX)
        now = self._clock.now()
        end = await self._blocking(lambda: self._claims.end(run, watch.claim, now=now))
        watch.ended.set_result(end)

    @staticmethod
    def _release(watch: _Watch) -> None:
        if watch.pidfd is not None:
            asyncio.get_running_loop().remove_reader(watch.pidfd)
            os.close(watch.pidfd)
            watch.pidfd = None

    async def _blocking(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


@dataclass(slots=True)
class _Source:
    """One of a run's two files, and how far it was read."""

    stream: LogStream
    descriptor: int
    offset_bytes: int
