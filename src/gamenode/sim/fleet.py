"""A simulated fleet: starts its nodes one after the other, lays faults on them, and judges."""

from __future__ import annotations

import asyncio
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from gamenode.agent.settings import AgentSettings, HostSettings
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.node import NodeType
from gamenode.lib.clock import Clock
from gamenode.lib.tasks import Supervisor, every
from gamenode.sim.faults import STRIKING, Fault, FaultKind
from gamenode.sim.judge import Finding, Judge, JudgeSettings, Verdict
from gamenode.sim.node import SimulatedNode, Surroundings
from gamenode.sim.watch import EventWatch, WatchSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """What is simulated, and its bounds."""

    nodes: int
    server: str
    """The server's gRPC address."""
    duration_s: float
    """From the start of the first node to the verdict."""
    faults: tuple[Fault, ...] = ()
    seed: int
    summary_interval_s: float = 5.0
    starts_per_s: float = 50.0
    stops_at_once_max: int = 200
    threads: int = 4
    files_spare: int = 256
    """Open files that are needed beside one for each node."""
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a simulation."""

    settings: FleetSettings
    findings: Sequence[Finding]
    figures: Mapping[str, float | int | None]

    @property
    def kept(self) -> bool:
        """Return whether no promise was seen broken."""
        return all(finding.verdict is not Verdict.BROKEN for finding in self.findings)

    def body(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "nodes": self.settings.nodes,
            "seed": self.settings.seed,
            "kept": self.kept,
            "promises": [asdict(finding) for finding in self.findings],
            "figures": [{"name": name, "value": it} for name, it in self.figures.items()],
        }


class Fleet:
    """Many nodes, for a while."""

    def __init__(
        self,
        settings: FleetSettings,
        *,
        folder: Path,
        token: str,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        """Keep spooled logs below `folder`; give the live summary to `tell`, line by line.

        `token` lets the fleet see the server's events; empty where the server asks for none.

        Raises:
            GameNodeError: this process may not open so many connections.
        """
        _allow_files(settings.nodes + settings.files_spare)
        self._settings = settings
        self._clock = clock
        self._token = token
        self._tell = tell
        self._refusal: GameNodeError | None = None
        self._random = Random(settings.seed)  # noqa: S311 - the same seed, the same faults
        self._judge = Judge(clock, settings.judge)
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="sim")
        self._ending = asyncio.Event()
        self._begun_s = clock.monotonic_s()
        self._looked_s: float | None = None
        self._stall_s_max = 0.0
        self._nodes = self._make_nodes(folder)

    def end(self) -> None:
        """End before the time."""
        self._ending.set()

    async def run(self) -> Outcome:
        """Simulate, and return the verdict.

        Raises:
            GameNodeError: UNAVAILABLE, no node could register; UNAUTHENTICATED, PERMISSION_DENIED.
        """
        settings = self._settings
        loops, strikes = Supervisor(), Supervisor()
        _ = loops.start("watch", self._watch())
        loops.keep("judge", lambda: every(1.0, self._look))
        loops.keep("summary", lambda: every(settings.summary_interval_s, self._summarise))
        self._begun_s = self._clock.monotonic_s()
        try:
            await self._start()
            for fault in settings.faults:
                if fault.kind in STRIKING and fault.ratio:
                    strikes.keep(f"fault {fault.kind}", partial(self._strike, fault))
            await self._pause(settings.duration_s - (self._clock.monotonic_s() - self._begun_s))
            outcome = self._outcome()
        finally:
            self._ending.set()
            # What the fleet's leaving does to it is no news.
            await loops.close()
            await strikes.finish()
            await self._stop()
        if self._refusal is not None:
            raise self._refusal
        if not self._judge.counts.registrations:
            raise GameNodeError(
                ErrorCode.UNAVAILABLE,
                f"no node could register with {settings.server}",
                hint="is a server's gRPC there? Name it with --server HOST:PORT",
            )
        return outcome

    def _make_nodes(self, folder: Path) -> list[SimulatedNode]:
        settings = self._settings
        around = Surroundings(
            settings=AgentSettings(
                agent=HostSettings(
                    server=settings.server,
                    data=folder,
                    node_type=NodeType.PHYSICAL,
                    labels={"simulated": "true"},
                )
            ),
            judge=self._judge,
            clock=self._clock,
            random=self._random,
            pool=self._pool,
        )
        late = self._chosen(FaultKind.SLOW)
        off = self._chosen(FaultKind.SKEW)
        return [
            SimulatedNode(
                number,
                around,
                delay_s_max=late.get(number, 0.0),
                skew_s=off.get(number, 0.0) * self._random.choice((-1.0, 1.0)),
            )
            for number in range(1, settings.nodes + 1)
        ]

    def _chosen(self, kind: FaultKind) -> dict[int, float]:
        """Return the nodes that have a lasting fault, and how strongly."""
        for fault in self._settings.faults:
            if fault.kind is kind:
                count = math.ceil(fault.ratio * self._settings.nodes)
                numbers = range(1, self._settings.nodes + 1)
                return dict.fromkeys(self._random.sample(numbers, count), fault.duration_s)
        return {}

    async def _start(self) -> None:
        """Start the nodes, spread over time; heartbeats are spread with them."""
        for number, node in enumerate(self._nodes):
            due_s = self._begun_s + number / self._settings.starts_per_s
            await self._pause(due_s - self._clock.monotonic_s())
            if self._ending.is_set():
                return
            node.start()

    async def _strike(self, fault: Fault) -> None:
        """Strike nodes at random instants, so often as the fault says."""
        per_s = fault.ratio * len(self._nodes) / 60.0
        struck = Supervisor()
        while not self._ending.is_set():
            await self._pause(self._random.expovariate(per_s))
            node = self._random.choice(self._nodes)
            if not self._ending.is_set() and not node.struck:
                _ = struck.start(f"{fault.kind} {node.node_id}", node.strike(fault, self._pause))
        await struck.finish()

    async def _stop(self) -> None:
        turns = asyncio.Semaphore(self._settings.stops_at_once_max)

        async def stop(node: SimulatedNode) -> None:
            async with turns:
                await node.stop()

        await asyncio.gather(*(stop(node) for node in self._nodes))
        self._pool.shutdown()

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until the simulation ends."""
        if seconds > 0 and not self._ending.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._ending.wait()
            except TimeoutError:
                return

    async def _look(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._looked_s is not None:
            self._stall_s_max = max(self._stall_s_max, now_s - self._looked_s - 1.0)
        self._looked_s = now_s
        self._judge.check()

    async def _watch(self) -> None:
        watch = EventWatch(
            self._settings.server,
            heard=self._judge.heard,
            lost=self._judge.server_lost,
            gap=self._gap,
            token=self._token,
            settings=self._settings.watch,
        )
        try:
            await watch.run()
        except GameNodeError as error:
            self._refusal = error
            self.end()

    def _gap(self) -> None:
        self._judge.counts.event_gaps += 1

    async def _summarise(self) -> None:
        judge, counts = self._judge, self._judge.counts
        self._tell(
            f"{self._clock.monotonic_s() - self._begun_s:5.0f} s"
            f"  online {judge.online}/{len(self._nodes)}"
            f"  cut off {judge.cut_off}"
            f"  registered {counts.registrations}"
            f"  heartbeats {counts.beats_answered}/{counts.beats_sent}"
            f"  p50 {_ms(judge.latencies.quantile_s(0.5))}"
            f"  p99 {_ms(judge.latencies.quantile_s(0.99))}"
            f"  streams {counts.streams}"
            f"  broken promises {judge.broken}"
        )

    def _outcome(self) -> Outcome:
        judge, counts = self._judge, self._judge.counts
        judge.check()
        p50_s, p99_s = judge.latencies.quantile_s(0.5), judge.latencies.quantile_s(0.99)
        return Outcome(
            settings=self._settings,
            findings=judge.findings(run for node in self._nodes for run in node.starts),
            figures={
                "online": judge.online,
                "registrations": counts.registrations,
                "streams": counts.streams,
                "heartbeats_sent": counts.beats_sent,
                "heartbeats_answered": counts.beats_answered,
                "heartbeats_refused": counts.beats_refused,
                "heartbeat_p50_s": p50_s,
                "heartbeat_p99_s": p99_s,
                "server_lost": counts.server_losses,
                "events": counts.events,
                "event_gaps": counts.event_gaps,
                **{f"strikes_{kind}": counts.strikes[kind] for kind in STRIKING},
                "simulator_stall_s_max": round(self._stall_s_max, 3),
                "simulator_memory_bytes": _memory_bytes(),
            },
        )


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as this process may, if it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise GameNodeError(
            ErrorCode.RESOURCE_EXHAUSTED,
            f"this process may open {hard} files, and so many nodes need {wanted}",
            hint=f"raise the limit (ulimit -Hn {wanted}), or simulate fewer nodes",
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _memory_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"
