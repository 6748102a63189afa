"""The records of attempts, compared on real hosts."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.cluster import Cluster, pipeline, step

DIFFERENT = 10


def _kinds(cluster: Cluster) -> list[str]:
    return [found["kind"] for found in cluster.get("/attempts:verify")["violations"]]


def test_records_agree_until_somebody_moves_a_run_s_folder(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.dev()
    service = cluster.create(pipeline(step("game", "sleep 600", type="service")))
    assert cluster.ended(service)["status"] == "COMPLETED"
    running = cluster.create(pipeline(step("long", "sleep 600")))
    cluster.until_step(running, "long", "RUNNING")
    good = cluster.command("verify", "attempts")
    assert (good.exit_code, good.stderr) == (0, "")
    assert _kinds(cluster) == []
    # Hidden from the agent, as if a person had removed it.
    (folder,) = cluster.folder.rglob(f"{running}.long.1.1")
    hidden = tmp_path / "hidden"
    shutil.move(folder, hidden)
    bad = cluster.command("verify", "attempts")
    assert bad.exit_code == DIFFERENT
    assert "MISSING" in bad.stdout
    shutil.move(hidden, folder)
    assert _kinds(cluster) == []
