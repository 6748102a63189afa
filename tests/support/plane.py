"""Server and agents in one process, over real databases and journals, on links that fail at will.

Everything is what runs in production but for the wire (messages pass through the codec and two
queues) and the host (`FakeHost`).
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from signal import SIGKILL
from typing import Any, Generic, TypeVar, cast

import pytest
from tests.support.programs import DiedError, Program

from gamenode.agent.inventory.collector import Collector, CollectorSettings
from gamenode.agent.inventory_reporter import InventoryReporter, ReporterSettings
from gamenode.agent.journal import Journal
from gamenode.agent.link import AgentStream, LinkError
from gamenode.agent.policy import OpenPolicy, Policy
from gamenode.agent.runner import Runner, RunnerSettings
from gamenode.agent.runtime import Ended, RunKey
from gamenode.agent.runtime.fake import FakeHost, FakeRuntime
from gamenode.agent.secrets import Secrets, SecretSettings
from gamenode.agent.session import Outbox, Session, SessionSettings
from gamenode.agent.spool.logs import LogSpool
from gamenode.agent.uploader import LogUploader, UploaderSettings
from gamenode.domain.access import Actor, ActorKind, Role
from gamenode.domain.command import (
    ExecuteOrder,
    LivingInstances,
    NumberedReport,
    OrderAnswer,
    ServerWord,
    Statement,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event, EventFilter
from gamenode.domain.inventory import Collection, CollectionAnswer, Inventory
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition
from gamenode.domain.node import (
    ConditionType,
    Heartbeat,
    NodeType,
    Registration,
    RegistrationAnswer,
)
from gamenode.domain.pipeline import ContainerSpec, NewPipeline, Pipeline
from gamenode.domain.placement import Demand
from gamenode.lib.clock import Clock, ClockSettings, ClockWatch, Instant
from gamenode.lib.tasks import Supervisor
from gamenode.server.db.database import Database, DatabaseSettings
from gamenode.server.events.feed import EventFeed, EventFeedSettings
from gamenode.server.logs.manager import LogManager, ManagerSettings
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService, LogSettings
from gamenode.server.logs.streamer import LogStreamer, StreamerSettings
from gamenode.server.metrics.service import MetricService, MetricSettings
from gamenode.server.nodes.manager import NodeManager, NodeSettings
from gamenode.server.nodes.service import GameNodeService, InventorySettings
from gamenode.server.nodes.states import StateSettings
from gamenode.server.pipelines.dispatcher import DispatcherSettings, TaskDispatcher
from gamenode.server.pipelines.lost import LostPipelines
from gamenode.server.pipelines.manager import PipelineManager, PipelineSettings
from gamenode.server.pipelines.secrets import SecretBox
from gamenode.server.pipelines.service import GamePipelineGRPCService
from gamenode.server.rpc.agent_link import AgentLink, AgentLinkSettings
from gamenode.server.rpc.servicer import GameNodeServer, RpcSettings
from gamenode.wire import codec
from gamenode.wire.cri import checksum
from gamenode.wire.errors import OUTWARD
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

Message = TypeVar("Message")
Answer = TypeVar("Answer")

_ORDERS_KEPT = 16

USER = Actor(kind=ActorKind.LOCAL, name="tester", role=Role.ADMIN)


def fill_disk(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every write of a server answer that its disk is full; `undo` frees the disk."""

    async def refuse(_: object) -> None:
        raise GameNodeError(ErrorCode.STORAGE_FULL, "no room", retry_after_s=30.0)

    monkeypatch.setattr(plane.database, "write", refuse)


class CountingIds:
    """Ids that differ, in a fixed order."""

    def __init__(self, prefix: str = "id") -> None:
        self._prefix = prefix
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """Return the next one."""
        return f"{self._prefix}-{next(self._numbers):06}"


def registration(
    node_id: str = "n1",
    *,
    boot_id: str = "boot-1",
    last_session_epoch: int | None = None,
    env_names: frozenset[str] = frozenset(),
    labels: Mapping[str, str] | None = None,
    inventory: Inventory | None = None,
) -> Registration:
    """Return what a node says of itself; without a boot id it is a simple client."""
    return Registration(
        node_id=node_id,
        type=NodeType.PHYSICAL,
        inventory=inventory or Inventory(),
        last_session_epoch=last_session_epoch,
        boot_id=boot_id,
        agent_version="0.1.0" if boot_id else "",
        env_names=env_names,
        labels=labels or {},
    )


@dataclass(frozen=True, kw_only=True)
class PlaneSettings:
    """What a test may want otherwise."""

    nodes: NodeSettings = field(default_factory=NodeSettings)
    dispatch: DispatcherSettings = field(default_factory=DispatcherSettings)
    pipelines: PipelineSettings = field(default_factory=PipelineSettings)
    link: AgentLinkSettings = field(default_factory=AgentLinkSettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    logs: LogSettings = field(default_factory=LogSettings)


class ControlPlane:
    """A server without ports; another one over the same folder is the server restarted."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Clock,
        random: Random | None = None,
        ids: CountingIds | None = None,
        url: str = "",
        settings: PlaneSettings | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.clock = clock
        self.clock_watch = ClockWatch(clock, ClockSettings())
        self.settings = settings = settings or PlaneSettings()
        random = random or Random(1)
        ids = ids or CountingIds()
        self.database = Database.open(
            replace(settings.database, url=url or f"sqlite:///{folder / 'gamenode.db'}"),
            clock=clock,
        )
        self.feed = EventFeed(self.database, settings=EventFeedSettings(), audit_key=b"key")
        self.database.on_commit(self.feed)
        self.node_service = GameNodeService(self.database, InventorySettings())
        self.nodes = NodeManager(
            service=self.node_service,
            clock=clock,
            clock_watch=self.clock_watch,
            ids=ids,
            settings=settings.nodes,
            states=StateSettings(),
            inventories=InventorySettings(),
            log_chunk_bytes_max=settings.logs.chunk_bytes_max,
        )
        self.service = GamePipelineGRPCService(
            self.database, SecretBox(bytes(32)), restarts_max=settings.pipelines.restarts_max
        )
        files = LogFiles(folder / "logs")
        self.log_service = LogService(self.database, files, settings=settings.logs)
        self._streamer = LogStreamer(
            self.log_service, files, clock=clock, settings=StreamerSettings()
        )
        self._logs = LogManager(
            self.log_service,
            self._streamer,
            steps=self.service,
            on_live=lambda *_, **__: None,
            settings=ManagerSettings(),
        )
        self.dispatcher = TaskDispatcher(
            service=self.service,
            nodes=self.nodes,
            logs=self._logs,
            clock=clock,
            settings=settings.dispatch,
        )
        self.pipelines = PipelineManager(
            service=self.service,
            dispatcher=self.dispatcher,
            nodes=self.nodes,
            logs=self.log_service,
            log_manager=self._logs,
            feed=self.feed,
            clock=clock,
            ids=ids,
            settings=settings.pipelines,
        )
        self.lost = LostPipelines(
            service=self.service,
            nodes=self.nodes,
            clock=clock,
            fail_s=settings.pipelines.lost_fail_s,
            sweep_interval_s=settings.pipelines.lost_sweep_interval_s,
        )
        self.edge = GameNodeServer(
            nodes=self.nodes,
            pipelines=self.pipelines,
            logs=self._logs,
            log_service=self.log_service,
            metrics=MetricService(
                self.database,
                clock=clock,
                clock_watch=self.clock_watch,
                settings=MetricSettings(),
            ),
            feed=self.feed,
            settings=RpcSettings(),
            link=AgentLink(
                nodes=self.nodes, pipelines=self.pipelines, random=random, settings=settings.link
            ),
            clock=clock,
        )
        self.nodes.on_change(self.dispatcher.wake)
        self.feed.on_events(self.dispatcher.hear)
        self.feed.on_events(self.lost.hear)
        self.streams: set[asyncio.Task[None]] = set()
        self.program = Program("server", on_death=on_death)
        self._supervisor = Supervisor()

    async def start(self) -> None:
        """Know what the database knows, and run every loop."""
        await self.feed.start()
        await self.nodes.load()
        self._supervisor.keep("judge", self.nodes.judge)
        self._supervisor.keep("flush", self.nodes.flush)
        self._supervisor.keep("states", self.nodes.states.run)
        self._supervisor.keep("dispatch", self.dispatcher.run)
        self._supervisor.keep("lost", self.lost.run)

    async def stop(self) -> None:
        """End everything at once, as a crash would but for what the database has taken."""
        for stream in self.streams:
            stream.cancel()
        await asyncio.gather(*self.streams, return_exceptions=True)
        await self._supervisor.close()
        await self.dispatcher.close()
        await self.nodes.states.close()
        await self.feed.close()
        self._streamer.close()
        await self.log_service.close()
        await self.database.aclose()

    def let_go(self) -> None:
        """Close the database's files, as the kernel does when the program has died."""
        self.database._disconnect()

    async def create(self, file: str, **request: Any) -> Pipeline:
        """Create a pipeline as a user does."""
        return await self.pipelines.create(NewPipeline(file=file, **request), by=USER)

    async def bind(
        self, pipeline_id: str, node_id: str = "n1", *, demand: Demand | None = None
    ) -> ExecuteOrder | None:
        """Bind past the dispatcher, to a node that memory takes for reached and free."""
        node = next(each for each in self.nodes.candidates({}) if each.node_id == node_id)
        node = replace(node, connected=True)
        demand = demand or Demand(node_id=node_id)
        return await self.service.bind(pipeline_id, demand, node, now=self.clock.now())

    async def events(self) -> list[Event]:
        """Return every event so far."""
        return list(await self.feed.read_after(None, wanted=EventFilter(), limit=100_000))


class Witness:
    """Hears what agents are told and what they answer, at the moment that they do."""

    def told(self, node_id: str, word: ServerWord | None) -> None:
        """Hear a word that the agent of a node has read."""

    def answered(self, node_id: str, sequence: int, answer: OrderAnswer) -> None:
        """Hear an agent's answer to an order."""


SPEAKER: ContextVar[tuple[str, str] | None] = ContextVar("speaker", default=None)
"""The node and session by whose word the server acts, in whatever a stream causes there."""


class Network:
    """What lies between agents and server; `plane` None: the server is down."""

    def __init__(
        self, random: Random, *, delay_s_max: float = 0.0, witness: Witness | None = None
    ) -> None:
        self.random = random
        self.plane: ControlPlane | None = None
        self.cut = False
        self.delay_s_max = delay_s_max
        self.repeat_ratio = 0.0
        self.repeat_late_s_max = 0.0
        """A repeat follows at once, or so much later."""
        self.streams: list[MemoryStream] = []
        self.witness = witness or Witness()
        self._orders: defaultdict[str, deque[pb.ServerMessage]] = defaultdict(
            lambda: deque(maxlen=_ORDERS_KEPT)
        )

    def up(self) -> ControlPlane:
        """Return the server.

        Raises:
            LinkError: there is no way to it.
        """
        if self.plane is None or self.cut:
            raise LinkError("no way to the server", transient=True)
        return self.plane

    async def delay(self) -> None:
        """Take the time of one way."""
        if self.delay_s_max:
            await asyncio.sleep(self.random.uniform(0.0, self.delay_s_max))

    def break_streams(self) -> None:
        """Lose every stream, with what is on its way."""
        for stream in self.streams:
            stream.break_off()
        self.streams.clear()

    def keep_order(self, node_id: str, message: pb.ServerMessage) -> None:
        """Remember an order, for a replay."""
        self._orders[node_id].append(message)

    def replay(self, node_id: str, back: int) -> None:
        """Let an order that went to a node once, `back` before the last, come again now."""
        orders = self._orders[node_id]
        streams = [stream for stream in self.streams if stream.node_id == node_id]
        if back < len(orders) and streams:
            streams[-1].bring(orders[-1 - back])


async def _healthy() -> dict[ConditionType, str]:
    return {}


class MemoryLink:
    """A `Link` over a `Network`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._session = ("", "")
        self._calls: set[asyncio.Task[Any]] = set()
        self._streams: list[MemoryStream] = []

    async def register(self, registration: Registration) -> RegistrationAnswer:
        request = codec.encode_registration(registration)
        try:
            response = await self._call(lambda plane: plane.edge.Register(request, _context()))
        except GameNodeError as error:
            raise _link_error(error) from error
        self._session = (registration.node_id, response.session_id)
        return codec.decode_registration_answer(response)

    async def open(self, statement: Statement) -> AgentStream:
        await self._network.delay()
        stream = MemoryStream(self._network, statement)
        self._streams.append(stream)
        return stream

    async def update_inventory(self, collection: Collection) -> CollectionAnswer:
        del collection
        return CollectionAnswer(accepted=True)

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        node_id, session_id = self._session
        request = codec.encode_append(
            node_id=node_id,
            session_id=session_id,
            key=key,
            offset=offset,
            chunk=chunk,
            checksum=checksum(chunk),
            position=position,
        )
        try:
            response = await self._call(lambda plane: plane.edge.AppendLogs(request, _context()))
        except LinkError as error:
            raise _unavailable(error) from error
        return codec.decode_append_answer(response)

    async def close(self) -> None:
        return

    def hang_up(self) -> None:
        """End every call and stream, as the kernel does for a dead agent.

        What the agent has sent on its streams still arrives.
        """
        for call in self._calls:
            call.cancel()
        for stream in self._streams:
            stream.hang_up()

    async def _call(self, work: Callable[[ControlPlane], Coroutine[Any, Any, Answer]]) -> Answer:
        network = self._network
        await network.delay()
        program = network.up().program
        call = program.start(work(network.up()))
        self._calls.add(call)
        call.add_done_callback(self._called)
        try:
            answer = await program.result(call)
        except DiedError as error:
            raise LinkError("the server died", transient=True) from error
        await network.delay()
        network.up()
        return answer

    def _called(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # it is told; a dead agent does not mind


class MemoryStream:
    """Two queues, and a server's task between them."""

    def __init__(self, network: Network, statement: Statement) -> None:
        self.node_id = statement.node_id
        self._network = network
        self._plane = network.up()
        self._speaker = (statement.node_id, statement.session_id)
        self._to_server: _Queue[pb.AgentMessage] = _Queue()
        self._to_agent: _Queue[pb.ServerMessage] = _Queue()
        self._broken = False
        network.streams.append(self)
        serving = self._plane.program.start(self._serve())
        self._plane.streams.add(serving)
        serving.add_done_callback(self._plane.streams.discard)
        self._serving = serving
        self._to_server.put(pb.AgentMessage(statement=codec.encode_statement(statement)))

    def send(self, message: pb.AgentMessage) -> None:
        if self._broken:
            raise LinkError("the stream is broken", transient=True)
        self._to_server.put(message)
        if message.WhichOneof("content") in {"reports", "answer", "heartbeat"}:
            self._repeat(self._to_server, message)

    async def read(self) -> ServerWord | None:
        message = await self._to_agent.get()
        if message is None:
            raise LinkError("the stream has ended", transient=True)
        word = codec.decode_server_word(message)
        self._network.witness.told(self.node_id, word)
        return word

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        self.send(pb.AgentMessage(heartbeat=codec.encode_heartbeat(heartbeat)))

    async def report(self, reports: list[NumberedReport]) -> None:
        encoded = [codec.encode_report(report) for report in reports]
        self.send(pb.AgentMessage(reports=pb.StatusReports(reports=encoded)))

    async def answer(self, sequence: int, answer: OrderAnswer) -> None:
        self._network.witness.answered(self.node_id, sequence, answer)
        self.send(pb.AgentMessage(answer=codec.encode_answer(sequence, answer)))

    async def instances(self, living: LivingInstances) -> None:
        self.send(pb.AgentMessage(instances=codec.encode_instances(living)))

    async def goodbye(self, reason: str) -> None:
        self.send(pb.AgentMessage(goodbye=pb.Goodbye(reason=reason)))
        await asyncio.wait([self._serving])

    async def close(self) -> None:
        self._broken = True
        self._to_agent.end()
        if not self._to_server.silent:
            self._to_server.end()

    def break_off(self) -> None:
        """Lose what is on its way, both ways."""
        self._broken = True
        self._to_server.end()
        self._to_agent.end()

    def hang_up(self) -> None:
        """End on the agent's side; what it has sent still arrives, unless it is lost anyhow."""
        self._broken = True
        self._to_agent.end()
        self._to_server.close()

    def silence(self, *, server: bool = False) -> None:
        """Lose what is on its way and all that follows, and tell nobody; or the server's words."""
        self._to_server.silent = self._to_server.silent or not server
        self._to_agent.silent = True

    def stall(self, seconds: float) -> None:
        """Hold up what is on its way to the server, and all that follows, for a while."""
        self._to_server.hold()
        asyncio.get_running_loop().call_later(seconds, self._to_server.go_on)

    def bring(self, message: pb.ServerMessage) -> None:
        """Let a word of the server arrive, whenever it was said."""
        self._to_agent.put(message)

    async def _serve(self) -> None:
        SPEAKER.set(self._speaker)
        try:
            with suppress(GameNodeError):
                await self._plane.edge.Connect(self._messages(), cast("Any", _Context(self)))
        finally:
            self._to_agent.close()

    async def _messages(self) -> AsyncIterator[pb.AgentMessage]:
        while (message := await self._to_server.get()) is not None:
            await self._network.delay()
            yield message

    async def write(self, message: pb.ServerMessage) -> None:
        """Take a word of the server."""
        await self._network.delay()
        self._to_agent.put(message)
        if message.WhichOneof("content") == "command":
            self._network.keep_order(self.node_id, message)
        if message.WhichOneof("content") != "close":
            self._repeat(self._to_agent, message)

    def _repeat(self, queue: _Queue[Message], message: Message) -> None:
        random = self._network.random
        if random.random() < self._network.repeat_ratio:
            late_s = random.choice([0.0, self._network.repeat_late_s_max])
            if late_s:
                asyncio.get_running_loop().call_later(late_s, queue.put, message)
            else:
                queue.put(message)


class _Queue(Generic[Message]):
    """One direction of a stream."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._held = False
        self.silent = False

    def hold(self) -> None:
        """Give nothing out for now."""
        self._held = True

    def go_on(self) -> None:
        """Give out again."""
        self._held = False
        self._changed.set()

    def put(self, message: Message) -> None:
        if not self.silent and not self._closed:
            self._messages.append(message)
            self._changed.set()

    def close(self) -> None:
        """End behind what is there."""
        self._closed = True
        self._changed.set()

    def end(self) -> None:
        """End, and lose what is there."""
        self.silent = False
        self._held = False
        self._messages.clear()
        self.close()

    async def get(self) -> Message | None:
        """Return the next message, None at the end."""
        while self._held or (not self._messages and not (self._closed and not self.silent)):
            self._changed.clear()
            await self._changed.wait()
        return self._messages.popleft() if self._messages else None


class _Context:
    """The part of a call's context that the edge uses."""

    def __init__(self, stream: MemoryStream) -> None:
        self._stream = stream

    async def write(self, message: pb.ServerMessage) -> None:
        await self._stream.write(message)


def _context() -> Any:
    return None  # the edge does not look at it


def _link_error(error: GameNodeError) -> LinkError:
    return LinkError(str(error), transient=OUTWARD[error.code].retryable)


def _unavailable(error: LinkError) -> GameNodeError:
    return GameNodeError(ErrorCode.UNAVAILABLE, str(error))


class RecordingHost(FakeHost):
    """A host that remembers every run it had, removed or not."""

    def __init__(self, *, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.ended: dict[RunKey, Ended | None] = {}
        """The end of each run, as of its removal."""
        self.wanted: list[tuple[Instant, RunKey]] = []
        """Each time that an agent asked for the start of a run."""
        self.containers: dict[RunKey, ContainerSpec] = {}
        """What each run was to be."""
        self._starting_runs: set[asyncio.Task[Instant]] = set()

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Start a run, once; an agent that dies meanwhile does not keep it from starting."""
        self.wanted.append((self.clock.now(), run))
        self.containers[run] = container
        starting = asyncio.get_running_loop().create_task(
            super().start(run, container, service=service), context=Context()
        )
        self._starting_runs.add(starting)
        starting.add_done_callback(self._starting_runs.discard)
        return await asyncio.shield(starting)

    def halt(self) -> None:
        """End everything, as a boot does."""
        for starting in self._starting_runs:
            starting.cancel()
        for run in self.runs():
            self.kill(run, SIGKILL)

    def wipe(self) -> None:
        """End and remove everything, as a new installation of the host does."""
        self.halt()
        for run in self.runs():
            self.forget(run)

    def forget(self, run: RunKey) -> None:
        if run in self.runs():
            self.ended[run] = self.end(run)
        super().forget(run)

    def intervals(self) -> dict[RunKey, tuple[float, float]]:
        """Return when each run lived, as instants; those that do live, for ever."""
        found: dict[RunKey, tuple[float, float]] = {}
        for run in self.starts:
            end = self.ended[run] if run in self.ended else self.end(run)
            started_at = end.started_at if end is not None else self.get(run).started_at
            found[run] = (started_at, end.ended_at if end is not None else math.inf)
        return found


class NodeAgent:
    """An agent that can be killed and started again on its host."""

    def __init__(
        self,
        folder: Path,
        *,
        node_id: str = "n1",
        network: Network,
        clock: Clock,
        random: Random | None = None,
        host: FakeHost | None = None,
        runner: RunnerSettings | None = None,
        session: SessionSettings | None = None,
        policy: Policy | None = None,
        envs: Mapping[str, str] | None = None,
        inventory: Inventory | None = None,
    ) -> None:
        self.node_id = node_id
        self.boot_id = f"boot-of-{node_id}"
        self.host = host or RecordingHost(clock=clock)
        self.journal_path = folder / f"{node_id}.journal"
        self._folder = folder
        self._network = network
        self._clock = clock
        self._random = random or Random(2)
        self._runner_settings = runner or RunnerSettings()
        self._session_settings = session or SessionSettings()
        self._policy = policy or OpenPolicy()
        self._envs = envs or {}
        self._inventory = inventory
        self.running: asyncio.Task[None] | None = None
        self.on_death: Callable[[], None] = lambda: None
        """Called when `program` was killed."""
        self.disk_full = False

    def start(self) -> None:
        """Start the agent's program."""
        assert self.running is None
        self.program = Program(self.node_id, on_death=self._died)
        self.program.enter(self._start)

    def _start(self) -> None:
        self.link = MemoryLink(self._network)
        self.journal = Journal(self.journal_path)
        self.fill_disk(full=self.disk_full)
        self.outbox = Outbox()
        self.uploader = LogUploader(
            link=self.link,
            spool=LogSpool(self._folder / f"{self.node_id}.spool"),
            settings=UploaderSettings(),
            random=self._random,
        )
        self.runner = Runner(
            runtime=FakeRuntime(self.host),
            journal=self.journal,
            uploader=self.uploader,
            reporter=self.outbox,
            policy=self._policy,
            secrets=Secrets(
                self._folder / f"{self.node_id}.secrets",
                envs=self._envs,
                secret_envs=(),
                clock=self._clock,
                settings=SecretSettings(),
            ),
            clock=self._clock,
            settings=self._runner_settings,
        )
        self.session = Session(
            link=self.link,
            journal=self.journal,
            runner=self.runner,
            uploader=self.uploader,
            outbox=self.outbox,
            inventory=InventoryReporter(
                collector=Collector((), clock=self._clock, settings=CollectorSettings()),
                send=self.link.update_inventory,
                active=lambda: False,  # what it is made of is no matter here
                clock=self._clock,
                random=self._random,
                settings=ReporterSettings(),
            ),
            registration=self._registration,
            conditions=_healthy,
            clock=self._clock,
            random=self._random,
            settings=self._session_settings,
        )
        self.runner.resume()
        self.running = asyncio.get_running_loop().create_task(self.session.run())

    def _died(self) -> None:
        self.running = None
        self.link.hang_up()
        self.journal._connection.close()
        self.on_death()

    def fill_disk(self, *, full: bool) -> None:
        """Let the journal's every write fail, or end that."""
        self.disk_full = full
        self.journal._connection.execute(f"PRAGMA query_only={int(full)}")

    async def kill(self) -> None:
        """End the agent's program wherever it is; what it runs goes on."""
        running, self.running = self.running, None
        if running is None:
            return
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await self.session.close()
        await self.runner.close()
        await self.uploader.close()
        await self.journal.close()

    async def stop(self) -> None:
        """Leave in good order."""
        await self.session.leave("a test")
        await self.kill()

    async def _registration(self, last_session_epoch: int | None) -> Registration:
        return registration(
            self.node_id,
            boot_id=self.boot_id,
            last_session_epoch=last_session_epoch,
            env_names=frozenset(self._envs),
            inventory=self._inventory,
        )
