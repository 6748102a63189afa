"""The operating system and the kernel."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from gamenode.agent.inventory.hostfiles import text
from gamenode.domain.inventory import Kernel, OperatingSystem


def collect(root: Path, machine: str) -> tuple[OperatingSystem, Kernel]:
    """Return both; `machine` is the architecture that programs here are made for.

    Raises:
        LookupError: the kernel does not say what it is.
    """
    release = text(root / "proc/sys/kernel/osrelease")
    if release is None:
        raise LookupError("/proc/sys/kernel/osrelease says nothing")
    return _operating_system(root, release, machine), _kernel(release)


def _operating_system(root: Path, release: str, machine: str) -> OperatingSystem:
    values = _assignments(text(root / "etc/os-release") or text(root / "usr/lib/os-release") or "")
    version = next(
        (
            values[name]
            for name in ("VERSION_ID", "BUILD_ID", "VERSION_CODENAME")
            if values.get(name)
        ),
        None,
    )
    # A system that does not describe itself is a kernel with programs: Linux, of that version.
    return OperatingSystem(
        distribution=values.get("ID") or "linux",
        version=version or release,
        architecture=machine or None,
    )


def _kernel(release: str) -> Kernel:
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", release)
    major, minor, patch = (
        (int(it) if it is not None else None for it in match.groups())
        if match
        else (None, None, None)
    )
    return Kernel(major=major, minor=minor, patch=patch, release=release)


def _assignments(content: str) -> dict[str, str]:
    values = {}
    for line in content.splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith("#"):
            try:
                values[name] = "".join(shlex.split(value))
            except ValueError:
                continue  # an open quote: this line says nothing
    return values
