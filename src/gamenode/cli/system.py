"""`gamenode version`, `completion` and `api`: the program itself, and its interface as it is."""

from __future__ import annotations

import json
from typing import Final

import click

from gamenode import __version__
from gamenode.cli.client import API, Request
from gamenode.cli.command import Command, Invocation, pass_invocation
from gamenode.cli.inputs import Inputs
from gamenode.cli.output import Column, Format, View, field

COMPLETE_VARIABLE: Final = "_GAMENODE_COMPLETE"

_VERSION: Final = View(
    columns=(
        Column("CLIENT", field("client.version")),
        Column("SERVER", field("server.version")),
        Column("API", field("server.api")),
    ),
    name=lambda body: str(body["client"]["version"]),
)


@click.command(
    "version",
    cls=Command,
    examples="""
    gamenode version
    gamenode version --client
    """,
)
@click.option("--client", is_flag=True, help="Only of this program; no server is asked.")
@pass_invocation
def version(invocation: Invocation, *, client: bool) -> None:
    """Print the version of this program and of the server."""
    server = None if client else invocation.client.get("/version")
    invocation.output.item({"client": {"version": __version__}, "server": server}, _VERSION)


@click.command(
    "completion",
    cls=Command,
    examples="""
    source <(gamenode completion bash)
    gamenode completion zsh > "${fpath[1]}/_gamenode"
    gamenode completion fish > ~/.config/fish/completions/gamenode.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_invocation
def completion(invocation: Invocation, *, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, nodes and pipelines."""
    from click.shell_completion import (  # noqa: PLC0415 - only for completion
        ShellComplete,
        get_completion_class,
    )

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    # The class's own method would start a shell to look at its version.
    script = ShellComplete.source(kind(root, {}, "gamenode", COMPLETE_VARIABLE))
    if invocation.output.format.for_people:
        invocation.output.text(script)
    else:
        view = View(
            columns=(Column("SHELL", field("shell")), Column("SCRIPT", field("script"))),
            name=lambda body: str(body["shell"]),
        )
        invocation.output.item({"shell": shell, "script": script}, view)


@click.command(
    "api",
    cls=Command,
    examples="""
    gamenode api GET nodes
    gamenode api GET "events?follow=true"
    gamenode api POST pipelines -d @request.json -o yaml
    """,
)
@click.argument("method", metavar="METHOD")
@click.argument("path", metavar="PATH")
@click.option("-d", "--data", metavar="BODY", help="The body; @FILE or - reads it.")
@click.option("--type", "media_type", default="application/json", show_default=True)
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME=VALUE")
@pass_invocation
def api(
    invocation: Invocation,
    *,
    method: str,
    path: str,
    data: str | None,
    media_type: str,
    headers: tuple[str, ...],
) -> None:
    """Send one request to the HTTP interface, and print the answer as it is.

    A PATH without a leading slash is below /api/v1.
    """
    inputs = Inputs(bytes_max=invocation.settings.file_bytes_max)
    sent = inputs.pairs(headers, option="--header")
    body = None
    if data is not None:
        body = inputs.value(data, field="--data").encode()
        sent = {"Content-Type": media_type, **sent}
    output = invocation.output
    address = path if path.startswith("/") else f"{API}/{path}"
    method = method.upper()
    if not (method.isascii() and method.isalpha()):
        raise click.UsageError(f"{method!r} is no method, such as GET")
    silence_s = invocation.options.timeout or invocation.settings.away_s_max
    request = Request(method, address, body=body, headers=sent)
    with invocation.client.stream(request, silence_s=silence_s) as stream:
        if output.format is Format.TABLE or not stream.content_type.endswith("json"):
            while block := stream.read():
                output.bytes(block)
            return
        content = b"".join(iter(stream.read, b""))
    output.document(json.loads(content))
