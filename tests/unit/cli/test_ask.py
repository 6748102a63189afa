"""`run` asks for args that are missing: at a terminal alone, and without showing a secret."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.bodies import PIPELINE_ID, pipeline
from tests.support.fake_api import FakeApi, Reply, Seen, fake_api, problem
from tests.support.program import Program

from gamenode.domain.pipeline import ArgSpec, ArgType, PipelineSpec
from gamenode.wire.args_schema import args_json_schema
from gamenode.wire.pipeline_file import parse_pipeline

SRC = Path(__file__).parents[3] / "src"
VALUE = "correct-horse-battery"
SPEC: PipelineSpec = parse_pipeline(
    "name: x\nargs: [HOST, {name: T, type: secret, description: the key}, {name: Z, default: a}]\n"
    "steps: [{name: s, container: {image: a}}]\n"
)


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:

        def create(seen: Seen) -> Reply:
            given = seen.json()["args"].keys()
            if {"HOST", "T"} <= given:
                return Reply(pipeline("PENDING"), 201)
            return problem("INVALID_REQUEST", 400, "args.T is missing")

        served.on("POST", "/pipelines", create)
        declared = {"args": [], "args_schema": args_json_schema(SPEC.args)}
        served.on("POST", "/pipelines:validate", Reply(declared))
        yield served


def at_a_terminal(api: FakeApi, *args: str, answers: tuple[tuple[bytes, bytes], ...]) -> str:
    """Run the program at a terminal of its own; answer each question; return what was seen."""
    ours, its = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "gamenode", *args],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        # The threads are the fake server's; what it does in the child takes no lock of theirs.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - as above
        env={**os.environ, "PYTHONPATH": str(SRC), "GAMENODE_URL": api.url, "NO_COLOR": "1"},
    )
    os.close(its)
    seen = b""
    waiting = list(answers)
    try:
        while select.select([ours], [], [], 20.0)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:
                break  # the program has gone
            if waiting and waiting[0][0] in seen:
                os.write(ours, waiting.pop(0)[1] + b"\n")
    finally:
        if waiting:
            program.kill()
        ended = program.wait(10)
        os.close(ours)
    assert (ended, waiting) == (0, []), seen
    return seen.decode()


def test_missing_args_are_asked_for_and_a_secret_is_not_shown(api: FakeApi, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: x\n")
    seen = at_a_terminal(
        *(api, "run", str(file), "--detach", "--key", "k"),
        answers=((b"HOST: ", b"fra"), (b"T (the key): ", VALUE.encode())),
    )
    assert PIPELINE_ID in seen
    assert "fra" in seen
    assert VALUE not in seen
    refused, made = api.requests("POST", "/pipelines")
    assert refused.headers["idempotency-key"] == made.headers["idempotency-key"] == "k"
    assert made.json()["args"] == {"HOST": "fra", "T": VALUE}


def test_without_a_terminal_nothing_is_asked(api: FakeApi) -> None:
    result = Program(api.url)("run", "-", "--detach", stdin=b"name: x\n")
    assert result.exit_code == 2
    assert "args.T is missing" in result.stderr
    assert api.requests("POST", "/pipelines:validate") == []


def test_a_secret_can_come_from_a_file_or_standard_input(api: FakeApi, tmp_path: Path) -> None:
    file, value = tmp_path / "x.yaml", tmp_path / "token"
    file.write_text("name: x\n")
    value.write_text(f"{VALUE}\n")
    for given, stdin in ((f"T=@{value}", b""), ("T=-", VALUE.encode() + b"\n")):
        result = Program(api.url)(
            *("run", str(file), "--detach", "-a", "HOST=h", "-a", given, "--debug-http"),
            stdin=stdin,
        )
        assert result.exit_code == 0
        assert VALUE not in result.stderr
        assert api.requests("POST", "/pipelines")[-1].json()["args"]["T"] == VALUE


def test_validate_shows_the_args_as_a_table(api: FakeApi, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: x\n")
    arg: dict[str, Any] = {
        "required": True,
        "default": None,
        "description": "",
        "pattern": "",
        "choices": [],
    }
    declared = {
        "name": "x",
        "description": "",
        "args": [
            {**arg, "name": "T", "type": "secret", "description": "the key"},
            {**arg, "name": "M", "type": "choice", "choices": ["a", "b"], "default": "a"},
        ],
        "args_schema": {},
        "envs": [],
        "steps": [],
    }
    api.on("POST", "/pipelines:validate", Reply(declared))
    result = Program(api.url)("pipelines", "validate", str(file))
    table = [line.split() for line in result.text.splitlines()]
    assert ["T", "secret", "true", "the", "key"] in table
    assert ["M", "choice", "true", "a", "a,b"] in table


def test_the_schema_says_what_each_kind_of_arg_takes() -> None:
    schema = args_json_schema(
        [
            ArgSpec(name="S", pattern="[a-z]+", description="a word"),
            ArgSpec(name="I", type=ArgType.INTEGER, default="7"),
            ArgSpec(name="B", type=ArgType.BOOLEAN, default="false"),
            ArgSpec(name="C", type=ArgType.CHOICE, choices=("x", "y"), default="x"),
            ArgSpec(name="T", type=ArgType.SECRET),
        ]
    )
    limit = 10**18 - 1
    assert schema["properties"] == {
        "S": {"type": "string", "description": "a word", "pattern": "^(?:[a-z]+)$"},
        "I": {"type": "integer", "minimum": -limit, "maximum": limit, "default": 7},
        "B": {"type": "boolean", "default": False},
        "C": {"type": "string", "enum": ["x", "y"], "default": "x"},
        "T": {"type": "string", "minLength": 1, "writeOnly": True},
    }
    assert schema["required"] == ["S", "T"]
    assert schema["additionalProperties"] is False
