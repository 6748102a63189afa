"""A disk that fills: a clear error, nothing acknowledged lost, service when there is room (P13)."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.cluster import Answer, Cluster, cluster_in, eventually, pipeline, step
from tests.support.full_disk import fill, small_disk

CALLERS = 8
CREATES_MAX = 400
PADDING = "x" * 2_000
DISK_BYTES = 6 * 1024 * 1024


def _waiting_step(gate: Path, exit_code: int) -> dict[str, object]:
    return step("a", "echo begun", f"until [ -e {gate} ]; do sleep 0.02; done", f"exit {exit_code}")


def _create(cluster: Cluster, number: int) -> Answer:
    file = pipeline(step("a", "true"), name=f"p{number}", description=PADDING)
    return cluster.request(
        "POST",
        "/api/v1/pipelines",
        {"file": file, "selector": "never=there"},
        headers={"idempotency-key": f"key-{number}"},
    )


def _stored(cluster: Cluster) -> dict[str, str]:
    """Return every pipeline's name by its id."""
    found: dict[str, str] = {}
    cursor = ""
    while True:
        page = cluster.get(f"/pipelines?limit=1000{cursor}")
        found |= {each["id"]: each["name"] for each in page["items"]}
        if not page["next_cursor"]:
            return found
        cursor = f"&cursor={page['next_cursor']}"


def _beats(cluster: Cluster) -> None:
    """Check that heartbeats are counted: another one than the last comes in."""
    before = cluster.node()["last_heartbeat_at"]
    eventually(lambda: cluster.node()["last_heartbeat_at"] != before, "a heartbeat counts")
    assert cluster.node()["online"]


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with a heartbeat each second."""
    with cluster_in(tmp_path, NODES__HEARTBEAT_INTERVAL_S="1") as made:
        yield made


def test_a_full_disk_of_the_server_is_a_clear_error_that_costs_nothing_acknowledged(
    tmp_path: Path,
) -> None:
    gate, ballast = tmp_path / "gate", tmp_path / "server" / "ballast"
    with (
        small_disk(tmp_path / "server", size_bytes=DISK_BYTES),
        cluster_in(tmp_path, NODES__HEARTBEAT_INTERVAL_S="1") as cluster,
        ThreadPoolExecutor(CALLERS) as pool,
    ):
        server = cluster.server()
        cluster.agent()
        running = cluster.create(pipeline(_waiting_step(gate, 0), name="runs"))
        cluster.until_step(running, "a", "RUNNING")
        # It runs full while several callers share each commit.
        fill(ballast, leave_bytes=400_000)
        answers = dict(
            zip(
                range(CREATES_MAX),
                pool.map(lambda number: _create(cluster, number), range(CREATES_MAX)),
                strict=True,
            )
        )
        accepted = {n: a.json["id"] for n, a in answers.items() if a.status == http.client.CREATED}
        refused = {n: a for n, a in answers.items() if n not in accepted}
        assert accepted
        assert refused
        for answer in refused.values():
            assert answer.status == http.client.INSUFFICIENT_STORAGE, answer
            assert answer.json["code"] == "STORAGE_FULL"
            assert answer.json["retry_after_s"] > 0
            assert "room" in str(answer.json), answer
        fill(tmp_path / "server" / "more")
        gate.touch()  # its step ends, and nobody can write that down
        _beats(cluster)
        assert _create(cluster, CREATES_MAX).status == http.client.INSUFFICIENT_STORAGE
        assert cluster.get(f"/pipelines/{running}")["status"] == "RUNNING"
        names = {name for name in _stored(cluster).values() if name != "runs"}
        assert names == {f"p{number}" for number in accepted}

        ballast.unlink()
        (tmp_path / "server" / "more").unlink()
        ended = cluster.ended(running)
        assert ended["status"] == "COMPLETED", ended
        assert cluster.log(running, "a") == "begun\n"
        number = next(iter(refused))
        assert _create(cluster, number).status == http.client.CREATED
        server.kill()
        cluster.server()
        stored = _stored(cluster)
        assert stored.keys() >= {running, *accepted.values()}
        assert len(stored) == len(accepted) + 2


def test_a_full_disk_of_the_agent_refuses_new_work_and_keeps_what_runs(tmp_path: Path) -> None:
    gate, ballast = tmp_path / "gate", tmp_path / "agents" / "n1" / "ballast"
    with (
        small_disk(tmp_path / "agents" / "n1", size_bytes=DISK_BYTES),
        cluster_in(
            tmp_path,
            NODES__HEARTBEAT_INTERVAL_S="1",
            # The server must ask all the same, or the journal would never be put to the test.
            CONDITIONS__DISK_FREE_BYTES_MIN="0",
            CONDITIONS__DISK_FREE_RATIO_MIN="0",
        ) as cluster,
    ):
        cluster.server()
        agent = cluster.agent()
        running = cluster.create(pipeline(_waiting_step(gate, 5)))
        cluster.until_step(running, "a", "RUNNING")
        eventually(lambda: cluster.log(running, "a") == "begun\n", "its log is on the server")
        fill(ballast)
        waiting = cluster.create(pipeline(step("b", "echo later")))
        eventually(
            lambda: "journal" in str(cluster.get(f"/pipelines/{waiting}")["waiting"]),
            "the agent says why it refuses",
        )
        gate.touch()
        _beats(cluster)
        time.sleep(0.5)
        assert agent.alive
        assert cluster.get(f"/pipelines/{running}")["status"] == "RUNNING"

        ballast.unlink()
        ended = cluster.ended(running)
        assert (ended["status"], ended["steps"][0]["exit_code"]) == ("FAILED", 5), ended
        assert cluster.log(running, "a") == "begun\n"
        assert cluster.ended(waiting)["status"] == "COMPLETED"
        assert cluster.log(waiting, "b") == "later\n"
