"""Clients that we did not write: built from the public pages alone, or from reflection alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.cluster import Cluster, eventually, pipeline, step
from tests.support.dynamic_rpc import DynamicClient, Reflection, compiled
from tests.support.signed import signed

SERVICE = "gamenode.v1.GameNodeService"
PROTO = Path(__file__).parents[1] / "support" / "third_party.proto"
NODE = "third-party"
HARDWARE = {
    "cpu": {"cores": 8, "architecture": "x86_64"},
    "memory": {"total_bytes": 32 * 2**30},
}
SOFTWARE = {
    "os": {"distribution": "debian", "version": "12"},
    "kernel": {"major": 6, "minor": 1, "patch": 0},
}
PENDING, RUNNING, COMPLETED, FAILED = range(4)


@pytest.fixture(scope="module")
def channel(shared: Cluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(shared.grpc) as channel:
        yield signed(channel, shared.bearer)


@pytest.fixture(scope="module")
def third_party(channel: grpc.Channel, tmp_path_factory: pytest.TempPathFactory) -> DynamicClient:
    return DynamicClient(channel, compiled(PROTO, tmp_path_factory.mktemp("proto")), SERVICE)


def _registered(client: DynamicClient) -> Any:
    return client.call("Register", node_id=NODE, node_type=1, hardware=HARDWARE, software=SOFTWARE)


def test_a_third_party_registers_beats_and_reports(
    shared: Cluster, third_party: DynamicClient
) -> None:
    answer = _registered(third_party)
    assert answer.accepted, answer.message
    assert answer.session_id
    assert answer.heartbeat_interval_s > 0
    node = shared.node(NODE)
    assert (node["type"], node["online"], node["state"]) == ("physical", True, "normal")
    for session in (answer.session_id, ""):
        beat = third_party.call(
            "Heartbeat", node_id=NODE, timestamp=time.time_ns(), session_id=session
        )
        assert beat.status == 1, beat.message
    metrics = [
        {"name": "host_load1", "type": "gauge", "value": 0.5},
        {"name": "host_cpu_usage_ratio", "value": 0.25, "labels": {"cpu": "0"}},
    ]
    assert third_party.call(
        "ReportMetrics", node_id=NODE, timestamp=time.time_ns(), metrics=metrics
    ).accepted
    assert third_party.call(
        "UpdateResourceInfo",
        node_id=NODE,
        timestamp=time.time_ns(),
        hardware={**HARDWARE, "memory": {"total_bytes": 64 * 2**30}},
        software=SOFTWARE,
    ).accepted


def test_a_third_party_executes_reads_the_log_and_cancels(
    shared: Cluster, third_party: DynamicClient
) -> None:
    wanted = {
        "node_id": "n1",
        "file": pipeline(
            {"name": "say", "container": {"command": ["echo", "${{ args.WHO }}"]}},
            step("long", "sleep 600"),
            args=["WHO"],
        ),
        "args": {"WHO": "you"},
        "idempotency_key": "third-party-1",
    }
    started = third_party.call("Execute", **wanted)
    assert third_party.call("Execute", **wanted).pipeline_id == started.pipeline_id
    assert started.status == PENDING
    shared.until_step(started.pipeline_id, "long", "RUNNING")
    (line,) = third_party.call(
        "StreamLogs", pipeline_id=started.pipeline_id, step_id="say", follow=True
    )
    assert (line.text, line.stream, line.sequence, line.offset) == (b"you", "stdout", 1, 0)
    assert line.next_offset > 0
    assert third_party.call("Cancel", pipeline_id=started.pipeline_id, reason="enough").accepted
    assert shared.ended(started.pipeline_id)["status"] == "CANCELLED"


def test_a_third_partys_node_runs_what_names_it_without_sessions_and_attempts(
    shared: Cluster, third_party: DynamicClient
) -> None:
    _registered(third_party)
    pipeline_id = third_party.call(
        "Execute", node_id=NODE, file=pipeline(step("a", "true"), step("b", "true"))
    ).pipeline_id
    # It finds its work where everybody sees it: in the API and in the events.
    eventually(
        lambda: shared.get(f"/pipelines/{pipeline_id}")["node_id"] == NODE,
        "it is bound to the node",
    )
    for name in ("a", "b"):
        for status, more in (
            (RUNNING, {"start_time": time.time_ns()}),
            (COMPLETED, {"end_time": time.time_ns(), "logs": b"from elsewhere\n"}),
        ):
            answer = third_party.call(
                "UpdateStepStatus", pipeline_id=pipeline_id, step_id=name, status=status, **more
            )
            assert answer.accepted, answer
    assert third_party.call(
        "UpdatePipelineStatus", pipeline_id=pipeline_id, status=COMPLETED
    ).accepted
    ended = shared.ended(pipeline_id)
    assert [each["status"] for each in ended["steps"]] == ["COMPLETED", "COMPLETED"]
    assert ended["status"] == "COMPLETED"
    assert shared.log(pipeline_id, "a") == "from elsewhere\n"
    # A late word changes nothing any more (P4).
    late = third_party.call("UpdateStepStatus", pipeline_id=pipeline_id, step_id="a", status=FAILED)
    assert not late.accepted
    assert shared.get(f"/pipelines/{pipeline_id}") == ended


def test_reflection_alone_is_enough_to_list_and_call_the_service(
    shared: Cluster, channel: grpc.Channel
) -> None:
    reflection = Reflection(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(reflection.services())
    client = DynamicClient(channel, reflection.files(SERVICE), SERVICE)
    pipeline_id = client.call("Execute", file=pipeline(step("a", "echo found"))).pipeline_id
    assert shared.ended(pipeline_id)["status"] == "COMPLETED"
    lines = client.call("StreamLogs", pipeline_id=pipeline_id, step_id="a", follow=True)
    assert [line.text for line in lines] == [b"found"]


def _health(channel: grpc.Channel, service: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10.0)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_served(channel: grpc.Channel, service: str) -> None:
    answer = _health(channel, service)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_health_of_an_unknown_service_is_an_error(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as unknown:
        _health(channel, "nobody")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
