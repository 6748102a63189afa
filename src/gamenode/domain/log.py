"""What steps print: which log, and how it is framed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gamenode.domain.errors import invalid


@dataclass(frozen=True, slots=True)
class LogKey:
    """Which log: of one start (`run`) of one try (`attempt`) at one step."""

    pipeline_id: str
    step: str
    attempt: int
    run: int = 1


_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def relative_path(key: LogKey) -> str:
    """Return where a log lies below a folder of logs: `<2>/<pipeline>/<step>.<attempt>.<run>`.

    The first part spreads the folders; it is the id's last two characters, since the first ones of
    a UUIDv7 stay the same for years.

    Raises:
        GameNodeError: INVALID_REQUEST, for names that are none; they come from outside.
    """
    folder = folder_of(key.pipeline_id)
    if not _SAFE_NAME.fullmatch(key.step):
        raise invalid("step", f"{key.step!r} is not a step's name")
    if key.attempt < 1 or key.run < 1:
        raise invalid("attempt", "attempts and runs count from 1")
    return f"{folder}/{key.step}.{key.attempt}.{key.run}"


def folder_of(pipeline_id: str) -> str:
    """Return where the logs of a pipeline lie: `<2>/<pipeline>`.

    Raises:
        GameNodeError: INVALID_REQUEST, for what is no id.
    """
    if not _SAFE_NAME.fullmatch(pipeline_id):
        raise invalid("pipeline_id", f"{pipeline_id!r} is not an id")
    return f"{pipeline_id[-2:]}/{pipeline_id}"


class LogStream(StrEnum):
    """Where a line came from; `GAMENODE` marks a record about the log itself, such as a gap."""

    STDOUT = "stdout"
    STDERR = "stderr"
    GAMENODE = "gamenode"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPosition:
    """How far a step's two streams had been read when a chunk of its log ended."""

    stdout_bytes: int = 0
    stdout_lines: int = 0
    stderr_bytes: int = 0
    stderr_lines: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a log. `text` has no newline; `partial`: the step had not ended the line."""

    at_ns: int
    stream: LogStream
    partial: bool
    text: bytes
    offset: int
    next_offset: int


@dataclass(frozen=True, slots=True)
class LogSlice:
    """Whole lines of a log, as they are stored, from `offset` to `next_offset`."""

    offset: int
    data: bytes

    @property
    def next_offset(self) -> int:
        """Where the line after these begins."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendAnswer:
    """The server's answer to a chunk (rule RG1): where to go on, and what stands before that."""

    next_offset: int
    position: LogPosition
    hash: bytes
    """SHA-256 of all bytes before `next_offset`."""
    stop: bool = False
    """Nothing more of this log is wanted."""
    retry_after_s: float = 0.0
    """How long to wait before the next chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLog:
    """A log as the server keeps it."""

    node_id: str
    """Whose log it is."""
    length_bytes: int
    """How much is stored, durably."""
    position: LogPosition
    final_length_bytes: int | None = None
    """How long it will be in all; None: not known."""
    final_hash: bytes = b""
    """SHA-256 of the whole log, by the node's word; empty: not known."""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.final_length_bytes == self.length_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    """What a node knows of a log whose step has ended (rule RA4)."""

    length_bytes: int | None
    """The whole log's length; None while not all output has been read."""
    hash: bytes
    """SHA-256 of the whole log; empty while not known."""
    complete: bool
    """Whether the server has it all."""


CRI_PREFIX_BYTES: Final = 40
"""Length of `2026-11-24T21:58:21.123456789Z stdout F `; stdout and stderr have equal lengths."""
