"""`gamenode pipelines`: what was asked for, how far it is, and its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import click

from gamenode.cli.command import DURATION, Command, Group, Invocation, pass_invocation
from gamenode.cli.follow import duration_s
from gamenode.cli.inputs import Inputs
from gamenode.cli.names import complete_nodes, complete_pipelines, pipeline_id
from gamenode.cli.output import Body, Column, Part, View, age, field, labels, short_id
from gamenode.cli.watch import show_list
from gamenode.domain.pipeline import TERMINAL, Status
from gamenode.domain.quantity import size_text, span
from gamenode.lib.ids import UuidV7


def _progress(pipeline: Body) -> str:
    steps = pipeline.get("steps") or ()
    return f"{sum(step['status'] in TERMINAL for step in steps)}/{len(steps)}"


def _span_or_nothing(seconds: float | None, _now: Any) -> str:
    return "" if seconds is None else span(seconds)


def _try(step: Body) -> str:
    attempt, most = step["attempt"], step.get("attempts_max") or 0
    return f"{attempt} of {most}" if most > 1 and attempt else str(attempt or "")


def _gpu(pipeline: Body) -> str:
    gpu: Body = field("reservation.gpu")(pipeline) or {}
    slots = gpu.get("slots", 0)
    return f"{gpu['id']} ({slots} slot{'s' if slots != 1 else ''})" if gpu else ""


def _ports(pipeline: Body) -> str:
    return ",".join(field("reservation.ports")(pipeline) or ())


def _size_or_nothing(size_bytes: int | None, _now: Any) -> str:
    return size_text(size_bytes) if size_bytes else ""


def _number_or_nothing(number: float | None, _now: Any) -> str:
    return f"{number:g}" if number else ""


_STEPS: Final = Part(
    "steps",
    (
        Column("STEP", field("name")),
        Column("TYPE", field("type")),
        Column("STATUS", field("status")),
        Column("REASON", field("reason")),
        Column("EXIT", field("exit_code")),
        Column("SIGNAL", field("signal")),
        Column("ATTEMPT", _try),
        Column("STARTED", field("started_at"), age),
        Column("TOOK", duration_s, _span_or_nothing),
        Column("MESSAGE", field("message")),
    ),
)
VIEW: Final = View(
    columns=(
        Column("ID", field("id"), short_id),
        Column("NAME", field("name")),
        Column("STATUS", field("status")),
        Column("REASON", field("reason")),
        Column("NODE", field("node_id")),
        Column("STEPS", _progress),
        Column("AGE", field("created_at"), age),
        Column("TOOK", duration_s, _span_or_nothing),
        Column("MESSAGE", field("message"), wide=True),
        Column("ATTEMPT", field("attempt"), wide=True),
        Column("PRIORITY", field("priority"), wide=True),
        Column("ARGS", labels("args"), wide=True),
        Column(
            "WAITING",
            lambda body: body["message"] if body.get("waiting") else "",
            wide=True,
        ),
        Column("CPUS", field("reservation.cpus"), _number_or_nothing, wide=True),
        Column("MEMORY", field("reservation.memory_bytes"), _size_or_nothing, wide=True),
        Column("GPU", _gpu, wide=True),
        Column("PORTS", _ports, wide=True),
        Column("CANCEL_REQUESTED", field("cancel_requested_at"), age, wide=True),
        Column("CANCEL_REASON", field("cancel_reason"), wide=True),
        Column("CREATED_BY", field("created_by"), wide=True),
        Column("RETRY_OF", field("retry_of"), short_id, wide=True),
        Column("ON_LOST", field("on_lost"), wide=True),
        Column("EXTENDED", lambda body: body["extended_s"] or None, _span_or_nothing, wide=True),
        Column("MAY_STILL_RUN", field("may_still_run"), wide=True),
    ),
    name=lambda body: str(body["id"]),
    parts=(_STEPS,),
)
_EXTENDED: Final = replace(
    VIEW,
    columns=tuple(
        replace(column, wide=column.wide and column.name != "EXTENDED") for column in VIEW.columns
    ),
)
"""Of one that was extended: by how much, in all."""
_FILE: Final = View(
    columns=(
        Column("NAME", field("name")),
        Column("DESCRIPTION", field("description")),
        Column("STEPS", lambda body: ",".join(step["name"] for step in body["steps"])),
        Column("ARGS", lambda body: ",".join(arg["name"] for arg in body["args"])),
        Column("ENVS", lambda body: ",".join(body["envs"])),
    ),
    name=lambda body: str(body["name"]),
    parts=(
        Part(
            "args",
            (
                Column("ARG", field("name")),
                Column("TYPE", field("type")),
                Column("REQUIRED", field("required")),
                Column("DEFAULT", field("default")),
                Column("ONE_OF", lambda body: ",".join(body["choices"])),
                Column("PATTERN", field("pattern")),
                Column("DESCRIPTION", field("description")),
            ),
            empty="no args",
        ),
    ),
)

pipelines = Group("pipelines", short_help="List, show, check, cancel, extend, retry pipelines.")
pipelines.help = "What was asked for, how far it is, and its end."


@pipelines.command(
    "list",
    cls=Command,
    examples="""
    gamenode pipelines list --status RUNNING
    gamenode pipelines list --node fra-07 -o name
    gamenode pipelines list --watch
    """,
)
@click.option(
    "--status",
    type=click.Choice([str(status) for status in Status], case_sensitive=False),
    help="Only those with this status.",
)
@click.option("--node", shell_complete=complete_nodes, help="Only those of this node.")
@click.option("--search", metavar="TEXT", help="Only those with this in id or name.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--cursor", help="Where to go on, as the page before said.")
@click.option("-w", "--watch", is_flag=True, help="Show them again and again.")
@pass_invocation
def list_(
    invocation: Invocation,
    *,
    status: str | None,
    node: str | None,
    search: str | None,
    limit: int,
    cursor: str | None,
    watch: bool,
) -> None:
    """List pipelines, newest first."""
    query = {"status": status, "node": node, "q": search, "limit": limit, "cursor": cursor}
    show_list(invocation, lambda: invocation.client.get("/pipelines", query), VIEW, watch=watch)


@pipelines.command(
    "show",
    cls=Command,
    examples="""
    gamenode pipelines show 5f3a91c2
    gamenode pipelines show start-game -o json
    """,
)
@click.argument("pipeline", shell_complete=complete_pipelines)
@pass_invocation
def show(invocation: Invocation, *, pipeline: str) -> None:
    """Show a pipeline and its steps."""
    client = invocation.client
    whole_id = pipeline_id(client, pipeline, settings=invocation.settings)
    invocation.output.item(client.get(f"/pipelines/{whole_id}"), VIEW)


@pipelines.command(
    "validate",
    cls=Command,
    examples="""
    gamenode pipelines validate start.yaml
    gamenode pipelines validate start.yaml -a PORT=8080
    cat start.yaml | gamenode pipelines validate -
    """,
)
@click.argument("file", type=click.Path())
@click.option("-a", "--arg", "args", multiple=True, metavar="K=V", help="Check this arg as well.")
@pass_invocation
def validate(invocation: Invocation, *, file: str, args: tuple[str, ...]) -> None:
    """Check a pipeline file, and its args where any are given; start nothing."""
    inputs = Inputs(bytes_max=invocation.settings.file_bytes_max)
    invocation.file = file.removeprefix("@")
    body: dict[str, Any] = {"file": inputs.file(file, field="FILE")}
    if args:
        body["args"] = inputs.pairs(args, option="-a")
    found = invocation.client.post("/pipelines:validate", body)
    invocation.output.item(found, _FILE)


@pipelines.command(
    "cancel",
    cls=Command,
    examples="""
    gamenode pipelines cancel 5f3a91c2 --reason "wrong image"
    gamenode pipelines cancel 5f3a91c2 --force
    """,
)
@click.argument("pipeline", shell_complete=complete_pipelines)
@click.option("--reason", default="", help="Why; it stands in the audit log.")
@click.option(
    "--force",
    is_flag=True,
    help="End it without its node's word; what runs there may go on running.",
)
@pass_invocation
def cancel(invocation: Invocation, *, pipeline: str, reason: str, force: bool) -> None:
    """Ask for a pipeline's end. A running step gets its grace period to stop."""
    client = invocation.client
    whole_id = pipeline_id(client, pipeline, settings=invocation.settings)
    found = client.post(f"/pipelines/{whole_id}:cancel", {"reason": reason, "force": force})
    invocation.output.item(found, VIEW, brief=True)


@pipelines.command(
    "retry",
    cls=Command,
    examples="""
    gamenode pipelines retry 5f3a91c2
    gamenode pipelines retry 5f3a91c2 --from-failed
    """,
)
@click.argument("pipeline", shell_complete=complete_pipelines)
@click.option(
    "--from-failed",
    is_flag=True,
    help="On the same node, and without the steps that went well there.",
)
@click.option("--key", help="The same key never makes a second one; made up if not given.")
@pass_invocation
def retry(invocation: Invocation, *, pipeline: str, from_failed: bool, key: str | None) -> None:
    """Repeat a pipeline that failed or was cancelled, as a new one."""
    found = _act(invocation, pipeline, "retry", {"from_failed": from_failed}, key)
    invocation.output.item(found, VIEW, brief=True)


@pipelines.command(
    "extend",
    cls=Command,
    examples="""
    gamenode pipelines extend 5f3a91c2 2h
    """,
)
@click.argument("pipeline", shell_complete=complete_pipelines)
@click.argument("by", type=DURATION, metavar="DURATION")
@click.option("--key", help="The same key never extends a second time; made up if not given.")
@pass_invocation
def extend(invocation: Invocation, *, pipeline: str, by: float, key: str | None) -> None:
    """Let a pipeline and each of its steps take DURATION longer than they may now."""
    found = _act(invocation, pipeline, "extend", {"by_s": by}, key)
    invocation.output.item(found, _EXTENDED, brief=True)


def _act(
    invocation: Invocation, pipeline: str, act: str, body: dict[str, object], key: str | None
) -> Any:
    """Do to a pipeline what must not happen twice; return the pipeline that it leads to."""
    client = invocation.client
    whole_id = pipeline_id(client, pipeline, settings=invocation.settings)
    return client.post(
        f"/pipelines/{whole_id}:{act}",
        body,
        headers={"Idempotency-Key": key or UuidV7(invocation.clock).new()},
    )


@pipelines.command(
    "schema", cls=Command, examples="gamenode pipelines schema > pipeline.schema.json"
)
@pass_invocation
def schema(invocation: Invocation) -> None:
    """Print the JSON Schema of pipeline files, for editors."""
    from gamenode.wire.pipeline_file import (  # noqa: PLC0415 - slow to import, used only here
        pipeline_json_schema,
    )

    invocation.output.document(pipeline_json_schema())


pipelines.add_lazy("plan", "gamenode.cli.plan:plan", "Say which nodes could take a pipeline.")
pipelines.add_lazy("explain", "gamenode.cli.plan:explain", "Say why a pipeline is where it is.")
