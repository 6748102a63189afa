"""The documents say what the code does: links, commands, files and lists in them are checked."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import pytest

import gamenode.__main__  # noqa: F401 - adds the commands that run programs
from gamenode.cli.main import cli
from gamenode.domain.explanation import Cause
from gamenode.domain.pipeline import Reason
from gamenode.domain.placement import Misfit
from gamenode.domain.verification import ViolationKind
from gamenode.wire.pipeline_file import parse_pipeline, pipeline_json_schema

ROOT: Final = Path(__file__).resolve().parents[2]
_FOLDERS: Final = ("docs", "examples", "proto", "src", "tests", "tools")
DOCUMENTS: Final = sorted(
    path.relative_to(ROOT).as_posix()
    for found in (ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in _FOLDERS))
    for path in found
)
GUIDE: Final = "docs/guide/pipeline-file.md"
WORDS_MAX: Final = 400

_LINK: Final = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_FENCED: Final = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND: Final = re.compile(r"^(?:    |\$ )?(?P<line>gamenode .*)$", re.MULTILINE)
_MAKE: Final = re.compile(r"(?:^    |`)make (?P<target>[a-z-]+)", re.MULTILINE)


def _text(document: str) -> str:
    return (ROOT / document).read_text()


def _anchors(document: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _fenced(document: str, language: str) -> list[str]:
    return [m["body"] for m in _FENCED.finditer(_text(document)) if m["language"] == language]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for match in _LINK.finditer(_text(document)):
        target, _, anchor = match["target"].partition("#")
        if target.startswith("https://"):
            continue
        linked = (ROOT / document).parent / target if target else ROOT / document
        assert linked.exists(), match["target"]
        assert not anchor or anchor in _anchors(linked), match["target"]


def _pipeline_files() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for number, body in enumerate(_fenced(document, "yaml"), 1):
            yield f"{document} {number}", body
    for example in sorted((ROOT / "examples").glob("*.yaml")):
        yield example.name, example.read_text()


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in _pipeline_files()])
def test_every_pipeline_in_a_document_is_valid(text: str) -> None:
    parse_pipeline(text)


def _keys(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, value in schema.items():
        if name == "properties":
            yield from value
        if isinstance(value, Mapping):
            yield from _keys(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Mapping):
                    yield from _keys(item)


def test_the_guide_names_every_key_of_the_file() -> None:
    named = set(re.findall(r"`([a-z_]+)`", _text(GUIDE)))
    # The long form of a limit is Compose's own, and named by its short one.
    assert set(_keys(pipeline_json_schema())) - named <= {"soft", "hard"}


def test_the_guide_explains_only_reasons_that_there_are() -> None:
    table = _text(GUIDE).partition("## What a status may say why")[2]
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|\b[A-Z]{6,}\b", table))
    assert named <= set(Reason)


def _commands() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for match in _COMMAND.finditer(_text(document)):
            yield document, re.split(r"\s(?:#|>|…)", match["line"])[0]


@pytest.mark.parametrize(("document", "line"), list(_commands()))
def test_every_command_in_a_document_exists_with_its_options(document: str, line: str) -> None:
    del document
    words = shlex.split(line)[1:]
    command: click.Command = cli
    ctx = click.Context(cli, info_name="gamenode")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(ctx, words[0])
        assert found is not None, f"{ctx.command_path} has no command {words[0]}"
        ctx = click.Context(found, parent=ctx, info_name=words[0])
        command, words = found, words[1:]
    options = {option for parameter in command.get_params(ctx) for option in parameter.opts}
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= options


def test_every_make_target_in_a_document_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text("Makefile"), re.MULTILINE))
    named = {m["target"] for document in DOCUMENTS for m in _MAKE.finditer(_text(document))}
    assert named <= targets


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = (_fenced(f"README{suffix}.md", "console") for suffix in ("", ".zh-CN"))
    assert english == chinese


@pytest.mark.parametrize("record", sorted((ROOT / "docs" / "adr").glob("*.md")))
def test_a_decision_is_short_and_has_its_three_parts(record: Path) -> None:
    text = record.read_text()
    assert len(text.split()) <= WORDS_MAX
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Price"]


def test_the_list_of_settings_is_what_the_code_says() -> None:
    tool = ROOT / "tools" / "settings_reference.py"
    done = subprocess.run(
        [sys.executable, tool, "--check"],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guide_to_placement_names_every_reason_and_every_violation() -> None:
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", _text("docs/guide/placement.md")))
    assert named >= {*Misfit, *Cause, *ViolationKind}
