"""What the kernel shows in files. What is not there, or may not be read, is absent."""

from __future__ import annotations

from pathlib import Path


def text(path: Path) -> str | None:
    """Return what a file says, without the blanks around it; None where it says nothing."""
    try:
        return path.read_text(errors="replace").strip(" \t\r\n\0") or None
    except OSError:
        # Not there, not ours to read, or a device that does not answer: sysfs reports all of
        # these so, and none of them is a fault of the host.
        return None


def number(path: Path, base: int = 10) -> int | None:
    """Return the number that a file holds."""
    try:
        return int(text(path) or "", base)
    except ValueError:
        return None


def target_name(path: Path) -> str | None:
    """Return the last part of what a link points to, which is how sysfs names drivers."""
    try:
        return path.readlink().name
    except OSError:
        return None


def entries(folder: Path) -> tuple[Path, ...]:
    """Return what is in a folder, by name; nothing where there is none."""
    try:
        return tuple(sorted(folder.iterdir()))
    except OSError:
        return ()
