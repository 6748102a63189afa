"""Identifiers that nobody else makes."""

from __future__ import annotations

from uuid import UUID

from tests.support.time import FakeClock

from gamenode.lib.ids import UuidV7


def test_ids_are_of_version_7_and_differ() -> None:
    ids = UuidV7(FakeClock())
    made = [ids.new() for _ in range(1_000)]
    assert len(set(made)) == len(made)
    assert {UUID(one).version for one in made} == {7}
    assert {UUID(one).variant for one in made} == {"specified in RFC 4122"}


def test_later_ids_sort_behind_earlier_ones() -> None:
    clock = FakeClock()
    ids = UuidV7(clock)
    made = []
    for _ in range(50):
        made.append(ids.new())
        clock.advance(0.001)
    assert made == sorted(made)


def test_an_id_tells_the_millisecond_it_was_made_in() -> None:
    clock = FakeClock()
    assert UUID(UuidV7(clock).new()).int >> 80 == clock.now() // 1_000_000
