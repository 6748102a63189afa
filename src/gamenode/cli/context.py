"""`gamenode context`: servers by a name of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from gamenode.cli.command import Command, Group, Invocation, pass_invocation
from gamenode.cli.inputs import STDIN
from gamenode.cli.output import Body, Column, View, field
from gamenode.cli.target import ContextFile, Contexts, Place, check_url, read_token
from gamenode.domain.errors import ErrorCode, GameNodeError

VIEW: Final = View(
    columns=(
        Column("CURRENT", lambda body: "*" if body["current"] else ""),
        Column("NAME", field("name")),
        Column("URL", field("url")),
        Column("TOKEN", field("token")),
    ),
    name=lambda body: str(body["name"]),
)

context = Group("context", short_help="Name servers, and choose one.")
context.help = "Servers by a name of one's own, in a file that only its owner can read."


def _complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    try:
        places = ContextFile().load().places
    except GameNodeError:
        return []
    return [name for name in places if name.startswith(incomplete)]


def _body(contexts: Contexts, name: str) -> Body:
    place = contexts.get(name)
    # Where the token is, never the token.
    token = place.token_file or ("kept here" if place.token else "")
    return {"name": name, "url": place.url, "token": token, "current": name == contexts.current}


@context.command("list", cls=Command, examples="gamenode context list")
@pass_invocation
def list_(invocation: Invocation) -> None:
    """List the servers that have a name here."""
    contexts = ContextFile().load()
    items = [_body(contexts, name) for name in contexts.places]
    invocation.output.page({"items": items, "next_cursor": None}, VIEW)


@context.command(
    "add",
    cls=Command,
    examples="""
    gamenode context add lab --url http://10.0.0.5:8080
    gamenode context add prod --url https://games.example.com --token-file ~/.prod-token
    """,
)
@click.argument("name")
@pass_invocation
def add(invocation: Invocation, *, name: str) -> None:
    """Name the server at --url, with the token in --token-file; the first becomes current.

    The file with the token is read whenever it is needed; with - the token is read now, and kept.
    """
    options = invocation.options
    if not options.url:
        raise click.UsageError("--url says where the server is")
    token, token_file = "", ""
    if options.token_file == STDIN:
        token = read_token(STDIN)
    elif options.token_file:
        read_token(options.token_file)
        token_file = str(Path(options.token_file).absolute())
    file = ContextFile()
    before = file.load()
    if name in before.places:
        raise GameNodeError(
            ErrorCode.CONFLICT,
            f"there is a context {name!r} already",
            hint=f"gamenode context remove {name}",
        )
    place = Place(url=check_url(options.url), token_file=token_file, token=token)
    after = Contexts(places={**before.places, name: place}, current=before.current or name)
    file.save(after)
    invocation.output.item(_body(after, name), VIEW, brief=True)


@context.command("use", cls=Command, examples="gamenode context use prod")
@click.argument("name", shell_complete=_complete)
@pass_invocation
def use(invocation: Invocation, *, name: str) -> None:
    """Let commands speak to this server from now on."""
    file = ContextFile()
    before = file.load()
    before.get(name)
    after = Contexts(places=before.places, current=name)
    file.save(after)
    invocation.output.item(_body(after, name), VIEW, brief=True)


@context.command("remove", cls=Command, examples="gamenode context remove lab")
@click.argument("name", shell_complete=_complete)
@pass_invocation
def remove(invocation: Invocation, *, name: str) -> None:
    """Forget a server's name, and the token that is kept with it."""
    file = ContextFile()
    before = file.load()
    removed = _body(before, name)
    places = {other: place for other, place in before.places.items() if other != name}
    file.save(Contexts(places=places, current="" if before.current == name else before.current))
    invocation.output.item(removed, VIEW, brief=True)
