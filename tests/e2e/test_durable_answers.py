"""What is answered is on the disk: no OK before its fdatasync, no process before its journal entry.

Seen from outside, by the system calls of the running programs (P5, P1, RA2).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.cluster import Cluster, pipeline, step
from tests.support.traced import traced

CALLERS = 8
CREATES_EACH = 5

_SENDS = ("sendto", "sendmsg", "write", "writev")
_WRITES = ("pwrite64", "write")
_RENAMES = ("rename", "renameat", "renameat2")


def _file(name: str) -> str:
    return pipeline(step("a", "true"), name=name)


def test_every_accepted_pipeline_is_synchronised_before_its_answer_is_sent(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = cluster.server()
    names = [f"durable-{number}" for number in range(CALLERS * CREATES_EACH)]
    calls = ("fsync", "fdatasync", *{*_WRITES, *_SENDS})
    with (
        traced(server.pid, tmp_path / "trace", calls) as trace,
        ThreadPoolExecutor(CALLERS) as pool,
    ):
        # Side by side, so that several share a commit.
        created = list(pool.map(lambda name: cluster.create(_file(name)), names))
    for pipeline_id in created:
        (answer,) = trace.of(_SENDS, "HTTP/1.1 201", pipeline_id)
        # The first one: its page may be written again by the commits that follow.
        written = next(trace.of(_WRITES, "gamenode.db-wal", pipeline_id))
        assert trace.is_durable_before(written, "gamenode.db-wal", answer), pipeline_id


def test_every_try_is_in_the_synchronised_journal_before_anything_of_it_is_made(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.server()
    agent = cluster.agent()
    calls = ("fsync", "fdatasync", *_WRITES, *_RENAMES)
    with traced(agent.pid, tmp_path / "trace", calls) as trace:
        pipeline_id = cluster.create(pipeline(step("one", "true"), step("two", "true")))
        assert cluster.ended(pipeline_id)["status"] == "COMPLETED"
    for name in ("one", "two"):
        run = f"{pipeline_id}.{name}.1.1"
        (made,) = trace.of(_RENAMES, "/.new-", f'/{run}"')
        written = [
            call
            for call in trace.of(_WRITES, "journal.db-wal", pipeline_id, name)
            if call.begun < made.begun
        ]
        assert written, f"step {name} was made before it was written"
        assert trace.is_durable_before(written[-1], "journal.db-wal", made), name
