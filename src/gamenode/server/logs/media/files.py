"""Logs as plain files, one each. Everything here blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gamenode.domain.log import LogKey, folder_of, relative_path


class DamagedLogError(Exception):
    """A log's file is shorter than what was acknowledged."""

    def __init__(self, path: Path, found_bytes: int, stored_bytes: int) -> None:
        """Say which file, how long it is and how long it was."""
        super().__init__(
            f"{path} has {found_bytes} bytes, but {stored_bytes} were acknowledged: "
            "restore it from a backup; what it holds stays readable"
        )
        self.found_bytes = found_bytes


class LogFiles:
    """The files below one folder."""

    def __init__(self, root: Path) -> None:
        """Keep the logs below `root`."""
        self._root = root

    def open(self, key: LogKey, stored_bytes: int) -> LogFile:
        """Return the file to append to, cut to what was acknowledged (rule RG2).

        A log without a byte has no file yet.

        Raises:
            DamagedLogError: it is shorter. Nothing was changed.
            OSError: it cannot be opened.
        """
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if stored_bytes:
                raise DamagedLogError(path, 0, stored_bytes) from None
            return LogFile(path, None, 0)
        found = os.fstat(descriptor).st_size
        if found < stored_bytes:
            os.close(descriptor)
            raise DamagedLogError(path, found, stored_bytes)
        if found > stored_bytes:
            os.ftruncate(descriptor, stored_bytes)
        return LogFile(path, descriptor, stored_bytes)

    def reader(self, key: LogKey) -> LogReader:
        """Return the file to read from. It need not exist yet."""
        return LogReader(self._path(key))

    def remove(self, pipeline_id: str) -> None:
        """Remove every log of a pipeline. Safe to repeat.

        Raises:
            OSError: such as a disk that cannot be written to; some of it may be gone.
        """
        try:
            shutil.rmtree(self._root / folder_of(pipeline_id))
        except FileNotFoundError:
            return

    def _path(self, key: LogKey) -> Path:
        return self._root / f"{relative_path(key)}.log"


class LogFile:
    """One log's file, for its one writer."""

    def __init__(self, path: Path, descriptor: int | None, length_bytes: int) -> None:
        """Append to `descriptor`, which has `length_bytes`; None: the file is to be made."""
        self._path = path
        self._descriptor = descriptor
        self._length_bytes = length_bytes

    def append(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Write at the end; durable on return, the name in its folder included.

        Raises:
            OSError: such as a full disk. What was written is not counted; open it anew.
        """
        if self._descriptor is None:
            self._descriptor = _create(self._path)
        left = [memoryview(piece) for piece in pieces]
        while left:
            written = os.pwritev(self._descriptor, left, self._length_bytes)
            self._length_bytes += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
        os.fdatasync(self._descriptor)

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Return up to `length_bytes` from `offset` on."""
        if self._descriptor is None:
            return b""
        return os.pread(self._descriptor, length_bytes, offset)

    def close(self) -> None:
        """Let go of the file. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class LogReader:
    """One log's file, for one reader."""

    def __init__(self, path: Path) -> None:
        """Read `path`, opened when the first byte is wanted."""
        self._path = path
        self._descriptor: int | None = None

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Return `length_bytes` from `offset` on; less where the file is shorter.

        Raises:
            OSError: the file cannot be read.
        """
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
        return os.pread(self._descriptor, length_bytes, offset)

    def close(self) -> None:
        """Let go of the file. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _create(path: Path) -> int:
    """Create a file whose name outlives a power loss."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    for folder in [path.parent, *(made.parent for made in missing)]:
        entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
    return descriptor
