"""What a node is made of. An absent value was not seen; it is never zero in its place (B1).

An inventory is as it was collected. Its *stable content* (`canonical`) is what a version is made
of: what moves by itself is left out, and the order in which the host names its parts does not
count. `inventory_diff` says how two of them differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection as Group
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from gamenode.lib.clock import Instant

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A processor."""

    model: str | None = None
    cores: int | None = None
    threads: int | None = None
    frequency_hertz: float | None = None
    """The highest that it is made for."""
    cache_bytes: int | None = None
    """The last level's, all instances in this socket together."""
    architecture: str | None = None
    socket: int | None = None
    l1d_cache_bytes: int | None = None
    l1i_cache_bytes: int | None = None
    l2_cache_bytes: int | None = None
    l3_cache_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModule:
    """A memory module."""

    slot: str | None = None
    size_bytes: int | None = None
    type: str | None = None
    frequency_hertz: float | None = None
    """Transfers a second, as modules are sold: DDR5-4800 is 4.8e9."""
    serial: str | None = None
    manufacturer: str | None = None
    part_number: str | None = None
    channel: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of a node."""

    total_bytes: int | None = None
    type: str | None = None
    frequency_hertz: float | None = None
    channels: int | None = None
    modules: tuple[MemoryModule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU."""

    model: str | None = None
    memory_bytes: int | None = None
    architecture: str | None = None
    driver_version: str | None = None
    compute_capability: str | None = None
    power_watts: float | None = None
    cuda_cores: int | None = None
    uuid: str | None = None
    pci_address: str | None = None
    vendor: str | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A block device."""

    model: str | None = None
    capacity_bytes: int | None = None
    type: str | None = None
    interface: str | None = None
    path: str | None = None
    serial: str | None = None
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The parts of a node."""

    cpu: tuple[Cpu, ...] = ()
    memory: Memory = Memory()
    gpu: tuple[Gpu, ...] = ()
    disk: tuple[Disk, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingSystem:
    """An operating system."""

    distribution: str | None = None
    version: str | None = None
    architecture: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel's version."""

    major: int | None = None
    minor: int | None = None
    patch: int | None = None
    release: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDriver:
    """A graphics driver."""

    driver_version: str | None = None
    compute_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtimes:
    """Versions of the container runtimes."""

    docker: str | None = None
    containerd: str | None = None
    runc: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """The software of a node."""

    os: OperatingSystem = OperatingSystem()
    kernel: Kernel = Kernel()
    gpu_driver: GpuDriver = GpuDriver()
    runtimes: Runtimes = Runtimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInterface:
    """A network interface."""

    name: str | None = None
    mac: str | None = None
    addresses: tuple[str, ...] = ()
    speed_bits_per_second: int | None = None
    driver: str | None = None
    virtual: bool | None = None
    """Whether there is only software behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The network interfaces of a node."""

    interfaces: tuple[NetworkInterface, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything that a node is made of."""

    hardware: Hardware = Hardware()
    software: Software = Software()
    network: Network = Network()


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionFailure:
    """A part that could not be collected."""

    part: str
    """One of `PARTS`."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What one collection saw of a node."""

    inventory: Inventory
    collected_at: Instant
    failed: tuple[CollectionFailure, ...] = ()
    hash: str = ""
    """`content_hash`, as the node computed it; empty: it does not keep one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionAnswer:
    """What the server answered to a collection (B3)."""

    accepted: bool
    error: str = ""
    stale: bool = False
    """The session is superseded: the node registers again."""
    next_report_at: Instant | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryVersion:
    """What a node was made of, from one change of its stable content to the next (B4)."""

    node_id: str
    version: int
    """From 1, one more with each change."""
    collected_at: Instant
    """When this content was first seen."""
    seen_at: Instant
    """When the server was last told the same content."""
    hash: str
    """`content_hash` of `inventory`."""
    inventory: Inventory
    """As it was collected; what is not part of the stable content, as it was seen last."""
    failed: tuple[CollectionFailure, ...]
    """What the last collection could not see; `inventory` has it as it was seen before."""
    summary: str
    """What changed, in words; empty for the first version."""


PARTS: Final = ("cpu", "memory", "gpu", "disk", "system", "runtimes", "network")
"""What is collected, and may fail, on its own. `gpu` has the graphics driver with it, `system` the
operating system and the kernel."""

_MEMORY_STEP_BYTES: Final = 16 * 1024 * 1024


def canonical(inventory: Inventory) -> Inventory:
    """Return the stable content: two that are equal are the same version (B4).

    Left out is what moves by itself: the speed that a link has now, the device path of a disk that
    has a serial number (the kernel numbers disks anew at each boot), the MAC address of an
    interface that is only software (the kernel makes one up). Memory is rounded to 16 MiB, since
    the kernel keeps some pages more or less for itself at each boot. Parts, addresses and mounts
    are in one fixed order, whatever order the host showed them in.
    """
    hardware = inventory.hardware
    memory = hardware.memory
    return replace(
        inventory,
        hardware=replace(
            hardware,
            cpu=_ordered(hardware.cpu),
            memory=replace(
                memory,
                total_bytes=_rounded(memory.total_bytes),
                modules=_ordered(memory.modules),
            ),
            gpu=_ordered(hardware.gpu),
            disk=_ordered(_stable_disk(disk) for disk in hardware.disk),
        ),
        network=Network(
            interfaces=_ordered(_stable_interface(it) for it in inventory.network.interfaces)
        ),
    )


def content_hash(inventory: Inventory) -> str:
    """Return the SHA-256 of the stable content, as 64 hexadecimal digits.

    What is absent is not hashed, so a field that a later version of the program adds does not
    change the hash of a host that does not show it.
    """
    return hashlib.sha256(_text(canonical(inventory)).encode()).hexdigest()


def with_parts_of(inventory: Inventory, other: Inventory, parts: Group[str]) -> Inventory:
    """Return `inventory`, but for `parts` (of `PARTS`), which are as in `other`.

    So a part that could not be collected stays as it was seen last: it has not been taken out of
    the machine.
    """
    hardware, software, network = inventory.hardware, inventory.software, inventory.network
    if "cpu" in parts:
        hardware = replace(hardware, cpu=other.hardware.cpu)
    if "memory" in parts:
        hardware = replace(hardware, memory=other.hardware.memory)
    if "gpu" in parts:
        hardware = replace(hardware, gpu=other.hardware.gpu)
        software = replace(software, gpu_driver=other.software.gpu_driver)
    if "disk" in parts:
        hardware = replace(hardware, disk=other.hardware.disk)
    if "system" in parts:
        software = replace(software, os=other.software.os, kernel=other.software.kernel)
    if "runtimes" in parts:
        software = replace(software, runtimes=other.software.runtimes)
    if "network" in parts:
        network = other.network
    return Inventory(hardware=hardware, software=software, network=network)


def _stable_disk(disk: Disk) -> Disk:
    return replace(
        disk,
        path=None if disk.serial is not None else disk.path,
        mounts=tuple(sorted(disk.mounts)),
    )


def _stable_interface(interface: NetworkInterface) -> NetworkInterface:
    return replace(
        interface,
        mac=None if interface.virtual else interface.mac,
        addresses=tuple(sorted(interface.addresses)),
        speed_bits_per_second=None,
    )


def _rounded(total_bytes: int | None) -> int | None:
    # Never to zero, which would read as "no memory".
    if total_bytes is None or total_bytes < _MEMORY_STEP_BYTES:
        return total_bytes
    steps = (total_bytes + _MEMORY_STEP_BYTES // 2) // _MEMORY_STEP_BYTES
    return steps * _MEMORY_STEP_BYTES


def _ordered(parts: Iterable[_Part]) -> tuple[_Part, ...]:
    return tuple(sorted(parts, key=_text))


def _text(record: Any) -> str:
    return json.dumps(
        dataclasses.asdict(record, dict_factory=_present), sort_keys=True, separators=(",", ":")
    )


def _present(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # 2.4e9 and 2400000000 are one frequency, whatever a codec on the way made of it.
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in items
        if value is not None and value not in ((), {})
    }
