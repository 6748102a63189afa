from __future__ import annotations

from tests.support.time import START_AT, FakeClock

from gamenode.domain.inventory import content_hash
from gamenode.domain.node import NodeType
from gamenode.domain.registration import refusal
from gamenode.sim.host import SkewedClock, inventory_of


def test_a_made_up_host_may_register_and_is_always_the_same() -> None:
    for number in (1, 2):
        assert refusal(inventory_of(number), NodeType.PHYSICAL, (), retry_after_s=1.0) is None
    assert content_hash(inventory_of(7)) == content_hash(inventory_of(7))


def test_no_two_made_up_hosts_are_the_same() -> None:
    assert len({content_hash(inventory_of(number)) for number in range(1, 101)}) == 100


def test_a_skewed_clock_is_off_by_the_same_amount_while_time_passes() -> None:
    right = FakeClock()
    wrong = SkewedClock(right, -90.0)
    right.advance(5.0)
    assert wrong.now() - START_AT == -85_000_000_000
    assert wrong.monotonic_s() == right.monotonic_s()
