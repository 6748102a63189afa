"""Secrets on their way through an agent: kept, filled in, masked, forgotten (RG3)."""

from __future__ import annotations

import json
import logging
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.time import until, virtual_time
from tests.unit.agent.test_runner import Node, on_a_node, order, step

from gamenode.agent.secrets import Secrets, SecretSettings
from gamenode.domain.command import ExecuteOrder, GrantedStep, OrderOutcome
from gamenode.domain.errors import GameNodeError
from gamenode.domain.log import LogKey
from gamenode.domain.pipeline import Reason, Status
from gamenode.lib.clock import SystemClock
from gamenode.wire import cri

VALUE = "correct-horse-battery"
STARS = "*" * len(VALUE)


def secret_order(*steps: GrantedStep) -> ExecuteOrder:
    return replace(order(*steps), secrets={"T": VALUE})


def printed(node: Node, name: str = "one") -> str:
    framed = node.server.logs.get(LogKey("p", name, 1), b"")
    return cri.strip(framed, records=True).decode()


def files(node: Node) -> list[Path]:
    return [path for path in node.folder.rglob("*") if path.is_file() and not path.is_symlink()]


def holding(node: Node) -> list[str]:
    """Return the files of the agent that hold the value."""
    return [path.name for path in files(node) if VALUE.encode() in path.read_bytes()]


@virtual_time
async def test_a_secret_is_in_one_private_file_and_gone_with_the_pipeline(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        one = step(stdout="a ${{ args.T }} b\n", duration_s=5)
        await node.runner.take(secret_order(one, step("two", stderr="${{ args.T }}")))
        await node.started()
        assert holding(node) == ["p.json"]
        path = node.folder / "secrets" / "p.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        await node.restart()
        assert holding(node) == ["p.json"]
        assert await node.ended() is Status.COMPLETED
        assert printed(node) == f"a {STARS} b\n"
        assert printed(node, "two") == STARS
        await node.released()
        assert holding(node) == []
        assert list(path.parent.iterdir()) == []


@virtual_time
async def test_an_engines_words_are_reported_and_logged_masked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    async with on_a_node(tmp_path) as node:
        await node.runner.take(secret_order(step(start_error="x" * 990 + "no: T=${{ args.T }}!")))
        assert await node.ended() is Status.FAILED
        assert node.step().message.endswith("no: T=****")  # cut after it was masked
        end = node.end()
        assert end is not None
        assert end.message == node.step().message
        await node.released()
        node.reports.clear()

        async def broken(*_: object, **__: object) -> None:
            monkeypatch.undo()
            raise RuntimeError(f"what is {VALUE}?")

        monkeypatch.setattr(node.runner, "_run_step", broken)
        await node.runner.take(secret_order(step()))
        assert await node.ended() is Status.COMPLETED
    assert f"what is {STARS}?" in str([vars(record) for record in caplog.records])
    assert VALUE not in str([vars(record) for record in caplog.records])
    assert VALUE not in caplog.text


@virtual_time
async def test_without_its_file_a_step_fails_and_what_ran_is_not_shown(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        first = step(stdout="${{ args.T }}\n", start_s=0.1, duration_s=5)
        two = step("two", stdout="${{ args.T }}")
        await node.runner.take(secret_order(first, two))
        await node.started()
        await node.crash()
        node.server.logs.clear()
        node.server.lengths.clear()
        (node.folder / "secrets" / "p.json").unlink()
        node.begin()
        assert await node.ended() is Status.FAILED
        assert printed(node).endswith("the secrets to mask in it are gone from this node\n")
        assert VALUE not in printed(node)
        assert node.step("two").reason is Reason.SECRET_MISSING
        assert node.step("two").message == (
            "this node has no value of T any more: run the pipeline again"
        )


@virtual_time
async def test_a_living_services_log_is_masked_until_it_ends(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        game = step(service=True, stdout="${{ args.T }}\n", duration_s=60)
        await node.runner.take(secret_order(game))
        assert await node.ended() is Status.COMPLETED
        await node.released()
        assert holding(node) == ["p.json"]
        await node.crash()
        node.server.logs.clear()
        node.server.lengths.clear()
        node.begin()
        await until(lambda: printed(node) != "")
        assert printed(node) == f"{STARS}\n"
        await until(lambda: holding(node) == [])


@virtual_time
async def test_a_refused_dispatch_leaves_no_file(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.journal.error_code = sqlite3.SQLITE_FULL
        answer = await node.runner.take(secret_order(step()))
        assert answer.outcome is OrderOutcome.REFUSED
        assert holding(node) == []
        node.journal.error_code = 0


@virtual_time
async def test_secrets_that_cannot_be_written_refuse_the_dispatch(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        (tmp_path / "secrets").write_text("in the way")
        answer = await node.runner.take(secret_order(step()))
        assert (answer.outcome, answer.reason) == (OrderOutcome.REFUSED, "JOURNAL")
        assert node.runner.held() == []
        assert node.journal.held() == []
        assert VALUE not in answer.message


@virtual_time
async def test_what_a_crash_left_goes_at_the_next_start(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        await node.runner.take(secret_order(step(duration_s=5)))
        await node.crash()
        for name in ("gone.json", ".tmp123"):
            (tmp_path / "secrets" / name).write_text(json.dumps({"args": {"T": VALUE}}))
        node.begin()
        assert holding(node) == ["p.json"]


@virtual_time
async def test_secret_envs_of_the_node_are_masked_where_they_are_used(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.envs |= {"KEY": VALUE, "OPEN": "open-value"}
        await node.restart()
        use = step(stdout="${{ envs.KEY }} ${{ envs.OPEN }}\n", duration_s=5)
        await node.runner.take(order(use, step("two", stdout="${{ envs.KEY }}")))
        await node.started()
        node.envs["KEY"] = "changed-since-then"
        await node.restart()
        assert await node.ended() is Status.COMPLETED
        assert printed(node) == f"{STARS} open-value\n"
        assert printed(node, "two") == "*" * len("changed-since-then")
        await node.released()
        assert holding(node) == []


@virtual_time
async def test_a_secret_env_cannot_stand_in_an_argument_vector(tmp_path: Path) -> None:
    async with on_a_node(tmp_path) as node:
        node.envs |= {"KEY": VALUE}
        await node.restart()
        one = step()
        container = replace(one.container, command=("login", "${{ envs.KEY }}"))
        await node.runner.take(order(replace(one, container=container)))
        assert await node.ended() is Status.FAILED
        assert node.step().message == (
            "container.command[1]: envs.KEY is secret, and others could read it here"
        )
        assert node.host.starts == []


@pytest.mark.parametrize(
    ("envs", "problem"), [({}, "KEY has no value here"), ({"KEY": "abc"}, "KEY is shorter than")]
)
def test_a_secret_env_must_be_there_and_maskable(
    tmp_path: Path, envs: dict[str, str], problem: str
) -> None:
    with pytest.raises(GameNodeError, match=problem):
        Secrets(
            tmp_path, envs=envs, secret_envs={"KEY"}, clock=SystemClock(), settings=SecretSettings()
        )


def test_an_order_does_not_show_its_secrets() -> None:
    one = secret_order(step())
    assert VALUE not in repr(one)
