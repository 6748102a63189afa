"""`gamenode verify attempts`: its words and its number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.bodies import PIPELINE_ID
from tests.support.fake_api import FakeApi, Reply, fake_api
from tests.support.program import Program


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:
        yield served


def verdict(*violations: dict[str, Any], absent: tuple[str, ...] = ()) -> Reply:
    return Reply(
        {
            "ok": not violations,
            "attempts": 12,
            "nodes_asked": 3,
            "nodes_absent": list(absent),
            "violations": list(violations),
        }
    )


OVERLAP: dict[str, Any] = {
    "kind": "OVERLAP",
    "pipeline_id": PIPELINE_ID,
    "step": "game",
    "attempt": 2,
    "run": 1,
    "node_id": "fra-07",
    "message": "it began while attempt 1, run 1, lived on node fra-08",
}


def test_nothing_found_is_0(api: FakeApi) -> None:
    api.on("GET", "/attempts:verify", verdict())
    result = Program(api.url)("verify", "attempts")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "every attempt is as it must be" in result.text


def test_a_violation_is_10_and_stands_in_a_table(api: FakeApi) -> None:
    api.on("GET", "/attempts:verify", verdict(OVERLAP))
    result = Program(api.url)("verify", "attempts")
    assert result.exit_code == 10
    heading, row = result.text.splitlines()[-2:]
    assert heading.split() == ["KIND", "PIPELINE", "STEP", "ATTEMPT", "RUN", "NODE", "MESSAGE"]
    assert row.split()[:6] == ["OVERLAP", PIPELINE_ID[-8:], "game", "2", "1", "fra-07"]
    assert row.endswith(OVERLAP["message"])


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        (
            ("fra-01",),
            "1 node is not connected or did not answer: nothing is said about it (fra-01)\n",
        ),
        (
            ("a", "b", "c", "d", "e", "f"),
            (
                "6 nodes are not connected or did not answer: nothing is said about them"
                " (a, b, c, d, e, …)\n"
            ),
        ),
    ],
)
def test_who_was_not_asked_is_said(api: FakeApi, absent: tuple[str, ...], words: str) -> None:
    api.on("GET", "/attempts:verify", verdict(absent=absent))
    result = Program(api.url)("verify", "attempts", "-o", "json")
    assert (result.exit_code, result.stderr) == (0, words)
