"""What an agent gives out of its host, as its configuration says: F7."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.support.time import FakeClock

from gamenode.agent.app import Agent
from gamenode.agent.runtime.fake import FakeHost, FakeRuntime
from gamenode.agent.settings import AgentSettings, CapacitySettings, HostSettings
from gamenode.domain.container import PortRange
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.node import Offer
from gamenode.lib.settings import load_settings


def agent(folder: Path, **capacity: Any) -> Agent:
    clock = FakeClock()
    return Agent(
        AgentSettings(
            agent=HostSettings(node_id="n1", data=folder), capacity=CapacitySettings(**capacity)
        ),
        clock=clock,
        random=Random(1),
        runtime=FakeRuntime(FakeHost(clock=clock)),
    )


@pytest.mark.parametrize(
    ("capacity", "offer"),
    [
        ({}, Offer(gpu_slots=1, ports=PortRange(20_000, 31_999))),
        (
            {"gpu_slots": 4, "gpu_slots_by_id": {"GPU-1": 0}, "port_last": 19_999},
            Offer(gpu_slots=4, gpu_slots_by_id={"GPU-1": 0}, ports=None),
        ),
    ],
)
async def test_a_node_offers_what_its_configuration_says(
    tmp_path: Path, capacity: dict[str, Any], offer: Offer
) -> None:
    made = agent(tmp_path, **capacity)
    registration = await made._registration(None)
    assert registration.offer == offer
    await made.stop()


@pytest.mark.parametrize(
    ("capacity", "name"),
    [
        ({"gpu_slots": 65}, "capacity.gpu_slots"),
        ({"port_last": 65_536}, "capacity.port_last"),
        ({"gpu_slots_by_id": {"GPU-1": -1}}, "capacity.gpu_slots_by_id.GPU-1"),
        ({"gpu_slots_by_id": {"GPU-1": "2"}}, "capacity.gpu_slots_by_id.GPU-1"),
    ],
)
def test_what_no_node_can_offer_is_refused_at_the_start(
    tmp_path: Path, capacity: dict[str, Any], name: str
) -> None:
    with pytest.raises(GameNodeError, match=name) as caught:
        agent(tmp_path, **capacity)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_the_capacity_stands_in_the_configuration_file() -> None:
    settings = load_settings(
        AgentSettings,
        file={"capacity": {"gpu_slots": 3, "gpu_slots_by_id": {"GPU-1": 2}}},
        file_name="agent.toml",
        environment={},
        prefix="GAMENODE_",
        flags={},
    )
    assert settings.capacity == CapacitySettings(gpu_slots=3, gpu_slots_by_id={"GPU-1": 2})
