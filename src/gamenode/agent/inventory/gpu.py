"""GPUs: NVIDIA's through its library, AMD's and Intel's from sysfs, with what they show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from gamenode.agent.inventory.hostfiles import entries, number, target_name, text
from gamenode.domain.inventory import Gpu, GpuDriver

_DISPLAY_CLASS: Final = 0x03
_NVIDIA: Final = 0x10DE
_VENDORS: Final = {0x1002: "AMD", _NVIDIA: "NVIDIA", 0x8086: "Intel"}
_NAMES: Final = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids")
_GIVEN_AWAY: Final = "vfio-pci"
"""The driver of a device that belongs to a guest of this host."""


Seen = tuple[tuple[Gpu, ...], GpuDriver]


def collect(root: Path, nvidia: Callable[[], Seen | None]) -> Seen:
    """Return the GPUs that this host can use, and their driver.

    Display controllers of other makers, such as a server's management chip, are no GPUs.
    """
    known = nvidia() if _may_have_nvidia(root) else None
    gpus = list(known[0]) if known is not None else []
    described = {gpu.pci_address for gpu in gpus}
    gpus += [_gpu(root, device) for device in _controllers(root) if device.name not in described]
    if known is not None:
        return tuple(gpus), known[1]
    version = next((gpu.driver_version for gpu in gpus if gpu.driver_version), None)
    rocm = text(root / "opt/rocm/.info/version") if gpus else None
    return tuple(gpus), GpuDriver(driver_version=version, compute_version=rocm)


def glance(root: Path) -> object:
    """Return what differs when a GPU or its driver was exchanged."""
    controllers = tuple(
        (device.name, target_name(device / "driver")) for device in _controllers(root)
    )
    return (
        controllers,
        text(root / "proc/driver/nvidia/version"),
        text(root / "opt/rocm/.info/version"),
    )


def _may_have_nvidia(root: Path) -> bool:
    # Under WSL a card is no PCI device of the guest, and its library is there all the same.
    return (root / "dev/dxg").exists() or any(
        number(device / "vendor", 16) == _NVIDIA for device in _controllers(root)
    )


def _controllers(root: Path) -> Iterator[Path]:
    for device in entries(root / "sys/bus/pci/devices"):
        kind = number(device / "class", 16)
        if (
            kind is not None
            and kind >> 16 == _DISPLAY_CLASS
            and number(device / "vendor", 16) in _VENDORS
            and target_name(device / "driver") != _GIVEN_AWAY
        ):
            yield device


def _gpu(root: Path, device: Path) -> Gpu:
    vendor, product = number(device / "vendor", 16) or 0, number(device / "device", 16) or 0
    driver = target_name(device / "driver")
    microwatts = next(
        filter(None, (number(it / "power1_cap") for it in entries(device / "hwmon"))), None
    )
    return Gpu(
        vendor=_VENDORS[vendor],
        model=text(device / "product_name") or _name(root, vendor, product),
        memory_bytes=number(device / "mem_info_vram_total"),
        # Drivers that are part of the kernel have no version of their own.
        driver_version=text(root / "sys/module" / driver / "version") if driver else None,
        power_watts=microwatts / 1e6 if microwatts is not None else None,
        uuid=text(device / "unique_id"),
        pci_address=device.name,
    )


def _name(root: Path, vendor: int, product: int) -> str | None:
    """Return the name that the host's list of PCI devices has for one."""
    for path in _NAMES:
        listed = text(root / path)
        if listed is None:
            continue
        block = re.search(rf"^{vendor:04x}  .*\n((?:[\t#].*\n|\n)*)", listed + "\n", re.MULTILINE)
        match = block and re.search(rf"^\t{product:04x}  (.+)$", block[1], re.MULTILINE)
        if match:
            return match[1].strip()
    return None
