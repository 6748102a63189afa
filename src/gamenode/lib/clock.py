"""Time, as a thing that is handed in."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import NewType, Protocol

_log = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSettings:
    """When the host's clock is not to be believed."""

    jump_s_max: float = 5.0
    """A wall clock that parts from the monotonic one by more has jumped."""
    calm_s: float = 300.0
    """How long the two must go on together before deadlines are judged again."""


class ClockWatch:
    """Sees the wall clock jump: set by hand, corrected, or of a host that slept (rule RA6).

    Both clocks are corrected alike while they run, so nothing else lets them part. A jump is seen
    when somebody looks: who is about to act by the wall clock looks right before.
    """

    def __init__(self, clock: Clock, settings: ClockSettings) -> None:
        """Take it that the clocks agree now."""
        self._clock = clock
        self._settings = settings
        self._offset_s = self._offset_now_s()
        self._jump_s: float | None = None
        self._jumped_at_s = 0.0

    def jump_s(self) -> float | None:
        """Return by how many seconds the wall clock jumped lately, ahead or (negative) back.

        None once the clocks have gone on together for a while: it may be believed.
        """
        offset_s = self._offset_now_s()
        now_s = self._clock.monotonic_s()
        parted_s = offset_s - self._offset_s
        if abs(parted_s) > self._settings.jump_s_max:
            self._offset_s, self._jump_s, self._jumped_at_s = offset_s, parted_s, now_s
            _log.warning(
                "the wall clock jumped by %+.1f s: what goes by it waits until it is calm",
                parted_s,
                extra={"event": "clock.jumped"},
            )
        elif self._jump_s is not None and now_s - self._jumped_at_s >= self._settings.calm_s:
            self._jump_s = None
            _log.info("the wall clock is calm again", extra={"event": "clock.calm"})
        return self._jump_s

    def _offset_now_s(self) -> float:
        return self._clock.now() / NANOSECONDS_PER_S - self._clock.monotonic_s()


def after(moment: Instant, seconds: float) -> Instant:
    """Return the instant `seconds` after `moment`."""
    return Instant(moment + round(seconds * NANOSECONDS_PER_S))
