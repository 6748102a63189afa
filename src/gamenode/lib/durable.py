"""Files that are whole or not there, whenever the power fails."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read (mode 0600); on disk on return.

    It takes the place of one that is there. Blocks.

    Raises:
        OSError: such as a full disk; what stood at `path` still does.
    """
    with NamedTemporaryFile("wb", dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring to disk which files a folder holds. Blocks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
