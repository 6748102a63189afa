from __future__ import annotations

import asyncio
from random import Random

from tests.support.time import LoopClock, until, virtual_time

from gamenode.agent.inventory_reporter import InventoryReporter, ReporterSettings
from gamenode.agent.link import LinkError
from gamenode.domain.inventory import (
    Collection,
    CollectionAnswer,
    CollectionFailure,
    Inventory,
    Kernel,
    Software,
    content_hash,
)
from gamenode.lib.clock import after

_SETTINGS = ReporterSettings()
_DAY_S = 24 * 3600.0


class _Machine:
    """A host that is changed by the test, and a server that takes or loses what it sends."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.kernel = "6.1"
        self.glance: object = "6.1"
        self.failed: tuple[CollectionFailure, ...] = ()
        self.collections = 0
        self.active = True
        self.tries: list[float] = []
        self.stored: list[Collection] = []
        self.answers: list[CollectionAnswer | LinkError] = []
        """What the next sends meet; then they are accepted."""
        self._seen: object = None
        self.reporter = InventoryReporter(
            collector=self,
            send=self._send,
            active=lambda: self.active,
            clock=self.clock,
            random=Random(1),
            settings=_SETTINGS,
        )

    async def collect(self) -> Collection:
        self.collections += 1
        self._seen = self.glance
        inventory = Inventory(software=Software(kernel=Kernel(release=self.kernel)))
        return Collection(
            inventory=inventory,
            collected_at=self.clock.now(),
            failed=self.failed,
            hash=content_hash(inventory),
        )

    async def may_have_changed(self) -> bool:
        return self.glance != self._seen

    def change(self, kernel: str) -> None:
        self.kernel = self.glance = kernel

    async def register(self) -> asyncio.Task[None]:
        _ = await self.reporter.collect()
        self.reporter.registered()
        self.reporter.connected()
        return asyncio.get_running_loop().create_task(self.reporter.run())

    async def _send(self, collection: Collection) -> CollectionAnswer:
        self.tries.append(self.clock.monotonic_s())
        answer = self.answers.pop(0) if self.answers else CollectionAnswer(accepted=True)
        if isinstance(answer, LinkError):
            raise answer
        if answer.accepted:
            self.stored.append(collection)
        return answer


async def _end(running: asyncio.Task[None]) -> None:
    running.cancel()
    _ = await asyncio.gather(running, return_exceptions=True)


@virtual_time
async def test_a_change_is_sent_within_a_minute_and_nothing_else_is() -> None:
    machine = _Machine()
    running = await machine.register()
    await asyncio.sleep(3600.0)
    assert (machine.stored, machine.collections) == ([], 1)

    machine.change("6.2")
    await asyncio.sleep(_SETTINGS.check_s + 1)

    assert [it.inventory.software.kernel.release for it in machine.stored] == ["6.2"]
    assert machine.reporter.reported_hash == machine.stored[0].hash
    await asyncio.sleep(3600.0)
    assert len(machine.stored) == 1
    await _end(running)


@virtual_time
async def test_what_looks_different_and_is_the_same_is_not_sent() -> None:
    machine = _Machine()
    running = await machine.register()

    machine.glance = "a link's speed"
    await asyncio.sleep(300.0)

    assert (machine.collections, machine.stored) == (2, [])
    await _end(running)


@virtual_time
async def test_the_inventory_is_sent_once_a_day_or_when_the_server_says() -> None:
    machine = _Machine()
    running = await machine.register()
    machine.answers = [
        CollectionAnswer(
            accepted=True, next_report_at=after(machine.clock.now(), _DAY_S + 2 * 3600.0)
        )
    ]

    await asyncio.sleep(_DAY_S + 3 * 3600.0)

    first_s, second_s = machine.tries
    assert _DAY_S <= first_s <= _DAY_S + _SETTINGS.check_s
    assert 0 <= second_s - (_DAY_S + 2 * 3600.0) <= 2 * _SETTINGS.check_s
    await _end(running)


@virtual_time
async def test_on_demand_it_is_collected_and_sent_at_once_changed_or_not() -> None:
    machine = _Machine()
    running = await machine.register()
    await asyncio.sleep(10.0)

    machine.reporter.ask()
    await until(lambda: bool(machine.stored), timeout_s=1.0)

    assert machine.collections == 2
    await _end(running)


@virtual_time
async def test_a_server_that_holds_another_one_gets_the_last_one_again() -> None:
    machine = _Machine()
    running = await machine.register()
    await asyncio.sleep(10.0)

    machine.reporter.resend()
    await until(lambda: bool(machine.stored), timeout_s=1.0)

    assert machine.collections == 1
    await _end(running)


@virtual_time
async def test_an_upload_is_retried_three_times_then_kept_for_the_next_stream() -> None:
    machine = _Machine()
    running = await machine.register()
    machine.answers = [LinkError("no way", transient=True)] * 4
    machine.change("6.2")
    machine.reporter.ask()
    await until(lambda: len(machine.tries) == 4)
    machine.active = False  # the stream is gone

    await asyncio.sleep(600.0)
    assert len(machine.tries) == 4
    machine.active = True
    machine.reporter.connected()
    await until(lambda: bool(machine.stored), timeout_s=1.0)

    assert machine.stored[0].inventory.software.kernel.release == "6.2"
    await _end(running)


@virtual_time
async def test_only_the_newest_collection_waits() -> None:
    machine = _Machine()
    running = await machine.register()
    machine.answers = [LinkError("no way", transient=True)] * 4
    machine.change("6.2")
    machine.reporter.ask()
    await until(lambda: len(machine.tries) == 4)

    machine.change("6.3")
    await asyncio.sleep(2 * _SETTINGS.check_s)

    assert [it.inventory.software.kernel.release for it in machine.stored] == ["6.3"]
    await _end(running)


@virtual_time
async def test_a_refused_inventory_is_not_sent_again_and_the_next_one_is() -> None:
    machine = _Machine()
    running = await machine.register()
    machine.answers = [
        LinkError("INVALID_ARGUMENT: hardware.cpu", transient=False),
        CollectionAnswer(accepted=False, error="hardware.cpu"),
    ]
    stored = machine.reporter.reported_hash
    for kernel in ("6.2", "6.3"):
        machine.change(kernel)
        await asyncio.sleep(5 * _SETTINGS.check_s)
    assert machine.reporter.reported_hash == stored  # what the server does hold
    machine.change("6.4")
    await asyncio.sleep(5 * _SETTINGS.check_s)

    assert len(machine.tries) == 3
    assert [it.inventory.software.kernel.release for it in machine.stored] == ["6.4"]
    await _end(running)


@virtual_time
async def test_a_part_that_begins_to_fail_is_reported_once() -> None:
    machine = _Machine()
    running = await machine.register()

    machine.failed = (CollectionFailure(part="gpu", reason="no answer in 2 s"),)
    machine.glance = "something"
    await asyncio.sleep(3600.0)

    assert [it.failed for it in machine.stored] == [machine.failed]
    await _end(running)


@virtual_time
async def test_a_node_that_is_disabled_collects_nothing() -> None:
    machine = _Machine()
    running = await machine.register()
    machine.active = False

    machine.change("6.2")
    await asyncio.sleep(2 * _DAY_S)

    assert (machine.collections, machine.tries) == (1, [])
    await _end(running)
