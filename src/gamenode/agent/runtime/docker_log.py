"""A container's log as an engine gives it: its framing, and where to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gamenode.agent.runtime.docker_engine import EngineFacts
from gamenode.domain.log import LogStream

_FRAME_HEADER_BYTES: Final = 8
_STREAMS: Final = {1: LogStream.STDOUT, 2: LogStream.STDERR}
_FILES: Final = 4


def log_config(facts: EngineFacts, log_bytes_max: int) -> Mapping[str, Any] | None:
    """Return how an engine is told to keep a log so that every byte comes back.

    None where it has no such way: then it does what it is configured for. Docker's `local` and
    Podman's `k8s-file` keep what was printed; others, `json-file` too, change bytes that are no
    UTF-8.
    """
    if facts.podman is not None:
        if "k8s-file" not in facts.log_drivers:
            return None
        return {"Type": "k8s-file", "Config": {"max-size": str(log_bytes_max)}}
    if "local" not in facts.log_drivers:
        return None
    size = {"max-size": str(log_bytes_max // _FILES), "max-file": str(_FILES)}
    return {"Type": "local", "Config": size}


class Frames:
    """Takes the engine's framing apart: stream, three zeros, length, bytes."""

    def __init__(self) -> None:
        """Begin with the first byte of a log."""
        self._rest = b""

    def blocks(self, chunk: bytes) -> list[tuple[LogStream, bytes]]:
        """Return what is whole by `chunk`, the frames of a stream joined."""
        buffer = self._rest + chunk
        start = 0
        pieces: dict[LogStream, list[bytes]] = {stream: [] for stream in _STREAMS.values()}
        while len(buffer) - start >= _FRAME_HEADER_BYTES:
            end = start + _FRAME_HEADER_BYTES + int.from_bytes(buffer[start + 4 : start + 8])
            if end > len(buffer):
                break
            pieces[_STREAMS[buffer[start]]].append(buffer[start + _FRAME_HEADER_BYTES : end])
            start = end
        self._rest = buffer[start:]
        return [(stream, b"".join(parts)) for stream, parts in pieces.items() if parts]


class Skip:
    """Drops what was read before: whole lines by count, then the begun line's bytes (RG1)."""

    def __init__(self, lines: int, size_bytes: int) -> None:
        """Drop so many whole lines and bytes, the lines' included."""
        self._lines = self._read_lines = lines
        self._bytes = self._read_bytes = size_bytes

    @property
    def missing(self) -> bool:
        """Whether the source was shorter than what is to be dropped."""
        return self._lines > 0 or self._bytes > 0

    def again(self) -> None:
        """Begin at the start of the source once more."""
        self._lines, self._bytes = self._read_lines, self._read_bytes

    def rest(self, data: bytes) -> bytes:
        """Return what of `data`, the next of the source, was not read before."""
        if self._lines and (ends := data.count(b"\n")) < self._lines:
            self._lines -= ends
            self._bytes -= len(data)
            return b""
        end = 0
        for _ in range(self._lines):
            end = data.index(b"\n", end) + 1
        self._lines = 0
        self._bytes -= end
        begun = min(max(self._bytes, 0), len(data) - end)
        self._bytes -= begun
        new = data[end + begun :]
        self._read_lines += new.count(b"\n")
        self._read_bytes += len(new)
        return new
