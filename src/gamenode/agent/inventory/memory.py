"""Memory, from the kernel's count and the firmware's tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gamenode.agent.inventory.hostfiles import text
from gamenode.agent.inventory.smbios import memory_modules
from gamenode.domain.inventory import Memory, MemoryModule

_TABLE: Final = "sys/firmware/dmi/tables/DMI"


def collect(root: Path) -> Memory:
    """Return the memory; its modules only to root, and only where the firmware describes them.

    Raises:
        LookupError: the kernel does not say how much there is.
        ValueError: the firmware's table is damaged.
    """
    total = re.search(r"^MemTotal:\s*(\d+) kB$", text(root / "proc/meminfo") or "", re.MULTILINE)
    if total is None:
        raise LookupError("/proc/meminfo has no MemTotal")
    modules = _modules(root / _TABLE)
    speeds = [it.frequency_hertz for it in modules if it.frequency_hertz is not None]
    channels = {it.channel for it in modules}
    types = {it.type for it in modules}
    return Memory(
        total_bytes=int(total[1]) * 1024,
        type=types.pop() if len(types) == 1 else None,
        # Modules of different speeds run at that of the slowest.
        frequency_hertz=min(speeds, default=None),
        channels=len(channels) if channels and None not in channels else None,
        modules=modules,
    )


def _modules(table: Path) -> tuple[MemoryModule, ...]:
    try:
        content = table.read_bytes()
    except OSError:
        return ()  # no such firmware, or not root
    return memory_modules(content)
