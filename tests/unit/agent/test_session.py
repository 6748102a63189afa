"""The session through what its server may do to it: C2, C5, RL1, RL3, RL5, P8, P13, P14."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from tests.support.lone import step, world_in
from tests.support.plane import (
    USER,
    ControlPlane,
    MemoryStream,
    Network,
    NodeAgent,
    PlaneSettings,
    fill_disk,
)
from tests.support.time import LoopClock, until, virtual_time

from gamenode.agent.session import Outbox
from gamenode.domain.command import Closed, CloseReason, Dispatch
from gamenode.domain.log import LogKey
from gamenode.domain.node import Heartbeat, HeartbeatResult
from gamenode.domain.pipeline import PipelineReport, Reason, Status, StepReport
from gamenode.server.logs.service import LogSettings

DISPATCH = Dispatch("p", 1)
FILE = """
name: w
steps:
  - name: one
    container: {image: a, environment: {FAKE_DURATION_S: "%s", FAKE_LOG_LINES: "2"}}
"""


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[tuple[ControlPlane, NodeAgent, Network]]:
    clock = LoopClock()
    plane = ControlPlane(folder, clock=clock)
    await plane.start()
    network = Network(Random(1))
    network.plane = plane
    agent = NodeAgent(folder, network=network, clock=clock)
    agent.start()
    await until(lambda: plane.nodes.connection("n1") is not None)
    try:
        yield plane, agent, network
    finally:
        await agent.kill()
        await plane.stop()


async def flips(plane: ControlPlane) -> list[str]:
    return [e.type for e in await plane.events() if e.type in {"node.online", "node.offline"}]


async def count(plane: ControlPlane, kind: str) -> int:
    return sum(event.type == kind for event in await plane.events())


@virtual_time
async def test_a_silent_stream_is_given_up_in_time_to_stay_online(tmp_path: Path) -> None:
    async with world(tmp_path) as (plane, agent, network):
        for stream in network.streams:
            stream.silence()
        silent = plane.nodes.connection("n1")
        await until(lambda: plane.nodes.connection("n1") not in {silent, None}, timeout_s=44.0)
        await asyncio.sleep(100.0)
        assert await flips(plane) == ["node.online"]
        assert agent.running is not None
        assert not agent.running.done()


@virtual_time
async def test_the_server_says_how_long_a_chunk_of_a_log_may_be(tmp_path: Path) -> None:
    logs = LogSettings(chunk_bytes_max=8192)  # a longer one is refused, for ever
    async with world_in(tmp_path, PlaneSettings(logs=logs)) as world:
        world.agent.start()
        await world.connected()
        await world.create(step(log_lines=5_000))
        await until(world.ended)
        stored = await world.plane.log_service.stored(LogKey(world.pipeline_id, "one", 1))
        assert stored is not None
        assert stored.final_length_bytes == stored.length_bytes > 10 * 8192


@virtual_time
async def test_who_has_said_goodbye_does_not_come_back(tmp_path: Path) -> None:
    async with world(tmp_path) as (plane, agent, _):
        await agent.session.leave("upgrade")
        assert not (await plane.nodes.get("n1")).online
        await asyncio.sleep(30.0)
        assert await flips(plane) == ["node.online", "node.offline"]


@virtual_time
async def test_a_session_that_does_not_count_any_more_is_opened_anew(tmp_path: Path) -> None:
    async with world(tmp_path) as (plane, agent, network):
        other = NodeAgent(tmp_path / "other", network=network, clock=plane.clock)
        other.boot_id = agent.boot_id  # a copy of the host, for all that the server can see
        (tmp_path / "other").mkdir()
        other.start()
        await asyncio.sleep(10.0)
        await other.kill()
        await asyncio.sleep(60.0)
        assert plane.nodes.connection("n1") is not None
        assert (await plane.nodes.get("n1")).online


def test_a_heartbeat_that_does_not_count_has_the_node_register_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @virtual_time
    async def check() -> None:
        async with world(tmp_path) as (plane, _, _network):

            async def superseded(_: Heartbeat) -> HeartbeatResult:
                return HeartbeatResult(counted=False)

            with monkeypatch.context() as stale:
                stale.setattr(plane.nodes, "heartbeat", superseded)
                await asyncio.sleep(16.0)
            await asyncio.sleep(60.0)
            assert await count(plane, "node.registered") >= 2
            assert plane.nodes.connection("n1") is not None

    check()


@pytest.mark.parametrize("reason", CloseReason)
def test_a_server_that_closes_every_stream_is_not_stormed(
    tmp_path: Path, reason: CloseReason, monkeypatch: pytest.MonkeyPatch
) -> None:
    @virtual_time
    async def check() -> None:
        async with world(tmp_path) as (plane, _, network):
            opened = 0
            reading = MemoryStream.read

            async def read(stream: MemoryStream) -> object:
                nonlocal opened
                opened += 1
                await reading(stream)
                return Closed(reason=reason)

            with monkeypatch.context() as closing:
                closing.setattr(MemoryStream, "read", read)
                network.break_streams()
                await asyncio.sleep(60.0)
            assert 2 <= opened <= 40
            assert await count(plane, "node.registered") <= 40

    check()


def test_a_journal_that_cannot_be_written_does_not_end_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @virtual_time
    async def check() -> None:
        async with world(tmp_path) as (plane, agent, network):

            async def full(_: int, *, continued: bool) -> None:
                del continued
                raise sqlite3.OperationalError("database or disk is full")

            with monkeypatch.context() as disk:
                disk.setattr(agent.journal, "open_session", full)
                agent.session._answer = None
                network.break_streams()
                await asyncio.sleep(30.0)
                assert plane.nodes.connection("n1") is None
            await until(lambda: plane.nodes.connection("n1") is not None)

    check()


def test_a_full_disk_of_the_server_loses_no_report_and_takes_nobody_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @virtual_time
    async def check() -> None:
        async with world(tmp_path) as (plane, agent, network):
            created = await plane.create(FILE % 20)
            await until(lambda: len(agent.host.starts) == 1)
            with monkeypatch.context() as disk:
                fill_disk(plane, disk)
                await asyncio.sleep(100.0)  # it ends meanwhile
                network.break_streams()
                await asyncio.sleep(100.0)
                assert (await plane.nodes.get("n1")).online

            async def completed() -> bool:
                return (await plane.service.get(created.id)).status is Status.COMPLETED

            await until(completed)
            assert await flips(plane) == ["node.online"]
            await until(lambda: agent.host.runs() == ())

    check()


@virtual_time
async def test_acknowledgements_that_are_lost_end_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as (plane, agent, network):
        created = await plane.create(FILE % 60)
        await until(lambda: len(agent.host.starts) == 1)
        for stream in network.streams:
            stream.silence()
        await asyncio.sleep(1.0)
        network.break_streams()

        async def ended() -> bool:
            return (await plane.service.get(created.id)).status.terminal

        await until(ended, timeout_s=120.0)
        assert (await plane.service.get(created.id)).status is Status.COMPLETED


@virtual_time
async def test_an_order_that_died_with_its_stream_is_sent_on_the_next_one_at_once(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as (plane, agent, network):
        network.streams[-1].silence(server=True)
        pipeline = await plane.create(FILE % 1)

        async def bound() -> bool:
            return (await plane.service.get(pipeline.id)).node_id == "n1"

        await until(bound)
        await agent.kill()
        network.break_streams()
        await until(lambda: plane.nodes.connection("n1") is None)
        agent.start()
        await until(lambda: len(agent.runner.held()) == 1, timeout_s=5.0)


@virtual_time
async def test_a_cancel_reaches_a_node_that_comes_back(tmp_path: Path) -> None:
    async with world(tmp_path) as (plane, agent, network):
        created = await plane.create(FILE % 600)
        await until(lambda: len(agent.host.starts) == 1)
        network.cut = True
        network.break_streams()
        await plane.pipelines.cancel(created.id, reason="", force=False, by=USER)
        await asyncio.sleep(60.0)
        network.cut = False

        async def cancelled() -> bool:
            return (await plane.service.get(created.id)).status is Status.CANCELLED

        await until(cancelled)


# The outbox


def report(number: int) -> StepReport:
    return StepReport(pipeline_id="p", step=f"s{number}", status=Status.RUNNING)


def test_reports_go_out_in_order_and_wait_for_room() -> None:
    outbox = Outbox(in_flight_max=3)
    for number in range(1, 6):
        outbox.report(DISPATCH, report(number))
    assert [n.sequence for n in outbox.unsent(500)] == [1, 2, 3]
    assert outbox.unsent(500) == []
    outbox.acknowledge(2)
    assert [n.sequence for n in outbox.unsent(500)] == [4]
    for number in (1, 3, 4):
        outbox.acknowledge(number)
    assert [n.sequence for n in outbox.unsent(500)] == [5]


def test_what_was_stated_is_not_sent_again_and_is_in_flight() -> None:
    outbox = Outbox(in_flight_max=2)
    for number in (1, 2):
        outbox.report(DISPATCH, report(number))
    assert [n.sequence for n in outbox.state()[DISPATCH]] == [1, 2]
    outbox.report(DISPATCH, report(3))
    assert outbox.unsent(500) == []
    outbox.acknowledge(1)
    assert [n.sequence for n in outbox.unsent(500)] == [3]


def test_a_statement_holds_no_more_than_may_be_in_flight_and_the_rest_follows() -> None:
    outbox = Outbox(in_flight_max=2)
    for number in range(1, 6):
        outbox.report(DISPATCH, report(number))
    outbox.unsent(500)
    outbox.acknowledge(2)
    outbox.unsent(500)
    for number in (1, 3):
        outbox.acknowledge(number)
    outbox.report(DISPATCH, report(6))
    assert [n.sequence for n in outbox.state()[DISPATCH]] == [4, 5]
    assert outbox.unsent(500) == []
    for number in (4, 5):
        outbox.acknowledge(number)
    assert [n.sequence for n in outbox.unsent(500)] == [6]


def test_a_report_that_waits_is_not_taken_twice() -> None:
    outbox = Outbox()
    for _ in range(3):
        outbox.report(DISPATCH, report(1))
    assert len(outbox.of(DISPATCH)) == 1
    outbox.acknowledge(1)
    assert outbox.acknowledge(1) is None
    outbox.report(DISPATCH, report(1))
    assert [n.sequence for n in outbox.of(DISPATCH)] == [2]


def test_how_far_a_pull_is_does_not_heap_up_for_a_server_that_is_away() -> None:
    outbox = Outbox()
    pulls = [replace(report(1), reason=Reason.PULLING, message=f"{n} MB") for n in range(1, 9)]
    for pull in pulls:
        outbox.report(DISPATCH, pull)
    outbox.report(DISPATCH, report(1))
    assert [n.report for n in outbox.of(DISPATCH)] == [pulls[0], report(1)]
    outbox.acknowledge(1)
    outbox.report(DISPATCH, pulls[-1])
    assert len(outbox.of(DISPATCH)) == 2


def test_a_report_is_kept_for_its_own_dispatch() -> None:
    outbox = Outbox()
    end = PipelineReport(pipeline_id="p", status=Status.COMPLETED)
    outbox.report(DISPATCH, end)
    outbox.report(Dispatch("p", 2), end)
    assert [n.sequence for n in outbox.of(Dispatch("p", 2))] == [2]
    assert outbox.acknowledge(1) == (DISPATCH, end)
    assert outbox.of(DISPATCH) == ()
