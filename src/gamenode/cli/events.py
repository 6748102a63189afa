"""`gamenode events`: what happened, and what happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Final

import click

from gamenode.cli.client import API, Body, Query, Request, Stream
from gamenode.cli.command import Command, Invocation, pass_invocation
from gamenode.cli.errors import EXIT_INTERRUPTED, EXIT_OK, ApiError, UnreachableError
from gamenode.cli.follow import Deadline
from gamenode.cli.names import complete_nodes
from gamenode.cli.output import Column, View, age, field, labels
from gamenode.domain.errors import GameNodeError
from gamenode.domain.event import EventType

_COLUMNS: Final = (
    Column("EVENT", field("type"), width=22),
    Column("NODE", field("node_id"), width=12),
    Column("ENTITY", field("entity_id"), width=36),
    Column("STATUS", field("status"), width=9),
    Column("MESSAGE", field("message")),
    Column("ID", field("id"), wide=True),
    Column("TIMESTAMP", field("timestamp"), wide=True),
    Column("DETAILS", labels("data"), wide=True),
)
VIEW: Final = View(
    columns=(Column("AGE", field("timestamp"), age, width=5), *_COLUMNS),
    name=lambda body: str(body["id"]),
)
_LIVE: Final = View(
    # What happens just now has no age worth the name.
    columns=(Column("TIME", field("timestamp"), width=24), *_COLUMNS),
    name=VIEW.name,
)
_TYPES: Final = [str(each) for each in EventType]


@click.command(
    "events",
    cls=Command,
    examples="""
    gamenode events -f
    gamenode events --type pipeline. --type error.node --node fra-07
    gamenode events -f --after 0 -o ndjson
    """,
)
@click.option("-f", "--follow", is_flag=True, help="Go on with events as they come.")
@click.option("--after", type=click.IntRange(0), help="Those behind this event's id.")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    shell_complete=lambda _ctx, _param, incomplete: [
        name for name in _TYPES if name.startswith(incomplete)
    ],
    help="Only these types, or families such as `pipeline.`.",
)
@click.option("--node", shell_complete=complete_nodes, help="Only those of this node.")
@click.option("--entity", help="Only those of this pipeline or node, by its whole id.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@pass_invocation
def events(
    invocation: Invocation,
    *,
    follow: bool,
    after: int | None,
    types: tuple[str, ...],
    node: str | None,
    entity: str | None,
    limit: int,
) -> int:
    """Show what happened, oldest first; with -f what happens from now on, or from --after on."""
    query: Query = {"type": types, "node": node, "entity": entity}
    if not follow:
        page = invocation.client.get("/events", {**query, "after": after, "limit": limit})
        invocation.output.page(page, VIEW, cursor_option="--after")
        return EXIT_OK
    try:
        _follow(invocation, query, after)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_OK


def _follow(invocation: Invocation, query: Query, after: int | None) -> None:
    rows = invocation.output.rows(_LIVE)
    patience = invocation.patience()
    deadline = Deadline(invocation.clock, invocation.options.timeout)
    told = False
    while True:
        # Server-sent events say every few seconds that they are alive, so silence means a break.
        silence_s = deadline.within(invocation.settings.events_silence_s)
        try:
            request = Request(
                "GET",
                f"{API}/events",
                {**query, "after": after, "follow": True},
                headers={"Accept": "text/event-stream"},
            )
            with invocation.client.stream(request, silence_s=silence_s) as stream:
                for event in _events(stream, patience.met):
                    rows.write(event)
                    after = event["id"]
                    deadline.within(silence_s)
            # No end is meant here: the server stops.
            raise UnreachableError("the server ended the stream of events", sent=True)
        except (ApiError, GameNodeError) as error:
            deadline.within(silence_s)
            patience.missed(error)
            if after is None and not told:
                invocation.output.tell("what happens while the server is away is not shown here")
                told = True


def _events(stream: Stream, met: Callable[[], None]) -> Iterator[Body]:
    """Yield the events of a stream; `met` is called at every sign of life."""
    kind = b""
    for line in stream.lines():
        met()
        name, _, value = line.partition(b": ")
        if name == b"event":
            kind = value
        elif name == b"data" and kind == b"problem":
            raise ApiError(json.loads(value))
        elif name == b"data":
            yield json.loads(value)
