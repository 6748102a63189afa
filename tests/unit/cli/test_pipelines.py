"""`gamenode pipelines show`: what there is about a pipeline, for people."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.bodies import PIPELINE_ID, pipeline, step
from tests.support.fake_api import FakeApi, Reply, fake_api
from tests.support.program import Program


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:
        yield served


def _details(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(" ")
        found[name] = value.strip()
    return found


def _rows(text: str) -> list[dict[str, str]]:
    """Return the table of steps, its cells by their headings' columns."""
    heading, *rows = text.split("\n\n")[1].splitlines()
    names = heading.split()
    begins = [heading.index(name) for name in names]
    ends = [*begins[1:], None]
    return [
        {name: row[begin:end].strip() for name, begin, end in zip(names, begins, ends, strict=True)}
        for row in rows
    ]


def test_each_step_says_how_it_ended_and_at_which_try(api: FakeApi) -> None:
    steps = (
        step("fetch", "COMPLETED", attempt=1, attempts_max=1, exit_code=0),
        step("build", "FAILED", reason="EXIT_CODE", exit_code=3, attempt=4, attempts_max=4),
        step("game", "FAILED", reason="SIGNAL", signal=9, attempt=2, attempts_max=3),
        step("tidy", "CANCELLED", reason="SKIPPED", attempt=0, attempts_max=1),
    )
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(pipeline("FAILED", *steps)))
    rows = _rows(Program(api.url)("pipelines", "show", PIPELINE_ID).text)
    columns = ("STEP", "STATUS", "REASON", "EXIT", "SIGNAL", "ATTEMPT")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("fetch", "COMPLETED", "", "0", "", "1"),
        ("build", "FAILED", "EXIT_CODE", "3", "", "4 of 4"),
        ("game", "FAILED", "SIGNAL", "", "9", "2 of 3"),
        ("tidy", "CANCELLED", "SKIPPED", "", "", ""),
    ]


def test_what_it_holds_of_its_node_is_shown_while_it_does(api: FakeApi) -> None:
    held = {
        "cpus": 1.5,
        "memory_bytes": 4 * 1024**3,
        "gpu": {"id": "GPU-5f", "slots": 1, "memory_bytes": 0},
        "ports": ["20000/tcp", "7777/udp"],
    }
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(pipeline(reservation=held)))
    shown = _details(Program(api.url)("pipelines", "show", PIPELINE_ID).text)
    assert [shown[name] for name in ("CPUS", "MEMORY", "GPU", "PORTS")] == [
        "1.5",
        "4GiB",
        "GPU-5f (1 slot)",
        "20000/tcp,7777/udp",
    ]
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(pipeline()))
    assert "GPU" not in Program(api.url)("pipelines", "show", PIPELINE_ID).text


def test_a_wanted_end_is_shown_with_its_reason(api: FakeApi) -> None:
    wanted = pipeline(cancel_requested_at="2026-11-24T21:58:21.000Z", cancel_reason="wrong image")
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(wanted))
    shown = _details(Program(api.url)("pipelines", "show", PIPELINE_ID).text)
    assert shown["CANCEL_REASON"] == "wrong image"
    assert "CANCEL_REQUESTED" in shown


def test_an_extension_says_how_long_it_is_in_all(api: FakeApi) -> None:
    extended = pipeline("RUNNING") | {"extended_s": 7200.0}
    api.on("POST", f"/pipelines/{PIPELINE_ID}:extend", Reply(extended))
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(extended))
    result = Program(api.url)("pipelines", "extend", PIPELINE_ID, "1h")
    heading, row = (line.split() for line in result.text.splitlines())
    assert (heading[-1], row[-1]) == ("EXTENDED", "2h")
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(pipeline("RUNNING")))
    assert "EXTENDED" not in Program(api.url)("pipelines", "show", PIPELINE_ID).text
