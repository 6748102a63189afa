"""Made-up hosts: plausible to look at, each with serial numbers and addresses of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from gamenode.domain.inventory import (
    Collection,
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
    content_hash,
)
from gamenode.lib.clock import Clock, Instant, after

_GIB: Final = 1024**3


class SkewedClock:
    """A clock whose wall time is off by a fixed amount."""

    def __init__(self, clock: Clock, offset_s: float) -> None:
        """Be `offset_s` ahead of `clock`."""
        self._clock = clock
        self._offset_s = offset_s

    def now(self) -> Instant:
        """Return the moment that this host takes it for."""
        return after(self._clock.now(), self._offset_s)

    def monotonic_s(self) -> float:
        """Return seconds on a clock that never goes back."""
        return self._clock.monotonic_s()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A kind of machine: what all of its hosts have in common."""

    cpu: Cpu
    sockets: int
    module: MemoryModule
    modules: int
    gpu: Gpu
    gpus: int
    disk: Disk
    interface: NetworkInterface
    software: Software


_SOFTWARE: Final = Software(
    os=OperatingSystem(distribution="ubuntu", version="24.04", architecture="x86_64"),
    kernel=Kernel(major=6, minor=8, patch=0, release="6.8.0-57-generic"),
    gpu_driver=GpuDriver(driver_version="550.144.03", compute_version="12.4"),
    runtimes=Runtimes(docker="27.5.1", containerd="1.7.25", runc="1.2.4"),
)
_MODELS: Final = (
    _Model(
        cpu=Cpu(
            model="AMD Ryzen 9 7950X 16-Core Processor",
            cores=16,
            threads=32,
            frequency_hertz=5.88e9,
            cache_bytes=64 * 1024**2,
            architecture="x86_64",
        ),
        sockets=1,
        module=MemoryModule(size_bytes=32 * _GIB, type="DDR5", frequency_hertz=4.8e9),
        modules=4,
        gpu=Gpu(
            model="NVIDIA GeForce RTX 4090",
            memory_bytes=24 * _GIB,
            driver_version="550.144.03",
            compute_capability="8.9",
            power_watts=450.0,
            vendor="NVIDIA",
        ),
        gpus=1,
        disk=Disk(
            model="Samsung SSD 990 PRO 2TB",
            capacity_bytes=2_000_398_934_016,
            type="ssd",
            interface="nvme",
        ),
        interface=NetworkInterface(driver="igc", speed_bits_per_second=2_500_000_000),
        software=_SOFTWARE,
    ),
    _Model(
        cpu=Cpu(
            model="Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz",
            cores=32,
            threads=64,
            frequency_hertz=3.2e9,
            cache_bytes=48 * 1024**2,
            architecture="x86_64",
        ),
        sockets=2,
        module=MemoryModule(size_bytes=64 * _GIB, type="DDR4", frequency_hertz=3.2e9),
        modules=8,
        gpu=Gpu(
            model="NVIDIA A10",
            memory_bytes=24 * _GIB,
            driver_version="550.144.03",
            compute_capability="8.6",
            power_watts=150.0,
            vendor="NVIDIA",
        ),
        gpus=4,
        disk=Disk(
            model="INTEL SSDPE2KX040T8",
            capacity_bytes=4_000_787_030_016,
            type="ssd",
            interface="nvme",
        ),
        interface=NetworkInterface(driver="i40e", speed_bits_per_second=25_000_000_000),
        software=_SOFTWARE,
    ),
)


class MadeUpHost:
    """What the agent of a simulated node finds when it looks at its host. It never changes."""

    def __init__(self, number: int, clock: Clock) -> None:
        """Be host `number`: the same number is the same host."""
        self._number = number
        self._clock = clock

    async def collect(self) -> Collection:
        """Return what the host is made of."""
        inventory = inventory_of(self._number)
        return Collection(
            inventory=inventory, collected_at=self._clock.now(), hash=content_hash(inventory)
        )

    async def may_have_changed(self) -> bool:
        """Return that nothing has changed."""
        return False


def inventory_of(number: int) -> Inventory:
    """Return what host `number` is made of."""
    model = _MODELS[number % len(_MODELS)]
    serial = f"{number:08d}"
    return Inventory(
        hardware=Hardware(
            cpu=tuple(replace(model.cpu, socket=socket) for socket in range(model.sockets)),
            memory=Memory(
                total_bytes=(model.module.size_bytes or 0) * model.modules,
                type=model.module.type,
                frequency_hertz=model.module.frequency_hertz,
                channels=model.modules,
                modules=tuple(
                    replace(model.module, slot=f"DIMM_{slot}", serial=f"{serial}{slot:02d}")
                    for slot in range(model.modules)
                ),
            ),
            gpu=tuple(
                replace(
                    model.gpu,
                    uuid=f"GPU-{number:08x}-0000-4000-8000-{gpu:012x}",
                    pci_address=f"0000:{gpu + 1:02x}:00.0",
                )
                for gpu in range(model.gpus)
            ),
            disk=(replace(model.disk, path="/dev/nvme0n1", serial=f"S{serial}", mounts=("/",)),),
        ),
        software=model.software,
        network=Network(
            interfaces=(
                replace(
                    model.interface,
                    name="eth0",
                    # 02: an address that its owner made up.
                    mac="02:00:" + ":".join(f"{byte:02x}" for byte in number.to_bytes(4, "big")),
                    virtual=False,
                ),
            )
        ),
    )
