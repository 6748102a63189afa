"""What runs steps: one small interface, and an implementation for each kind of host.

A **run** is one start of one try at one step. Its key is that of its log, since a run has exactly
one log; where something has to be named after it (a container, a folder), the name is made of
pipeline, step, attempt and run.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from gamenode.domain.log import LogKey, LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.lib.clock import Instant

RunKey = LogKey

BLOCK_BYTES_MAX: Final = 1024 * 1024
"""The longest `LogBlock`."""

_SIGNALS: Final = frozenset(signal.Signals)
_HINTS: Final[Mapping[int, str]] = {
    126: ": a command could not be executed",
    127: ": a command was not found",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A run of which something may live."""

    started_at: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run of which nothing lives.

    Either `exit_code` or `signal` is set, and neither where the outcome is not known
    (`Reason.OUTCOME_UNKNOWN`) or it never came to run (`Reason.START_FAILED`).
    """

    exit_code: int | None = None
    signal: int | None = None
    reason: Reason
    message: str
    started_at: Instant
    ended_at: Instant

    @classmethod
    def by_code(cls, code: int, *, started_at: Instant, ended_at: Instant) -> Ended:
        """Return the end that `code` tells: by the shells' convention, 128 + n is signal n."""
        if code - 128 in _SIGNALS:
            number = code - 128
            return cls(
                signal=number,
                reason=Reason.SIGNAL,
                message=f"ended by signal {number} ({signal.Signals(number).name})",
                started_at=started_at,
                ended_at=ended_at,
            )
        return cls(
            exit_code=code,
            reason=Reason.EXIT_CODE if code else Reason.NONE,
            message=f"exit code {code}{_HINTS.get(code, '')}" if code else "",
            started_at=started_at,
            ended_at=ended_at,
        )


Found = Running | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBlock:
    """Bytes that a run printed, as they came, read together at `at`.

    The stream `GAMENODE` marks a text of the runtime's own: bytes before this place are gone.
    """

    stream: LogStream
    data: bytes
    at: Instant
    masked: tuple[tuple[int, int], ...] = ()
    """Parts of `data`, in order, that stand for secrets (rule RG3)."""


class StartError(Exception):
    """A run certainly did not start, and nothing of it lives."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Say why, for programs and for people."""
        super().__init__(message)
        self.reason = reason
        self.message = message


class Runtime(Protocol):
    """Starts runs and looks after them, across restarts of the agent.

    What it knows of a run is kept on the host, not in this object: another object over the same
    host finds, waits for, stops and reads every run that an earlier one started. Unknown runs
    (never started, or removed) are a `KeyError`, except for `find`, `stop` and `remove`. Waits
    may be cancelled at any await without an effect on the run.

    Source: F1, RA2, RI1, promises P1, P2, P11.
    """

    @property
    def name(self) -> str:
        """Return the name that configuration and people use."""

    def unsupported(self, container: ContainerSpec) -> tuple[str, ...]:
        """Return the keys of `container` that cannot be honoured here, in the file's words."""

    async def prepare(self, container: ContainerSpec) -> None:
        """Fetch what a start of `container` needs, as its pull policy says. May be cancelled.

        A start fetches what is missing all the same, but no cancel reaches it meanwhile (P11).

        Raises:
            StartError: it cannot be had.
        """

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Create and start `run`; return when it was started.

        A run starts at most once, ever: for one that was started before, also by another process
        or before a crash, nothing happens and the instant of that start is returned. `service`
        says that the run is to live on; only then is a restart policy honoured.

        Raises:
            StartError: it certainly did not start.
        """

    async def find(self, run: RunKey) -> Found | None:
        """Return what became of `run`; None if nothing was ever started for it.

        None means that it is safe to start it. A start that a crash cut off is an end with
        `Reason.OUTCOME_UNKNOWN`, unless it certainly had no effect.
        """

    async def wait(self, run: RunKey) -> Ended:
        """Wait until nothing of `run` lives, and return its end."""

    async def stop(self, run: RunKey, *, grace_s: float) -> None:
        """End `run`: its stop signal, after `grace_s` a kill of all that is left.

        Returns when nothing of it lives. Harmless for one that has ended or was never started.
        """

    def read_log(
        self, run: RunKey, position: LogPosition, *, live: asyncio.Event
    ) -> AsyncIterator[LogBlock]:
        """Return what `run` printed from `position` on, in blocks of at most 1 MiB.

        The order within a stream is exact. While `live` is set, what is printed comes within 5 ms;
        else within about a second, at next to no cost. Ends when the run has ended and everything
        was read.
        """

    async def remove(self, run: RunKey) -> None:
        """Forget an ended run: its container or folder, its log. Safe to repeat.

        Only for a run whose end was acknowledged: from here on nothing prevents another start.

        Raises:
            GameNodeError: CONFLICT while something of it lives; nothing was removed.
        """

    async def runs(self) -> Mapping[RunKey, Found]:
        """Return every run that was started here and not removed."""

    async def problem(self) -> str:
        """Return why nothing can be started here now; empty where it can."""

    async def close(self) -> None:
        """Let go of every run without ending any. Safe to repeat."""
