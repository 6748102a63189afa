"""`gamenode nodes`: the hosts, and how they are."""

from __future__ import annotations

from typing import Final

import click

from gamenode.cli.command import Command, Group, Invocation, pass_invocation
from gamenode.cli.names import complete_nodes
from gamenode.cli.names import node as find_node
from gamenode.cli.output import Body, Column, Part, View, age, field, labels
from gamenode.cli.terminal import confirm
from gamenode.cli.watch import show_list
from gamenode.domain.errors import invalid
from gamenode.domain.node import Link, Maintenance


def _liveness(node: Body) -> str:
    if node.get("online") and field("link.state")(node) == Link.RECONNECTING:
        return str(Link.RECONNECTING)
    return "online" if node.get("online") else "offline"


def _conditions(node: Body) -> str:
    return ",".join(condition["type"] for condition in node.get("conditions") or ())


def _may_still_run(node: Body) -> str:
    return ",".join(each["pipeline_id"] for each in node.get("may_still_run") or ())


VIEW: Final = View(
    columns=(
        Column("ID", field("id")),
        Column("NAME", field("display_name"), wide=True),
        Column("LIVENESS", _liveness),
        Column("STATE", field("state")),
        Column("HEARTBEAT", field("last_heartbeat_at"), age),
        Column("CONDITIONS", _conditions),
        Column("LABELS", labels("labels")),
        Column("TYPE", field("type"), wide=True),
        Column("AGENT", field("agent_version"), wide=True),
        Column("INVENTORY", field("inventory_version"), wide=True),
        Column("LINK", field("link.state"), wide=True),
        Column("LINK_SINCE", field("link.since"), age, wide=True),
        Column("LINK_CAUSE", field("link.cause"), wide=True),
        Column("ONLINE_SINCE", field("online_since"), age, wide=True),
        Column("SESSION_EPOCH", field("session_epoch"), wide=True),
        Column("REGISTERED", field("registered_at"), age, wide=True),
        Column("NOTE", field("note"), wide=True),
        Column("MAY_STILL_RUN", _may_still_run, wide=True),
    ),
    name=lambda body: str(body["id"]),
    parts=(
        Part(
            "conditions",
            (
                Column("CONDITION", field("type")),
                Column("SINCE", field("since"), age),
                Column("BLOCKS", field("blocks_placement")),
                Column("REASON", field("reason")),
            ),
        ),
    ),
)

nodes = Group("nodes", short_help="List and show nodes.")
nodes.help = "The hosts, and how they are."


@nodes.command(
    "list",
    cls=Command,
    examples="""
    gamenode nodes list
    gamenode nodes list -l zone=a,gpu.model~4090 -o wide
    gamenode nodes list --offline -o name
    """,
)
@click.option("--online/--offline", default=None, help="Only those that are, or are not, online.")
@click.option(
    "--state",
    type=click.Choice([str(state) for state in Maintenance]),
    help="Only those in this state.",
)
@click.option("-l", "--selector", help="Only those that this fits, such as zone=a,!broken.")
@click.option("--search", metavar="TEXT", help="Only those with this in id or name.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where to go on, as the page before said.")
@click.option("-w", "--watch", is_flag=True, help="Show them again and again.")
@pass_invocation
def list_(
    invocation: Invocation,
    *,
    online: bool | None,
    state: str | None,
    selector: str | None,
    search: str | None,
    limit: int,
    cursor: str | None,
    watch: bool,
) -> None:
    """List nodes."""
    query = {
        "online": online,
        "state": state,
        "selector": selector,
        "q": search,
        "limit": limit,
        "cursor": cursor,
    }
    show_list(invocation, lambda: invocation.client.get("/nodes", query), VIEW, watch=watch)


for _name, _short_help in (
    ("maintenance", "Start nothing new on nodes; what runs goes on."),
    ("disable", "End everything on nodes and let them only heartbeat."),
    ("enable", "Let nodes work again."),
):
    nodes.add_lazy(_name, f"gamenode.cli.states:{_name}", _short_help)


@nodes.command(
    "label",
    cls=Command,
    examples="""
    gamenode nodes label fra-07 zone=a rack=12
    gamenode nodes label fra-07 rack-
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@click.argument("labels", nargs=-1, required=True, metavar="K=V|K-…")
@pass_invocation
def label(invocation: Invocation, *, node: str, labels: tuple[str, ...]) -> None:
    """Set labels of a node; `K-` removes one."""
    changes: dict[str, str | None] = {}
    for text in labels:
        key, separator, value = text.partition("=")
        if separator:
            changes[key] = value
        elif text.endswith("-"):
            changes[text.removesuffix("-")] = None
        else:
            raise invalid("labels", f"{text} is neither K=V nor K-")
    found = find_node(invocation.client, node, settings=invocation.settings)
    changed = invocation.client.patch(f"/nodes/{found['id']}", {"labels": changes})
    invocation.output.item(changed, VIEW, brief=True)


@nodes.command(
    "note", cls=Command, examples='gamenode nodes note fra-07 "fan 2 is loud, ticket 4711"'
)
@click.argument("node", shell_complete=complete_nodes)
@click.argument("text")
@pass_invocation
def note(invocation: Invocation, *, node: str, text: str) -> None:
    """Write a note on a node; an empty TEXT removes it."""
    found = find_node(invocation.client, node, settings=invocation.settings)
    changed = invocation.client.patch(f"/nodes/{found['id']}", {"note": text})
    invocation.output.item(changed, VIEW, brief=True)


@nodes.command(
    "fence",
    cls=Command,
    examples="""
    gamenode nodes fence fra-07 --reason "its mainboard burnt" --yes
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@click.option("--reason", required=True, help="How it is known; it stands in the audit log.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@pass_invocation
def fence(invocation: Invocation, *, node: str, reason: str, yes: bool) -> None:
    """Say that a node's host is dead, so that its work may start elsewhere.

    Make sure that it is: what still runs there would run twice. A node that is online is refused.
    """
    found = find_node(invocation.client, node, settings=invocation.settings)
    confirm(f"everything on node {found['id']} will count as dead", yes=yes)
    fenced = invocation.client.post(f"/nodes/{found['id']}:fence", {"reason": reason})
    invocation.output.item(fenced, VIEW, brief=True)


@nodes.command(
    "remove",
    cls=Command,
    examples="""
    gamenode nodes remove fra-07 --reason "sold" --yes
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@click.option("--reason", default="", help="Why; it stands in the audit log.")
@click.option("--force", is_flag=True, help="Even if it runs something, which may go on there.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@pass_invocation
def remove(invocation: Invocation, *, node: str, reason: str, force: bool, yes: bool) -> None:
    """Remove a node. Its agent does not come back by itself."""
    found = find_node(invocation.client, node, settings=invocation.settings)
    confirm(f"node {found['id']} will be removed", yes=yes)
    invocation.client.delete(f"/nodes/{found['id']}", {"force": force, "reason": reason})
    invocation.output.item(found, VIEW, brief=True)


@nodes.command(
    "show",
    cls=Command,
    examples="""
    gamenode nodes show fra-07
    gamenode nodes show fra-07 -o yaml
    """,
)
@click.argument("node", shell_complete=complete_nodes)
@pass_invocation
def show(invocation: Invocation, *, node: str) -> None:
    """Show a node."""
    found = find_node(invocation.client, node, settings=invocation.settings)
    invocation.output.item(found, VIEW)
