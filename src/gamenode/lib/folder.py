"""A folder that one process has for itself."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderError(Exception):
    """A folder that cannot be had; the message names it and says why."""


def hold_folder(folder: Path) -> int:
    """Make `folder` where it is missing, and hold it for this process alone.

    Returns the descriptor that holds it; closing it, or the end of the process, lets go. Children
    do not inherit it.

    Raises:
        FolderError: another process holds it, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FolderError(f"the folder {folder} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise FolderError(f"another process uses the folder {folder}") from error
        raise FolderError(f"the folder {folder} cannot be locked: {error.strerror}") from error
    return descriptor
