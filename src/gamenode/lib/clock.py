"""Time, as a thing that is handed in."""

from __future__ import annotations

import time
from typing import NewType, Protocol

Instant = NewType("Instant", int)
"""A moment: integer nanoseconds since 1970 UTC."""

NANOSECONDS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Tells the time. Waits are measured with `monotonic_s`, never by subtracting instants."""

    def now(self) -> Instant:
        """Return the moment it is, by the host's wall clock."""

    def monotonic_s(self) -> float:
        """Return seconds on a clock that never goes back; only differences mean something."""


class SystemClock:
    """The host's own clocks."""

    def now(self) -> Instant:
        """Return the moment it is."""
        return Instant(time.time_ns())

    def monotonic_s(self) -> float:
        """Return the host's monotonic time, in seconds."""
        return time.monotonic()


def after(moment: Instant, seconds: float) -> Instant:
    """Return the instant `seconds` after `moment`."""
    return Instant(moment + round(seconds * NANOSECONDS_PER_S))
