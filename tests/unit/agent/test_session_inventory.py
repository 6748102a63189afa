from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.support.time import LoopClock, until, virtual_time

from gamenode.agent.app import Agent
from gamenode.agent.inventory.collector import Collector, CollectorSettings
from gamenode.agent.link import AgentStream, LinkError
from gamenode.agent.runtime.fake import FakeHost, FakeRuntime
from gamenode.agent.settings import AgentSettings, HostSettings
from gamenode.domain.command import (
    CollectOrder,
    FencedOrder,
    LivingInstances,
    NumberedReport,
    OrderAnswer,
    OrderOutcome,
    ServerWord,
    Statement,
    StateOrder,
    Welcome,
)
from gamenode.domain.inventory import Collection, CollectionAnswer, Inventory, content_hash
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition
from gamenode.domain.node import (
    Heartbeat,
    HeartbeatResult,
    Maintenance,
    Registration,
    RegistrationAnswer,
)
from gamenode.domain.pipeline import Reason

_HASH = content_hash(Inventory())
_HEARD = HeartbeatResult(counted=True)


class _Server:
    """A `Link` whose far end the test plays."""

    def __init__(self) -> None:
        self.registrations: list[Registration] = []
        self.updates: list[Collection] = []
        self.streams: list[_Stream] = []
        self.reachable = True

    async def register(self, registration: Registration) -> RegistrationAnswer:
        self.registrations.append(registration)
        return RegistrationAnswer(
            accepted=True,
            message="welcome",
            maintenance=Maintenance.NORMAL,
            session_id="s1",
            session_epoch=len(self.registrations),
            continuation=False,
            state_version=0,
            heartbeat_interval_s=15.0,
            heartbeat_timeout_s=45.0,
            log_chunk_bytes_max=1024,
        )

    async def open(self, statement: Statement) -> AgentStream:
        stream = _Stream(statement)
        self.streams.append(stream)
        return stream

    async def update_inventory(self, collection: Collection) -> CollectionAnswer:
        if not self.reachable:
            raise LinkError("no way to the server", transient=True)
        self.updates.append(collection)
        return CollectionAnswer(accepted=True)

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        raise NotImplementedError

    async def close(self) -> None:
        return


class _Stream:
    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.beats: list[Heartbeat] = []
        self.answers: dict[int, OrderAnswer] = {}
        self.heartbeat_answer = _HEARD
        self._words: asyncio.Queue[ServerWord | None] = asyncio.Queue()
        self._words.put_nowait(Welcome())

    def order(self, sequence: int, order: CollectOrder | StateOrder, *, epoch: int = 1) -> None:
        self._words.put_nowait(
            FencedOrder(
                session_epoch=epoch,
                stream_number=self.statement.stream_number,
                sequence=sequence,
                order=order,
            )
        )

    async def read(self) -> ServerWord | None:
        word = await self._words.get()
        if word is None:
            raise LinkError("broken", transient=True)
        return word

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        self.beats.append(heartbeat)
        self._words.put_nowait(self.heartbeat_answer)

    async def report(self, reports: list[NumberedReport]) -> None:
        raise NotImplementedError

    async def answer(self, sequence: int, answer: OrderAnswer) -> None:
        self.answers[sequence] = answer

    async def instances(self, living: LivingInstances) -> None:
        del living

    async def goodbye(self, reason: str) -> None:
        del reason
        await self.close()

    async def close(self) -> None:
        self._words.put_nowait(None)


def _agent(folder: Path, server: _Server, *, node_type: str = "virtual") -> Agent:
    clock = LoopClock()
    return Agent(
        AgentSettings(agent=HostSettings(node_id="n1", data=folder, node_type=node_type)),
        clock=clock,
        random=Random(1),
        runtime=FakeRuntime(FakeHost(clock=clock)),
        link=server,
        collector=Collector((), clock=clock, settings=CollectorSettings()),
    )


@virtual_time
async def test_a_registration_and_every_heartbeat_carry_the_hash(tmp_path: Path) -> None:
    server = _Server()
    agent = _agent(tmp_path, server)
    _ = agent.start()
    await until(lambda: bool(server.streams) and len(server.streams[0].beats) >= 2)

    assert server.registrations[0].inventory_hash == _HASH
    assert server.registrations[0].type == "virtual"
    assert {it.inventory_hash for it in server.streams[0].beats} == {_HASH}
    assert server.updates == []
    await agent.stop()


@virtual_time
async def test_a_collect_order_is_answered_and_then_carried_out(tmp_path: Path) -> None:
    server = _Server()
    agent = _agent(tmp_path, server)
    _ = agent.start()
    await until(lambda: bool(server.streams) and bool(server.streams[0].beats))

    server.streams[0].order(1, CollectOrder())
    await until(lambda: bool(server.updates), timeout_s=5.0)

    assert server.streams[0].answers[1].outcome is OrderOutcome.ACCEPTED
    assert server.updates[0].hash == _HASH
    await agent.stop()


@virtual_time
async def test_a_server_that_holds_another_inventory_is_sent_ours(tmp_path: Path) -> None:
    server = _Server()
    agent = _agent(tmp_path, server)
    _ = agent.start()
    await until(lambda: bool(server.streams) and bool(server.streams[0].beats))

    server.streams[0].heartbeat_answer = replace(_HEARD, send_inventory=True)
    await until(lambda: bool(server.updates), timeout_s=20.0)

    assert server.updates[0].hash == _HASH
    await agent.stop()


@virtual_time
async def test_what_could_not_be_sent_goes_out_on_the_next_stream(tmp_path: Path) -> None:
    server = _Server()
    agent = _agent(tmp_path, server)
    _ = agent.start()
    await until(lambda: bool(server.streams) and bool(server.streams[0].beats))
    server.reachable = False
    server.streams[0].order(1, CollectOrder())
    await asyncio.sleep(60.0)
    server.reachable = True

    await server.streams[0].close()
    await until(lambda: bool(server.updates), timeout_s=5.0)

    assert len(server.streams) == 2
    await agent.stop()


@virtual_time
async def test_a_disabled_node_refuses_to_collect(tmp_path: Path) -> None:
    server = _Server()
    agent = _agent(tmp_path, server)
    _ = agent.start()
    await until(lambda: bool(server.streams) and bool(server.streams[0].beats))
    state = StateOrder(
        node_id="n1",
        version=1,
        target=Maintenance.DISABLED,
        reason="a test",
        requested_at=LoopClock().now(),
    )
    server.streams[0].order(1, state)
    await until(lambda: 1 in server.streams[0].answers)

    server.streams[0].order(2, CollectOrder())
    await until(lambda: 2 in server.streams[0].answers)

    answer = server.streams[0].answers[2]
    assert (answer.outcome, answer.reason) == (OrderOutcome.REFUSED, Reason.NODE_DISABLED)
    assert server.updates == []
    await agent.stop()
