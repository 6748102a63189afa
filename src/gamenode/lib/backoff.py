"""How long to wait before trying again."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits that double from `first_s` to `most_s`, each shortened at random by `jitter_ratio`."""

    first_s: float
    most_s: float
    jitter_ratio: float = 0.5

    def delay_s(self, failures: int, random: Random) -> float:
        """Return the wait after the `failures`-th failure in a row, counted from 1."""
        whole = min(self.most_s, self.first_s * 2.0 ** min(failures - 1, 30))
        return whole * (1.0 - self.jitter_ratio * random.random())
