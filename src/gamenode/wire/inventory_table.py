"""Inventories as rows of a table, for CSV: one row a node, what a node has several of in one cell.

A cell is empty where nothing was reported; a number in it is one that the node gave, or a sum of
such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from gamenode.domain.inventory import Inventory, InventoryVersion
from gamenode.wire.http import encode_time

Cell = str | int | float | None

_SEPARATOR: Final = "; "
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def _together(values: Iterable[str | None]) -> str | None:
    return _SEPARATOR.join(dict.fromkeys(value for value in values if value)) or None


def _sum(values: Iterable[int | None]) -> int | None:
    present = [value for value in values if value is not None]
    return sum(present) if present else None


def _count(parts: Sequence[object]) -> int | None:
    return len(parts) or None


def _kernel(inventory: Inventory) -> str | None:
    kernel = inventory.software.kernel
    numbers = [
        str(number) for number in (kernel.major, kernel.minor, kernel.patch) if number is not None
    ]
    return kernel.release or ".".join(numbers) or None


_OF_INVENTORY: Final[Mapping[str, Callable[[Inventory], Cell]]] = {
    "cpu_model": lambda it: _together(cpu.model for cpu in it.hardware.cpu),
    "cpu_sockets": lambda it: _count(it.hardware.cpu),
    "cpu_cores": lambda it: _sum(cpu.cores for cpu in it.hardware.cpu),
    "cpu_threads": lambda it: _sum(cpu.threads for cpu in it.hardware.cpu),
    "cpu_architecture": lambda it: _together(cpu.architecture for cpu in it.hardware.cpu),
    "memory_total_bytes": lambda it: it.hardware.memory.total_bytes,
    "memory_type": lambda it: it.hardware.memory.type,
    "memory_modules": lambda it: _count(it.hardware.memory.modules),
    "gpu_count": lambda it: _count(it.hardware.gpu),
    "gpu_model": lambda it: _together(gpu.model for gpu in it.hardware.gpu),
    "gpu_memory_bytes": lambda it: _sum(gpu.memory_bytes for gpu in it.hardware.gpu),
    "gpu_driver_version": lambda it: it.software.gpu_driver.driver_version,
    "compute_version": lambda it: it.software.gpu_driver.compute_version,
    "gpu_uuid": lambda it: _together(gpu.uuid for gpu in it.hardware.gpu),
    "disk_count": lambda it: _count(it.hardware.disk),
    "disk_capacity_bytes": lambda it: _sum(disk.capacity_bytes for disk in it.hardware.disk),
    "disk_model": lambda it: _together(disk.model for disk in it.hardware.disk),
    "disk_serial": lambda it: _together(disk.serial for disk in it.hardware.disk),
    "os_distribution": lambda it: it.software.os.distribution,
    "os_version": lambda it: it.software.os.version,
    "kernel": _kernel,
    "docker": lambda it: it.software.runtimes.docker,
    "containerd": lambda it: it.software.runtimes.containerd,
    "runc": lambda it: it.software.runtimes.runc,
    "interfaces": lambda it: _together(one.name for one in it.network.interfaces),
    "mac": lambda it: _together(one.mac for one in it.network.interfaces),
    "addresses": lambda it: _together(
        address for one in it.network.interfaces for address in one.addresses
    ),
}

HEADINGS: Final = ("node_id", "version", "collected_at", *_OF_INVENTORY, "failed")
"""The first row."""


def row_of(version: InventoryVersion) -> Sequence[Cell]:
    """Return a node's row, in the order of `HEADINGS`."""
    return (
        version.node_id,
        version.version,
        encode_time(version.collected_at),
        *(_harmless(cell(version.inventory)) for cell in _OF_INVENTORY.values()),
        _together(failure.part for failure in version.failed),
    )


def _harmless(cell: Cell) -> Cell:
    # A spreadsheet would take a host's text for a formula.
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"'{cell}"
    return cell
