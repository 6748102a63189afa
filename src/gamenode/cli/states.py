"""`gamenode nodes maintenance|disable|enable`: what nodes may be used for."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any, Final

import click

from gamenode.cli.command import DURATION, Command, Invocation, pass_invocation
from gamenode.cli.names import complete_nodes
from gamenode.cli.names import node as find_node
from gamenode.cli.output import Body, Column, View, field
from gamenode.cli.terminal import confirm
from gamenode.domain.errors import invalid
from gamenode.domain.node import DrainThen, Maintenance, node_id_of

_EXIT_NOT_CONFIRMED: Final = 8
_EXIT_SOME_REFUSED: Final = 6
_WAIT: Final = 600.0

_OUTCOMES: Final = View(
    columns=(
        Column("NODE", field("node_id")),
        Column("OUTCOME", field("outcome")),
        Column("STATE", field("state")),
        Column("RUNNING", field("running")),
        Column("MESSAGE", field("message")),
    ),
    name=lambda body: str(body["node_id"]),
)
_Decorated = Callable[..., Any]


def _options(command: _Decorated) -> _Decorated:
    for option in reversed(
        (
            click.argument("node", required=False, shell_complete=complete_nodes),
            click.option("--reason", default="", help="Why; it stands in the audit log."),
            click.option("-l", "--selector", help="All that this fits, such as zone=a,!broken."),
            click.option("--self", "own", is_flag=True, help="The node that this host is."),
            click.option("--until", default="", help="Work again by itself then, such as +2h."),
            click.option("--wait", is_flag=True, help="Until the agent has confirmed."),
            click.option("--dry-run", is_flag=True, help="Say what would change, change nothing."),
            click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        )
    ):
        command = option(command)
    return command


def _drain_options(command: _Decorated) -> _Decorated:
    for option in reversed(
        (
            click.option("--drain", is_flag=True, help="Show how much still runs."),
            click.option("--deadline", type=DURATION, help="How long what runs may go on."),
            click.option(
                "--then",
                type=click.Choice([str(then) for then in DrainThen]),
                help="What happens to what still runs then.  [keep]",
            ),
        )
    ):
        command = option(command)
    return command


@click.command(
    "maintenance",
    cls=Command,
    examples="""
    gamenode nodes maintenance fra-07 --reason "new fans" --until +2h
    gamenode nodes maintenance fra-07 --drain --deadline 30m --then end --wait
    gamenode nodes maintenance -l zone=a --reason "power work" --dry-run
    """,
)
@_options
@_drain_options
@pass_invocation
def maintenance(invocation: Invocation, /, **options: Any) -> int:
    """Start nothing new on a node; what runs goes on."""
    return _change(invocation, Maintenance.MAINTENANCE, **options)


@click.command(
    "disable",
    cls=Command,
    examples="""
    gamenode nodes disable fra-07 --reason "sold" --yes
    """,
)
@_options
@pass_invocation
def disable(invocation: Invocation, /, **options: Any) -> int:
    """End everything on a node and let it only heartbeat."""
    return _change(invocation, Maintenance.DISABLED, **options)


@click.command(
    "enable",
    cls=Command,
    examples="""
    gamenode nodes enable fra-07
    gamenode nodes enable -l zone=a
    """,
)
@_options
@pass_invocation
def enable(invocation: Invocation, /, **options: Any) -> int:
    """Let a node work again."""
    return _change(invocation, Maintenance.NORMAL, **options)


def _change(
    invocation: Invocation,
    state: Maintenance,
    *,
    node: str | None,
    selector: str | None,
    own: bool,
    reason: str,
    until: str,
    wait: bool,
    dry_run: bool,
    yes: bool,
    drain: bool = False,
    deadline: float | None = None,
    then: str | None = None,
) -> int:
    if sum((node is not None, selector is not None, own)) != 1:
        raise invalid("NODE", "name one node, or give -l SELECTOR, or --self")
    body: dict[str, Any] = {"state": state, "reason": reason, "drain": drain, "until": until}
    if deadline is not None:
        body["deadline_s"] = deadline
    if then is not None:
        body["then"] = then
    client = invocation.client
    if selector is None and not dry_run:
        if own:
            node = os.environ.get("GAMENODE_AGENT__NODE_ID") or node_id_of(platform.node())
        found = find_node(client, str(node), settings=invocation.settings)
        if state is Maintenance.DISABLED:
            confirm(f"everything on node {found['id']} will be ended", yes=yes)
        return _change_one(invocation, found, body, wait=wait)
    if selector is None:
        found = find_node(client, str(node), settings=invocation.settings)
        selector = f"id={found['id']}"
    preview: Body = client.post("/nodes:state", {**body, "selector": selector, "dry_run": True})
    changing = [item for item in preview["items"] if item["outcome"] == "would_change"]
    if dry_run:
        invocation.output.page(preview, _OUTCOMES)
        return 0
    running = sum(item["running"] for item in changing)
    confirm(f"{len(changing)} nodes will be {state}; {running} pipelines run on them", yes=yes)
    done: Body = client.post("/nodes:state", {**body, "selector": selector})
    invocation.output.page(done, _OUTCOMES)
    refused = any(item["outcome"] == "refused" for item in done["items"])
    return _EXIT_SOME_REFUSED if refused else 0


def _change_one(invocation: Invocation, found: Body, body: dict[str, Any], *, wait: bool) -> int:
    from gamenode.cli.nodes import VIEW  # noqa: PLC0415 - nodes adds these commands to its own

    query = {"wait": "30s"} if wait else None
    left_s = invocation.options.timeout or _WAIT
    while True:
        node = invocation.client.put(
            f"/nodes/{found['id']}/state", body, query, wait_s=30.0 if wait else 0.0
        )
        change = node["state_change"]
        confirmed = change is None or change["confirmed_at"] is not None
        left_s -= 30.0
        if confirmed or not wait or left_s <= 0:
            break
    invocation.output.item(node, VIEW, brief=True)
    return 0 if confirmed or not wait else _EXIT_NOT_CONFIRMED
