"""Events and their readers: nothing is missed and nothing comes twice (H2)."""

from __future__ import annotations

import json
import signal
from typing import Any

import grpc
from tests.support.cluster import Cluster, Started, eventually, pipeline, step
from tests.support.signed import signed

from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc


def _read(follower: Started) -> list[dict[str, Any]]:
    return [json.loads(line) for line in follower.stdout.splitlines()]


def _follow(cluster: Cluster, *arguments: str) -> Started:
    return cluster.start("events", "-f", "-o", "ndjson", *arguments, name="events")


def _run_one(cluster: Cluster) -> str:
    pipeline_id = cluster.create(pipeline(step("a", "true")))
    assert cluster.ended(pipeline_id)["status"] == "COMPLETED"
    return pipeline_id


def test_a_follower_resumes_from_its_cursor_and_loses_nothing(cluster: Cluster) -> None:
    server = cluster.server()
    cluster.agent()
    first = _follow(cluster, "--after", "0")
    _run_one(cluster)
    eventually(lambda: "pipeline.completed" in first.stdout, "the first follower sees the end")
    assert first.stop(signal.SIGINT) == 130
    _run_one(cluster)  # nobody follows
    second = _follow(cluster, "--after", str(_read(first)[-1]["id"]))
    eventually(lambda: "pipeline.completed" in second.stdout, "the second follower sees the end")
    server.kill()
    cluster.server()
    cluster.until_connected()
    last = _run_one(cluster)
    eventually(
        lambda: any(
            event["type"] == "pipeline.completed" and event["entity_id"] == last
            for event in _read(second)
        ),
        "the second follower goes on after the crash",
    )
    second.stop(signal.SIGINT)
    seen = _read(first) + _read(second)
    stored = cluster.get("/events?limit=1000")["items"]
    assert seen == stored[: len(seen)]
    assert [event["id"] for event in seen] == sorted({event["id"] for event in seen})


def test_every_face_tells_the_same_events_in_the_same_order(shared: Cluster) -> None:
    pipeline_id = _run_one(shared)
    stored = shared.get(f"/events?entity={pipeline_id}")["items"]
    types = [event["type"] for event in stored]
    assert types == [
        "pipeline.created",
        "pipeline.dispatched",
        "pipeline.running",
        "step.running",
        "step.completed",
        "pipeline.completed",
    ]
    shown = shared.command("events", "--entity", pipeline_id, "-o", "json")
    assert json.loads(shown.stdout)["items"] == stored
    watched = []
    with grpc.insecure_channel(shared.grpc) as channel:
        stub = pb_grpc.GameNodeServiceStub(signed(channel, shared.bearer))
        for event in stub.WatchEvents(pb.WatchEventsRequest(after=0), timeout=20.0):
            if event.entity_id.startswith(pipeline_id):
                watched.append((event.id, event.type))
            if event.id == stored[-1]["id"]:
                break
    assert watched == [(event["id"], event["type"]) for event in stored]


def test_a_cursor_ahead_of_the_head_is_an_error_that_says_so(shared: Cluster) -> None:
    answer = shared.request("GET", "/api/v1/events?after=999999999")
    assert (answer.status, answer.json["code"]) == (410, "CURSOR_EXPIRED")
    done = shared.command("events", "-f", "--after", "999999999")
    assert done.exit_code == 6
    assert "CURSOR_EXPIRED" in done.stderr
