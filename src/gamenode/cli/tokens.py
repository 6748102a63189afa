"""`gamenode tokens`: what people and services sign in with."""

from __future__ import annotations

from typing import Any, Final

import click

from gamenode.cli.command import Command, Group, Invocation, pass_invocation
from gamenode.cli.names import complete_tokens, token_id
from gamenode.cli.output import Body, Column, View, age, field, instant, short_id
from gamenode.cli.watch import show_list
from gamenode.domain.access import TOKEN_ROLES
from gamenode.lib.clock import Instant


def _until(value: str | None, now: Instant) -> str:
    end = instant(value)
    if value is None or end is None:
        return "never"
    return "expired" if end <= now else value


_COLUMNS: Final = (
    Column("ID", field("id"), short_id),
    Column("NAME", field("name")),
    Column("ROLE", field("role")),
    Column("CREATED", field("created_at"), age),
    Column("BY", field("created_by")),
    Column("EXPIRES", field("expires_at"), _until),
)
VIEW: Final = View(
    columns=(
        *_COLUMNS,
        Column("USED", field("last_used_at"), age),
        Column("REVOKED", field("revoked_at"), age),
    ),
    name=lambda body: str(body["id"]),
)
_NEW: Final = View(columns=(*_COLUMNS, Column("TOKEN", field("token"))), name=VIEW.name)

tokens = Group("tokens", short_help="Make, list and revoke what people sign in with.")
tokens.help = "API tokens, each with a role: a viewer sees, an operator runs, an admin decides."


@tokens.command(
    "create",
    cls=Command,
    examples="""
    gamenode tokens create --role viewer --name grafana --ttl 90d
    gamenode tokens create --role operator --name ci --columns token --no-headers > ci-token
    """,
)
@click.option(
    "--role",
    type=click.Choice([str(role) for role in TOKEN_ROLES]),
    required=True,
    help="What its holder may do.",
)
@click.option("--name", required=True, help="Whose it is; it stands in the audit log.")
@click.option("--ttl", default="", metavar="DURATION", help="How long it works.  [for ever]")
@pass_invocation
def create(invocation: Invocation, *, role: str, name: str, ttl: str) -> None:
    """Make a token and show it: this once, and nowhere again."""
    made: Body = invocation.client.post("/tokens", {"role": role, "name": name, "ttl": ttl})
    invocation.output.item(made, _NEW, brief=True)
    if invocation.output.on_terminal():
        invocation.output.tell("keep the token now: nobody can show it again")


@tokens.command(
    "list",
    cls=Command,
    examples="""
    gamenode tokens list
    gamenode tokens list -o json
    """,
)
@click.option("--search", metavar="TEXT", help="Only those with this in id or name.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where to go on, as the page before said.")
@click.option("-w", "--watch", is_flag=True, help="Show them again and again.")
@pass_invocation
def list_(
    invocation: Invocation, *, search: str | None, limit: int, cursor: str | None, watch: bool
) -> None:
    """List tokens, newest first, revoked and expired ones too; never their secrets."""
    query: dict[str, Any] = {"q": search, "limit": limit, "cursor": cursor}
    show_list(invocation, lambda: invocation.client.get("/tokens", query), VIEW, watch=watch)


@tokens.command("revoke", cls=Command, examples="gamenode tokens revoke ci")
@click.argument("token", shell_complete=complete_tokens)
@pass_invocation
def revoke(invocation: Invocation, *, token: str) -> None:
    """Let nobody sign in with a token from now on."""
    wanted = token_id(invocation.client, token, settings=invocation.settings)
    invocation.output.item(invocation.client.delete(f"/tokens/{wanted}"), VIEW, brief=True)
