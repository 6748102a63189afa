"""Every command, by what all of them promise."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from tests.support.bodies import (
    PIPELINE_ID,
    audit_entry,
    event,
    explanation,
    inventory,
    inventory_diff,
    inventory_version,
    node,
    page,
    pipeline,
    plan,
    step,
    token,
)
from tests.support.fake_api import FakeApi, Reply, Seen, fake_api, problem
from tests.support.program import Program

from gamenode.cli.command import FORMATS, Command, Group
from gamenode.cli.main import cli
from gamenode.domain.errors import ErrorCode
from gamenode.wire.errors import OUTWARD

SRC = Path(__file__).parents[3] / "src"


def _leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from _leaves(command, (*path, name))
        else:
            yield (*path, name)


# Programs are no commands of this package: `gamenode.__main__` adds them where it is imported.
PROGRAMS = {("server",), ("agent",), ("dev",), ("sim",)}
LEAVES = [path for path in _leaves(cli) if path not in PROGRAMS]
ARGUMENTS = {
    ("run",): ["--detach", "FILE"],
    ("pipelines", "show"): [PIPELINE_ID],
    ("pipelines", "validate"): ["FILE"],
    ("pipelines", "cancel"): [PIPELINE_ID],
    ("pipelines", "plan"): ["FILE"],
    ("pipelines", "explain"): [PIPELINE_ID],
    ("pipelines", "retry"): [PIPELINE_ID, "--from-failed"],
    ("pipelines", "extend"): [PIPELINE_ID, "2h"],
    ("logs",): [f"{PIPELINE_ID}/fetch"],
    ("nodes", "show"): ["fra-07"],
    ("nodes", "maintenance"): ["fra-07", "--reason", "fans"],
    ("nodes", "disable"): ["fra-07", "--yes"],
    ("nodes", "enable"): ["fra-07"],
    ("nodes", "label"): ["fra-07", "zone=a", "rack-"],
    ("nodes", "note"): ["fra-07", "loud"],
    ("nodes", "fence"): ["fra-07", "--reason", "it burnt", "--yes"],
    ("nodes", "remove"): ["fra-07", "--yes"],
    ("inventory", "show"): ["fra-07"],
    ("inventory", "versions"): ["fra-07"],
    ("inventory", "diff"): ["fra-07"],
    ("inventory", "collect"): ["fra-07"],
    ("inventory", "query"): ["gpu.model~4090"],
    ("context", "use"): ["lab"],
    ("context", "add"): ["new", "--url", "http://127.0.0.1:1"],
    ("context", "remove"): ["lab"],
    ("tokens", "create"): ["--role", "viewer", "--name", "grafana", "--no-headers"],
    ("tokens", "revoke"): ["grafana"],
    ("completion",): ["bash"],
    ("api",): ["GET", "nodes"],
}


def inventories(seen: Seen) -> Reply:
    match seen.query.get("format"):
        case "csv":
            return Reply(b"node_id\nfra-07\n")
        case "ndjson":
            return Reply(json.dumps(inventory()).encode() + b"\n")
        case _:
            return Reply(page(inventory()))


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:
        done = pipeline("COMPLETED", step(status="COMPLETED"))
        served.on("GET", "/nodes", Reply(page(node())))
        served.on("GET", "/nodes/fra-07", Reply(node()))
        served.on("PUT", "/nodes/fra-07/state", Reply(node()))
        served.on("PATCH", "/nodes/fra-07", Reply(node()))
        served.on("DELETE", "/nodes/fra-07", Reply(b"", status=204))
        change = {"op": "changed", "path": "os.version", "from": "11", "to": "12"}
        served.on("GET", "/nodes/fra-07/inventory", Reply(inventory()))
        served.on("GET", "/nodes/fra-07/inventory/versions", Reply(page(inventory_version())))
        served.on("GET", "/nodes/fra-07/inventory/diff", Reply(inventory_diff(change)))
        served.on("POST", "/nodes/fra-07/inventory:collect", Reply(inventory()))
        served.on("GET", "/inventory", inventories)
        served.on("GET", "/pipelines", Reply(page(done)))
        served.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(done))
        served.on("POST", "/pipelines", Reply(done, 201))
        for act in ("cancel", "retry", "extend"):
            served.on("POST", f"/pipelines/{PIPELINE_ID}:{act}", Reply(done))
        served.on("POST", "/nodes/fra-07:fence", Reply(node()))
        declared = {"name": "x", "description": "", "args": [], "envs": [], "steps": []}
        served.on("POST", "/pipelines:validate", Reply(declared))
        served.on("POST", "/pipelines:plan", Reply(plan()))
        served.on("GET", f"/pipelines/{PIPELINE_ID}/explain", Reply(explanation()))
        served.on("GET", "/events", Reply(page(event(1))))
        served.on("GET", "/tokens", Reply(page(token())))
        served.on("POST", "/tokens", Reply({**token(), "token": "gn_secret"}, 201))
        served.on("DELETE", f"/tokens/{PIPELINE_ID}", Reply(token()))
        served.on("GET", "/audit", Reply(page(audit_entry())))
        verdict = {"ok": True, "rows": 1, "head": "ab" * 32, "first_bad": None}
        served.on("GET", "/audit:verify", Reply(verdict))
        compared = {"ok": True, "attempts": 3, "nodes_asked": 1, "nodes_absent": []}
        served.on("GET", "/attempts:verify", Reply({**compared, "violations": []}))
        served.on("GET", "/version", Reply({"version": "0.1.0", "api": "v1"}))
        line = b"2026-11-24T21:58:21.123456789Z stdout F hello\n"
        served.on("GET", ".*/logs", Reply(line, headers={"log-offset": "0"}))
        yield served


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Program()("context", "add", "lab", "--url", "http://127.0.0.1:1")


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    result = Program()(*path, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.text
    assert f"gamenode {' '.join(path)}" in result.text.split("Options:")[0]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_suggests_the_option_that_was_meant(path: tuple[str, ...]) -> None:
    result = Program()(*path, "--colums", "id")
    assert result.exit_code == 2
    assert result.stdout == b""
    assert "--columns" in result.stderr
    assert f"hint: gamenode {' '.join(path)} --help" in result.stderr


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_gives_its_result_in_every_format(
    api: FakeApi, tmp_path: Path, path: tuple[str, ...], format_: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("name: x\n")
    arguments = [str(file) if word == "FILE" else word for word in ARGUMENTS.get(path, [])]
    result = Program(api.url)(*path, *arguments, "-o", format_)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith(b"\n") or path == ("api",)
    if format_ == "json" and path != ("logs",):
        json.loads(result.stdout)
    if format_ == "yaml":
        list(yaml.safe_load_all(result.stdout))
    if format_ == "ndjson":
        assert all(json.loads(line) for line in result.text.splitlines())


def test_json_and_yaml_are_the_rest_body_and_nothing_else(api: FakeApi) -> None:
    body = page(node(), next_cursor="more")
    api.on("GET", "/nodes", Reply(body))
    as_json = Program(api.url)("nodes", "list", "-o", "json")
    as_yaml = Program(api.url)("nodes", "list", "-o", "yaml")
    assert json.loads(as_json.stdout) == body
    assert yaml.safe_load(as_yaml.stdout) == body
    assert as_json.stderr == ""


def test_the_shared_options_stand_on_the_program_or_on_the_command(api: FakeApi) -> None:
    before = Program(api.url)("-o", "name", "nodes", "list")
    behind = Program(api.url)("nodes", "list", "-o", "name")
    assert before.text == behind.text == "fra-07\n"


@pytest.mark.parametrize("code", ErrorCode)
def test_an_error_ends_with_its_code_s_number(api: FakeApi, code: ErrorCode) -> None:
    outward = OUTWARD[code]
    api.on("GET", "/nodes", problem(code, outward.http_status, "so it is", id="e-1", hint="do"))
    result = Program(api.url)("nodes", "list")
    assert result.exit_code == outward.exit_code
    assert result.stdout == b""
    assert result.stderr == f"error: {code}: so it is\nhint: do\nid: e-1\n"


@pytest.mark.parametrize(
    ("status", "exit_code"), [(400, 2), (401, 4), (404, 5), (409, 6), (422, 3), (429, 7), (599, 1)]
)
def test_a_code_of_a_newer_server_is_shown_and_its_status_says_how_to_exit(
    api: FakeApi, status: int, exit_code: int
) -> None:
    api.on("GET", "/nodes", problem("BRAND_NEW", status))
    result = Program(api.url)("nodes", "list")
    assert result.exit_code == exit_code
    assert result.stderr.startswith("error: BRAND_NEW: ")


def test_with_json_an_error_is_the_problem_object_on_standard_error(api: FakeApi) -> None:
    api.on("GET", "/nodes", problem("CONFLICT", 409, "so it is", extra="kept"))
    result = Program(api.url)("nodes", "list", "-o", "json")
    assert result.stdout == b""
    found = json.loads(result.stderr)
    assert (found["code"], found["detail"], found["extra"]) == ("CONFLICT", "so it is", "kept")


def test_with_json_a_usage_error_is_a_problem_object_too() -> None:
    result = Program()("nodes", "list", "--limit", "many", "-ojson")
    assert result.exit_code == 2
    assert json.loads(result.stderr)["code"] == "INVALID_REQUEST"


def test_an_answer_that_is_not_gamenode_s_says_so(api: FakeApi) -> None:
    api.on("GET", "/nodes", Reply(b"<html>", 502, {"Content-Type": "text/html"}))
    away = Program(api.url)("nodes", "list")
    api.on("GET", "/nodes", Reply(b"<html>", 200, {"Content-Type": "text/html"}))
    strange = Program(api.url)("nodes", "list")
    assert (away.exit_code, strange.exit_code) == (7, 1)
    assert "502" in away.stderr
    assert "text/html" in strange.stderr


def test_without_a_server_it_exits_7_and_says_how_to_start_one(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "PATH": ""}
    code = "from gamenode.cli.main import cli; cli()"
    result = subprocess.run(
        [sys.executable, "-c", code, "nodes", "list", "--url", "http://127.0.0.1:1"],
        env={**environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 7
    assert "error: UNAVAILABLE: cannot connect to http://127.0.0.1:1" in result.stderr
    assert "hint: " in result.stderr


def test_places_in_a_file_are_listed_as_editors_read_them(api: FakeApi, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("x: 1\n")
    details = [
        {
            "field": "steps[0].container.imag",
            "line": 3,
            "column": 5,
            "reason": "is not known",
            "advice": "did you mean image?",
        },
        {"field": "args.PORT", "line": None, "column": None, "reason": "missing", "advice": ""},
    ]
    api.on("POST", "/pipelines:validate", problem("INVALID_REQUEST", 400, details=details))
    result = Program(api.url)("pipelines", "validate", str(file))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1:] == [
        f"{file}:3:5: steps[0].container.imag: is not known (did you mean image?)",
        "args.PORT: missing",
    ]


def test_a_detail_that_repeats_the_message_is_not_listed_again(api: FakeApi) -> None:
    detail = {"field": "type", "line": None, "reason": "is no type", "advice": "did you mean x?"}
    refused = problem(
        "INVALID_REQUEST", 400, "type: is no type", details=[detail], hint=detail["advice"]
    )
    api.on("GET", "/events", refused)
    result = Program(api.url)("events")
    assert result.stderr == ("error: INVALID_REQUEST: type: is no type\nhint: did you mean x?\n")


def test_a_fault_of_ours_is_an_error_with_a_number_and_no_traceback(api: FakeApi) -> None:
    api.on("GET", "/nodes", Reply({"items": [{"id": 1, "labels": 7}], "next_cursor": None}))
    result = Program(api.url)("nodes", "list")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: INTERNAL: ")
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the host has no /dev/full")
def test_output_that_cannot_be_written_is_an_error_and_a_reader_that_left_is_quiet(
    api: FakeApi,
) -> None:
    command = [sys.executable, "-c", "from gamenode.cli.main import cli; cli()", "nodes", "list"]
    env = {"PYTHONPATH": str(SRC), "GAMENODE_URL": api.url}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr.startswith("error: INTERNAL: ")
    assert "No space left" in result.stderr
    reader, writer = os.pipe()
    os.close(reader)
    left = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (left.returncode, left.stderr) == (1, b"")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from gamenode.cli.main import cli\n"
        "try:\n    cli(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'grpc', 'sqlalchemy', 'yaml', 'msgspec', 'ssl', 'http.client', 'asyncio',"
        " 'google', 'starlette'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    # Of processor time, which a busy machine does not stretch as it does the wall clock's.
    took_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(SRC)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took_s) <= 0.12


def test_a_lazy_command_is_not_imported_for_help_or_for_completion() -> None:
    group = Group("g", help="A group.")
    group.add_lazy("server", "no.such.module:server", "Serve.")
    group.add_command(Command("here", short_help="Here."))
    ctx = click.Context(group, info_name="g")
    assert "server  Serve." in group.get_help(ctx)
    assert [item.value for item in group.shell_complete(ctx, "s")] == ["server"]
    with pytest.raises(ModuleNotFoundError):
        group.get_command(ctx, "server")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shell_s_script(shell: str) -> None:
    result = Program()("completion", shell)
    assert result.exit_code == 0
    assert f"_GAMENODE_COMPLETE={shell}_complete" in result.text


def _complete(url: str, words: str, position: int) -> tuple[list[str], float, str]:
    began_s = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", "from gamenode.cli.main import cli; cli()"],
        env={
            "PYTHONPATH": str(SRC),
            "GAMENODE_URL": url,
            "_GAMENODE_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    values = [line.partition(",")[2] for line in result.stdout.splitlines() if line]
    return values, time.monotonic() - began_s, result.stderr


def test_ids_are_completed_from_the_server(api: FakeApi) -> None:
    assert _complete(api.url, "gamenode nodes show fr", 3)[0] == ["fra-07"]
    assert _complete(api.url, "gamenode logs 0193", 2)[0] == [PIPELINE_ID]
    assert "list" in _complete(api.url, "gamenode nodes l", 2)[0]


def test_completion_is_silent_and_quick_without_a_server() -> None:
    values, took_s, stderr = _complete("http://127.0.0.1:1", "gamenode nodes show fr", 3)
    assert (values, stderr) == ([], "")
    assert took_s < 0.5


def test_an_argument_that_is_no_text_is_named_as_the_mistake(api: FakeApi, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("name: x")
    done = Program(api.url)("run", str(file), "-a", "WHO=\udce9")
    assert done.exit_code == OUTWARD[ErrorCode.INVALID_REQUEST].exit_code
    assert "an argument: is not UTF-8 text" in done.stderr
