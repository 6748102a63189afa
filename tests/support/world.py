"""Server, two nodes and what may happen to them: the state machine that the promises are held to.

An example is a `Plan`: how the world is, and a list of `Act`s. What is done is done in passing, so
that acts overlap. `World.judge` then holds what the hosts, the wire and the database have recorded
against the promises of the architecture.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import math
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

from tests.support import trail
from tests.support.plane import (
    SPEAKER,
    USER,
    ControlPlane,
    CountingIds,
    Network,
    NodeAgent,
    PlaneSettings,
    RecordingHost,
    Witness,
)
from tests.support.programs import DiedError, Program, bury
from tests.support.time import LoopClock, run_virtually, until

from gamenode.agent.runtime import RunKey
from gamenode.domain.command import (
    Acknowledged,
    CancelOrder,
    Dispatch,
    FencedOrder,
    OrderAnswer,
    ServerWord,
    StateOrder,
    Welcome,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.inventory import Gpu, Hardware, Inventory
from gamenode.domain.node import Maintenance, Session
from gamenode.domain.pipeline import Pipeline, PipelineReport, Reason, Status, StepReport
from gamenode.domain.verification import AttemptVerdict
from gamenode.lib.clock import NANOSECONDS_PER_S, Instant, after
from gamenode.server.pipelines.manager import PipelineSettings
from gamenode.server.pipelines.verifier import AttemptVerifier, VerifierSettings

NODES = ("n1", "n2")
GRACE_S = 2.0
_PROMISED_S = 5.0
"""How much longer than its grace a stop may take (P11)."""
_OVER = frozenset({"COMPLETED", "FAILED", "CANCELLED"})
_SETTLES_S = 900.0
_FENCE_TRIES = 20
"""How often an operator looks whether a node is offline, to fence it."""
_SETTINGS = PlaneSettings(
    pipelines=PipelineSettings(lost_fail_s=10.0, lost_sweep_interval_s=2.0, restarts_max=2)
)
_HOST = Inventory(hardware=Hardware(gpu=(Gpu(uuid="GPU-1", memory_bytes=1),)))
_MEMORY = Path("/dev/shm")  # programs are killed, not machines: nothing depends on a real disk


@dataclass(frozen=True)
class StepPlan:
    """One step of a pipeline."""

    duration_s: float = 0.5
    prepare_s: float = 0.0
    start_s: float = 0.0
    exit_code: int = 0
    retries: int = 0
    when: str = "success"
    ignores_stop: bool = False
    timeout_s: float | None = None
    service: bool = False

    def text(self, name: str, *, port: bool) -> str:
        """Return the step as a pipeline file has it."""
        lines = [
            f"  - name: {name}",
            f"    when: {self.when}",
            f"    retries: {{max: {self.retries}, backoff: 1s}}",
            f"    type: {'service' if self.service else 'task'}",
            *([f"    timeout: {self.timeout_s:g}s"] if self.timeout_s else []),
            "    container:",
            "      image: a",
            *(['      ports: ["7000:7000"]'] if port else []),
            f"      stop_grace_period: {GRACE_S:g}s",
            "      environment:",
            f'        FAKE_DURATION_S: "{self.duration_s}"',
            f'        FAKE_PREPARE_S: "{self.prepare_s}"',
            f'        FAKE_START_S: "{self.start_s}"',
            f'        FAKE_EXIT_CODE: "{self.exit_code}"',
            '        FAKE_LOG_LINES: "2"',
            *(['        FAKE_IGNORE_STOP: "1"'] if self.ignores_stop else []),
        ]
        return "\n".join(lines)


class Data(StrEnum):
    """What an agent finds of its data folder when it starts again."""

    KEPT = "kept"
    LOST = "lost"
    RESTORED = "restored"
    REIMAGED = "re-imaged"
    """Lost, and so is everything that the host ran."""
    REBOOTED = "rebooted"
    """Kept, while everything that the host ran has ended."""


_BOOTS = frozenset({Data.REIMAGED, Data.REBOOTED})


class Claim(StrEnum):
    """What only one dispatch can have at a time."""

    PORT = "a host port"
    GPU = "the GPU of a host"
    GROUP = "the one place in a concurrency group"


@dataclass(frozen=True)
class Create:
    """Create a pipeline; who asks does so again until it is answered."""

    steps: tuple[StepPlan, ...]
    node: str = ""
    timeout_s: float | None = None
    twice: bool = False
    on_lost: str = "wait"
    claims: frozenset[Claim] = frozenset()

    def text(self) -> str:
        """Return the pipeline as its file has it."""
        port = Claim.PORT in self.claims
        lines = [
            "name: work",
            f"on_lost: {self.on_lost}",
            *([f"timeout: {self.timeout_s:g}s"] if self.timeout_s else []),
            *(["placement: {gpu: {slots: 1}}"] if Claim.GPU in self.claims else []),
            *(["concurrency: {group: g, limit: 1}"] if Claim.GROUP in self.claims else []),
            "steps:",
            *(step.text(f"s{number}", port=port) for number, step in enumerate(self.steps)),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Retry:
    """Repeat a pipeline that went badly, if it has; who asks does so until it is answered."""

    pipeline: int
    from_failed: bool
    twice: bool = False


@dataclass(frozen=True)
class Extend:
    """Let a pipeline take longer."""

    pipeline: int
    by_s: float
    twice: bool = False


@dataclass(frozen=True)
class Fence:
    """Say that a node's host is dead, as soon as the node is offline."""

    node: int


@dataclass(frozen=True)
class Cancel:
    """Cancel a pipeline."""

    pipeline: int
    force: bool = False


@dataclass(frozen=True)
class KillServer:
    """Kill the server some steps from now, and start it again some time later."""

    in_steps: int
    down_s: float


@dataclass(frozen=True)
class KillAgent:
    """Kill an agent some steps from now, and start it again some time later."""

    node: int
    in_steps: int
    down_s: float
    data: Data = Data.KEPT


@dataclass(frozen=True)
class Snapshot:
    """Copy an agent's data folder, as it is now."""

    node: int


@dataclass(frozen=True)
class Break:
    """Break every stream."""


@dataclass(frozen=True)
class Silence:
    """Lose what is and will be on its way on every stream, or only what the server says."""

    only_server: bool


@dataclass(frozen=True)
class Stall:
    """Hold up what agents say, for a while."""

    seconds: float


@dataclass(frozen=True)
class Cut:
    """Cut the network, for a while."""

    seconds: float


@dataclass(frozen=True)
class Replay:
    """Let an old order arrive once more."""

    node: int
    back: int


@dataclass(frozen=True)
class LateWord:
    """Let the word of a superseded session, or of a superseded attempt, arrive."""

    pipeline: int
    status: Status
    of_step: bool
    of_session: bool


@dataclass(frozen=True)
class ChangeState:
    """Want another maintenance state."""

    node: int
    target: Maintenance


@dataclass(frozen=True)
class FillServerDisk:
    """Let the server's disk be full, for a while."""

    seconds: float


@dataclass(frozen=True)
class FillAgentDisk:
    """Let an agent's disk be full, for a while."""

    node: int
    seconds: float


@dataclass(frozen=True)
class Wait:
    """Let time pass."""

    seconds: float


Act = (
    Create
    | Retry
    | Extend
    | Fence
    | Cancel
    | KillServer
    | KillAgent
    | Snapshot
    | Break
    | Silence
    | Stall
    | Cut
    | Replay
    | LateWord
    | ChangeState
    | FillServerDisk
    | FillAgentDisk
    | Wait
)


@dataclass(frozen=True)
class Plan:
    """One example."""

    acts: tuple[Act, ...]
    seed: int = 0
    delay_s_max: float = 0.0
    repeat_ratio: float = 0.0
    disk_s: float = 0.0


@dataclass(frozen=True)
class _Told:
    """When an agent heard that a pipeline must end."""

    node_id: str
    dispatch: Dispatch
    force: bool
    at: Instant


@dataclass(frozen=True)
class _Obeyed:
    """When an agent confirmed a maintenance state, and what it listed."""

    at: Instant
    version: int
    target: Maintenance
    remaining: frozenset[Dispatch]


@dataclass(frozen=True)
class _Life:
    """When a run lived on a host that was not dead, as instants."""

    node_id: str
    run: RunKey
    dispatch: Dispatch
    began: float
    ended: float


class _Records(Witness):
    """What passed between server and agents, as far as promises speak of it."""

    def __init__(self, clock: LoopClock) -> None:
        self._clock = clock
        self._orders: dict[tuple[str, int], StateOrder] = {}
        self.told_to_end: list[_Told] = []
        self.told_states: defaultdict[str, list[tuple[Instant, int]]] = defaultdict(list)
        self.obeyed: defaultdict[str, list[_Obeyed]] = defaultdict(list)

    def told(self, node_id: str, word: ServerWord | None) -> None:
        match word:
            case FencedOrder(order=CancelOrder() as order):
                self._end(node_id, order.dispatch, force=order.force)
            case FencedOrder(order=StateOrder() as order):
                self._orders[node_id, word.sequence] = order
                self.told_states[node_id].append((self._clock.now(), order.version))
            case Welcome():
                for dispatch in word.unwanted:
                    self._end(node_id, dispatch, force=True)
            case Acknowledged() | _:
                pass

    def _end(self, node_id: str, dispatch: Dispatch, *, force: bool) -> None:
        self.told_to_end.append(_Told(node_id, dispatch, force, self._clock.now()))

    def answered(self, node_id: str, sequence: int, answer: OrderAnswer) -> None:
        confirmation = answer.confirmation
        order = self._orders.get((node_id, sequence))
        if confirmation is None or order is None or order.version != confirmation.version:
            return
        self.obeyed[node_id].append(
            _Obeyed(
                self._clock.now(),
                confirmation.version,
                order.target,
                frozenset(confirmation.remaining),
            )
        )


class World:
    """One example: everything that its acts can reach."""

    def __init__(self, folder: Path, plan: Plan, programs: list[Program]) -> None:
        """Be ready for `run`; `programs` gets every program that is started."""
        self.plan = plan
        self.clock = LoopClock()
        self._folder = folder
        self._random = Random(plan.seed)
        self._ids = CountingIds()
        self._records = _Records(self.clock)
        self._audit = trail.Audit()
        self.network = Network(self._random, delay_s_max=plan.delay_s_max, witness=self._records)
        self.network.repeat_ratio = plan.repeat_ratio
        self.network.repeat_late_s_max = 2.0
        self.hosts = {node_id: RecordingHost(clock=self.clock) for node_id in NODES}
        self.agents = [self._agent(node_id) for node_id in NODES]
        self._programs = programs
        self._deaths_matter = True
        self._deaths: defaultdict[str, list[Instant]] = defaultdict(list)
        self._after_death: dict[str, KillAgent] = {}
        self._server_down_s = 0.0
        self._server_full_until_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._keys = itertools.count()
        self.made: dict[str, str] = {}
        """The id of each pipeline, by its idempotency key."""
        self.files: dict[str, Create] = {}
        """What each pipeline is, by its id."""
        self.extended_s: defaultdict[str, float] = defaultdict(float)
        """By how much each was extended."""
        self.forced: set[str] = set()
        self.lossy = False
        """Whether an agent lost data."""
        self._losses: defaultdict[str, list[Instant]] = defaultdict(list)
        """When each agent began without the data that it had."""

    # Programs

    def _agent(self, node_id: str) -> NodeAgent:
        agent = NodeAgent(
            self._folder,
            node_id=node_id,
            network=self.network,
            clock=self.clock,
            random=self._random,
            host=self.hosts[node_id],
            inventory=_HOST,
        )
        agent.on_death = lambda: self._agent_died(agent)
        return agent

    def _start_agent(self, agent: NodeAgent) -> None:
        kill = self._after_death.pop(agent.node_id, None)
        if kill is not None and kill.data not in {Data.KEPT, Data.REBOOTED}:
            self.lossy = True
            self._losses[agent.node_id].append(self.clock.now())
            _remove_data(self._folder, agent.node_id)
            if kill.data is Data.RESTORED:
                _copy_data(self._folder / "snapshot", self._folder, agent.node_id)
        agent.start()
        self._programs.append(agent.program)

    def _agent_died(self, agent: NodeAgent) -> None:
        kill = self._after_death[agent.node_id]
        self._deaths[agent.node_id].append(self.clock.now())
        host = self.hosts[agent.node_id]
        if kill.data is Data.REIMAGED:
            host.wipe()
        elif kill.data is Data.REBOOTED:
            host.halt()
        if kill.data in _BOOTS:
            agent.boot_id = f"boot-{len(self._deaths[agent.node_id])}-of-{agent.node_id}"
        _later(kill.down_s, lambda: self._start_agent(agent))

    def _start_server(self) -> None:
        plane = ControlPlane(
            self._folder,
            clock=self.clock,
            random=self._random,
            ids=self._ids,
            settings=_SETTINGS,
            on_death=self._server_died,
        )
        self._programs.append(plane.program)
        self._refuse_writes_of(plane)
        self._audit.watch(plane)
        self._newest = plane
        starting = plane.program.start(plane.start())
        starting.add_done_callback(lambda _: self._server_started(plane))

    def _server_started(self, plane: ControlPlane) -> None:
        if plane.program.alive:
            self.network.plane = plane

    def _server_died(self) -> None:
        self.network.plane = None
        self.network.break_streams()
        self._newest.let_go()
        if self._deaths_matter:
            _later(self._server_down_s, self._start_server)

    def _refuse_writes_of(self, plane: ControlPlane) -> None:
        write = plane.database.write

        async def refused_while_full(fn: Any) -> Any:
            if self.clock.monotonic_s() < self._server_full_until_s:
                raise GameNodeError(ErrorCode.STORAGE_FULL, "no room", retry_after_s=1.0)
            return await write(fn)

        plane.database.write = refused_while_full  # type: ignore[method-assign] # a full disk

    # Acts

    async def run(self) -> None:
        """Do what the plan says, then leave the world alone until everything has its end."""
        self._start_server()
        for agent in self.agents:
            self._start_agent(agent)
        await until(self._all_up, every_s=0.1)
        for act in self.plan.acts:
            await self._do(act)
        await self._calm_down()
        await until(self._settled, timeout_s=_SETTLES_S, every_s=2.0)  # P9
        for node_id, back in itertools.product(NODES, range(16)):
            self.network.replay(node_id, back)
        await asyncio.sleep(10.0)
        assert await self._settled(), "it did not stay as it was"

    async def _do(self, act: Act) -> None:
        match act:
            case Create():
                self._spawn_all(act.twice, lambda key: self._create(key, act))
            case Retry():
                self._spawn_all(act.twice, lambda key: self._retry(key, act))
            case Extend():
                self._spawn(self._extend(act))
            case Fence():
                self._spawn(self._fence(NODES[act.node]))
            case Cancel():
                self._spawn(self._cancel(act))
            case KillServer():
                if self.network.plane is not None:
                    self._server_down_s = act.down_s
                    self.network.plane.program.kill(in_steps=act.in_steps)
            case KillAgent():
                agent = self.agents[act.node]
                snapshot = self._folder / "snapshot" / f"{agent.node_id}.journal"
                if agent.running is not None and (
                    act.data is not Data.RESTORED or snapshot.exists()
                ):
                    self._after_death[agent.node_id] = act
                    agent.program.kill(in_steps=act.in_steps)
            case Snapshot():
                node_id = NODES[act.node]
                _remove_data(self._folder / "snapshot", node_id)
                _copy_data(self._folder, self._folder / "snapshot", node_id)
            case Break():
                self.network.break_streams()
            case Silence():
                for stream in self.network.streams:
                    stream.silence(server=act.only_server)
                if act.only_server:
                    _later(4.0, self.network.break_streams)
            case Stall():
                for stream in self.network.streams:
                    stream.stall(act.seconds)
            case Cut():
                self.network.cut = True
                self.network.break_streams()
                _later(act.seconds, self._mend)
            case Replay():
                self.network.replay(NODES[act.node], act.back)
            case LateWord():
                self._spawn(self._late_word(act))
            case ChangeState():
                self._spawn(self._change_state(NODES[act.node], act.target))
            case FillServerDisk():
                self._server_full_until_s = self.clock.monotonic_s() + act.seconds
            case FillAgentDisk():
                agent = self.agents[act.node]
                if agent.running is not None:
                    agent.fill_disk(full=True)
                    _later(act.seconds, lambda: self._free_disk(agent))
            case Wait():
                await asyncio.sleep(act.seconds)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _spawn_all(self, twice: bool, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        key = f"k{next(self._keys)}"
        for _ in range(1 + twice):
            self._spawn(work(key))

    def _mend(self) -> None:
        self.network.cut = False

    def _free_disk(self, agent: NodeAgent) -> None:
        agent.disk_full = False
        if agent.running is not None:
            agent.fill_disk(full=False)

    async def _ask(self, work: Any) -> Any:
        """Ask the server for something, again and again until it answers."""
        while True:
            plane = self.network.plane
            if plane is not None:
                try:
                    return await plane.program.call(work(plane))
                except DiedError:
                    pass
                except GameNodeError as error:
                    if error.retry_after_s is None:
                        raise
            await asyncio.sleep(0.5)

    async def _create(self, key: str, act: Create) -> None:
        created = await self._ask(
            lambda plane: plane.create(act.text(), idempotency_key=key, node=act.node)
        )
        self._made(key, created, act)

    def _made(self, key: str, pipeline: Pipeline, act: Create) -> None:
        assert self.made.setdefault(key, pipeline.id) == pipeline.id, "one key, two (P10)"
        self.files[pipeline.id] = act

    def _picked(self, number: int) -> str | None:
        """Return the id of one of the pipelines there are, if there is any."""
        ids = list(self.files)
        return ids[number % len(ids)] if ids else None

    async def _retry(self, key: str, act: Retry) -> None:
        pipeline_id = self._picked(act.pipeline)
        if pipeline_id is None:
            return
        with suppress(GameNodeError):  # it does not go badly, or may still run
            again = await self._ask(
                lambda plane: plane.pipelines.retry(
                    pipeline_id, from_failed=act.from_failed, key=key, by=USER
                )
            )
            assert again.retry_of == pipeline_id
            self._made(key, again, self.files[pipeline_id])

    async def _extend(self, act: Extend) -> None:
        pipeline_id = self._picked(act.pipeline)
        if pipeline_id is None:
            return
        key = f"x{next(self._keys)}"
        with suppress(GameNodeError):  # it has no limit, or has ended
            for _ in range(1 + act.twice):
                await self._ask(
                    lambda plane: plane.pipelines.extend(pipeline_id, act.by_s, key=key, by=USER)
                )
            self.extended_s[pipeline_id] += act.by_s

    async def _fence(self, node_id: str) -> None:
        async def fence(plane: ControlPlane) -> None:
            await plane.pipelines.fence_node(node_id, reason="dead", by=USER)
            listed = await plane.service.list(node=node_id, limit=1_000)
            bound = [pipeline.id for pipeline in listed if not pipeline.status.terminal]
            node = await plane.node_service.get(node_id)
            assert node.online or not bound, "work is bound to a dead host (RA1)"

        for _ in range(_FENCE_TRIES):
            with suppress(GameNodeError):  # it is online
                await self._ask(fence)
                return
            await asyncio.sleep(1.0)

    async def _cancel(self, act: Cancel) -> None:
        pipeline_id = self._picked(act.pipeline)
        if pipeline_id is None:
            return
        if act.force:
            self.forced.add(pipeline_id)
        with suppress(GameNodeError):  # it has ended otherwise
            await self._ask(
                lambda plane: plane.pipelines.cancel(
                    pipeline_id, reason="", force=act.force, by=USER
                )
            )

    async def _change_state(self, node_id: str, target: Maintenance) -> None:
        with suppress(GameNodeError):  # not allowed from the present one
            await self._ask(
                lambda plane: plane.nodes.change_state(
                    node_id, target, drain=None, by=USER, reason="a test"
                )
            )

    async def _late_word(self, act: LateWord) -> None:
        plane = self.network.plane
        pipeline_id = self._picked(act.pipeline)
        if plane is None or pipeline_id is None:
            return
        with suppress(DiedError, GameNodeError):
            await plane.program.call(self._say_late(plane, pipeline_id, act))

    async def _say_late(self, plane: ControlPlane, pipeline_id: str, act: LateWord) -> None:
        pipeline = await plane.service.get(pipeline_id)
        if not pipeline.node_id:
            return
        node = await plane.node_service.get(pipeline.node_id)
        session = Session(node_id=node.id, session_id=node.session_id, epoch=node.session_epoch)
        attempt, tried = pipeline.attempt, max(pipeline.steps[0].attempt, 1)
        if act.of_session:
            session = Session(
                node_id=node.id, session_id="superseded", epoch=node.session_epoch - 1
            )
        elif attempt > 1:
            attempt -= 1
        else:
            return
        SPEAKER.set((node.id, "superseded"))
        report = (
            StepReport(
                pipeline_id=pipeline_id,
                step="s0",
                status=act.status,
                pipeline_attempt=attempt,
                attempt=tried,
                run=1,
            )
            if act.of_step
            else PipelineReport(pipeline_id=pipeline_id, status=act.status, attempt=attempt)
        )
        await plane.service.apply([report], node_id=node.id, session=session, now=self.clock.now())

    # The end

    async def _calm_down(self) -> None:
        for program in self._programs:
            program.spare()
        for agent in self.agents:
            self._free_disk(agent)
        self._server_full_until_s = 0.0
        self.network.repeat_ratio = 0.0
        self.network.delay_s_max = min(self.network.delay_s_max, 0.02)
        await until(self._all_up, timeout_s=_SETTLES_S, every_s=1.0)
        await asyncio.gather(*self._tasks)
        for node_id in NODES:
            await self._ask(
                lambda plane, node_id=node_id: plane.nodes.change_state(
                    node_id, Maintenance.NORMAL, drain=None, by=USER, reason="the end"
                )
            )

    def _all_up(self) -> bool:
        plane = self.network.plane
        return (plane is not None and not self.network.cut) and all(
            plane.nodes.connection(node_id) is not None for node_id in NODES
        )

    async def _settled(self) -> bool:
        return (
            all(pipeline.status.terminal for pipeline in await self.pipelines())
            and all(not agent.runner.held() for agent in self.agents)
            and all(self._is_still(host) for host in self.hosts.values())
            and await self._ask(lambda plane: plane.service.reserved()) == {}
        )

    def _is_still(self, host: RecordingHost) -> bool:
        """Return whether nothing lives on a host, nor lies around that nobody will remove."""
        return all(self.lossy and host.end(run) is not None for run in host.runs())

    async def pipelines(self) -> list[Pipeline]:
        """Return every pipeline that was accepted."""
        return [await self._ask(lambda p, i=i: p.service.get(i)) for i in self.files]

    # The promises

    async def judge(self) -> None:
        """Hold what was recorded against the promises.

        Raises:
            AssertionError: one was broken.
        """
        pipelines = await self.pipelines()
        changes = await self.network.up().database.read(trail.read)
        bindings = trail.Bindings(changes)
        self._judge_runs(bindings)
        self._judge_claims(bindings)
        self._judge_changes(changes)
        assert not self._audit.violations, "a superseded one changed something (P3)"
        await self._judge_accepted()
        for pipeline in pipelines:
            self._judge_end(pipeline, bindings)
        self._judge_stops(bindings)
        self._judge_states(bindings)
        await self._judge_records()

    def _lives(self, bindings: trail.Bindings) -> Iterator[_Life]:
        """Return when each run lived; on a host that was fenced nothing of before does (RA1)."""
        for node_id, host in self.hosts.items():
            for run, (began, ended) in host.intervals().items():
                dispatch = bindings.of(run)
                dead_at = bindings.fenced_at.get(dispatch, math.inf)
                if began < dead_at:
                    yield _Life(node_id, run, dispatch, began, min(ended, dead_at))

    def _judge_runs(self, bindings: trail.Bindings) -> None:
        starts = [run for host in self.hosts.values() for run in host.starts]
        assert len(set(starts)) == len(starts), f"a run started twice (P1): {starts}"
        lives: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for life in self._lives(bindings):
            lives[life.run.pipeline_id, life.run.step].append((life.began, life.ended))
        for lived_all in lives.values():
            for before, behind in itertools.pairwise(sorted(lived_all)):
                assert before[1] <= behind[0], "two tries at a step overlap (P2)"

    def _judge_claims(self, bindings: trail.Bindings) -> None:
        """Hold what was alive at once against what only one dispatch can have (F10)."""
        holders: defaultdict[str, list[_Life]] = defaultdict(list)
        for life in self._lives(bindings):
            for claimed in self._claimed(life):
                holders[claimed].append(life)
        for claimed, lives in holders.items():
            for one, other in itertools.combinations(lives, 2):
                apart = one.ended <= other.began or other.ended <= one.began
                same = one.dispatch == other.dispatch
                assert apart or same, f"two have {claimed}: {one} and {other}"

    def _claimed(self, life: _Life) -> Iterator[str]:
        act = self.files[life.run.pipeline_id]
        host = self.hosts[life.node_id]
        wanted_at = next(at for at, run in host.wanted if run == life.run)
        # What an agent with no memory of a run has stated is not how things are on its host.
        lost_at = min((at for at in self._losses[life.node_id] if at >= wanted_at), default=None)
        if lost_at is not None and lost_at < life.ended:
            return
        container = host.containers[life.run]
        if Claim.PORT in act.claims:
            yield f"{life.node_id}: {container.ports}"
        if Claim.GPU in act.claims:
            yield from (f"{life.node_id}: {d.device_ids}" for d in container.devices_reserved)
            assert container.devices_reserved, f"{life} got no GPU"
        if Claim.GROUP in act.claims and not act.steps[int(life.run.step[1:])].service:
            yield "the group"

    @staticmethod
    def _judge_changes(changes: list[trail.Change]) -> None:
        began_anew: dict[str, bool] = {}
        cancelled: set[str] = set()
        for change in changes:
            pipeline_id = change.subject.partition("/")[0]
            if change.kind == "cancel":
                cancelled.add(pipeline_id)
            again = change.kind == "grant" and pipeline_id in cancelled
            assert not again, f"{change}: granted though its end is wanted (P4)"
            if change.kind == "pipeline":
                began_anew[pipeline_id] = change.became == "PENDING" and change.bound[0] == "/"
            anew = change.kind == "step" and change.became == "PENDING" and began_anew[pipeline_id]
            if change.kind in {"pipeline", "step"} and change.was in _OVER and not anew:
                assert change.became == change.was, f"{change}: something after the end (P4)"

    async def _judge_accepted(self) -> None:
        listed = await self.network.up().service.list(limit=1_000)
        assert len(listed) == len(self.made), "not one pipeline for each key (P9, P10)"
        assert {one.id for one in listed} == set(self.made.values())

    async def _judge_records(self) -> None:
        """Hold rows, journals and hosts against each other, as an operator does."""
        verdicts: list[AttemptVerdict] = []

        async def everybody_answers() -> bool:
            verdict = await self._ask(
                lambda plane: AttemptVerifier(
                    service=plane.service, nodes=plane.nodes, settings=VerifierSettings()
                ).verify()
            )
            verdicts.append(verdict)
            return not verdict.nodes_absent

        await until(everybody_answers, timeout_s=_SETTLES_S, every_s=5.0)  # none is silent now
        assert verdicts[-1].ok or self.lossy, verdicts[-1].violations

    def _judge_end(self, pipeline: Pipeline, bindings: trail.Bindings) -> None:
        act = self.files[pipeline.id]
        assert pipeline.extended_s == self.extended_s[pipeline.id], "extended twice, or not (F8)"
        if pipeline.id not in self.forced and act.on_lost != "fail":
            for host in self.hosts.values():
                for at, run in host.wanted:
                    late = run.pipeline_id == pipeline.id and at > (pipeline.ended_at or 0)
                    dead = late and bindings.of(run) in bindings.fenced_at
                    assert not late or dead, f"{run} was started after the end (P4)"
        if pipeline.status is Status.COMPLETED:
            for step, plan in zip(pipeline.steps, act.steps, strict=True):
                if step.reason is Reason.SKIPPED:
                    done_before = step.message.removeprefix("completed in pipeline ")
                    assert plan.when == "failure" or (
                        pipeline.retry_of and self._went_well(done_before, step.name, plan)
                    ), f"{step} was left out"
                else:
                    assert step.status is Status.COMPLETED
                    assert self._went_well(pipeline.id, step.name, plan), f"{step} never did"
        if pipeline.status is Status.CANCELLED:
            assert pipeline.cancel_requested_at is not None or pipeline.reason in {
                Reason.NODE_DISABLED,
                Reason.DRAINED,
            }, f"nobody wanted its end: {pipeline}"
        if pipeline.reason is Reason.NODE_LOST:
            fenced = Dispatch(pipeline.id, pipeline.attempt) in bindings.fenced_at
            assert self.lossy or fenced or act.on_lost == "fail", "nothing was lost"
        elif pipeline.status is Status.FAILED:
            timed_out = pipeline.reason is Reason.TIMEOUT
            assert timed_out or Status.FAILED in {step.status for step in pipeline.steps}

    def _went_well(self, pipeline_id: str, step: str, plan: StepPlan) -> bool:
        runs = [
            (host, run)
            for host in self.hosts.values()
            for run in host.starts
            if (run.pipeline_id, run.step) == (pipeline_id, step)
        ]
        if plan.service:
            return bool(runs)
        return any(_exit_code(host, run) == 0 for host, run in runs)

    def _judge_stops(self, bindings: trail.Bindings) -> None:
        first: dict[tuple[str, Dispatch, bool], _Told] = {}
        for told in self._records.told_to_end:
            first.setdefault((told.node_id, told.dispatch, told.force), told)
        for told in first.values():
            deadline = after(told.at, GRACE_S + _PROMISED_S)
            died = any(told.at <= at <= deadline for at in self._deaths[told.node_id])
            if not died and not self.lossy:
                self._judge_stop(told, bindings)

    def _judge_stop(self, told: _Told, bindings: trail.Bindings) -> None:
        plans = self.files[told.dispatch.pipeline_id].steps
        for run, (began, ended) in self.hosts[told.node_id].intervals().items():
            if bindings.of(run) != told.dispatch or ended <= told.at:
                continue
            plan = plans[int(run.step[1:])]
            if plan.service:
                continue  # it lives on after its pipeline
            if began > told.at and not told.force and plan.when == "always":
                continue  # a clean-up is left alone
            slack = round((GRACE_S + _PROMISED_S) * NANOSECONDS_PER_S)
            assert ended <= max(told.at, began) + slack, f"{run} went on after {told} (P11)"
            begins = round((plan.start_s + 1.0) * NANOSECONDS_PER_S)
            assert began <= told.at + begins, f"{run} began after {told} (P4, P11)"

    def _judge_states(self, bindings: trail.Bindings) -> None:
        for node_id, host in self.hosts.items():
            for at, run in host.wanted:
                self._judge_start(node_id, run, bindings.of(run), at)

    def _judge_start(self, node_id: str, run: RunKey, dispatch: Dispatch, at: Instant) -> None:
        told = [version for told_at, version in self._records.told_states[node_id] if told_at <= at]
        obeyed = [one for one in self._records.obeyed[node_id] if one.at < at]
        newest = max(obeyed, key=lambda one: one.version, default=None)
        if newest is None or max(told) > newest.version:
            return
        if newest.target is Maintenance.DISABLED:
            raise AssertionError(f"{run} started on {node_id}, which is disabled (P12)")
        if newest.target is Maintenance.MAINTENANCE:
            assert dispatch in newest.remaining, f"{run} started on {node_id} in maintenance (P12)"

    # Clean-up

    def kill_all(self) -> None:
        """Kill every program, for good."""
        for agent in self.agents:
            agent.on_death = lambda: None
        self._deaths_matter = False
        for program in self._programs:
            program.kill()


def _exit_code(host: RecordingHost, run: RunKey) -> int | None:
    end = host.ended[run] if run in host.ended else host.end(run)
    return end.exit_code if end is not None else None


def _later(seconds: float, call: Any) -> None:
    """Call `call` in no program's name."""
    loop = asyncio.get_running_loop()
    loop.call_later(seconds, call, context=contextvars.Context())


def _data_of(folder: Path, node_id: str) -> list[Path]:
    return sorted(folder.glob(f"{node_id}.*"))


def _remove_data(folder: Path, node_id: str) -> None:
    for path in _data_of(folder, node_id):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _copy_data(folder: Path, to: Path, node_id: str) -> None:
    to.mkdir(exist_ok=True)
    for path in _data_of(folder, node_id):
        if path.is_dir():
            shutil.copytree(path, to / path.name)
        elif not path.name.endswith("-shm"):
            shutil.copyfile(path, to / path.name)


def _close_files(folder: Path) -> None:
    """Close what dead programs held open below `folder`, as the kernel would."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if descriptor.readlink().is_relative_to(folder):
                os.close(int(descriptor.name))


def hold_promises(plan: Plan) -> None:
    """Live through a plan, and hold what happened against the promises.

    Raises:
        AssertionError: one was broken.
    """
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        folder = Path(name)
        trail.prepare(folder / "gamenode.db")
        programs: list[Program] = []

        async def live() -> None:
            world = World(folder, plan, programs)
            try:
                await world.run()
                await world.judge()
            finally:
                world.kill_all()

        try:
            run_virtually(live(), disk_s=plan.disk_s)
        finally:
            bury(programs)
            _close_files(folder)
