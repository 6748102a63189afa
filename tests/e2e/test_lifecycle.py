"""How the programs start, refuse to start, and leave."""

from __future__ import annotations

import http.client
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
from tests.support.cluster import Cluster, Started, counted, counting, eventually, pipeline, step
from tests.support.signed import signed

from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

STOP_S_MAX = 10.0
FOLLOWED_STOP_S_MAX = 3.0  # nobody is waited for until the grace is over
USAGE, CONFLICT = 2, 6


def _dev_with_work(cluster: Cluster) -> tuple[Started, str]:
    """Start `dev` with a service that lives on and a step that would run for long."""
    dev = cluster.dev()
    service = cluster.create(pipeline(step("game", "sleep 600", type="service")))
    assert cluster.ended(service)["status"] == "COMPLETED"
    pipeline_id = cluster.create(
        pipeline(step("long", "echo here", "sleep 600"), step("tidy", "echo tidied", when="always"))
    )
    cluster.until_step(pipeline_id, "long", "RUNNING")
    return dev, pipeline_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_dev_ends_steps_and_services_and_says_so(cluster: Cluster, number: signal.Signals) -> None:
    dev, pipeline_id = _dev_with_work(cluster)
    assert dev.stop(number) == 0
    assert "steps and services that were started here are ended" in dev.stderr
    assert "ended 2 running step(s) on node local" in dev.stderr
    assert not cluster.below()
    # The ends are known, clean-up included, and nothing is started again.
    cluster.dev()
    ended = cluster.get(f"/pipelines/{pipeline_id}")
    assert (ended["status"], ended["reason"]) == ("CANCELLED", "AGENT_STOPPED")
    assert cluster.log(pipeline_id, "tidy") == "tidied\n"
    assert not cluster.steps()


def test_a_crash_of_dev_ends_nothing_and_the_next_start_adopts(
    cluster: Cluster, tmp_path: Path
) -> None:
    dev = cluster.dev()
    starts, go = tmp_path / "starts", tmp_path / "go"
    pipeline_id = cluster.create(
        pipeline(
            step(
                "a",
                f"echo started >>{starts}",
                f"until [ -e {go} ]; do sleep 0.02; done",
                "echo on",
            )
        )
    )
    cluster.until_step(pipeline_id, "a", "RUNNING")
    steps = set(cluster.steps())
    dev.kill()
    eventually(lambda: set(cluster.below()) <= steps | set(cluster.steps()), "its agent has left")
    assert steps & set(cluster.steps())
    cluster.dev()
    go.touch()
    assert cluster.ended(pipeline_id)["status"] == "COMPLETED"
    assert cluster.log(pipeline_id, "a") == "on\n"
    assert starts.read_text() == "started\n"


@contextmanager
def _taken(address: str) -> Iterator[None]:
    host, _, port = address.partition(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        yield


@pytest.mark.parametrize("program", ["dev", "server"])
@pytest.mark.parametrize("face", ["http", "grpc"])
def test_a_taken_port_is_named_with_the_flag_that_changes_it(
    cluster: Cluster, program: str, face: str
) -> None:
    address = getattr(cluster, face)
    with _taken(address):
        done = cluster.start(
            *(program, "--http", cluster.http, "--grpc", cluster.grpc),
            *("--data", str(cluster.folder / "other")),
            name=program,
        ).done()
    assert done.exit_code == CONFLICT, done
    assert f"error: CONFLICT: cannot listen on {address}" in done.stderr
    assert f"--{face} HOST:PORT" in done.stderr
    assert "Traceback" not in done.stderr
    eventually(lambda: not cluster.below(), "nothing stays behind")


def test_a_data_folder_in_use_is_refused(cluster: Cluster) -> None:
    with_other_ports = Cluster(cluster.folder)
    cluster.server()
    cluster.agent()
    server = with_other_ports.start(
        *("server", "--http", with_other_ports.http, "--grpc", with_other_ports.grpc),
        *("--data", str(cluster.folder / "server")),
        name="second-server",
    ).done()
    agent = cluster.agent_unawaited().done()
    for done, folder in ((server, "server"), (agent, "agent")):
        assert done.exit_code == CONFLICT, done
        assert f"another process uses the folder {cluster.folder}/{folder}" in done.stderr
        assert "--data" in done.stderr
    assert cluster.run(pipeline(step("a", "true"))).exit_code == 0


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080"])
@pytest.mark.parametrize("flag", ["--http", "--grpc"])
def test_who_lets_everybody_in_refuses_an_address_that_others_reach_and_says_why(
    cluster: Cluster, address: str, flag: str
) -> None:
    done = cluster.start(
        *("server", flag, address, "--data", str(cluster.folder / "server")),
        name="server",
        ACCESS__AUTH="none",
    ).done()
    assert done.exit_code == USAGE
    assert f"will not listen on {address}: nobody has to sign in here" in done.stderr
    assert "127.0.0.1" in done.stderr


def test_an_agent_that_leaves_lets_its_steps_run_and_its_node_is_offline_at_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.server()
    agent = cluster.agent()
    starts = tmp_path / "starts"
    run = cluster.run_unawaited(
        pipeline(step("a", f"echo started >>{starts}", counting(200, pause_s=0.01)))
    )
    eventually(lambda: "line 20\n" in run.stdout, "the step prints")
    left_s = time.monotonic()
    assert agent.stop() == 0
    eventually(lambda: not cluster.node()["online"], "the node is offline")
    assert time.monotonic() - left_s < 5.0  # neither the grace nor the timeout
    assert cluster.steps()
    cluster.agent()
    done = run.done()
    assert (done.exit_code, done.stdout) == (0, counted(200))
    assert starts.read_text() == "started\n"


def test_a_server_with_followers_ends_in_time_and_they_go_on_with_the_next(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = cluster.server()
    agent = cluster.agent()
    go = tmp_path / "go"
    pipeline_id = cluster.create(
        pipeline(step("a", "echo here", f"until [ -e {go} ]; do sleep 0.02; done", "echo there"))
    )
    cluster.until_step(pipeline_id, "a", "RUNNING")
    logs = cluster.start("logs", "-f", pipeline_id, name="logs")
    events = cluster.start("events", "-f", "-o", "ndjson", "--after", "0", name="events")
    live = cluster.start("events", "-f", name="live-events")
    eventually(lambda: "here" in logs.stdout, "the log is followed")
    eventually(lambda: "step.running" in events.stdout, "the events are followed")
    with (
        closing(http.client.HTTPConnection(cluster.http, timeout=STOP_S_MAX)) as plain,
        grpc.insecure_channel(cluster.grpc) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        plain.request(
            "GET", "/api/v1/events?follow=true&after=0", headers={"authorization": cluster.bearer}
        )
        stream = plain.getresponse()
        waiting = pool.submit(cluster.request, "GET", f"/api/v1/pipelines/{pipeline_id}?wait=60s")
        stub = pb_grpc.GameNodeServiceStub(signed(channel, cluster.bearer))
        watching = stub.WatchEvents(pb.WatchEventsRequest(after=0))
        following = stub.StreamLogs(
            pb.LogRequest(pipeline_id=pipeline_id, step_id="a", follow=True)
        )
        assert next(iter(watching)).type == "node.registered"
        assert next(iter(following)).text == b"here"

        begun_s = time.monotonic()
        assert server.stop(within_s=STOP_S_MAX) == 0
        assert time.monotonic() - begun_s < FOLLOWED_STOP_S_MAX

        assert waiting.result().json["status"] == "RUNNING"
        assert "node.registered" in stream.read().decode()  # whole, to a clean end
        for call in (watching, following):
            with pytest.raises(grpc.RpcError) as ended:
                for _ in call:
                    pass
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "the server is stopping" in str(ended.value.details())
    assert agent.alive
    cluster.server()
    cluster.until_connected()
    go.touch()
    done = logs.done()
    assert (done.exit_code, done.stdout) == (0, "here\nthere\n")
    eventually(lambda: "pipeline.completed" in events.stdout, "the events go on")
    assert events.stop(signal.SIGINT) == live.stop(signal.SIGINT) == 130
    assert live.stderr.count("is not shown here") <= 1
    assert agent.stderr.count("link.broken") < 20  # it tries again, but not without a pause
    assert '"level": "error"' not in server.stderr
    assert "Traceback" not in server.stderr + agent.stderr + events.stderr


def test_dev_is_ready_with_several_nodes(cluster: Cluster) -> None:
    cluster.dev("--agents", "3")
    nodes = cluster.get("/nodes")["items"]
    assert {node["id"]: node["online"] for node in nodes} == {
        f"local-{number}": True for number in (1, 2, 3)
    }


def test_dev_hands_settings_of_the_environment_to_the_program_that_knows_them(
    cluster: Cluster,
) -> None:
    dev = cluster.start(
        *("dev", "--runtime", "process", "--data", str(cluster.folder)),
        name="dev",
        SERVER__HTTP=cluster.http,
        SERVER__GRPC=cluster.grpc,
        NODES__HEARTBEAT_INTERVAL_S="1.5",
        SESSION__HEARTBEAT_RETRIES="2",
    )
    eventually(lambda: "(online)" in dev.stdout, "its node is online")
    assert cluster.run(pipeline(step("a", "echo hello"))).stdout == "hello\n"


def test_a_setting_that_nobody_knows_is_named(cluster: Cluster) -> None:
    done = cluster.dev_unawaited(NODES__HEARTBEAT_INTREVAL_S="1").done()
    assert done.exit_code == USAGE
    assert "GAMENODE_NODES__HEARTBEAT_INTREVAL_S" in done.stderr
    assert "did you mean nodes.heartbeat_interval_s?" in done.stderr


def test_an_agent_obeys_its_policy_and_dev_reads_none(cluster: Cluster) -> None:
    policy = cluster.folder / "policy.toml"
    policy.write_text("[process]\nallowed = false\n")
    policy.chmod(0o666)
    done = cluster.agent_unawaited(AGENT__POLICY=str(policy)).done()
    assert done.exit_code == USAGE
    assert "written to by others" in done.stderr
    assert f"chmod go-w {policy}" in done.stderr
    policy.chmod(0o644)
    cluster.dev(AGENT__POLICY=str(policy))
    cluster.agent(AGENT__POLICY=str(policy))
    file = pipeline(step("one", "echo here"))
    assert cluster.run(file, "--node", "local").exit_code == 0
    refused = cluster.run(file, "--node", "n1")
    assert "runs no plain processes" in refused.stderr
    assert "POLICY" in refused.stderr
