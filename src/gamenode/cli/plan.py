"""`gamenode pipelines plan|explain`: where a pipeline could run, and why one is where it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import click

from gamenode.cli.client import Body
from gamenode.cli.command import Command, Invocation, pass_invocation
from gamenode.cli.errors import EXIT_DIFFERENT, EXIT_OK
from gamenode.cli.names import complete_pipelines, pipeline_id
from gamenode.cli.output import Column, Part, View, field
from gamenode.cli.request import read_request, request_options
from gamenode.cli.tail import tell_tail
from gamenode.domain.pipeline import Status


def _fits(verdict: Body) -> str:
    if verdict["fits"]:
        return "now"
    return "never" if verdict["never"] else "later"


_NODES: Final = Part(
    "nodes",
    (
        Column("NODE", field("node_id")),
        Column("FITS", _fits),
        Column("WHY_NOT", lambda body: "; ".join(each["detail"] for each in body["reasons"])),
    ),
)
_REASONS: Final = Part(
    "reasons",
    (
        Column("REASON", field("reason")),
        Column("NODES", lambda body: body["nodes_total"] or None),
        Column("MESSAGE", field("message")),
        Column("FOR_EXAMPLE", lambda body: ", ".join(body["nodes"])),
    ),
)
_WORDS: Final = Part("reasons", (_REASONS.columns[0], _REASONS.columns[2]))
"""The same, where no reason is about many nodes."""
_COUNTS: Final = (
    Column("NODES", field("nodes_total")),
    Column("FIT_NOW", field("nodes_fitting")),
    Column("MUST_WAIT", field("nodes_waiting")),
    Column("NEVER_FIT", field("nodes_never")),
)
_PLAN: Final = View(
    columns=(
        Column("NAME", field("name")),
        Column("SUMMARY", field("summary")),
        Column("NODE", field("node_id")),
        Column("GPU", field("gpu_id")),
        Column("PORTS", lambda body: ",".join(map(str, body["ports"]))),
        *_COUNTS,
        Column("NEXT_STEP", field("next_step")),
    ),
    name=lambda body: str(body["node_id"] or ""),
    parts=(_NODES,),
)
_EXPLANATION: Final = View(
    columns=(
        Column("PIPELINE", field("pipeline_id")),
        Column("STATUS", field("status")),
        Column("SUMMARY", field("summary")),
        Column("NEXT_STEP", field("next_step")),
    ),
    name=lambda body: str(body["pipeline_id"]),
    parts=(_WORDS,),
)
_WAITS_FOR_A_NODE: Final = replace(
    _EXPLANATION, columns=(*_EXPLANATION.columns, *_COUNTS), parts=(_REASONS, _NODES)
)


@click.command(
    "plan",
    cls=Command,
    examples="""
    gamenode pipelines plan start.yaml -a IMAGE=alpine:3.20
    gamenode pipelines plan start.yaml -l zone=a --exit-code
    gamenode pipelines plan start.yaml --limit 1000 -o json
    """,
)
@request_options
@click.option("--limit", type=click.IntRange(1, 1000), default=100, help="Nodes shown.  [100]")
@click.option("--exit-code", is_flag=True, help=f"Exit with {EXIT_DIFFERENT} if no node fits now.")
@pass_invocation
def plan(invocation: Invocation, /, *, limit: int, exit_code: bool, **asked: Any) -> int:
    """Say which nodes could take the pipeline in FILE now, and everything against the others.

    Nothing is started, and nothing is kept free.
    """
    request = read_request(invocation, **asked)
    found: Body = invocation.client.post("/pipelines:plan", request, query={"limit": limit})
    invocation.output.item(found, _PLAN)
    return EXIT_DIFFERENT if exit_code and not found["fits"] else EXIT_OK


@click.command(
    "explain",
    cls=Command,
    examples="""
    gamenode pipelines explain 5f3a91c2
    gamenode pipelines explain start-game -o json
    """,
)
@click.argument("pipeline", shell_complete=complete_pipelines)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, help="Nodes shown.  [100]")
@pass_invocation
def explain(invocation: Invocation, *, pipeline: str, limit: int) -> None:
    """Say why a pipeline waits, has failed, or has not ended yet, and what to do about it."""
    client, output = invocation.client, invocation.output
    whole_id = pipeline_id(client, pipeline, settings=invocation.settings)
    found: Body = client.get(f"/pipelines/{whole_id}/explain", {"limit": limit})
    output.item(found, _WAITS_FOR_A_NODE if found["nodes_total"] else _EXPLANATION)
    if output.format.for_people and found["status"] == Status.FAILED:
        for step in client.get(f"/pipelines/{whole_id}")["steps"]:
            if step["status"] == Status.FAILED and step["attempt"]:
                heading = f"the last lines of step {step['name']}:"
                tell_tail(invocation, whole_id, step, heading=heading)
