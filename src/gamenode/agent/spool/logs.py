"""Logs on their way to the server: what is framed and not yet acknowledged, in files.

Nothing here is fsynced. A power loss may take the end of a spool; the server's answer and the
step's own output, which is read again, make up for it (rule RG1).
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_right
from pathlib import Path
from threading import Lock

from gamenode.domain.log import LogKey, relative_path

_SEGMENT_DIGITS = 20


class LogSpool:
    """The spooled logs below one folder. Its methods block."""

    def __init__(self, root: Path, *, segment_bytes: int = 4 * 1024 * 1024) -> None:
        """Keep logs below `root`, each in files of about `segment_bytes`."""
        self._root = root
        self._segment_bytes = segment_bytes

    def create(self, key: LogKey) -> SpooledLog:
        """Return an empty log, for one that cannot have files yet. Touches no disk."""
        return SpooledLog(self._root / relative_path(key), self._segment_bytes, [], 0)

    def open(self, key: LogKey) -> SpooledLog:
        """Return a log as its files stand, up to the first gap between them."""
        folder = self._root / relative_path(key)
        starts: list[int] = []
        end = 0
        for path in sorted(folder.glob("[0-9]" * _SEGMENT_DIGITS)):
            start = int(path.name)
            if starts and start != end:
                path.unlink()
                continue
            starts.append(start)
            end = start + path.stat().st_size
        return SpooledLog(folder, self._segment_bytes, starts, end)


class SpooledLog:
    """The bytes of one log from `begin` to `end`, positions as the server counts them.

    A log is a row of files that are named after the position of their first byte, so that what the
    server has can go, file by file. One thread may append while another reads and trims.
    """

    def __init__(self, folder: Path, segment_bytes: int, starts: list[int], end: int) -> None:
        """Hold the files in `folder` that begin at `starts`, the last of which ends at `end`."""
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._starts = starts
        self._end = end
        self._lock = Lock()
        self._descriptor: int | None = None

    @property
    def begin(self) -> int:
        """The position of the first byte that is held."""
        with self._lock:
            return self._starts[0] if self._starts else self._end

    @property
    def end(self) -> int:
        """The position behind the last byte."""
        return self._end

    @property
    def found(self) -> bool:
        """Whether there is any file."""
        return bool(self._starts)

    def append(self, framed: bytes) -> None:
        """Add bytes at the end.

        Raises:
            OSError: such as a full disk; nothing was added.
        """
        descriptor = self._writable()
        start = self._starts[-1]
        try:
            written = 0
            view = memoryview(framed)
            while written < len(framed):
                written += os.pwrite(descriptor, view[written:], self._end - start + written)
        except OSError:
            os.ftruncate(descriptor, self._end - start)
            raise
        self._end += len(framed)

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Return `length_bytes` from `offset` on, which must be held."""
        pieces: list[bytes] = []
        stop = offset + length_bytes
        while offset < stop:
            with self._lock:
                at = bisect_right(self._starts, offset)
                start = self._starts[at - 1]
                until = self._starts[at] if at < len(self._starts) else self._end
            with self._path(start).open("rb", buffering=0) as segment:
                piece = os.pread(segment.fileno(), min(stop, until) - offset, offset - start)
            if not piece:
                raise EOFError(f"{self._path(start)} is shorter than what was written")
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def trim(self, before: int) -> None:
        """Remove the files that hold nothing from `before` on; never the last."""
        while True:
            with self._lock:
                if len(self._starts) < 2 or self._starts[1] > before:  # noqa: PLR2004 - first, next
                    return
                gone = self._starts.pop(0)
            self._path(gone).unlink(missing_ok=True)

    def cut(self, end: int) -> None:
        """Drop what stands behind `end`."""
        self._close_segment()
        while self._starts and self._starts[-1] >= end:
            self._path(self._starts.pop()).unlink(missing_ok=True)
        if self._starts:
            os.truncate(self._path(self._starts[-1]), end - self._starts[-1])
        self._end = end

    def restart(self, offset: int) -> None:
        """Drop everything; the next byte appended stands at `offset`."""
        self.cut(0)
        self._end = offset

    def remove(self) -> None:
        """Drop everything, the folder included."""
        self.restart(0)
        if not self._folder.exists():
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        for parent in (self._folder.parent, self._folder.parent.parent):
            try:
                parent.rmdir()
            except OSError:
                return  # another log lies there

    def close(self) -> None:
        """Let go of the files; what is held stays."""
        self._close_segment()

    def _writable(self) -> int:
        full = not self._starts or self._end - self._starts[-1] >= self._segment_bytes
        if full:
            self._close_segment()
        if self._descriptor is None:
            start = self._end if full else self._starts[-1]
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if full else 0)
            self._descriptor = os.open(self._path(start), flags, 0o600)
            if full:
                with self._lock:
                    self._starts.append(start)
        return self._descriptor

    def _close_segment(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:0{_SEGMENT_DIGITS}d}"
