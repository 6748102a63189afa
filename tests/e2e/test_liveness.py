"""When a node counts as offline, and when not (P7, P8)."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.cluster import Cluster, cluster_in, counted, counting, eventually, pipeline, step

INTERVAL_S, TIMEOUT_S, GRACE_S, CHECK_S = 0.5, 3.0, 1.0, 0.1
SLACK_S = 1.5  # of a busy machine


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Cluster]:
    """A server that judges as ever, only sooner."""
    with cluster_in(
        tmp_path,
        NODES__HEARTBEAT_INTERVAL_S=str(INTERVAL_S),
        NODES__HEARTBEAT_TIMEOUT_S=str(TIMEOUT_S),
        NODES__RECONNECT_GRACE_S=str(GRACE_S),
        NODES__JUDGE_INTERVAL_S=str(CHECK_S),
    ) as made:
        yield made


def _events(cluster: Cluster, type_: str) -> list[str]:
    return [event["message"] for event in cluster.get(f"/events?type={type_}")["items"]]


def test_a_silent_agent_is_offline_after_the_timeout_and_not_before(hasty: Cluster) -> None:
    hasty.server()
    agent = hasty.agent()
    beat = hasty.node()["last_heartbeat_at"]
    eventually(lambda: hasty.node()["last_heartbeat_at"] != beat, "a heartbeat")
    agent.send(signal.SIGSTOP)
    silent_s = time.monotonic()
    # Its connection stands: silence alone must not count before the timeout.
    eventually(lambda: not hasty.node()["online"], "the node is offline")
    took_s = time.monotonic() - silent_s
    assert TIMEOUT_S - INTERVAL_S - 0.2 <= took_s <= TIMEOUT_S + CHECK_S + SLACK_S
    assert "no heartbeat for" in _events(hasty, "node.offline")[0]
    agent.send(signal.SIGCONT)
    hasty.until_connected()
    assert hasty.run(pipeline(step("a", "true"))).exit_code == 0


def test_a_broken_connection_is_offline_after_the_grace_and_its_work_is_kept(
    hasty: Cluster, tmp_path: Path
) -> None:
    hasty.server()
    agent = hasty.agent()
    go = tmp_path / "go"
    pipeline_id = hasty.create(
        pipeline(step("a", f"until [ -e {go} ]; do sleep 0.02; done", "echo done"))
    )
    hasty.until_step(pipeline_id, "a", "RUNNING")
    agent.kill()
    broken_s = time.monotonic()
    eventually(lambda: not hasty.node()["online"], "the node is offline")
    took_s = time.monotonic() - broken_s
    assert GRACE_S - 0.2 <= took_s <= GRACE_S + CHECK_S + SLACK_S
    assert took_s < TIMEOUT_S
    assert "connection broke" in _events(hasty, "node.offline")[0]
    assert hasty.get(f"/pipelines/{pipeline_id}")["status"] == "RUNNING"
    hasty.agent()
    go.touch()
    assert hasty.ended(pipeline_id)["status"] == "COMPLETED"


def test_an_agent_that_is_back_within_the_grace_was_never_offline(hasty: Cluster) -> None:
    hasty.server()
    agent = hasty.agent()
    agent.kill()
    hasty.agent_unawaited()
    eventually(lambda: len(_events(hasty, "node.registered")) == 2, "the agent is back")
    hasty.until_connected()
    assert _events(hasty, "node.offline") == []


def test_no_node_is_offline_across_restarts_of_the_server(hasty: Cluster) -> None:
    server = hasty.server()
    hasty.agent("n1")
    hasty.agent("n2")
    for number in (signal.SIGKILL, signal.SIGTERM):
        server.stop(number)
        server = hasty.server()
        # From the first answer on: nobody was seen yet, and nobody is judged.
        assert [node["online"] for node in hasty.get("/nodes")["items"]] == [True, True]
        hasty.until_connected("n1")
        hasty.until_connected("n2")
    time.sleep(GRACE_S + 4 * CHECK_S)  # longer than any judgement could still take
    assert _events(hasty, "node.offline") == []
    assert len(_events(hasty, "node.online")) == 2


def test_a_node_that_died_with_the_server_is_offline_a_timeout_after_the_next_is_ready(
    hasty: Cluster,
) -> None:
    server, agent = hasty.server(), hasty.agent()
    agent.kill()
    server.kill()
    hasty.server()
    ready_s = time.monotonic()
    eventually(lambda: not hasty.node()["online"], "the node is offline")
    assert TIMEOUT_S - 0.5 <= time.monotonic() - ready_s <= TIMEOUT_S + CHECK_S + SLACK_S


def test_a_server_that_stalls_takes_nobody_for_offline(hasty: Cluster) -> None:
    server = hasty.server()
    hasty.agent()
    run = hasty.run_unawaited(pipeline(step("a", counting(400, pause_s=0.01))))
    eventually(lambda: "line 10\n" in run.stdout, "the step prints")
    server.send(signal.SIGSTOP)
    time.sleep(TIMEOUT_S + 1.0)  # the stall itself
    server.send(signal.SIGCONT)
    done = run.done()
    assert (done.exit_code, done.stdout) == (0, counted(400))
    assert _events(hasty, "node.offline") == []
