"""Every bound of the operators' commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CliSettings:
    """How long the commands wait, how often they ask, and how much they read."""

    connect_s: float = 10.0
    """For one connection to be made."""
    answer_s: float = 30.0
    """For an answer, beyond what the request itself asks the server to wait."""
    silence_s: float = 15.0
    """For the next bytes of a stream; after that it is opened again where it stood."""
    events_silence_s: float = 45.0
    """For the next sign of a stream of events, which gives one every 15 s."""
    away_s_max: float = 60.0
    """For a server that was there and has gone, such as one that restarts."""
    start_s_max: float = 3.0
    """For a server that was never reached, when something is to be started on it."""
    retry_s_first: float = 0.1
    retry_s_most: float = 2.0
    verify_s_max: float = 600.0
    """For the server to walk along a long audit log, or to ask every node what it holds."""
    poll_s_first: float = 0.1
    """Between two looks at a pipeline in which nothing moves; its end is answered at once."""
    poll_s_most: float = 1.0
    pull_said_s: float = 10.0
    """Between two words on how far an image has come."""
    watch_s: float = 2.0
    """Between two looks of `--watch`."""
    completion_s: float = 0.15
    """For the server to name what a word may be completed to."""
    completions_max: int = 200
    search_items_max: int = 10_000
    """Looked at for the one that a part of its name means."""
    candidates_max: int = 10
    """Named when what was written fits several things."""
    tail_lines: int = 10
    """Of the step that failed."""
    file_bytes_max: int = 1024 * 1024
    """Read from a file or from standard input into a request."""
    block_bytes: int = 256 * 1024
    """Read from a stream at once."""
    answer_bytes_max: int = 256 * 1024 * 1024
    """Of one answer that is no stream."""
