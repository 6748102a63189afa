"""Nothing is lost, doubled or started twice when the server or the agent dies (P1, P5, P6, P9)."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.cluster import Cluster, Started, counted, counting, eventually, pipeline, step

LINES = 300
STORM_S = 8.0


def _slow_file(starts: Path, lines: int = LINES) -> str:
    """Return a pipeline whose step says that it started, and counts for some seconds."""
    return pipeline(
        step("count", f"echo started >>{starts}", counting(lines, pause_s=0.01)),
        step("after", "echo after"),
    )


def _printed(run: Started, line: int) -> None:
    eventually(lambda: f"line {line}\n" in run.stdout, f"line {line} is on the terminal")


def _ended_whole(cluster: Cluster, run: Started, starts: Path) -> None:
    """Check that a run ended well, was started once, and that nothing of its log is missing."""
    done = run.done(60.0)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == counted(LINES) + "after\n"
    assert cluster.log(cluster.pipeline_of(run), "count") == counted(LINES)
    assert starts.read_text() == "started\n"


def test_a_run_outlives_kills_of_the_server(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server()
    cluster.agent()
    run = cluster.run_unawaited(_slow_file(tmp_path / "starts"))
    for line in (10, 100, 200):
        _printed(run, line)
        server.kill()
        server = cluster.server()
    _ended_whole(cluster, run, tmp_path / "starts")


def test_a_run_outlives_a_kill_of_a_server_on_postgresql(
    cluster: Cluster, postgres_url: str, tmp_path: Path
) -> None:
    server = cluster.server(DATABASE__URL=postgres_url)
    cluster.agent()
    run = cluster.run_unawaited(_slow_file(tmp_path / "starts"))
    _printed(run, 50)
    server.kill()
    cluster.server(DATABASE__URL=postgres_url)
    _ended_whole(cluster, run, tmp_path / "starts")


def test_a_step_outlives_kills_of_its_agent_and_is_adopted(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.server()
    agent = cluster.agent()
    run = cluster.run_unawaited(_slow_file(tmp_path / "starts"))
    for line in (10, 150):
        _printed(run, line)
        agent.kill()
        agent = cluster.agent()
    _ended_whole(cluster, run, tmp_path / "starts")


def test_a_step_that_ends_while_its_agent_is_dead_is_found_ended(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.server()
    agent = cluster.agent()
    go = tmp_path / "go"
    pipeline_id = cluster.create(
        pipeline(step("a", f"until [ -e {go} ]; do sleep 0.01; done", "echo late", "exit 5"))
    )
    cluster.until_step(pipeline_id, "a", "RUNNING")
    agent.kill()
    go.touch()
    eventually(lambda: not cluster.steps(), "the step has ended")
    cluster.agent()
    ended = cluster.ended(pipeline_id)
    assert (ended["status"], ended["steps"][0]["exit_code"]) == ("FAILED", 5)
    assert ended["steps"][0]["attempt"] == 1
    assert cluster.log(pipeline_id, "a") == "late\n"


def test_a_run_outlives_the_death_of_both(cluster: Cluster, tmp_path: Path) -> None:
    server, agent = cluster.server(), cluster.agent()
    run = cluster.run_unawaited(_slow_file(tmp_path / "starts"))
    _printed(run, 50)
    server.kill()
    agent.kill()
    cluster.server()
    cluster.agent()
    _ended_whole(cluster, run, tmp_path / "starts")


def test_a_cancel_reaches_a_step_whose_agent_was_dead(cluster: Cluster) -> None:
    cluster.server()
    agent = cluster.agent()
    pipeline_id = cluster.create(pipeline(step("long", "sleep 600")))
    cluster.until_step(pipeline_id, "long", "RUNNING")
    agent.kill()
    answer = cluster.request("POST", f"/api/v1/pipelines/{pipeline_id}:cancel", {})
    assert answer.json["status"] == "RUNNING"  # the agent alone knows its end
    cluster.agent()
    assert cluster.ended(pipeline_id)["status"] == "CANCELLED"
    eventually(lambda: not cluster.steps(), "no process of the step lives")


def test_a_create_whose_answer_is_lost_makes_one_under_its_key(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = cluster.server()
    cluster.agent()
    starts = tmp_path / "starts"
    for number, delay_s in enumerate((0.0, 0.002, 0.004)):
        file = pipeline(step("a", f"echo {number} >>{starts}"), name=f"create-{number}")
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(cluster.create, file, key=f"key-{number}")
            time.sleep(delay_s)
            server.kill()
        server = cluster.server()
        pipeline_id = cluster.create(file, key=f"key-{number}")
        if lost.exception() is None:
            assert lost.result() == pipeline_id
        assert cluster.ended(pipeline_id)["status"] == "COMPLETED"
    assert starts.read_text().split() == ["0", "1", "2"]
    assert len(cluster.get("/pipelines")["items"]) == 3


def test_random_kills_of_server_and_agent_lose_and_double_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    starts = tmp_path / "starts"
    programs = {"server": cluster.server(), "agent": cluster.agent()}
    start = {"server": cluster.server, "agent": cluster.agent_unawaited}
    runs: list[tuple[str, int]] = []
    deadline_s = time.monotonic() + STORM_S
    while time.monotonic() < deadline_s:
        number = len(runs)
        lines = chance.randrange(1, 150)
        file = pipeline(
            step("count", f"echo {number} >>{starts}", counting(lines, pause_s=0.01)),
            step("after", f"echo after {number} >>{starts}"),
        )
        runs.append((cluster.create(file), lines))
        time.sleep(chance.uniform(0.0, 1.0))
        for name in chance.choice((["server"], ["agent"], ["server", "agent"])):
            programs[name].kill()
            time.sleep(chance.uniform(0.0, 0.1))
            programs[name] = start[name]()
    cluster.until_connected()
    for pipeline_id, lines in runs:
        ended = cluster.ended(pipeline_id, within_s=60.0)
        assert ended["status"] == "COMPLETED", ended
        assert cluster.log(pipeline_id, "count") == counted(lines)
    expected = [f"{prefix}{n}" for n in range(len(runs)) for prefix in ("", "after ")]
    assert sorted(starts.read_text().splitlines()) == sorted(expected)
