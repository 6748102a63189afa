"""`gamenode audit`: who did what, and whether that record is whole."""

from __future__ import annotations

from typing import Any, Final

import click

from gamenode.cli.client import Body
from gamenode.cli.command import Command, Group, Invocation, pass_invocation
from gamenode.cli.errors import EXIT_DIFFERENT, EXIT_OK
from gamenode.cli.output import Column, View, age, field
from gamenode.cli.watch import show_list

VIEW: Final = View(
    columns=(
        Column("ID", field("id"), wide=True),
        Column("AGE", field("at"), age),
        Column("AT", field("at"), wide=True),
        Column("ACTOR", field("actor.name")),
        Column("KIND", field("actor.kind"), wide=True),
        Column("ROLE", field("actor.role")),
        Column("ACTION", field("action")),
        Column("TARGET", field("target")),
        Column("OUTCOME", field("outcome")),
        Column("CODE", field("code")),
        Column("REASON", field("reason")),
        Column("SOURCE", field("source"), wide=True),
        Column("BEFORE", field("before"), wide=True),
        Column("AFTER", field("after"), wide=True),
        Column("REQUEST", field("request_id"), wide=True),
    ),
    name=lambda body: str(body["id"]),
)
_VERDICT: Final = View(
    columns=(
        Column("OK", field("ok")),
        Column("ROWS", field("rows")),
        Column("FIRST_BAD", field("first_bad")),
        Column("HEAD", field("head")),
    ),
    name=lambda body: str(body["head"]),
)

audit = Group("audit", short_help="Show who did what, and whether that record is whole.")
audit.help = "The record of administrative acts, refused ones too."


@audit.command(
    "list",
    cls=Command,
    examples="""
    gamenode audit list
    gamenode audit list --limit 1000 -o csv
    """,
)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where to go on, as the page before said.")
@click.option("-w", "--watch", is_flag=True, help="Show them again and again.")
@pass_invocation
def list_(invocation: Invocation, *, limit: int, cursor: str | None, watch: bool) -> None:
    """List who did what, newest first."""
    query: dict[str, Any] = {"limit": limit, "cursor": cursor}
    show_list(invocation, lambda: invocation.client.get("/audit", query), VIEW, watch=watch)


@audit.command(
    "verify",
    cls=Command,
    examples="""
    gamenode audit verify
    gamenode audit verify --head 3f6c… -o json
    """,
)
@click.option(
    "--head",
    default="",
    metavar="HEX",
    help="A head from the server's log (event audit.head): is it still there?",
)
@pass_invocation
def verify(invocation: Invocation, *, head: str) -> int:
    """Find out whether entries were altered, removed, reordered or cut off; exit with 10 if so.

    The server remembers where the log ended since its start; --head checks for an earlier end.
    """
    verdict: Body = invocation.client.get(
        "/audit:verify", {"head": head}, wait_s=invocation.settings.verify_s_max
    )
    invocation.output.item(verdict, _VERDICT)
    if verdict["ok"]:
        return EXIT_OK
    invocation.output.tell(f"the audit log is not whole: see entry {verdict['first_bad']}")
    return EXIT_DIFFERENT
