"""What steps print: which log, and how it is framed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


@dataclass(frozen=True, slots=True)
class LogKey:
    """Which log: of one start (`run`) of one try (`attempt`) at one step."""

    pipeline_id: str
    step: str
    attempt: int
    run: int = 1


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


CRI_PREFIX_BYTES: Final = 40
"""Length of `2026-11-24T21:58:21.123456789Z stdout F `; stdout and stderr have equal lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendAnswer:
    """Where a log goes on: the offset wanted next, and what lies behind it (rule RG1)."""

    next_offset: int
    position: LogPosition
    hash: bytes = b""
    """SHA-256 of every byte before `next_offset`; empty where it is not at hand."""
    stop: bool = False
    """Nothing of this log is wanted any more."""
    retry_after_s: float = 0.0
