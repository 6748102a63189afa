"""What this host is made of, as far as the operating system says it without root."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

from gamenode.domain.inventory import (
    Cpu,
    Hardware,
    Inventory,
    Kernel,
    Memory,
    OperatingSystem,
    Software,
)
from gamenode.domain.node import NodeType


def boot_id() -> str:
    """Return what names this boot of the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Without it a restart of the host cannot be told from one of the agent.
        return f"unknown-{platform.node()}"


def node_type() -> NodeType:
    """Return what kind of machine this is."""
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return NodeType.CONTAINER
    flags = _first(r"^flags\s*:\s*(.*)$", "/proc/cpuinfo") or ""
    return NodeType.VIRTUAL if "hypervisor" in flags.split() else NodeType.PHYSICAL


def collect() -> Inventory:
    """Return the inventory; what the host does not show is absent, never invented (B1)."""
    release = platform.freedesktop_os_release() if _has_os_release() else {}
    kernel = platform.release()
    numbers = [int(part) for part in re.findall(r"\d+", kernel.split("-")[0])[:3]]
    major, minor, patch = [*numbers, None, None, None][:3]
    return Inventory(
        hardware=Hardware(cpu=_cpus(), memory=Memory(total_bytes=_memory_bytes())),
        software=Software(
            os=OperatingSystem(
                distribution=release.get("ID") or platform.system().lower(),
                version=release.get("VERSION_ID") or release.get("BUILD_ID") or kernel,
                architecture=platform.machine(),
            ),
            kernel=Kernel(major=major, minor=minor, patch=patch, release=kernel),
        ),
    )


def has_docker(socket: Path) -> bool:
    """Return whether a container engine may be reached at `socket`."""
    return socket.is_socket() and os.access(socket, os.R_OK | os.W_OK)


def has_shell() -> bool:
    """Return whether plain processes can be run here."""
    return shutil.which("sh") is not None


def _cpus() -> tuple[Cpu, ...]:
    threads = os.cpu_count() or 1
    return (
        Cpu(
            model=_first(r"^model name\s*:\s*(.*)$", "/proc/cpuinfo"),
            cores=_cores() or threads,
            threads=threads,
            architecture=platform.machine(),
        ),
    )


def _cores() -> int | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    pairs = set(
        zip(
            re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE),
            re.findall(r"^core id\s*:\s*(\d+)", text, re.MULTILINE),
            strict=False,
        )
    )
    return len(pairs) or None


def _memory_bytes() -> int | None:
    kibibytes = _first(r"^MemTotal:\s*(\d+) kB$", "/proc/meminfo")
    return int(kibibytes) * 1024 if kibibytes else None


def _first(pattern: str, path: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


def _has_os_release() -> bool:
    return Path("/etc/os-release").exists() or Path("/usr/lib/os-release").exists()
