"""What an agent sees of its host's clock (rule RA6)."""

from __future__ import annotations

from pathlib import Path

from tests.support.time import FakeClock

from gamenode.agent.conditions import ConditionSettings, HostConditions
from gamenode.agent.runtime.fake import FakeHost, FakeRuntime
from gamenode.domain.node import OF_THE_AGENT, ConditionType
from gamenode.lib.clock import ClockSettings, ClockWatch


async def test_a_clock_that_jumped_is_a_condition_until_it_is_calm(tmp_path: Path) -> None:
    clock = FakeClock()
    conditions = HostConditions(
        tmp_path,
        FakeRuntime(FakeHost(clock=clock)),
        ClockWatch(clock, ClockSettings(calm_s=60.0)),
        ConditionSettings(disk_free_bytes_min=0, disk_free_ratio_min=0, inode_free_ratio_min=0),
    )
    assert await conditions.look() == {}
    clock.jump(-3600.0)
    jumped = {ConditionType.CLOCK_JUMP: "the host's clock jumped by -3600.0 s"}
    assert await conditions.look() == jumped
    assert jumped.keys() <= OF_THE_AGENT
    clock.advance(61.0)
    assert await conditions.look() == {}
