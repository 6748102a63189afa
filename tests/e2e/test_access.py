"""Who may, and who did: tokens and the audit log as operators have them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, Done, cluster_in

NOT_ALLOWED = 4
DIFFERENT = 10


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server that knows a node."""
    with cluster_in(tmp_path_factory.mktemp("access")) as made:
        made.server()
        made.agent()
        yield made


def as_(cluster: Cluster, token: str, *arguments: str) -> Done:
    """Run a command with a token."""
    return cluster.start(*arguments, name=arguments[0], TOKEN=token).done()


def made_token(cluster: Cluster, name: str, role: str, *more: str) -> str:
    done = cluster.command("tokens", "create", "--name", name, "--role", role, *more, "-o", "json")
    assert done.exit_code == 0, done
    return str(json.loads(done.stdout)["token"])


def audit_of(cluster: Cluster) -> list[dict[str, Any]]:
    done = cluster.command("audit", "list", "-o", "json")
    assert done.exit_code == 0, done
    items: list[dict[str, Any]] = json.loads(done.stdout)["items"]
    return items


def test_without_a_token_nothing_is_shown_and_the_hint_says_how_to_sign_in(
    served: Cluster,
) -> None:
    done = as_(served, "", "nodes", "list")
    assert done.exit_code == NOT_ALLOWED
    assert done.stderr.startswith("error: UNAUTHENTICATED: ")
    assert "GAMENODE_TOKEN" in done.stderr
    assert served.token not in served.started[0].stderr + served.started[0].stdout


@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_a_state_change_needs_an_administrator_and_a_refused_one_is_on_record(
    served: Cluster, role: str
) -> None:
    token = made_token(served, f"a-{role}", role)
    assert as_(served, token, "nodes", "list").exit_code == 0
    done = as_(served, token, "nodes", "disable", "n1", "--reason", "mine", "--yes")
    assert done.exit_code == NOT_ALLOWED
    assert done.stderr.startswith("error: PERMISSION_DENIED: ")
    assert "admin" in done.stderr.partition("hint: ")[2]
    assert served.node()["state"] == "normal"
    newest = audit_of(served)[0]
    assert (newest["action"], newest["target"]) == ("node.state", "n1")
    assert (newest["outcome"], newest["code"]) == ("refused", "PERMISSION_DENIED")
    assert newest["actor"] == {"kind": "token", "name": f"a-{role}", "role": role}


def test_a_token_is_shown_once_and_revoked_at_once(served: Cluster) -> None:
    token = made_token(served, "short", "viewer", "--ttl", "1h")
    assert as_(served, token, "nodes", "list").exit_code == 0
    listed = served.command("tokens", "list", "-o", "json")
    secret = token.rpartition("_")[2]
    assert secret not in listed.stdout
    (found,) = [each for each in json.loads(listed.stdout)["items"] if each["name"] == "short"]
    assert (found["role"], found["revoked_at"]) == ("viewer", None)
    assert found["expires_at"] is not None
    assert served.command("tokens", "revoke", "short").exit_code == 0
    done = as_(served, token, "nodes", "list")
    assert (done.exit_code, "was revoked" in done.stderr) == (NOT_ALLOWED, True)
    on_record = [(each["action"], each["outcome"]) for each in audit_of(served)[:2]]
    assert on_record == [("token.revoke", "accepted"), ("token.create", "accepted")]
    said = served.started[0].stderr + Path(
        served.folder / "server" / "gamenode.db"
    ).read_bytes().decode("latin-1")
    assert secret not in said


@pytest.mark.parametrize(
    "arguments",
    [("--role", "node", "--name", "x"), ("--role", "viewer", "--name", "x", "--ttl", "soon")],
)
def test_a_token_that_makes_no_sense_is_not_made(
    served: Cluster, arguments: tuple[str, ...]
) -> None:
    done = served.command("tokens", "create", *arguments)
    assert done.exit_code == 2, done


def _alter(rows: sqlite3.Connection, ids: list[int]) -> None:
    rows.execute("UPDATE audit SET actor_name = 'somebody else' WHERE id = ?", [ids[1]])


def _remove(rows: sqlite3.Connection, ids: list[int]) -> None:
    rows.execute("DELETE FROM audit WHERE id = ?", [ids[1]])


def _reorder(rows: sqlite3.Connection, ids: list[int]) -> None:
    for old, new in ((ids[1], -1), (ids[2], ids[1]), (-1, ids[2])):
        rows.execute("UPDATE audit SET id = ? WHERE id = ?", [new, old])


def _cut(rows: sqlite3.Connection, ids: list[int]) -> None:
    rows.execute("DELETE FROM audit WHERE id >= ?", [ids[-1]])


@pytest.mark.parametrize("tamper", [_alter, _remove, _reorder, _cut])
def test_verify_finds_a_record_that_was_tampered_with(
    cluster: Cluster, tamper: Callable[[sqlite3.Connection, list[int]], None]
) -> None:
    server = cluster.server()
    for name in "abc":
        made_token(cluster, name, "viewer")
    done = cluster.command("audit", "verify", "-o", "json")
    assert done.exit_code == 0, done
    whole = json.loads(done.stdout)
    assert (whole["ok"], whole["rows"], whole["first_bad"]) == (True, 4, None)
    assert whole["head"] in server.stderr, "the log tells each head"
    with closing(sqlite3.connect(cluster.folder / "server" / "gamenode.db")) as rows, rows:
        ids = [row[0] for row in rows.execute("SELECT id FROM audit ORDER BY id")]
        tamper(rows, ids)
    done = cluster.command("audit", "verify", "-o", "json")
    assert done.exit_code == DIFFERENT, done
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert found["first_bad"] == (
        ids[-1] if tamper is _cut else ids[1] if tamper is not _remove else ids[2]
    )
    assert cluster.command("audit", "verify").exit_code == DIFFERENT
    # A server that starts afterwards did not see the end; the log's head tells it.
    server.stop()
    cluster.server()
    assert cluster.command("audit", "verify", "--head", whole["head"]).exit_code == DIFFERENT
