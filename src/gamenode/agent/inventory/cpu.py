"""Processors, from sysfs and `lscpu`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gamenode.agent.inventory.hostfiles import entries, number, text
from gamenode.agent.inventory.programs import ProgramError, Run
from gamenode.domain.inventory import Cpu

_KIBIBYTE: Final = 1024
_UNITS: Final = {"": 1, "K": _KIBIBYTE, "M": _KIBIBYTE**2, "G": _KIBIBYTE**3}


def collect(root: Path, run: Run, machine: str) -> tuple[Cpu, ...]:
    """Return one entry a socket; `machine` is the architecture that programs here are made for.

    Which threads, cores and caches there are is the kernel's word; `lscpu` is asked for what it
    alone knows: the names of ARM processors, and counts where a kernel shows no topology.

    Raises:
        LookupError: neither of them shows any processor.
    """
    described = _lscpu(run)
    model = " + ".join(dict.fromkeys(described.get("Model name", ()))) or _model(root)
    architecture = _first(described, "Architecture") or machine or None
    sockets = _sockets(root)
    if not sockets:
        return _counted(described, model, architecture)
    return tuple(
        Cpu(
            model=model,
            cores=len({_core(thread) for thread in threads}),
            threads=len(threads),
            frequency_hertz=_frequency(threads) or _megahertz(_first(described, "CPU max MHz")),
            architecture=architecture,
            socket=socket,
            **_caches(threads),
        )
        for socket, threads in sockets.items()
    )


def glance(root: Path) -> object:
    """Return what differs when processors were added, removed or switched off."""
    return text(root / "sys/devices/system/cpu/online"), text(
        root / "sys/devices/system/cpu/kernel_max"
    )


def _sockets(root: Path) -> dict[int | None, list[Path]]:
    sockets: dict[int | None, list[Path]] = defaultdict(list)
    for thread in entries(root / "sys/devices/system/cpu"):
        if re.fullmatch(r"cpu\d+", thread.name) and (thread / "topology").is_dir():
            socket = number(thread / "topology/physical_package_id")
            # Some ARM kernels number a package that they do not know -1.
            sockets[socket if socket is not None and socket >= 0 else None].append(thread)
    return dict(sorted(sockets.items(), key=lambda entry: entry[0] or 0))


def _core(thread: Path) -> str:
    """Return what only the threads of one core share; core ids may repeat between dies."""
    topology = thread / "topology"
    return (
        text(topology / "core_cpus_list") or text(topology / "thread_siblings_list") or thread.name
    )


def _frequency(threads: Iterable[Path]) -> float | None:
    kilohertz = [number(thread / "cpufreq/cpuinfo_max_freq") for thread in threads]
    return max((float(it) * 1000 for it in kilohertz if it), default=None)


def _caches(threads: Sequence[Path]) -> dict[str, int]:
    instances: dict[tuple[int, str, str], int] = {}
    for thread in threads:
        for cache in entries(thread / "cache"):
            level, size_bytes = number(cache / "level"), _size_bytes(text(cache / "size"))
            if level is None or size_bytes is None:
                continue
            kind = text(cache / "type") or ""
            shared = text(cache / "shared_cpu_list") or thread.name
            instances[level, kind, shared] = size_bytes
    totals: dict[str, int] = defaultdict(int)
    for (level, kind, _), size_bytes in instances.items():
        name = {(1, "Data"): "l1d", (1, "Instruction"): "l1i"}.get((level, kind), f"l{level}")
        totals[f"{name}_cache_bytes"] += size_bytes
    caches: dict[str, int] = {
        name: totals[name]
        for name in ("l1d_cache_bytes", "l1i_cache_bytes", "l2_cache_bytes", "l3_cache_bytes")
        if name in totals
    }
    last = max((level for level, _, _ in instances), default=1)
    if last > 1:
        caches["cache_bytes"] = totals[f"l{last}_cache_bytes"]
    return caches


def _counted(
    described: Mapping[str, Sequence[str]], model: str | None, architecture: str | None
) -> tuple[Cpu, ...]:
    """Return what `lscpu` counts, where the kernel shows no topology."""
    sockets = _count(described, "Socket(s)") or 1
    cores = _count(described, "Core(s) per socket")
    threads = _count(described, "CPU(s)")
    if cores is None and threads is None:
        raise LookupError("neither sysfs nor lscpu shows a processor")
    return tuple(
        Cpu(
            model=model,
            cores=cores,
            threads=threads // sockets if threads is not None else None,
            frequency_hertz=_megahertz(_first(described, "CPU max MHz")),
            architecture=architecture,
            socket=socket,
        )
        for socket in range(sockets)
    )


def _lscpu(run: Run) -> dict[str, list[str]]:
    """Return what `lscpu` says, by field; a host with two kinds of cores has some fields twice."""
    try:
        printed = run("lscpu", "-J")
        tree = json.loads(printed) if printed else {}
    except (ProgramError, ValueError):
        # Its word is wanted for little; without it that little is absent, the rest is not.
        return {}
    fields: dict[str, list[str]] = defaultdict(list)
    for name, value in _fields(tree.get("lscpu", ())):
        if value not in {"", "-"}:
            fields[name].append(value)
    return fields


def _fields(nodes: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    # Since util-linux 2.39 fields lie below others as their children.
    for node in nodes:
        yield str(node.get("field", "")).rstrip(":"), str(node.get("data") or "").strip()
        yield from _fields(node.get("children") or ())


def _model(root: Path) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else None


def _first(described: Mapping[str, Sequence[str]], name: str) -> str | None:
    values = described.get(name, ())
    return values[0] if values else None


def _count(described: Mapping[str, Sequence[str]], name: str) -> int | None:
    value = _first(described, name)
    return int(value) if value and value.isdecimal() else None


def _megahertz(value: str | None) -> float | None:
    try:
        return float(value or "") * 1e6
    except ValueError:
        return None


def _size_bytes(size: str | None) -> int | None:
    match = re.fullmatch(r"(\d+)([KMG]?)", size or "")
    return int(match[1]) * _UNITS[match[2]] if match else None
