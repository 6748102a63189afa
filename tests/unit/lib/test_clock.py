"""The watch over the wall clock (rule RA6)."""

from __future__ import annotations

import logging

import pytest
from tests.support.time import FakeClock

from gamenode.lib.clock import ClockSettings, ClockWatch

SETTINGS = ClockSettings(jump_s_max=5.0, calm_s=60.0)


@pytest.mark.parametrize("jump_s", [5.5, -5.5, 86_400.0, -1_800_000_000.0])
def test_a_jump_is_seen_at_the_next_look_and_over_after_a_calm_time(jump_s: float) -> None:
    clock = FakeClock()
    watch = ClockWatch(clock, SETTINGS)
    clock.advance(1000.0)
    assert watch.jump_s() is None
    clock.jump(jump_s)
    assert watch.jump_s() == pytest.approx(jump_s, abs=0.001)
    clock.advance(59.9)
    assert watch.jump_s() == pytest.approx(jump_s, abs=0.001)
    clock.advance(0.2)
    assert watch.jump_s() is None


def test_a_jump_back_begins_the_calm_time_anew() -> None:
    clock = FakeClock()
    watch = ClockWatch(clock, SETTINGS)
    clock.jump(3600.0)
    assert watch.jump_s() == pytest.approx(3600.0)
    clock.advance(50.0)
    clock.jump(-3600.0)
    assert watch.jump_s() == pytest.approx(-3600.0)
    clock.advance(50.0)
    assert watch.jump_s() is not None
    clock.advance(11.0)
    assert watch.jump_s() is None


def test_small_steps_are_a_jump_once_they_come_to_one() -> None:
    clock = FakeClock()
    watch = ClockWatch(clock, SETTINGS)
    for _ in range(4):
        clock.jump(1.2)
        assert watch.jump_s() is None
    clock.jump(1.2)
    assert watch.jump_s() == pytest.approx(6.0)


def test_a_jump_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    watch = ClockWatch(clock, SETTINGS)
    clock.jump(-7.0)
    for _ in range(200):
        watch.jump_s()
        clock.advance(1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "-7.0 s" in caplog.records[0].getMessage()
