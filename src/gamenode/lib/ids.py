"""New identifiers, as a thing that is handed in."""

from __future__ import annotations

import os
from typing import Protocol
from uuid import UUID

from gamenode.lib.clock import Clock


class Ids(Protocol):
    """Makes identifiers that nobody else makes."""

    def new(self) -> str:
        """Return a new UUIDv7 as text; later ones sort after earlier ones, by the millisecond."""


class UuidV7:
    """UUIDv7 (RFC 9562, section 5.7): 48 bits of milliseconds, then randomness."""

    def __init__(self, clock: Clock) -> None:
        """Take the time from `clock`, the rest from the host's random source."""
        self._clock = clock

    def new(self) -> str:
        """Return a new UUIDv7 as text."""
        milliseconds = self._clock.now() // 1_000_000
        raw = bytearray(milliseconds.to_bytes(6, "big") + os.urandom(10))
        raw[6] = raw[6] & 0x0F | 0x70
        raw[8] = raw[8] & 0x3F | 0x80
        return str(UUID(bytes=bytes(raw)))
