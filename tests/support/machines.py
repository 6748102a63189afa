"""A constructed game host, and what may be changed on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gamenode.domain.inventory import (
    Cpu,
    Disk,
    Gpu,
    GpuDriver,
    Hardware,
    Inventory,
    Kernel,
    Memory,
    MemoryModule,
    Network,
    NetworkInterface,
    OperatingSystem,
    Runtimes,
    Software,
)
from gamenode.domain.node import NodeType, Registration
from gamenode.wire import codec
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

GIB = 2**30

HOST = Inventory(
    hardware=Hardware(
        cpu=(
            Cpu(model="EPYC 7302", cores=16, threads=32, architecture="x86_64", socket=0),
            Cpu(model="EPYC 7302", cores=16, threads=32, architecture="x86_64", socket=1),
        ),
        memory=Memory(
            total_bytes=64 * GIB,
            modules=(
                MemoryModule(slot="A1", size_bytes=32 * GIB, serial="M1"),
                MemoryModule(slot="B1", size_bytes=32 * GIB, serial="M2"),
            ),
        ),
        gpu=(Gpu(model="RTX 4090", uuid="GPU-5f0d", driver_version="550.54", slots=2),),
        disk=(Disk(model="S980", serial="D1", capacity_bytes=2000 * GIB, path="/dev/nvme0n1"),),
    ),
    software=Software(
        os=OperatingSystem(distribution="debian", version="12"),
        kernel=Kernel(major=6, minor=1, patch=0, release="6.1.0-18-amd64"),
        gpu_driver=GpuDriver(driver_version="550.54", compute_version="12.4"),
        runtimes=Runtimes(docker="26.1.0"),
    ),
    network=Network(
        interfaces=(
            NetworkInterface(name="eth0", mac="52:54:00:00:00:01", speed_bits_per_second=1),
        )
    ),
)


def with_new_driver(host: Inventory) -> Inventory:
    (gpu,) = host.hardware.gpu
    return replace(
        host,
        hardware=replace(host.hardware, gpu=(replace(gpu, driver_version="555.42"),)),
        software=replace(host.software, gpu_driver=GpuDriver(driver_version="555.42")),
    )


def with_other_disk(host: Inventory) -> Inventory:
    (disk,) = host.hardware.disk
    return replace(host, hardware=replace(host.hardware, disk=(replace(disk, serial="D2"),)))


def with_second_interface(host: Inventory) -> Inventory:
    second = NetworkInterface(name="eth1", mac="52:54:00:00:00:02")
    return replace(host, network=Network(interfaces=(*host.network.interfaces, second)))


def with_moved_module(host: Inventory) -> Inventory:
    first, second = host.hardware.memory.modules
    memory = replace(host.hardware.memory, modules=(replace(first, slot="C1"), second))
    return replace(host, hardware=replace(host.hardware, memory=memory))


def without_gpu(host: Inventory) -> Inventory:
    return replace(host, hardware=replace(host.hardware, gpu=()))


def with_what_moves(host: Inventory) -> Inventory:
    """Return the same machine after a boot: nothing of this is a change."""
    (disk,) = host.hardware.disk
    (interface,) = host.network.interfaces
    return replace(
        host,
        hardware=replace(
            host.hardware,
            cpu=tuple(reversed(host.hardware.cpu)),
            memory=replace(host.hardware.memory, total_bytes=64 * GIB - 4096),
            disk=(replace(disk, path="/dev/nvme1n1"),),
        ),
        network=Network(interfaces=(replace(interface, speed_bits_per_second=10**9),)),
    )


SWAPS: dict[str, tuple[Callable[[Inventory], Inventory], list[tuple[str, str]]]] = {
    "driver": (
        with_new_driver,
        [
            ("changed", "gpu[GPU-5f0d].driver_version"),
            ("removed", "gpu_driver.compute_version"),
            ("changed", "gpu_driver.driver_version"),
        ],
    ),
    "disk": (with_other_disk, [("added", "disk[D2]"), ("removed", "disk[D1]")]),
    "interface": (with_second_interface, [("added", "interfaces[52:54:00:00:00:02]")]),
    "module": (with_moved_module, [("moved", "memory.modules[M1].slot")]),
}
"""What is done to a host, and the operations and paths that its diff has."""


def registration(node_id: str, inventory: Inventory = HOST, **more: object) -> Registration:
    return Registration(
        node_id=node_id,
        type=NodeType.PHYSICAL,
        inventory=inventory,
        **more,  # type: ignore[arg-type] # any of its fields
    )


def register_request(node_id: str, inventory: Inventory = HOST) -> pb.RegisterRequest:
    return codec.encode_registration(registration(node_id, inventory))
