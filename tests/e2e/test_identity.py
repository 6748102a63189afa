"""Real agents on hosts that are not who they were: cloned, restored, rebooted (RL3, RA2, P1)."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.cluster import Cluster, cluster_in, eventually, pipeline, step

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster in which a duplicate identity is over soon."""
    with cluster_in(tmp_path, NODES__HEARTBEAT_INTERVAL_S="1", NODES__DUPLICATE_HOLD_S="4") as made:
        yield made


def another_boot(folder: Path) -> Sequence[str]:
    """Return the command within which a program sees another boot of the host."""
    boot_id = folder / "boot-id"
    boot_id.write_text("11111111-2222-3333-4444-555555555555\n")
    within = (
        *("unshare", "--mount", "sh", "-c"),
        f'mount --bind {boot_id} {_BOOT_ID} && exec "$@"',
        "sh",
    )
    if os.geteuid() != 0 or subprocess.run((*within, "true"), check=False).returncode != 0:
        pytest.skip("this host does not let root hide its boot id")
    return within


def copy(data: Path, copied: Path) -> None:
    """Copy the folder of an agent, which may be running, as a backup would."""
    shutil.copytree(data, copied, ignore=shutil.ignore_patterns("journal.db*", "lock"))
    with (
        closing(sqlite3.connect(data / "journal.db")) as one,
        closing(sqlite3.connect(copied / "journal.db")) as other,
    ):
        one.backup(other)


def _conditions(cluster: Cluster) -> list[str]:
    return [condition["type"] for condition in cluster.node()["conditions"]]


def _file(folder: Path) -> str:
    """Return a pipeline whose two steps say that they start; the first waits for its gate."""
    gate = f"until [ -e {folder / 'gate'} ]; do sleep 0.02; done"
    starts = folder / "starts"
    return pipeline(step("one", f"echo one >>{starts}", gate), step("two", f"echo two >>{starts}"))


def test_one_data_folder_serves_one_agent(cluster: Cluster) -> None:
    cluster.server()
    cluster.agent()
    second = cluster.agent_unawaited().done()
    assert second.exit_code == 6, second
    assert "another" in second.stderr


def test_a_clone_is_refused_starts_nothing_and_the_node_names_the_cause(
    quick: Cluster, tmp_path: Path
) -> None:
    within = another_boot(tmp_path)
    quick.server()
    quick.agent()
    pipeline_id = quick.create(_file(tmp_path))
    eventually((tmp_path / "starts").exists, "step one runs")
    copy(tmp_path / "agents" / "n1", tmp_path / "agents" / "clone")
    clone = quick.agent_unawaited(data="clone", within=within)
    eventually(lambda: "DUPLICATE_IDENTITY" in _conditions(quick), "the condition names it")
    assert quick.node()["link"]["state"] == "connected"
    (tmp_path / "gate").touch()
    assert quick.ended(pipeline_id)["status"] == "COMPLETED"
    assert (tmp_path / "starts").read_text().split() == ["one", "two"]
    assert "another host is connected as node n1" in clone.stderr
    clone.stop(signal.SIGKILL)
    eventually(lambda: not _conditions(quick), "the condition is over")


def test_a_restored_data_folder_runs_nothing_again(quick: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "agents" / "n1"
    quick.server()
    agent = quick.agent()
    pipeline_id = quick.create(_file(tmp_path))
    eventually((tmp_path / "starts").exists, "step one runs")
    copy(data, tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "snapshot" / "runs")  # as in an engine, that keeps no snapshots
    agent.kill()
    agent = quick.agent()  # a session that the snapshot does not know
    (tmp_path / "gate").touch()
    assert quick.ended(pipeline_id)["status"] == "COMPLETED"
    other = quick.create(pipeline(step("later", f"echo later >>{tmp_path / 'starts'}")))
    assert quick.ended(other)["status"] == "COMPLETED"
    agent.kill()
    shutil.rmtree(data)
    (tmp_path / "snapshot").rename(data)
    quick.agent()
    third = quick.create(pipeline(step("last", f"echo last >>{tmp_path / 'starts'}")))
    assert quick.ended(third)["status"] == "COMPLETED"
    assert (tmp_path / "starts").read_text().split() == ["one", "two", "later", "last"]
    assert quick.get(f"/pipelines/{pipeline_id}")["status"] == "COMPLETED"


def test_a_reboot_leaves_the_outcome_unknown_and_touches_nobody_with_the_old_number(
    quick: Cluster, tmp_path: Path
) -> None:
    within = another_boot(tmp_path)
    quick.server()
    agent = quick.agent()
    pipeline_id = quick.create(_file(tmp_path))
    eventually((tmp_path / "starts").exists, "step one runs")
    agent.kill()
    for pid in quick.steps():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not quick.steps(), "nothing outlives a reboot")
    with subprocess.Popen((sys.executable, "-c", "input()"), stdin=subprocess.PIPE) as stranger:
        # Its number is the one that the supervisor had before.
        stat = Path(f"/proc/{stranger.pid}/stat").read_text()
        (run,) = (tmp_path / "agents" / "n1" / "runs").glob(f"{pipeline_id}.one.*")
        (run / "supervisor").write_text(stat)
        quick.agent_unawaited(within=within)
        ended = quick.ended(pipeline_id)
        assert stranger.poll() is None
        stranger.kill()
    assert (ended["status"], ended["reason"]) == ("FAILED", "OUTCOME_UNKNOWN"), ended
    assert (tmp_path / "starts").read_text().split() == ["one"]
