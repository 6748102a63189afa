"""kill -9 of the server, the agent or the engine, in each phase of a pipeline of three containers.

In every cell: the end is right, no (step, attempt) ever had two containers or ran twice, and no
line of a log is missing or doubled (P1, P2, P6, P9).
"""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import (
    Cluster,
    Started,
    cluster_in,
    counted,
    counting,
    eventually,
    pipeline,
)
from tests.support.engine import IMAGE
from tests.support.fragile_engine import FragileEngine, fragile_engine

pytestmark = pytest.mark.docker

STEPS = ("one", "two", "tidy")
LINES = 40
VICTIMS = ("server", "agent", "engine")


class Plane:
    """The three programs that die, and one node."""

    def __init__(self, cluster: Cluster, engine: FragileEngine) -> None:
        """Start everything; steps may mount what is in the folder `hosts`."""
        self.hosts = cluster.folder / "hosts"
        self.hosts.mkdir()
        policy = cluster.folder / "policy.toml"
        policy.write_text(f'[containers]\nmounts = ["{self.hosts}"]\n')
        self._on_docker = {"AGENT__POLICY": str(policy)}
        self.cluster = cluster
        self.engine = engine
        self.server = cluster.server()
        self.agent = cluster.agent("n1", "--runtime", "docker", **self._on_docker)

    def kill(self, victim: str) -> None:
        """End a program as kill -9 does."""
        match victim:
            case "server":
                self.server.kill()
            case "agent":
                self.agent.kill()
            case _:
                self.engine.kill()

    def start(self, victim: str) -> None:
        """Start it again."""
        match victim:
            case "server":
                self.server = self.cluster.server()
            case "agent":
                self.agent = self.cluster.agent_unawaited(
                    "n1", "--runtime", "docker", **self._on_docker
                )
            case _:
                self.engine.start()

    def heal(self) -> None:
        """Have all three run, and the node take work."""
        if not self.server.alive:
            self.start("server")
        if not self.agent.alive:
            self.start("agent")
        if not self.engine.alive:
            self.start("engine")
        self.cluster.until_connected()
        eventually(lambda: not self.cluster.node()["conditions"], "the node is well")
        self.state("normal")

    def state(self, target: str) -> None:
        """Change the node's state."""
        answer = self.cluster.request(
            "PUT", "/api/v1/nodes/n1/state?wait=20s", {"state": target, "reason": "a test"}
        )
        assert answer.json["state"] == target, answer


@dataclass(frozen=True)
class Cell:
    """One pipeline in one cell of the matrix. Each step waits for its gate to be opened."""

    plane: Plane
    folder: Path
    settled: bool
    """Whether a step runs only once its start and what it printed are on the server.

    An engine that dies while it starts a container forgets that it did, and an engine's log ends
    with what it had written down: neither is ours to mend.
    """

    def create(self) -> str:
        """Create the pipeline."""
        return self.plane.cluster.create(pipeline(*(self._step(name) for name in STEPS)))

    def _step(self, name: str) -> dict[str, Any]:
        commands = [
            f"echo {name} >>/host/starts",
            counting(LINES, pause_s=0),
            f"until [ -e /host/go-{name} ]; do sleep 0.02; done",
            f"echo {name} was let go",
        ]
        container = {"image": IMAGE, "commands": commands, "volumes": [f"{self.folder}:/host"]}
        return {
            "name": name,
            "container": container,
            **({"when": "always"} if name == "tidy" else {}),
        }

    def starts(self) -> list[str]:
        """Return every step that has ever begun, from its own mouth."""
        path = self.folder / "starts"
        return path.read_text().split() if path.exists() else []

    def let_go(self, *names: str) -> None:
        """Open the gates of steps."""
        for name in names:
            (self.folder / f"go-{name}").touch()

    def until_in(self, pipeline_id: str, name: str) -> None:
        """Wait until a step runs, with every gate before it open."""
        self.let_go(*STEPS[: STEPS.index(name)])
        eventually(lambda: name in self.starts(), f"step {name} runs")
        if self.settled:
            cluster = self.plane.cluster
            cluster.until_step(pipeline_id, name, "RUNNING")
            eventually(
                lambda: cluster.log(pipeline_id, name) == counted(LINES), "its log is stored"
            )

    def until_tried(self, pipeline_id: str, name: str, *, ended: bool) -> None:
        """Wait until the agent has journaled that it begins a step, or how that ended."""
        path = self.plane.cluster.folder / "agents" / "n1" / "journal.db"

        def look() -> bool:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
                rows = journal.execute(
                    "SELECT status FROM tries WHERE pipeline_id = ? AND step = ?",
                    (pipeline_id, name),
                ).fetchall()
            return any(status is not None or not ended for (status,) in rows)

        eventually(look, f"step {name} is in the journal")


@contextmanager
def frozen(program: Started | FragileEngine) -> Iterator[None]:
    """Hold a program still."""
    program.send(signal.SIGSTOP)
    try:
        yield
    finally:
        if program.alive:
            program.send(signal.SIGCONT)


Kill = Callable[[], None]


def queued(cell: Cell, kill: Kill) -> str:
    cell.plane.state("maintenance")
    pipeline_id = cell.create()
    eventually(
        lambda: cell.plane.cluster.get(f"/pipelines/{pipeline_id}")["waiting"], "it is queued"
    )
    kill()
    return pipeline_id


def dispatched(cell: Cell, kill: Kill) -> str:
    with frozen(cell.plane.agent):
        pipeline_id = cell.create()
        eventually(
            lambda: cell.plane.cluster.get(f"/pipelines/{pipeline_id}")["node_id"],
            "it is bound to a node that has not heard of it",
        )
        kill()
    return pipeline_id


def image_check(cell: Cell, kill: Kill) -> str:
    with frozen(cell.plane.engine):
        pipeline_id = cell.create()
        cell.until_tried(pipeline_id, "one", ended=False)
        kill()
    return pipeline_id


def _running(name: str) -> Callable[[Cell, Kill], str]:
    def phase(cell: Cell, kill: Kill) -> str:
        pipeline_id = cell.create()
        cell.until_in(pipeline_id, name)
        kill()
        return pipeline_id

    return phase


def between_steps(cell: Cell, kill: Kill) -> str:
    pipeline_id = cell.create()
    cell.until_in(pipeline_id, "one")
    with frozen(cell.plane.agent):
        cell.let_go("one")
        eventually(
            lambda: cell.plane.engine.states(pipeline_id) == ["exited"],
            "step one has ended, and its agent does not know",
        )
        kill()
    return pipeline_id


def end_report(cell: Cell, kill: Kill) -> str:
    pipeline_id = cell.create()
    cell.until_in(pipeline_id, "tidy")
    with frozen(cell.plane.server):
        cell.let_go("tidy")
        cell.until_tried(pipeline_id, "tidy", ended=True)
        kill()
    return pipeline_id


PHASES: Mapping[str, Callable[[Cell, Kill], str]] = {
    "queued": queued,
    "dispatched": dispatched,
    "image check": image_check,
    "step 1": _running("one"),
    "between steps": between_steps,
    "step 2": _running("two"),
    "clean-up": _running("tidy"),
    "end report": end_report,
}
_RUNS: Mapping[str, str] = {"step 1": "one", "step 2": "two", "clean-up": "tidy"}


def check_cell(plane: Plane, phase: str, victim: str, *, dies: bool) -> float:
    """Kill `victim` in `phase`, and check everything; return how long the cell took, in seconds.

    `dies` says that what runs dies with the victim.
    """
    plane.heal()
    folder = plane.hosts / f"{phase}-{victim}".replace(" ", "-")
    folder.mkdir()
    cell = Cell(plane, folder, settled=victim == "engine")
    began_s = time.monotonic()
    pipeline_id = PHASES[phase](cell, lambda: plane.kill(victim))
    killed = _RUNS.get(phase) if dies else None
    plane.start(victim)
    if killed is not None:
        eventually(
            lambda: plane.engine.states(f"{pipeline_id}.{killed}") != ["running"],
            "the step has died with its engine",
        )
    cell.let_go(*STEPS)
    plane.heal()
    ended = plane.cluster.ended(pipeline_id, within_s=60.0)
    _check_end(ended, killed)
    ran = [step["name"] for step in ended["steps"] if step["reason"] != "SKIPPED"]
    assert cell.starts() == ran
    made = {name: ids for name, ids in plane.engine.made().items() if pipeline_id in name}
    assert len(made) == len(ran), made
    assert all(len(ids) == 1 for ids in made.values()), made
    for name in ran:
        _check_log(plane.cluster, pipeline_id, name, whole=name != killed)
    eventually(lambda: not plane.engine.states(pipeline_id), "the containers are removed")
    return time.monotonic() - began_s


def _check_end(ended: Mapping[str, Any], killed: str | None) -> None:
    steps = {step["name"]: step for step in ended["steps"]}
    statuses = dict.fromkeys(STEPS, "COMPLETED")
    if killed is not None:
        statuses[killed] = "FAILED"
    if killed == "one":
        statuses["two"] = "CANCELLED"
    assert {name: step["status"] for name, step in steps.items()} == statuses, ended
    assert ended["status"] == ("COMPLETED" if killed is None else "FAILED"), ended


def _check_log(cluster: Cluster, pipeline_id: str, name: str, *, whole: bool) -> None:
    expected = counted(LINES) + (f"{name} was let go\n" if whole else "")
    eventually(lambda: cluster.log(pipeline_id, name) == expected, f"the log of {name} is whole")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """An engine whose containers die with it."""
    with _plane(tmp_path_factory, live_restore=False) as made:
        yield made


@contextmanager
def _plane(factory: pytest.TempPathFactory, *, live_restore: bool) -> Iterator[Plane]:
    with (
        fragile_engine(factory.mktemp("engine"), live_restore=live_restore) as engine,
        cluster_in(
            factory.mktemp("cluster"),
            AGENT__ENGINE_SOCKET=str(engine.engine.socket),
            NODES__HEARTBEAT_INTERVAL_S="1",
        ) as cluster,
    ):
        yield Plane(cluster, engine)


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("dispatched", "server"),
        ("step 1", "engine"),
        ("between steps", "agent"),
        ("clean-up", "server"),
        ("end report", "agent"),
    ],
)
def test_a_kill_in_this_phase_starts_nothing_twice_and_loses_nothing(
    plane: Plane, phase: str, victim: str
) -> None:
    check_cell(plane, phase, victim, dies=victim == "engine")


@pytest.mark.soak
@pytest.mark.parametrize("live_restore", [False, True])
def test_a_kill_in_any_phase_starts_nothing_twice_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, *, live_restore: bool
) -> None:
    failures = {}
    with _plane(tmp_path_factory, live_restore=live_restore) as plane:
        for victim in VICTIMS:
            dies = victim == "engine" and not live_restore
            for phase in PHASES:
                try:
                    said = f"{check_cell(plane, phase, victim, dies=dies):5.1f} s"
                except AssertionError as error:
                    said = "failed"
                    failures[victim, phase] = str(error)
                print(f"{phase:14} {victim:7} live-restore={live_restore} {said}")
    assert not failures
