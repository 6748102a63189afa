"""The three records of every attempt, compared while work goes on: P1, P2, RL3, RA3."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from tests.support.fake_agent import FakeAgent, dispatched, step
from tests.support.plane import USER, ControlPlane, Network, NodeAgent, RecordingHost
from tests.support.time import FakeClock, LoopClock, until, virtual_time

from gamenode.agent.runtime import RunKey
from gamenode.agent.runtime.fake import FakeRuntime
from gamenode.domain.pipeline import ContainerSpec, Reason, Status, StepType
from gamenode.domain.verification import AttemptVerdict, StepRecord, ViolationKind
from gamenode.server.pipelines.verifier import AttemptVerifier, VerifierSettings

LONG = """
name: long
steps:
  - {name: one, container: {image: a, environment: {FAKE_DURATION_S: "600"}}}
"""
SHORT = """
name: short
steps:
  - {name: one, retries: {max: 2, backoff: 1s}, container: {image: a, environment: {
      FAKE_DURATION_S: "0.7", FAKE_PREPARE_S: "0.3", FAKE_EXIT_CODE: "1", FAKE_LOG_LINES: "3"}}}
  - {name: two, when: always, container: {image: a, environment: {FAKE_DURATION_S: "0.5"}}}
"""
SERVICE = "name: game\nsteps: [{name: game, type: service, container: {image: a}}]"


class Site:
    """A server and two nodes."""

    def __init__(self, folder: Path) -> None:
        self.clock = LoopClock()
        self.network = Network(Random(1), delay_s_max=0.02)
        self.plane = ControlPlane(folder, clock=self.clock)
        self.verifier = AttemptVerifier(
            service=self.plane.service, nodes=self.plane.nodes, settings=VerifierSettings()
        )
        self.hosts = {node: RecordingHost(clock=self.clock) for node in ("n1", "n2")}
        self.agents = {
            node: NodeAgent(folder, node_id=node, network=self.network, clock=self.clock, host=host)
            for node, host in self.hosts.items()
        }

    async def begin(self) -> None:
        await self.plane.start()
        self.network.plane = self.plane
        for agent in self.agents.values():
            agent.start()
        await until(lambda: all(self.plane.nodes.connection(node) for node in self.agents))

    async def end(self) -> None:
        for agent in self.agents.values():
            await agent.kill()
        await self.plane.stop()

    async def run(self, file: str, *, node: str = "n1") -> RunKey:
        """Create a pipeline of one step and wait until it runs; return which run that is."""
        created = await self.plane.create(file, node=node)

        async def begun() -> bool:
            (step, *_) = (await self.plane.service.get(created.id)).steps
            return step.status in (Status.RUNNING, Status.COMPLETED)

        await until(begun)
        (run,) = [each for each in self.hosts[node].starts if each.pipeline_id == created.id]
        return run

    async def found(self) -> list[tuple[ViolationKind, str]]:
        """Return the violations by kind and node."""
        verdict = await self.verifier.verify()
        return [(violation.kind, violation.node_id) for violation in verdict.violations]

    def journal(self, node: str, statement: str) -> None:
        """Change a journal behind its agent's back."""
        connection = sqlite3.connect(self.agents[node].journal_path)
        with connection:
            connection.execute(statement)
        connection.close()


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    opened = Site(folder)
    await opened.begin()
    try:
        yield opened
    finally:
        await opened.end()


@virtual_time
async def test_work_in_every_phase_is_no_violation(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        await it.run(SERVICE)
        await it.run(LONG, node="n2")
        cancelled = await it.run(LONG)
        created = [await it.plane.create(SHORT) for _ in range(4)]
        verdicts: list[AttemptVerdict] = []

        async def done() -> bool:
            verdicts.append(await it.verifier.verify())
            pipelines = [await it.plane.service.get(one.id) for one in created]
            return all(pipeline.status.terminal for pipeline in pipelines)

        for force in (False, True):
            await it.plane.pipelines.cancel(cancelled.pipeline_id, reason="", force=force, by=USER)
        await until(done, every_s=0.11)
        assert all(verdict.ok for verdict in verdicts), verdicts
        assert len(verdicts) > 5
        assert max(verdict.attempts for verdict in verdicts) >= 5
        assert {verdict.nodes_asked for verdict in verdicts} == {2}


@virtual_time
async def test_what_no_journal_holds_is_found(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        run = await it.run(LONG)
        # Stray containers, as a broken agent or a person would leave them.
        stray = replace(run, attempt=2)
        container = ContainerSpec(environment={"FAKE_DURATION_S": "600"})
        await it.hosts["n1"].start(stray, container, service=False)
        over = replace(run, pipeline_id="gone")
        await it.hosts["n2"].start(over, ContainerSpec(), service=False)
        assert await it.found() == [
            (ViolationKind.LEFT_BEHIND, "n2"),
            (ViolationKind.UNKNOWN, "n2"),
            (ViolationKind.OVERLAP, "n1"),
            (ViolationKind.UNJOURNALED, "n1"),
            (ViolationKind.UNWANTED, "n1"),
        ]


@virtual_time
async def test_a_copy_of_a_host_is_found(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        run = await it.run(LONG)
        await asyncio.sleep(30.0)
        await it.hosts["n2"].start(run, ContainerSpec(), service=True)
        assert (ViolationKind.STARTED_TWICE, "n2") in await it.found()


@virtual_time
async def test_what_the_host_has_lost_is_found(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        run = await it.run(LONG)
        it.hosts["n1"].forget(run)
        assert await it.found() == [(ViolationKind.MISSING, "n1")]
        it.journal("n1", "DELETE FROM tries")
        assert await it.found() == [(ViolationKind.MISSING, "n1")]


@virtual_time
async def test_what_is_not_wanted_any_more_is_found_unless_its_agent_ends_it(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as it:
        stubborn = LONG.replace("600", '600", FAKE_IGNORE_STOP: "1')
        run = await it.run(stubborn.replace("image: a", "image: a, stop_grace_period: 60s"))
        await it.plane.pipelines.cancel(run.pipeline_id, reason="", force=True, by=USER)
        await asyncio.sleep(1.0)
        assert run in it.hosts["n1"].runs()
        assert await it.found() == []
        it.journal("n1", "UPDATE held SET cancel_reason = NULL")
        assert await it.found() == [(ViolationKind.UNWANTED, "n1")]


@virtual_time
async def test_nodes_that_cannot_be_asked_are_named_and_nothing_is_said_about_them(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as it:
        run = await it.run(LONG)
        it.hosts["n1"].forget(run)
        await it.agents["n1"].kill()
        await until(lambda: it.plane.nodes.connection("n1") is None)
        verdict = await it.verifier.verify()
        assert (verdict.ok, verdict.nodes_asked, verdict.nodes_absent) == (True, 1, ("n1",))


@virtual_time
async def test_an_engine_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site(tmp_path) as it:

        async def never(_: FakeRuntime) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(FakeRuntime, "runs", never)
        begun_s = it.clock.monotonic_s()
        verdict = await it.verifier.verify()
        assert verdict.nodes_absent == ("n1", "n2")
        assert it.clock.monotonic_s() - begun_s < VerifierSettings().answer_timeout_s


@virtual_time
async def test_one_look_has_an_end_and_keeps_what_was_said_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site(tmp_path) as it:
        await it.run(LONG, node="n2")
        monkeypatch.setattr(it.agents["n1"].runner, "state_attempts", asyncio.Event().wait)
        settings = VerifierSettings(look_s_max=5.0, asked_at_once_max=2)
        it.verifier = AttemptVerifier(
            service=it.plane.service, nodes=it.plane.nodes, settings=settings
        )
        begun_s = it.clock.monotonic_s()
        verdict = await it.verifier.verify()
        assert (verdict.attempts, verdict.nodes_absent) == (1, ("n1",))
        assert it.clock.monotonic_s() - begun_s == pytest.approx(5.0, abs=0.1)


async def test_the_records_are_of_what_is_named_and_of_all_that_runs(
    tmp_path: Path, database_url: str
) -> None:
    plane = ControlPlane(tmp_path, clock=FakeClock(), url=database_url)
    await plane.feed.start()
    agent = await FakeAgent.join(plane, "n1")
    running, idle, named = [await dispatched(plane, agent, LONG) for _ in range(3)]
    await agent.report(step(running, Status.RUNNING))
    records = await plane.service.step_records({named, "gone"}, batch_max=1)
    assert records.keys() == {(running, "one"), (named, "one")}
    assert idle not in {pipeline_id for pipeline_id, _ in records}
    assert records[running, "one"] == StepRecord(
        pipeline_id=running,
        step="one",
        type=StepType.TASK,
        node_id="n1",
        pipeline_status=Status.RUNNING,
        status=Status.RUNNING,
        reason=Reason.NONE,
        attempt=1,
        granted_from=1,
        granted_to=1,
    )
    await plane.stop()
