"""Waits that double."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from gamenode.lib.backoff import Backoff

BACKOFF = Backoff(first_s=0.2, most_s=5.0)


@given(st.integers(1, 10_000), st.integers())
def test_a_wait_is_within_its_bounds_however_many_failures(failures: int, seed: int) -> None:
    delay_s = BACKOFF.delay_s(failures, Random(seed))
    whole_s = min(5.0, 0.2 * 2.0 ** min(failures - 1, 10))
    assert whole_s / 2 <= delay_s <= whole_s


def test_without_jitter_it_doubles() -> None:
    backoff = Backoff(first_s=1.0, most_s=5.0, jitter_ratio=0.0)
    delays = [backoff.delay_s(failures, Random(1)) for failures in range(1, 6)]
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]
