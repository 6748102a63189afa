"""A node's policy, from the pipeline file to the step's end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from tests.support.plane import ControlPlane, Network, NodeAgent
from tests.support.time import LoopClock, until, virtual_time

from gamenode.agent.policy import FilePolicy
from gamenode.domain.pipeline import Pipeline, Reason, Status

ONE_STEP = """
name: w
envs: [{envs}]
steps:
  - name: one
    retries: {{max: 3, backoff: 5s}}
    container: {{image: a, volumes: ["{volume}"], environment: {{FAKE_PREPARE_S: "{prepare_s}"}}}}
  - {{name: tidy, when: always, container: {{image: a}}}}
"""


class World:
    """A server, and a node with a policy."""

    def __init__(self, folder: Path, envs: Mapping[str, str]) -> None:
        self.games = folder / "games"
        self.games.mkdir()
        self.file = folder / "policy.toml"
        self.file.write_text(f'[containers]\nmounts = ["{self.games}"]\n')
        self.file.chmod(0o644)
        clock = LoopClock()
        self.plane = ControlPlane(folder, clock=clock)
        network = Network(Random(1))
        network.plane = self.plane
        self.agent = NodeAgent(
            folder,
            network=network,
            clock=clock,
            policy=FilePolicy(self.file, envs=envs),
            envs=envs,
        )

    async def create(
        self,
        volume: str,
        *,
        envs: Mapping[str, str] | None = None,
        named: str = "",
        prepare_s: float = 0.0,
    ) -> str:
        file = ONE_STEP.format(volume=volume, envs=named, prepare_s=prepare_s)
        created = await self.plane.create(file, envs=dict(envs or {}))
        return created.id

    async def ended(self, pipeline_id: str) -> Pipeline:
        async def has_ended() -> bool:
            return (await self.plane.service.get(pipeline_id)).status.terminal

        await until(has_ended)
        return await self.plane.service.get(pipeline_id)

    async def run(self, volume: str, **more: object) -> Pipeline:
        return await self.ended(await self.create(volume, **more))  # type: ignore[arg-type]

    def started(self) -> list[str]:
        return [run.step for run in self.agent.host.starts]


@asynccontextmanager
async def world(folder: Path, envs: Mapping[str, str] | None = None) -> AsyncIterator[World]:
    made = World(folder, envs or {})
    await made.plane.start()
    made.agent.start()
    try:
        yield made
    finally:
        await made.agent.kill()
        await made.plane.stop()


@virtual_time
async def test_a_refused_step_fails_once_and_says_why(tmp_path: Path) -> None:
    async with world(tmp_path) as node:
        ended = await node.run("/etc:/x")
        assert (ended.status, ended.reason) == (Status.FAILED, Reason.POLICY)
        one, tidy = ended.steps
        assert (one.status, one.reason, one.attempt) == (Status.FAILED, Reason.POLICY, 1)
        assert one.message == (
            f"volumes[0]: /etc is outside the allowed roots ({node.games});"
            " ask this node's owner: policy.toml"
        )
        assert tidy.status is Status.COMPLETED
        assert node.started() == ["tidy"]


@virtual_time
async def test_a_step_within_the_rules_runs(tmp_path: Path) -> None:
    async with world(tmp_path) as node:
        assert (await node.run(f"{node.games}/one:/x")).status is Status.COMPLETED
        assert node.started() == ["one", "tidy"]


@virtual_time
async def test_a_folder_that_the_node_names_is_mounted_and_one_that_a_caller_names_is_not(
    tmp_path: Path,
) -> None:
    wind = tmp_path / "wind"
    wind.mkdir()
    async with world(tmp_path, {"WIND_ROOT": str(wind)}) as node:
        own = await node.run("${{ envs.WIND_ROOT }}:/data", named="WIND_ROOT")
        assert own.status is Status.COMPLETED
        # The node's own value wins, so a caller cannot turn it into another folder.
        for_own = {"WIND_ROOT": "/etc"}
        over = await node.run("${{ envs.WIND_ROOT }}:/data", named="WIND_ROOT", envs=for_own)
        assert over.status is Status.COMPLETED
        mine = await node.run("${{ envs.MINE }}:/data", named="MINE", envs={"MINE": "/etc"})
        assert mine.reason is Reason.POLICY


@virtual_time
async def test_a_path_that_changes_while_the_image_comes_is_judged_again(tmp_path: Path) -> None:
    async with world(tmp_path) as node:
        prepared = await node.create(f"{node.games}/later:/x", prepare_s=5.0)

        async def runs() -> bool:
            return bool(node.agent.runner.held())

        await until(runs)
        (node.games / "later").symlink_to("/etc")
        assert (await node.ended(prepared)).reason is Reason.POLICY
        assert node.started() == ["tidy"]


@virtual_time
async def test_a_broken_policy_refuses_until_it_is_repaired(tmp_path: Path) -> None:
    async with world(tmp_path) as node:
        good = node.file.read_text()
        node.file.write_text("[containers]\nmount = []\n")
        ended = await node.run("/etc:/x")
        assert ended.reason is Reason.POLICY
        assert "did you mean containers.mounts?" in ended.message
        assert node.started() == []
        node.file.write_text(good)
        assert (await node.run(f"{node.games}:/x")).status is Status.COMPLETED


@virtual_time
async def test_an_agent_that_is_restarted_does_not_try_a_refused_step_again(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as node:
        refused = await node.create("/etc:/x", prepare_s=0.0)
        await until(lambda: node.started() == ["tidy"], every_s=0.001)
        await node.agent.kill()
        node.agent.start()
        one = (await node.ended(refused)).steps[0]
        assert (one.reason, one.attempt) == (Reason.POLICY, 1)
        assert node.started() == ["tidy"]
