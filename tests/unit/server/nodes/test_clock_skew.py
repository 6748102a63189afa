from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.plane import ControlPlane, registration
from tests.support.time import FakeClock

from gamenode.domain.node import ConditionType, Heartbeat
from gamenode.lib.clock import after


class Node:
    """A node whose heartbeats say that its clock is off."""

    def __init__(self, plane: ControlPlane, clock: FakeClock, session_id: str) -> None:
        self._plane = plane
        self._clock = clock
        self._session_id = session_id

    async def beat(self, skew_s: float) -> bool:
        """Beat, and return whether the server says that the clock is off."""
        sent_at = after(self._clock.now(), skew_s)
        await self._plane.nodes.heartbeat(
            Heartbeat(node_id="n1", session_id=self._session_id, sent_at=sent_at)
        )
        self._clock.advance(15.0)
        node = await self._plane.nodes.get("n1")
        return ConditionType.CLOCK_SKEW in {condition.type for condition in node.conditions}


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    clock = FakeClock()
    plane = ControlPlane(tmp_path, clock=clock)
    answer = await plane.nodes.register(registration())
    yield Node(plane, clock, answer.session_id)
    await plane.stop()


async def test_a_heartbeat_that_was_held_up_says_nothing_of_the_clock(node: Node) -> None:
    assert not await node.beat(0.0)
    assert not await node.beat(-20.0)
    assert not await node.beat(0.0)


@pytest.mark.parametrize("skew_s", [-90.0, 90.0])
async def test_a_clock_that_is_off_is_named_until_it_is_right(node: Node, skew_s: float) -> None:
    assert await node.beat(skew_s)
    assert await node.beat(skew_s)
    assert not await node.beat(0.0)


async def test_a_clock_that_goes_wrong_is_named_with_the_second_heartbeat(node: Node) -> None:
    assert not await node.beat(0.0)
    assert not await node.beat(6.0)
    assert await node.beat(6.0)
