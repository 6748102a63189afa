"""`gamenode verify`: whether what is kept in several places agrees."""

from __future__ import annotations

from typing import Final

from gamenode.cli.command import Command, Group, Invocation, pass_invocation
from gamenode.cli.errors import EXIT_DIFFERENT, EXIT_OK
from gamenode.cli.output import Body, Column, Part, View, field, short_id

_NAMED_MAX: Final = 5
"""How many of the nodes that were not asked are named; all of them stand in the wide table."""

_VERDICT: Final = View(
    columns=(
        Column("OK", field("ok")),
        Column("ATTEMPTS", field("attempts")),
        Column("NODES_ASKED", field("nodes_asked")),
        Column("NODES_ABSENT", lambda body: len(body["nodes_absent"])),
        Column("ABSENT", lambda body: ",".join(body["nodes_absent"]), wide=True),
        Column("VIOLATIONS", lambda body: len(body["violations"])),
    ),
    name=lambda body: "\n".join(sorted({each["pipeline_id"] for each in body["violations"]})),
    parts=(
        Part(
            "violations",
            (
                Column("KIND", field("kind")),
                Column("PIPELINE", field("pipeline_id"), short_id),
                Column("STEP", field("step")),
                Column("ATTEMPT", field("attempt")),
                Column("RUN", field("run")),
                Column("NODE", field("node_id")),
                Column("MESSAGE", field("message")),
            ),
            empty="every attempt is as it must be",
        ),
    ),
)

verify = Group("verify", short_help="Find out whether all records of attempts agree.")
verify.help = "Whether what is kept in several places agrees."


@verify.command(
    "attempts",
    cls=Command,
    examples="""
    gamenode verify attempts
    gamenode verify attempts -o json
    """,
)
@pass_invocation
def attempts(invocation: Invocation) -> int:
    """Compare the server's rows, the agents' journals and the hosts; exit with 10 on a violation.

    Every node that is connected is asked what it holds. A violation counts only if it stands at a
    second look, a moment later.
    """
    verdict: Body = invocation.client.get(
        "/attempts:verify", wait_s=invocation.settings.verify_s_max
    )
    invocation.output.item(verdict, _VERDICT)
    if absent := verdict["nodes_absent"]:
        invocation.output.tell(_absent(absent))
    return EXIT_OK if verdict["ok"] else EXIT_DIFFERENT


def _absent(node_ids: list[str]) -> str:
    one = len(node_ids) == 1
    names = ", ".join(node_ids[:_NAMED_MAX]) + (", …" if len(node_ids) > _NAMED_MAX else "")
    return (
        f"{len(node_ids)} node{' is' if one else 's are'} not connected or did not answer:"
        f" nothing is said about {'it' if one else 'them'} ({names})"
    )
