from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gamenode.agent.inventory.collector import Collector, CollectorSettings, Part
from gamenode.agent.inventory.programs import ProgramError, runner
from gamenode.domain.inventory import (
    Collection,
    CollectionFailure,
    Disk,
    Hardware,
    Inventory,
    Memory,
)
from gamenode.lib.clock import SystemClock

_SETTINGS = CollectorSettings(part_timeout_s=0.1)
_DISK = Inventory(hardware=Hardware(disk=(Disk(serial="s1"),)))
_MEMORY = Inventory(hardware=Hardware(memory=Memory(total_bytes=2**30)))


class _Gate:
    """Work that hangs while the gate is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = 0

    def work(self) -> Inventory:
        self.entered += 1
        assert self.open.wait(10)
        return _DISK


@pytest.fixture
def gate() -> Iterator[_Gate]:
    gate = _Gate()
    yield gate
    gate.open.set()


def _part(
    name: str, collect: Callable[[], Inventory], glance: Callable[[], object] = lambda: 0
) -> Part:
    return Part(name=name, collect=collect, glance=glance)


def _collector(*parts: Part) -> Collector:
    return Collector(parts, clock=SystemClock(), settings=_SETTINGS)


async def _until(collector: Collector, done: Callable[[Collection], bool]) -> Collection:
    deadline_s = time.monotonic() + 5
    while not done(collection := await collector.collect()):
        assert time.monotonic() < deadline_s
    return collection


async def test_a_part_that_hangs_costs_itself_alone_and_is_named(gate: _Gate) -> None:
    collector = _collector(_part("disk", gate.work), _part("memory", lambda: _MEMORY))
    began_s = time.monotonic()

    collection = await collector.collect()

    assert time.monotonic() - began_s < 2.0
    assert collection.inventory == _MEMORY
    assert collection.failed == (
        CollectionFailure(part="disk", reason="TimeoutError: no answer in 0.1 s"),
    )


async def test_a_part_that_hangs_is_not_asked_again_before_it_came_back(gate: _Gate) -> None:
    collector = _collector(_part("disk", gate.work))
    for _ in range(3):
        assert (await collector.collect()).failed
    assert gate.entered == 1
    assert await collector.may_have_changed()


async def test_what_came_too_late_is_taken_by_the_next_collection(gate: _Gate) -> None:
    collector = _collector(_part("disk", gate.work))
    assert (await collector.collect()).failed

    gate.open.set()

    collection = await _until(collector, lambda it: not it.failed)
    assert collection.inventory == _DISK
    assert gate.entered == 1
    assert not await collector.may_have_changed()
    assert not (await collector.collect()).failed
    assert gate.entered == 2


async def test_a_glance_that_hangs_asks_for_a_collection_and_holds_nothing_up(gate: _Gate) -> None:
    hangs = [False]
    collector = _collector(
        _part("disk", lambda: _DISK, lambda: gate.work() if hangs[0] else _DISK),
    )
    _ = await collector.collect()
    hangs[0] = True
    began_s = time.monotonic()

    assert await collector.may_have_changed()
    assert await collector.may_have_changed()

    assert gate.entered == 1
    assert time.monotonic() - began_s < 2.0


async def test_a_part_that_fails_once_stays_as_it_was_seen_last() -> None:
    answers = iter((_DISK, OSError("input/output error"), _DISK))

    def read() -> Inventory:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    collector = _collector(_part("disk", read))
    first, second, third = [await collector.collect() for _ in range(3)]

    assert second.failed == (CollectionFailure(part="disk", reason="OSError: input/output error"),)
    assert third.failed == ()
    assert first.hash == second.hash == third.hash


async def test_a_glance_that_differs_asks_for_a_collection() -> None:
    seen = [1]
    collector = _collector(_part("disk", lambda: _DISK, lambda: seen[0]))
    assert await collector.may_have_changed()  # nothing was collected yet
    _ = await collector.collect()
    assert not await collector.may_have_changed()

    seen[0] = 2

    assert await collector.may_have_changed()
    _ = await collector.collect()
    assert not await collector.may_have_changed()


def test_a_program_that_does_not_end_is_ended() -> None:
    run = runner(timeout_s=0.1)

    with pytest.raises(ProgramError, match=r"sleep did not end in 0\.1 s"):
        _ = run("sleep", "60")


def test_a_program_that_is_not_installed_is_absent_and_one_that_fails_says_why() -> None:
    run = runner(timeout_s=5.0)

    assert run("no-such-program-anywhere") is None
    with pytest.raises(ProgramError, match="no/such/file"):
        _ = run("ls", "/no/such/file")
