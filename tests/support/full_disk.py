"""A small disk of a test's own, which it fills and frees."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, size_bytes: int) -> Iterator[Path]:
    """Make `folder` a real file system with room for `size_bytes`."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a disk")
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size_bytes}", "gamenode-test", folder],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip("this host does not let root mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path: Path, *, leave_bytes: int = 0) -> None:
    """Let a file take all the room of its disk but `leave_bytes`."""
    with path.open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
    if leave_bytes:
        os.truncate(path, path.stat().st_size - leave_bytes)
