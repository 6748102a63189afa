"""Where the commands connect, and to whom they show which token."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.program import Program

from gamenode.cli.target import (
    URL_DEFAULT,
    ContextFile,
    Contexts,
    Place,
    Target,
    check_url,
    choose_target,
)
from gamenode.domain.errors import ErrorCode, GameNodeError

A, B = "http://a.example:1", "http://b.example:2"


@pytest.fixture
def contexts(tmp_path: Path) -> ContextFile:
    file = ContextFile(tmp_path / "contexts.json")
    places = {"a": Place(url=A, token="token-a"), "b": Place(url=B, token="token-b")}
    file.save(Contexts(places=places, current="a"))
    return file


@pytest.mark.parametrize(
    ("options", "environ", "url", "token"),
    [
        ({}, {}, A, "token-a"),
        ({"context": "b"}, {}, B, "token-b"),
        ({}, {"GAMENODE_CONTEXT": "b"}, B, "token-b"),
        ({}, {"GAMENODE_URL": "http://e"}, "http://e", ""),
        ({}, {"GAMENODE_URL": "http://e", "GAMENODE_TOKEN": "t"}, "http://e", "t"),
        ({"context": "b"}, {"GAMENODE_URL": "http://e", "GAMENODE_TOKEN": "t"}, B, "token-b"),
        ({"url": "http://f/"}, {"GAMENODE_URL": "http://e"}, "http://f", ""),
        ({"url": "http://f", "context": "b"}, {}, "http://f", ""),
        ({}, {"GAMENODE_TOKEN": "t"}, A, "t"),
    ],
)
def test_the_nearest_word_names_the_server_and_a_token_goes_to_its_own(
    contexts: ContextFile,
    options: Mapping[str, str],
    environ: Mapping[str, str],
    url: str,
    token: str,
) -> None:
    chosen = {"url": None, "context": None, "token_file": None, **options}
    target = choose_target(**chosen, environ=environ, contexts=contexts)
    assert (target.url, target.token) == (url, token)


def test_a_token_file_comes_before_any_other_token(contexts: ContextFile, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    target = choose_target(
        url=None,
        context="b",
        token_file=str(file),
        environ={"GAMENODE_TOKEN": "t"},
        contexts=contexts,
    )
    assert target.token == "from-file"


def test_without_any_word_it_is_the_server_of_this_machine(tmp_path: Path) -> None:
    target = choose_target(
        url=None, context=None, token_file=None, environ={}, contexts=ContextFile(tmp_path / "no")
    )
    assert (target.url, target.token) == (URL_DEFAULT, "")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.example",
        "ftp://a",
        "http://",
        "http://a:x",
        "http://u:p@a",
        "http://a/?q",
        "http://a b",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(GameNodeError) as refused:
        check_url(url)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"contexts": {"a": {"x": 1}}}', b"\xff"])
def test_a_damaged_context_file_is_named_and_not_overwritten(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "contexts.json"
    path.write_bytes(content)
    with pytest.raises(GameNodeError) as refused:
        ContextFile(path).load()
    assert str(path) in str(refused.value)
    assert path.read_bytes() == content


def test_a_token_is_exposed_by_plain_http_to_another_machine_only() -> None:
    assert Target(url="http://a.example", token="t").exposes_token
    assert not Target(url="https://a.example", token="t").exposes_token
    assert not Target(url="http://127.0.0.1:8080", token="t").exposes_token
    assert not Target(url="http://a.example").exposes_token
    assert "t0ken" not in repr(Target(token="t0ken"))


def test_contexts_are_added_used_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    program = Program()
    added = program("context", "add", "a", "--url", A, "--token-file", "-", stdin=b"s3cret\n")
    program("context", "add", "b", "--url", B)
    assert (added.exit_code, "s3cret" in added.text + added.stderr) == (0, False)
    assert program("context", "add", "a", "--url", B).exit_code == 6
    assert program("context", "add", "c").exit_code == 2
    assert program("context", "list", "--columns", "current,name").text.splitlines()[1:] == [
        "*        a",
        "         b",
    ]
    assert program("context", "use", "b").exit_code == 0
    assert program("context", "remove", "a").exit_code == 0
    missing = program("context", "use", "a")
    assert (missing.exit_code, "there are: b" in missing.stderr) == (5, True)
    assert program("context", "list", "-o", "name").text == "b\n"


def test_only_its_owner_can_read_the_context_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Program()("context", "add", "a", "--url", A)
    file = tmp_path / "gamenode" / "contexts.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
