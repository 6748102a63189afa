"""Collects what the host is made of, part by part, so that one part can fail or hang alone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final, TypeVar

from gamenode.agent.inventory import cpu, disk, gpu, memory, network, runtimes, system
from gamenode.agent.inventory.addresses import Address, ask_addresses
from gamenode.agent.inventory.programs import Run, folders, runner
from gamenode.domain.inventory import (
    Collection,
    CollectionFailure,
    Hardware,
    Inventory,
    Software,
    content_hash,
    with_parts_of,
)
from gamenode.lib.clock import Clock

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_REASON_CHARACTERS_MAX: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorSettings:
    """The bounds of collecting."""

    part_timeout_s: float = 2.0
    """How long one part may take."""
    program_timeout_s: float = 1.5
    """How long a program of the host, or the engine, may take to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the inventory. Both functions block, and may raise anything."""

    name: str
    """One of `domain.inventory.PARTS`."""
    collect: Callable[[], Inventory]
    """Returns an inventory in which this part is what was seen, and nothing else counts."""
    glance: Callable[[], object]
    """Returns, cheaply, a value that differs when `collect` may return another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where a host says what it is made of."""

    root: Path
    run: Run
    folders: str
    """Where its programs lie, separated like `PATH`."""
    engine: runtimes.Engine
    engine_socket: Path
    addresses: Callable[[], Iterable[Address]]
    nvidia: Callable[[], gpu.Seen | None]
    machine: str
    """The architecture that programs are made for there."""


def host_parts(settings: CollectorSettings, *, engine_socket: Path) -> tuple[Part, ...]:
    """Return the parts of the host that this program runs on."""
    return parts_of(
        Host(
            root=Path("/"),
            run=runner(settings.program_timeout_s),
            folders=folders(),
            engine=runtimes.engine_at(engine_socket, settings.program_timeout_s),
            engine_socket=engine_socket,
            addresses=ask_addresses,
            nvidia=_nvidia,
            machine=os.uname().machine,
        )
    )


def parts_of(host: Host) -> tuple[Part, ...]:
    """Return the parts of a host; those that only read files are their own cheap sources."""
    root = host.root
    memory_, disk_ = partial(_memory, root), partial(_disks, root)
    network_, system_ = partial(_network, host), partial(_system, host)
    return (
        Part(name="cpu", collect=partial(_cpus, host), glance=partial(cpu.glance, root)),
        Part(name="memory", collect=memory_, glance=memory_),
        Part(name="gpu", collect=partial(_gpus, host), glance=partial(gpu.glance, root)),
        Part(name="disk", collect=disk_, glance=disk_),
        Part(name="system", collect=system_, glance=system_),
        Part(
            name="runtimes",
            collect=partial(_runtimes, host),
            glance=partial(runtimes.glance, host.folders, host.engine_socket),
        ),
        Part(name="network", collect=network_, glance=network_),
    )


class Collector:
    """Collects an inventory, again and again, and never waits longer than a part may take.

    Each part has a thread of its own while it is collected, and while it is glanced at. A part that
    hangs (a driver that does not come back) is not asked again before it has come back, so it costs
    these two threads and no more. What comes too late for one collection is taken by the next:
    NVIDIA's driver, where it is not told to stay awake, needs seconds to wake its cards.
    """

    def __init__(self, parts: Iterable[Part], *, clock: Clock, settings: CollectorSettings) -> None:
        """Collect nothing yet."""
        self._parts = tuple(parts)
        self._clock = clock
        self._settings = settings
        self._looks: dict[str, asyncio.Future[tuple[object, Inventory]]] = {}
        """Parts that are being collected."""
        self._glancing: dict[str, asyncio.Future[object]] = {}
        """Parts that are being glanced at."""
        self._glances: dict[str, object] = {}
        """What was glanced just before each part was collected last."""
        self._last = Inventory()
        self._turn = asyncio.Lock()

    async def collect(self) -> Collection:
        """Return what the host is made of now.

        A part that fails or takes too long is named with its reason, and is as it was seen last.
        """
        async with self._turn:
            at = self._clock.now()
            outcomes = await asyncio.gather(*(self._collect(part) for part in self._parts))
            failed = tuple(it for it in outcomes if isinstance(it, CollectionFailure))
            inventory = self._last
            for part, outcome in zip(self._parts, outcomes, strict=True):
                if isinstance(outcome, Inventory):
                    inventory = with_parts_of(inventory, outcome, {part.name})
            self._last = inventory
        for failure in failed:
            _log.warning(
                "the %s could not be collected: %s",
                failure.part,
                failure.reason,
                extra={"event": "inventory.failed", "part": failure.part},
            )
        return Collection(
            inventory=inventory, collected_at=at, failed=failed, hash=content_hash(inventory)
        )

    async def may_have_changed(self) -> bool:
        """Return whether a glance at the cheap sources differs from the last collection's.

        So does a part that failed then: it is to be collected again (B5).
        """
        async with self._turn:
            differs = await asyncio.gather(*(self._differs(part) for part in self._parts))
        return any(differs)

    async def _collect(self, part: Part) -> Inventory | CollectionFailure:
        self._glances.pop(part.name, None)
        try:
            # The glance first: what changes in between is seen at the next one.
            glance, inventory = await self._ask(
                self._looks, part.name, lambda: (part.glance(), part.collect())
            )
        except Exception as error:  # noqa: BLE001 - a part costs itself alone, whatever it does
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return CollectionFailure(part=part.name, reason=reason[:_REASON_CHARACTERS_MAX])
        self._glances[part.name] = glance
        return inventory

    async def _differs(self, part: Part) -> bool:
        if part.name not in self._glances:
            return True
        try:
            glance = await self._ask(self._glancing, part.name, part.glance)
        except Exception:  # noqa: BLE001 - as above; collecting will say what is wrong
            return True
        return glance != self._glances[part.name]

    async def _ask(
        self, asked: dict[str, asyncio.Future[_Result]], name: str, work: Callable[[], _Result]
    ) -> _Result:
        """Return what `work` returns, or what it returned since it was too late the last time."""
        answer = asked.pop(name, None) or _in_thread(f"inventory {name}", work)
        try:
            async with asyncio.timeout(self._settings.part_timeout_s):
                return await asyncio.shield(answer)
        except TimeoutError as error:
            if answer.done():
                raise  # its own
            message = f"no answer in {self._settings.part_timeout_s:g} s"
            raise TimeoutError(message) from error
        finally:
            if not answer.done():
                asked[name] = answer


def _in_thread(name: str, work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """Run `work` in a thread that does not keep the program from ending, as a pool's would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()
    future.add_done_callback(_taken)

    def settle(result: _Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type] # there is one where no error is

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - it is raised where it is awaited
            failure = error
        with suppress(RuntimeError):  # the loop has ended meanwhile: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    Thread(target=run, name=name, daemon=True).start()
    return future


def _taken(answer: asyncio.Future[Any]) -> None:
    """Take note of a failure that comes when nobody waits any more: it was reported as too late."""
    if not answer.cancelled():
        _ = answer.exception()


def _cpus(host: Host) -> Inventory:
    return Inventory(hardware=Hardware(cpu=cpu.collect(host.root, host.run, host.machine)))


def _memory(root: Path) -> Inventory:
    return Inventory(hardware=Hardware(memory=memory.collect(root)))


def _gpus(host: Host) -> Inventory:
    gpus, driver = gpu.collect(host.root, host.nvidia)
    return Inventory(hardware=Hardware(gpu=gpus), software=Software(gpu_driver=driver))


def _nvidia() -> gpu.Seen | None:
    from gamenode.agent.inventory import nvml  # noqa: PLC0415 - only hosts with a card load it

    return nvml.collect()


def _disks(root: Path) -> Inventory:
    return Inventory(hardware=Hardware(disk=disk.collect(root)))


def _network(host: Host) -> Inventory:
    return Inventory(network=network.collect(host.root, host.addresses))


def _system(host: Host) -> Inventory:
    operating_system, kernel = system.collect(host.root, host.machine)
    return Inventory(software=Software(os=operating_system, kernel=kernel))


def _runtimes(host: Host) -> Inventory:
    return Inventory(software=Software(runtimes=runtimes.collect(host.run, host.engine)))
