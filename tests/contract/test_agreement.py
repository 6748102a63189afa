"""Server and agents agree again, whatever was lost: P1 to P4, P9, P10."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.support.plane import ControlPlane, Network, NodeAgent
from tests.support.time import LoopClock, until, virtual_time

from gamenode.domain.pipeline import Status

FILE = """
name: work
steps:
  - name: one
    container: {image: a, environment: {FAKE_DURATION_S: "1"}}
  - name: two
    container: {image: a, environment: {FAKE_DURATION_S: "2", FAKE_LOG_LINES: "3"}}
"""


@virtual_time
async def test_a_pipeline_runs_to_its_end(tmp_path: Path) -> None:
    clock = LoopClock()
    plane = ControlPlane(tmp_path, clock=clock)
    await plane.start()
    network = Network(Random(1), delay_s_max=0.05)
    network.plane = plane
    agent = NodeAgent(tmp_path, network=network, clock=clock)
    agent.start()
    created = await plane.create(FILE)

    async def ended() -> bool:
        return (await plane.service.get(created.id)).status.terminal

    await until(ended)
    pipeline = await plane.service.get(created.id)
    assert pipeline.status is Status.COMPLETED
    await until(lambda: agent.runner.held() == [] and agent.host.runs() == ())
    await agent.kill()
    await plane.stop()
