"""`gamenode sim` against a real server: what it does to the fleet, and what it says of it."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest
from tests.support.cluster import Cluster, eventually


def _promises(outcome: Any) -> dict[str, str]:
    return {found["promise"]: found["verdict"] for found in outcome["promises"]}


def _figures(outcome: Any) -> dict[str, Any]:
    return {figure["name"]: figure["value"] for figure in outcome["figures"]}


def test_two_hundred_nodes_with_faults_keep_every_promise(cluster: Cluster) -> None:
    cluster.server()
    sim = cluster.start(
        *("sim", "--nodes", "200", "--server", cluster.grpc, "--duration", "20s", "--seed", "1"),
        *("--faults", "partition=0.3/8s,kill=0.3/2s,silence=0.1/4s,slow=0.02/1s,skew=0.02"),
        *("--interval", "1s", "-o", "json"),
        name="sim",
    )
    eventually(lambda: "online 200/200" in sim.stderr, "every node is online")
    selected = cluster.get("/nodes?selector=host/simulated=true,gpu.model~A10&limit=1000")
    assert len(selected["items"]) == 100
    text = json.dumps(
        {
            "name": "hello",
            "steps": [
                {"name": "a", "container": {"image": "x", "environment": {"FAKE_STDOUT": "hi\n"}}}
            ],
        }
    )
    pipelines = [cluster.create(text) for _ in range(20)]
    assert {cluster.ended(each)["status"] for each in pipelines} == {"COMPLETED"}
    done = sim.done()
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["seed"] == 1
    assert set(_promises(outcome).values()) == {"kept"}
    figures = _figures(outcome)
    assert all(figures[f"strikes_{kind}"] for kind in ("partition", "kill", "silence"))
    assert figures["heartbeats_answered"] >= 200


def test_a_simulation_without_a_server_says_so(cluster: Cluster) -> None:
    done = cluster.command("sim", "--nodes", "2", "--server", cluster.grpc, "--duration", "500ms")
    assert done.exit_code == 7
    assert "no node could register" in done.stderr
    assert done.stdout == ""


def test_a_simulation_ends_early_with_its_verdict(cluster: Cluster) -> None:
    cluster.server()
    sim = cluster.start(
        *("sim", "--nodes", "3", "--server", cluster.grpc, "--interval", "100ms"), name="sim"
    )
    eventually(lambda: "online 3/3" in sim.stderr, "every node is online")
    assert sim.stop(signal.SIGINT) == 0
    assert "VERDICT" in sim.stdout
    eventually(
        lambda: not any(node["online"] for node in cluster.get("/nodes")["items"]),
        "every agent said goodbye",
    )


@pytest.mark.soak
def test_nobody_flaps_in_ten_minutes_nor_when_the_server_is_killed(cluster: Cluster) -> None:
    server = cluster.server()
    sim = cluster.start(
        *("sim", "--nodes", "1000", "--server", cluster.grpc, "--duration", "10m"),
        *("--faults", "partition=0.01/70s,kill=0.01/20s,silence=0.005/70s,slow=0.02,skew=0.01"),
        *("-o", "json"),
        name="sim",
    )
    eventually(lambda: "online 1000/1000" in sim.stderr, "every node is online", within_s=60.0)
    time.sleep(240.0)  # the first half of what is measured
    server.kill()
    cluster.server()
    done = sim.done(within_s=600.0)
    assert done.exit_code == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    promises = _promises(outcome)
    assert promises.pop("P1") == "untried"
    assert set(promises.values()) == {"kept"}, outcome
    assert _figures(outcome)["server_lost"] == 1
