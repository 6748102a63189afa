"""`gamenode pipelines plan|explain`: their words and their numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bodies import PIPELINE_ID, explanation, node_verdict, pipeline, plan, step
from tests.support.fake_api import FakeApi, Reply, fake_api
from tests.support.program import Program


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:
        yield served


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "start.yaml"
    path.write_text("name: start-game\n")
    return str(path)


NOWHERE = plan(
    node_verdict("fra-07", ("OFFLINE", "offline"), ("BUSY", "at its limit of pipelines (2 of 2)")),
    node_verdict("fra-08", ("SELECTOR", "does not match zone=b"), never=True),
    fits=False,
    node_id=None,
    summary="must wait: 2 nodes: 1 does not match zone=b, 1 offline",
    next_step="see to the host",
)


def test_a_plan_shows_every_node_with_everything_against_it(api: FakeApi, file: str) -> None:
    api.on("POST", "/pipelines:plan", Reply(NOWHERE))
    result = Program(api.url)(
        "pipelines", "plan", file, "-a", "X=1", "-e", "Y=2", "-l", "zone=b", "--node", "fra-07"
    )
    assert result.exit_code == 0
    assert api.seen[-1].json() == {
        "file": "name: start-game\n",
        "args": {"X": "1"},
        "envs": {"Y": "2"},
        "node": "fra-07",
        "selector": "zone=b",
    }
    assert [line.split(maxsplit=1) for line in result.text.splitlines()[:6]] == [
        ["NAME", "start-game"],
        ["SUMMARY", "must wait: 2 nodes: 1 does not match zone=b, 1 offline"],
        ["NODES", "2"],
        ["FIT_NOW", "0"],
        ["MUST_WAIT", "1"],
        ["NEVER_FIT", "1"],
    ]
    assert [line.split(maxsplit=2) for line in result.text.splitlines()[-3:]] == [
        ["NODE", "FITS", "WHY_NOT"],
        ["fra-07", "later", "offline; at its limit of pipelines (2 of 2)"],
        ["fra-08", "never", "does not match zone=b"],
    ]
    assert "NEXT_STEP  see to the host" in result.text


@pytest.mark.parametrize(
    ("answer", "options", "exit_code"),
    [(plan(), ["--exit-code"], 0), (NOWHERE, [], 0), (NOWHERE, ["--exit-code"], 10)],
)
def test_with_exit_code_a_plan_that_fits_nowhere_is_10(
    api: FakeApi, file: str, answer: object, options: list[str], exit_code: int
) -> None:
    api.on("POST", "/pipelines:plan", Reply(answer))
    result = Program(api.url)("pipelines", "plan", file, "-o", "json", *options)
    assert (result.exit_code, result.stderr) == (exit_code, "")
    assert json.loads(result.stdout) == answer


def test_an_explanation_names_reasons_and_what_to_do(api: FakeApi) -> None:
    waits = explanation(
        "PENDING",
        node_verdict("fra-07", ("OFFLINE", "offline")),
        reasons=[
            {
                "reason": "OFFLINE",
                "message": "1 node offline",
                "nodes": ["fra-07"],
                "nodes_total": 1,
            }
        ],
        next_step="see to the host",
    )
    api.on("GET", f"/pipelines/{PIPELINE_ID}/explain", Reply(waits))
    result = Program(api.url)("pipelines", "explain", PIPELINE_ID)
    assert result.exit_code == 0
    lines = [line.split(maxsplit=3) for line in result.text.splitlines()]
    assert ["NEXT_STEP", "see", "to", "the host"] in lines
    assert ["OFFLINE", "1", "1", "node offline  fra-07"] in lines
    assert ["fra-07", "later", "offline"] in lines


def test_an_explanation_of_what_runs_shows_no_nodes(api: FakeApi) -> None:
    api.on("GET", f"/pipelines/{PIPELINE_ID}/explain", Reply(explanation()))
    result = Program(api.url)("pipelines", "explain", PIPELINE_ID)
    assert "WHY_NOT" not in result.text
    assert "FOR_EXAMPLE" not in result.text


def test_an_explanation_without_reasons_has_no_empty_table(api: FakeApi) -> None:
    api.on("GET", f"/pipelines/{PIPELINE_ID}/explain", Reply(explanation() | {"reasons": []}))
    assert "REASON" not in Program(api.url)("pipelines", "explain", PIPELINE_ID).text


def test_why_one_failed_comes_with_its_last_lines(api: FakeApi) -> None:
    failed = step("game", "FAILED", reason="EXIT_CODE", exit_code=3)
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(pipeline("FAILED", failed)))
    api.on("GET", f"/pipelines/{PIPELINE_ID}/explain", Reply(explanation("FAILED")))
    line = b"2026-11-24T21:58:21.123456789Z stderr F no such map\n"
    api.on("GET", ".*/steps/game/logs", Reply(line, headers={"log-offset": "0"}))
    shown = Program(api.url)("pipelines", "explain", PIPELINE_ID)
    assert shown.stderr == "the last lines of step game:\nno such map\n"
    api.on("GET", ".*/steps/game/logs", Reply(b"", headers={"log-offset": "0"}))
    assert Program(api.url)("pipelines", "explain", PIPELINE_ID).stderr == ""
    for_programs = Program(api.url)("pipelines", "explain", PIPELINE_ID, "-o", "json")
    assert for_programs.stderr == ""
