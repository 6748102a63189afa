"""What a node is made of. An absent value was not seen; it is never zero in its place (B1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A processor."""

    model: str | None = None
    cores: int | None = None
    threads: int | None = None
    frequency_hertz: float | None = None
    cache_bytes: int | None = None
    architecture: str | None = None
    socket: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModule:
    """A memory module."""

    slot: str | None = None
    size_bytes: int | None = None
    type: str | None = None
    frequency_hertz: float | None = None
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


def missing_to_register(inventory: Inventory) -> list[str]:
    """Return the paths of what a node must say of itself to register, and does not (A2)."""
    cpus, memory = inventory.hardware.cpu, inventory.hardware.memory
    system, kernel = inventory.software.os, inventory.software.kernel
    known = {
        "hardware.cpu": bool(cpus),
        "hardware.cpu.architecture": all(cpu.architecture for cpu in cpus),
        "hardware.cpu.cores": all(cpu.cores for cpu in cpus),
        "hardware.memory.total_bytes": bool(memory.total_bytes),
        "software.os.distribution": bool(system.distribution),
        "software.os.version": bool(system.version),
        "software.kernel": kernel.major is not None or bool(kernel.release),
    }
    return [path for path, is_known in known.items() if not is_known]
