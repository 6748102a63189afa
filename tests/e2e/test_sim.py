"""`gamenode sim` against a real server: what it does to the fleet, and what it says of it."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import Any

import grpc
import psutil
import pytest
from tests.support.cluster import Cluster, eventually, pipeline, step

from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc


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


FLOODERS = 4
METRICS_A_REPORT = 1_000
FLOOD_S = 90
SERVER_BYTES_MAX = 768 * 1024 * 1024


@pytest.mark.soak
def test_a_flood_of_logs_and_metrics_takes_nobody_offline_and_memory_stays_bounded(
    cluster: Cluster,
) -> None:
    server = cluster.server()
    cluster.agent("real")
    sim = cluster.start(
        *("sim", "--nodes", "1000", "--server", cluster.grpc, "--duration", f"{FLOOD_S + 40}s"),
        *("-o", "json"),
        name="sim",
    )
    eventually(lambda: "online 1000/1000" in sim.stderr, "every node is online", within_s=120.0)
    until_s = time.monotonic() + FLOOD_S
    # Some 20 MB a second each, for as long as the disk of a small machine bears it.
    flooding = pipeline(
        step(
            "flood",
            f"i=0; while [ $i -lt {FLOOD_S * 5} ]; do"
            f" yes {'0123456789' * 10} | head -c 4000000; sleep 0.2; i=$((i+1)); done",
        )
    )
    pipelines = [cluster.create(flooding, node="real") for _ in range(2)]
    reports = [0] * FLOODERS
    threads = [
        threading.Thread(target=_flood_metrics, args=(cluster.grpc, number, until_s, reports))
        for number in range(FLOODERS)
    ]
    for thread in threads:
        thread.start()
    most_bytes = 0
    while time.monotonic() < until_s:
        most_bytes = max(most_bytes, psutil.Process(server.pid).memory_info().rss)
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    logged = [cluster.get(f"/pipelines/{each}")["status"] for each in pipelines]
    done = sim.done(within_s=120.0)
    print(f"{sum(reports)} reports, the server's most: {most_bytes / 2**20:.0f} MiB, {logged}")
    print(done.stdout)
    assert done.exit_code == 0, done.stderr
    assert _promises(json.loads(done.stdout))["P8"] == "kept"
    assert all(reports)
    assert most_bytes < SERVER_BYTES_MAX


def _flood_metrics(address: str, number: int, until_s: float, reports: list[int]) -> None:
    """Send reports of a simple client as fast as they are answered."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GameNodeServiceStub(channel)
        stub.Register(
            pb.RegisterRequest(
                node_id=f"flood-{number}",
                node_type=pb.NODE_TYPE_VIRTUAL,
                hardware=pb.HardwareInfo(
                    cpu=[pb.CPUInfo(architecture="x86_64", cores=1)],
                    memory=pb.MemoryInfo(total_bytes=2**30),
                ),
                software=pb.SoftwareInfo(
                    os=pb.OSInfo(distribution="debian", version="12"),
                    kernel=pb.KernelInfo(major=6, minor=1, patch=0),
                ),
            )
        )
        report = pb.MetricsReport(
            node_id=f"flood-{number}",
            metrics=[
                pb.Metric(name="host_load1", value=1.0, labels={"series": str(series)})
                for series in range(METRICS_A_REPORT)
            ],
        )
        while time.monotonic() < until_s:
            try:
                stub.ReportMetrics(report, timeout=30.0)
                reports[number] += 1
            except grpc.RpcError:
                time.sleep(0.1)  # it is told when it sends too much
