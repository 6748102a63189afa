"""Who is online: C2, C3, C6, RL2, RL3, RL5, P3, P7, P8. On both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from tests.support.groups import HeldWriter
from tests.support.plane import USER, ControlPlane, fill_disk, registration
from tests.support.time import FakeClock, LoopClock, until, virtual_time

from gamenode.domain.command import Closed, CloseReason, Statement, Welcome
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import EventType
from gamenode.domain.node import (
    ConditionType,
    Heartbeat,
    Link,
    Maintenance,
    Node,
    NodePatch,
    RegistrationAnswer,
)
from gamenode.server.nodes.connections import AgentConnection

TIMEOUT_S = 45.0
GRACE_S = 5.0


def statement(answer: RegistrationAnswer, *, number: int = 1, boot_id: str = "boot-1") -> Statement:
    return Statement(
        node_id="n1",
        session_id=answer.session_id,
        stream_number=number,
        state_version=1,
        maintenance=Maintenance.NORMAL,
        held=(),
        boot_id=boot_id,
    )


async def attach(
    plane: ControlPlane, answer: RegistrationAnswer, *, number: int = 1, boot_id: str = "boot-1"
) -> AgentConnection:
    connection = await plane.nodes.attach(statement(answer, number=number, boot_id=boot_id))
    assert connection is not None
    return connection


async def beat(plane: ControlPlane, answer: RegistrationAnswer) -> bool:
    heartbeat = Heartbeat(node_id="n1", session_id=answer.session_id)
    return (await plane.nodes.heartbeat(heartbeat)).counted


async def node(plane: ControlPlane) -> Node:
    """Return the node as memory and row agree on it."""
    shown, stored = await plane.nodes.get("n1"), await plane.node_service.get("n1")
    assert shown.online == stored.online
    assert shown.link == stored.link
    return shown


async def flips(plane: ControlPlane) -> list[str]:
    kinds = [event.type for event in await plane.events()]
    return [kind.removeprefix("node.") for kind in kinds if kind in {"node.online", "node.offline"}]


async def stands(connection: AgentConnection) -> bool:
    """Return whether a stream stands: there is nothing to say on it."""
    try:
        async with asyncio.timeout(0.01):
            await connection.next_words()
    except TimeoutError:
        return True
    return False


async def closed_with(connection: AgentConnection) -> CloseReason | None:
    for word in await connection.next_words():
        if isinstance(word, Closed):
            return word.reason
    return None


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest_asyncio.fixture
async def plane(tmp_path: Path, database_url: str, clock: FakeClock) -> AsyncIterator[ControlPlane]:
    opened = ControlPlane(tmp_path, clock=clock, url=database_url)
    await opened.nodes.load()
    yield opened
    await opened.stop()


async def test_offline_45_s_after_the_last_heartbeat_and_not_before(
    plane: ControlPlane, clock: FakeClock
) -> None:
    answer = await plane.nodes.register(registration())
    clock.advance(30.0)
    assert await beat(plane, answer)  # the last one counts, not the first
    clock.advance(TIMEOUT_S - 0.001)
    await plane.nodes.judge_once()
    assert (await node(plane)).online
    clock.advance(0.001)
    await plane.nodes.judge_once()
    assert not (await node(plane)).online
    assert await flips(plane) == ["online", "offline"]
    assert await beat(plane, answer)
    assert (await node(plane)).online
    assert await flips(plane) == ["online", "offline", "online"]


async def test_a_broken_stream_has_the_grace_to_come_back(
    plane: ControlPlane, clock: FakeClock
) -> None:
    answer = await plane.nodes.register(registration())
    first = await attach(plane, answer)
    await plane.nodes.detach(first, "it broke")
    assert (await node(plane)).link is Link.RECONNECTING
    clock.advance(GRACE_S - 0.001)
    await plane.nodes.judge_once()
    assert (await node(plane)).online
    second = await attach(plane, answer, number=2)
    clock.advance(GRACE_S)
    await plane.nodes.judge_once()
    assert (await node(plane)).link is Link.CONNECTED
    await plane.nodes.detach(second, "it broke")
    clock.advance(GRACE_S)
    await plane.nodes.judge_once()
    assert not (await node(plane)).online
    assert await flips(plane) == ["online", "offline"]


async def test_a_goodbye_is_offline_at_once(plane: ControlPlane) -> None:
    connection = await attach(plane, await plane.nodes.register(registration()))
    await plane.nodes.goodbye(connection, "upgrade")
    assert not (await node(plane)).online
    assert (await node(plane)).link_cause == "goodbye: upgrade"


async def test_the_goodbye_of_a_superseded_stream_takes_nobody_offline(
    plane: ControlPlane,
) -> None:
    answer = await plane.nodes.register(registration())
    first = await attach(plane, answer)
    await attach(plane, answer, number=2)
    await plane.nodes.goodbye(first, "late")
    await plane.nodes.detach(first, "late")
    assert (await node(plane)).online
    assert (await node(plane)).link is Link.CONNECTED


async def test_a_newer_stream_closes_the_older_one_and_not_the_reverse(
    plane: ControlPlane,
) -> None:
    answer = await plane.nodes.register(registration())
    second = await attach(plane, answer, number=2)
    assert await plane.nodes.attach(statement(answer, number=1)) is None  # delayed on its way
    third = await attach(plane, answer, number=3)
    assert await closed_with(second) is CloseReason.SUPERSEDED
    third.welcome(Welcome())
    assert plane.nodes.connection("n1") is third


async def test_a_superseded_session_changes_nothing(plane: ControlPlane) -> None:
    old = await plane.nodes.register(registration())
    connection = await attach(plane, old)
    await plane.nodes.register(registration(last_session_epoch=old.session_epoch))
    assert await closed_with(connection) is CloseReason.SUPERSEDED
    assert not await beat(plane, old)
    assert await plane.nodes.attach(statement(old, number=2)) is None
    assert plane.nodes.session_of("n1", old.session_id) is None


async def test_a_restarted_server_gives_everybody_the_whole_timeout(
    plane: ControlPlane, clock: FakeClock, tmp_path: Path, database_url: str
) -> None:
    await plane.nodes.register(registration())
    clock.advance(TIMEOUT_S - 1.0)
    restarted = ControlPlane(tmp_path, clock=clock, url=database_url)
    await restarted.nodes.load()
    clock.advance(TIMEOUT_S - 0.001)
    await restarted.nodes.judge_once()
    assert (await node(restarted)).online
    clock.advance(0.001)
    await restarted.nodes.judge_once()
    assert not (await node(restarted)).online
    await restarted.stop()


async def test_a_node_that_was_offline_before_a_restart_is_online_with_its_stream(
    plane: ControlPlane, clock: FakeClock, tmp_path: Path, database_url: str
) -> None:
    answer = await plane.nodes.register(registration())
    clock.advance(TIMEOUT_S)
    await plane.nodes.judge_once()
    restarted = ControlPlane(tmp_path, clock=clock, url=database_url)
    await restarted.nodes.load()
    await attach(restarted, answer, number=2)
    assert (await node(restarted)).online
    await restarted.stop()


async def test_a_host_that_lost_its_power_may_come_back_with_another_boot_id(
    plane: ControlPlane, clock: FakeClock
) -> None:
    connection = await attach(plane, await plane.nodes.register(registration()))
    clock.advance(TIMEOUT_S - 1.0)
    with pytest.raises(GameNodeError) as caught:  # a clone, as far as anybody knows
        await plane.nodes.register(registration(boot_id="boot-2"))
    assert caught.value.code is ErrorCode.CONFLICT
    assert caught.value.retry_after_s == TIMEOUT_S
    clock.advance(1.0)
    await plane.nodes.register(registration(boot_id="boot-2"))
    assert await closed_with(connection) is CloseReason.SUPERSEDED


def conditions(shown: Node) -> list[ConditionType]:
    return [condition.type for condition in shown.conditions]


async def test_a_cloned_data_folder_is_refused_and_the_node_says_so_until_it_stays_away(
    plane: ControlPlane, clock: FakeClock
) -> None:
    answer = await plane.nodes.register(registration())
    connection = await attach(plane, answer)
    for _ in range(6):  # it comes again and again, between the heartbeats of the first
        with pytest.raises(GameNodeError) as caught:
            await plane.nodes.register(
                registration(boot_id="boot-2", last_session_epoch=answer.session_epoch)
            )
        assert caught.value.code is ErrorCode.CONFLICT
        clock.advance(15.0)
        assert await beat(plane, answer)
        shown = await node(plane)
        assert conditions(shown) == [ConditionType.DUPLICATE_IDENTITY]
        assert "boot-2" in shown.conditions[0].reason
        assert any(condition.blocks_placement for condition in shown.conditions)
    for _ in range(5):
        clock.advance(15.0)
        assert await beat(plane, answer)
    assert conditions(await node(plane)) == []
    told = [event for event in await plane.events() if event.type == EventType.NODE_CONDITION]
    assert [event.status for event in told] == ["holds", "cleared"]
    assert await stands(connection)


async def test_a_full_disk_lets_no_clone_in(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await attach(plane, await plane.nodes.register(registration()))
    with monkeypatch.context() as full:
        fill_disk(plane, full)
        with pytest.raises(GameNodeError) as caught:
            await plane.nodes.register(registration(boot_id="boot-2"))
    assert caught.value.code is ErrorCode.CONFLICT


async def test_what_held_of_a_duplicate_ends_with_the_session_that_it_was_said_of(
    plane: ControlPlane, clock: FakeClock
) -> None:
    answer = await plane.nodes.register(registration())
    connection = await attach(plane, answer)
    with pytest.raises(GameNodeError):
        await plane.nodes.register(registration(boot_id="boot-2"))
    await plane.nodes.goodbye(connection, "moved")
    moved = await plane.nodes.register(registration(boot_id="boot-2"))
    await attach(plane, moved, boot_id="boot-2")
    clock.advance(15.0)
    assert await beat(plane, moved)
    assert conditions(await node(plane)) == []


async def test_a_stream_that_nothing_comes_on_is_closed(
    plane: ControlPlane, clock: FakeClock
) -> None:
    connection = await attach(plane, await plane.nodes.register(registration()))
    clock.advance(TIMEOUT_S)
    await plane.nodes.judge_once()
    assert await closed_with(connection) is CloseReason.PROTOCOL


async def test_the_same_host_may_register_again_at_any_time(plane: ControlPlane) -> None:
    first = await plane.nodes.register(registration())
    await attach(plane, first)
    again = await plane.nodes.register(registration(last_session_epoch=first.session_epoch))
    assert again.continuation


async def test_an_attach_that_is_cancelled_leaves_no_stream_behind(plane: ControlPlane) -> None:
    answer = await plane.nodes.register(registration())
    async with HeldWriter(plane.database):
        attaching = asyncio.create_task(plane.nodes.attach(statement(answer)))
        await asyncio.sleep(0.01)
        attaching.cancel()
        await asyncio.gather(attaching, return_exceptions=True)
    await plane.nodes.register(registration(boot_id="boot-2"))


@pytest.mark.parametrize(
    ("named", "used", "continued"),
    [
        ("newest", False, True),
        ("newest", True, True),
        ("previous", False, True),  # the newest was opened, and the answer got lost
        ("previous", True, False),  # a restored snapshot
        ("older", False, False),
        (None, False, False),  # a lost journal
    ],
)
async def test_which_session_may_be_continued(
    plane: ControlPlane, named: str | None, used: bool, continued: bool
) -> None:
    epochs = {"newest": 0, "previous": 0, "older": 0}
    for name in ("older", "previous", "newest"):
        answer = await plane.nodes.register(registration(last_session_epoch=epochs["previous"]))
        epochs[name] = answer.session_epoch
        if name != "newest" or used:
            await plane.service.reconcile(
                [],
                session=(await attach(plane, answer)).session,
                stream_number=1,
                now=plane.clock.now(),
            )
    last = epochs[named] if named is not None else None
    answer = await plane.nodes.register(registration(last_session_epoch=last))
    assert answer.continuation is continued


async def test_epochs_grow(plane: ControlPlane) -> None:
    epochs = [(await plane.nodes.register(registration())).session_epoch for _ in range(3)]
    assert epochs == sorted(set(epochs))


async def test_registrations_side_by_side_leave_one_session(plane: ControlPlane) -> None:
    answers = await asyncio.gather(*(plane.nodes.register(registration()) for _ in range(8)))
    newest = max(answers, key=lambda answer: answer.session_epoch)
    counted = [answer for answer in answers if await beat(plane, answer)]
    assert counted == [newest]
    assert (await plane.node_service.get("n1")).session_id == newest.session_id


async def test_who_registers_while_its_silence_is_written_down_is_online(
    plane: ControlPlane, clock: FakeClock
) -> None:
    answer = await plane.nodes.register(registration())
    clock.advance(TIMEOUT_S)
    async with HeldWriter(plane.database):
        registering = asyncio.create_task(
            plane.nodes.register(registration(last_session_epoch=answer.session_epoch))
        )
        await asyncio.sleep(0.01)
        judging = asyncio.create_task(plane.nodes.judge_once())
        await asyncio.sleep(0.01)
    await asyncio.gather(registering, judging)
    assert (await node(plane)).online


async def test_a_flip_that_a_new_session_has_overtaken_flips_nothing(
    plane: ControlPlane, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = await plane.nodes.register(registration())
    clock.advance(TIMEOUT_S)
    registered = asyncio.Event()
    writing = plane.node_service.set_online

    async def late(*arguments: Any, **named: Any) -> bool:
        await registered.wait()
        return await writing(*arguments, **named)

    monkeypatch.setattr(plane.node_service, "set_online", late)
    judging = asyncio.create_task(plane.nodes.judge_once())
    await asyncio.sleep(0)
    await plane.nodes.register(registration(last_session_epoch=answer.session_epoch))
    registered.set()
    await judging
    assert (await node(plane)).online


async def test_who_is_heard_while_another_is_written_down_is_not_taken_for_silent(
    plane: ControlPlane, clock: FakeClock
) -> None:
    await plane.nodes.register(registration("n0"))
    answer = await plane.nodes.register(registration("n1"))
    clock.advance(TIMEOUT_S)
    async with HeldWriter(plane.database):
        judging = asyncio.create_task(plane.nodes.judge_once())
        await asyncio.sleep(0.01)
        assert await beat(plane, answer)
    await judging
    assert (await node(plane)).online


async def test_a_read_that_was_overtaken_does_not_bring_a_node_back_online(
    plane: ControlPlane, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.nodes.register(registration())
    stale = await plane.node_service.get("n1")
    clock.advance(TIMEOUT_S)
    await plane.nodes.judge_once()

    async def overtaken(_: str) -> Node:
        return stale

    monkeypatch.setattr(plane.node_service, "get", overtaken)  # what a slow read returns
    await plane.nodes.describe("n1", NodePatch(note="a note"), by=USER)
    assert not (await plane.nodes.get("n1")).online


async def test_a_full_disk_takes_nobody_offline(
    plane: ControlPlane, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = await plane.nodes.register(registration())
    await attach(plane, answer)
    fill_disk(plane, monkeypatch)
    connection = await attach(plane, answer, number=2)
    for _ in range(10):
        clock.advance(15.0)
        assert await beat(plane, answer)
        await plane.nodes.judge_once()
    shown = await plane.nodes.get("n1")
    assert shown.online
    assert shown.link is Link.CONNECTED
    await plane.nodes.detach(connection, "it broke")
    await plane.nodes.goodbye(connection, "")


@virtual_time
async def check_flapping(folder: Path, seed: int) -> None:
    random = Random(seed)
    clock = LoopClock()
    plane = ControlPlane(folder, clock=clock)
    await plane.start()
    answer = await plane.nodes.register(registration())
    last_s = clock.monotonic_s()
    for _ in range(40):
        # Sent every 15 s, and as late as one may be.
        await asyncio.sleep(random.uniform(0.0, TIMEOUT_S - 0.001 - (clock.monotonic_s() - last_s)))
        assert await beat(plane, answer)
        last_s = clock.monotonic_s()
        assert (await plane.nodes.get("n1")).online
    assert await flips(plane) == ["online"]

    async def offline() -> bool:
        return not (await plane.nodes.get("n1")).online

    await until(offline)
    assert TIMEOUT_S <= clock.monotonic_s() - last_s <= TIMEOUT_S + 1.2  # P7
    await plane.stop()


@pytest.mark.parametrize("seed", range(3))
def test_heartbeats_in_time_never_flap_and_silence_is_seen_within_a_check(
    tmp_path: Path, seed: int
) -> None:
    check_flapping(tmp_path, seed)


def test_a_stalled_loop_hears_first_what_came_meanwhile(tmp_path: Path) -> None:
    @virtual_time
    async def check() -> None:
        clock = LoopClock()
        plane = ControlPlane(tmp_path, clock=clock)
        await plane.start()
        answer = await plane.nodes.register(registration())
        await asyncio.sleep(10.0)
        clock.advance(60.0)  # nothing ran for a minute, and then everything at once
        await asyncio.sleep(1.0)
        assert (await plane.nodes.get("n1")).online
        assert await beat(plane, answer)
        await asyncio.sleep(5.0)
        assert await flips(plane) == ["online"]
        await plane.stop()

    check()
