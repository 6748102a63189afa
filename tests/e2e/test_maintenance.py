"""Maintenance through the real entry points: wanted, pushed, confirmed (E, P12)."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, eventually, pipeline, step

NORMAL, MAINTENANCE, DISABLED = "normal", "maintenance", "disabled"
ALLOWED = [
    (NORMAL, MAINTENANCE),
    (NORMAL, DISABLED),
    (MAINTENANCE, NORMAL),
    (MAINTENANCE, DISABLED),
    (DISABLED, NORMAL),
]
COMMANDS = {NORMAL: "enable", MAINTENANCE: "maintenance", DISABLED: "disable"}
WAITING = "until [ -e {go} ]; do sleep 0.02; done"


def change(cluster: Cluster, state: str, *options: str) -> Any:
    return cluster.command("nodes", COMMANDS[state], "n1", "--yes", *options)


def confirmed(cluster: Cluster) -> bool:
    found = cluster.node()["state_change"]
    return found is not None and found["confirmed_at"] is not None


def states_of(cluster: Cluster, type_: str) -> list[str]:
    return [event["status"] for event in cluster.get(f"/events?type={type_}")["items"]]


def test_every_allowed_change_is_confirmed_by_a_live_agent(cluster: Cluster) -> None:
    cluster.server()
    cluster.agent()
    walk = [MAINTENANCE, NORMAL, DISABLED, NORMAL, MAINTENANCE, DISABLED, NORMAL]
    assert {*zip([NORMAL, *walk], walk, strict=False)} == {*ALLOWED}
    for version, state in enumerate(walk, start=2):
        done = change(cluster, state, "--reason", f"to {state}", "--wait")
        assert done.exit_code == 0, done.stderr
        found = cluster.node()
        assert found["state"] == state
        assert found["state_change"]["version"] == version
        assert found["state_change"]["reason"] == f"to {state}"
        moments = [
            found["state_change"][f"{what}_at"] for what in ("requested", "pushed", "confirmed")
        ]
        assert moments == sorted(moments)
    assert states_of(cluster, "node.state_requested") == walk
    assert states_of(cluster, "node.state_confirmed") == walk


def test_what_is_not_allowed_is_a_conflict_and_the_same_again_changes_nothing(
    cluster: Cluster,
) -> None:
    cluster.server()
    cluster.agent()
    assert change(cluster, NORMAL).exit_code == 0
    assert cluster.node()["state_change"] is None
    change(cluster, DISABLED, "--wait")
    refused = change(cluster, MAINTENANCE)
    assert refused.exit_code == 6
    assert "CONFLICT" in refused.stderr
    assert change(cluster, DISABLED).exit_code == 0
    assert cluster.node()["state_change"]["version"] == 2


def test_in_maintenance_nothing_starts_and_what_runs_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.server()
    cluster.agent()
    go = tmp_path / "go"
    running = cluster.create(
        pipeline(step("a", WAITING.format(go=go)), step("b", "echo later steps run"))
    )
    cluster.until_step(running, "a", "RUNNING")
    assert change(cluster, MAINTENANCE, "--wait").exit_code == 0
    assert cluster.node()["state_change"]["remaining"] == 1
    waiting = cluster.create(pipeline(step("a", "echo not yet")))
    go.touch()
    assert cluster.ended(running)["status"] == "COMPLETED"
    assert "later steps run" in cluster.log(running, "b")
    assert "in maintenance" in cluster.get(f"/pipelines/{waiting}")["message"]
    change(cluster, NORMAL, "--wait")
    assert cluster.ended(waiting)["status"] == "COMPLETED"


def test_disabled_ends_everything_before_it_is_confirmed_and_nothing_starts(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.server()
    cluster.agent()
    stubborn = cluster.create(pipeline(step("a", "trap '' TERM", "while :; do sleep 0.05; done")))
    cluster.until_step(stubborn, "a", "RUNNING")
    assert change(cluster, DISABLED, "--reason", "sold", "--wait").exit_code == 0
    # Confirmed: nothing of it lives any more.
    assert cluster.steps() == []
    ended = cluster.ended(stubborn)
    assert (ended["status"], ended["reason"]) == ("CANCELLED", "NODE_DISABLED")
    started = tmp_path / "started"
    waiting = cluster.create(pipeline(step("a", f"touch {started}")))
    eventually(lambda: cluster.get(f"/pipelines/{waiting}")["waiting"], "it says why it waits")
    assert cluster.node()["online"]
    assert not started.exists()
    change(cluster, NORMAL, "--wait")
    assert cluster.ended(waiting)["status"] == "COMPLETED"


@pytest.mark.parametrize("state", [MAINTENANCE, DISABLED])
def test_an_offline_node_gets_its_state_when_it_is_back(
    cluster: Cluster, tmp_path: Path, state: str
) -> None:
    cluster.server()
    agent = cluster.agent()
    go, after = tmp_path / "go", tmp_path / "after"
    running = cluster.create(
        pipeline(step("a", WAITING.format(go=go)), step("b", f"touch {after}"))
    )
    cluster.until_step(running, "a", "RUNNING")
    agent.kill()
    eventually(lambda: cluster.node()["link"]["state"] != "connected", "the stream is gone")
    assert change(cluster, state).exit_code == 0
    assert not confirmed(cluster)
    cluster.agent_unawaited()
    eventually(lambda: confirmed(cluster), "the agent has confirmed")
    go.touch()
    status = cluster.ended(running)["status"]
    assert (status, after.exists()) == (
        ("COMPLETED", True) if state == MAINTENANCE else ("CANCELLED", False)
    )


def test_a_state_outlives_restarts_of_agent_and_server(cluster: Cluster) -> None:
    server = cluster.server()
    agent = cluster.agent()
    change(cluster, DISABLED, "--wait")
    agent.stop()
    # A disabled node registers, beats and counts as online, also after its agent restarted (E5).
    agent = cluster.agent()
    assert cluster.node()["state"] == DISABLED
    server.kill()
    cluster.server()
    cluster.until_connected()
    assert cluster.node()["state"] == DISABLED
    agent.kill()
    cluster.agent()
    assert change(cluster, NORMAL, "--wait").exit_code == 0
    assert cluster.run(pipeline(step("a", "true"))).exit_code == 0


def test_a_server_that_dies_between_push_and_confirmation_pushes_again(
    cluster: Cluster,
) -> None:
    server = cluster.server()
    agent = cluster.agent()
    agent.send(signal.SIGSTOP)  # it reads the push, at the earliest, when it goes on
    assert change(cluster, MAINTENANCE).exit_code == 0
    eventually(lambda: cluster.node()["state_change"]["pushed_at"], "it is pushed")
    server.kill()
    agent.send(signal.SIGCONT)
    cluster.server()
    eventually(lambda: confirmed(cluster), "the agent has confirmed to the next server")


def test_a_drain_ends_what_still_runs_at_its_deadline_and_the_node_comes_back_by_itself(
    cluster: Cluster,
) -> None:
    cluster.server()
    cluster.agent()
    running = cluster.create(pipeline(step("a", "sleep 600")))
    cluster.until_step(running, "a", "RUNNING")
    done = change(
        cluster, MAINTENANCE, "--drain", "--deadline", "1s", "--then", "end", "--until", "+5s"
    )
    assert done.exit_code == 0, done.stderr
    ended = cluster.ended(running)
    assert (ended["status"], ended["reason"]) == ("CANCELLED", "DRAINED")
    eventually(lambda: cluster.node()["state"] == NORMAL, "the node works again")


def test_a_selector_changes_many_nodes_after_a_preview(cluster: Cluster) -> None:
    cluster.server()
    for node, zone in (("n1", "a"), ("n2", "a"), ("n3", "b")):
        cluster.agent(node)
        assert cluster.command("nodes", "label", node, f"zone={zone}").exit_code == 0
    assert cluster.command("nodes", "disable", "n2", "--yes").exit_code == 0
    preview = cluster.command("nodes", "maintenance", "-l", "zone=a", "--dry-run")
    assert preview.exit_code == 0
    assert cluster.node("n1")["state"] == NORMAL
    done = cluster.command("nodes", "maintenance", "-l", "zone=a", "--yes", "-o", "csv")
    assert done.exit_code == 6  # one of them was refused
    assert cluster.node("n1")["state"] == MAINTENANCE
    assert cluster.node("n2")["state"] == DISABLED
    assert cluster.node("n3")["state"] == NORMAL


def test_a_removed_node_is_told_so_and_does_not_come_back_by_itself(cluster: Cluster) -> None:
    cluster.server()
    cluster.agent()
    running = cluster.create(pipeline(step("a", "sleep 600")))
    cluster.until_step(running, "a", "RUNNING")
    refused = cluster.command("nodes", "remove", "n1", "--yes")
    assert refused.exit_code == 6
    cluster.command("pipelines", "cancel", running)
    cluster.ended(running)
    assert cluster.command("nodes", "remove", "n1", "--yes").exit_code == 0
    agents = [text for name, text in cluster.said() if "agent" in name]
    assert agents
    eventually(
        lambda: any("was removed" in text for name, text in cluster.said() if "agent" in name),
        "the agent says why",
    )
    assert cluster.command("nodes", "show", "n1").exit_code == 5
