"""`gamenode run`: start a pipeline, watch it, end as it ends."""

from __future__ import annotations

from typing import Any, Final

import click

from gamenode.cli.client import Body
from gamenode.cli.command import Command, Invocation, pass_invocation
from gamenode.cli.errors import (
    EXIT_ENDED_BADLY,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ApiError,
    UnreachableError,
)
from gamenode.cli.follow import Deadline, PipelineFollower, log_source, outcome
from gamenode.cli.inputs import Inputs, ask, can_ask
from gamenode.cli.names import complete_nodes
from gamenode.cli.output import Format
from gamenode.cli.pipelines import VIEW
from gamenode.cli.terminal import BOLD, RED
from gamenode.cli.transcript import Style, Transcript
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import Status
from gamenode.lib.ids import UuidV7

_TAIL_S: Final = 10.0


@click.command(
    "run",
    cls=Command,
    examples="""
    gamenode run start.yaml -a IMAGE=alpine:3.20
    gamenode run start.yaml --node fra-07 -a TOKEN=@token.txt
    gamenode run start.yaml -l zone=a --detach
    """,
)
@click.argument("file", type=click.Path())
@click.option(
    "-a", "--arg", "args", multiple=True, metavar="K=V", help="An arg; @FILE or - as its value."
)
@click.option("-e", "--env", "envs", multiple=True, metavar="K=V", help="As -a, for an env.")
@click.option("--node", default="", shell_complete=complete_nodes, help="Run on this node.")
@click.option("-l", "--selector", default="", help="Run on a node that this fits.")
@click.option("--priority", type=int, default=0, show_default=True, help="Higher ones go first.")
@click.option("--key", help="The same key never starts a second one; made up if not given.")
@click.option("--detach", is_flag=True, help="Print the id and leave.")
@pass_invocation
def run(
    invocation: Invocation,
    *,
    file: str,
    args: tuple[str, ...],
    envs: tuple[str, ...],
    node: str,
    selector: str,
    priority: int,
    key: str | None,
    detach: bool,
) -> int:
    """Start the pipeline in FILE (- is standard input) and show its log until it ends.

    Ends with 0 only if the pipeline is COMPLETED, and with 3 if it is not. Ctrl-C leaves it
    running.
    """
    inputs = Inputs(bytes_max=invocation.settings.file_bytes_max)
    invocation.file = file.removeprefix("@")
    request: dict[str, Any] = {
        "file": inputs.file(file, field="FILE"),
        "args": inputs.pairs(args, option="-a"),
        "envs": inputs.pairs(envs, option="-e"),
        "node": node,
        "selector": selector,
        "priority": priority,
    }
    key = key or UuidV7(invocation.clock).new()
    try:
        try:
            pipeline = _create(invocation, request, key)
        except ApiError as error:
            asked = _ask_missing(invocation, request, error) if can_ask() else {}
            if not asked:
                raise
            request["args"] = {**request["args"], **asked}
            pipeline = _create(invocation, request, key)
    except KeyboardInterrupt:
        invocation.output.tell(
            "\ninterrupted before the server answered; it may have started:"
            f" the same command with --key {key} finds out"
        )
        return EXIT_INTERRUPTED
    if detach:
        _print_started(invocation, pipeline)
        return EXIT_OK
    invocation.output.tell(f"pipeline {pipeline['id']}", code=BOLD)
    try:
        return _attend(invocation, pipeline)
    except KeyboardInterrupt:
        invocation.output.tell(
            f"\ndetached; the pipeline goes on. Attach again: gamenode logs -f {pipeline['id']}"
        )
        return EXIT_INTERRUPTED


def _create(invocation: Invocation, request: Body, key: str) -> Body:
    patience = invocation.patience()
    maybe_started = False
    while True:
        try:
            created: Body = invocation.client.post(
                "/pipelines", request, headers={"Idempotency-Key": key}
            )
        except (ApiError, GameNodeError) as error:
            if isinstance(error, ApiError):
                patience.saw_sign()
            elif isinstance(error, UnreachableError) and error.sent:
                patience.saw_sign()
                maybe_started = True
            try:
                patience.missed(error)
            except UnreachableError as given_up:
                if maybe_started:
                    raise _undecided(given_up, key) from given_up
                raise
        else:
            return created


def _ask_missing(invocation: Invocation, request: Body, error: ApiError) -> dict[str, str]:
    """Return the required args that were not given, as somebody types them; none otherwise."""
    if error.code != ErrorCode.INVALID_REQUEST:
        return {}
    try:
        declared = invocation.client.post("/pipelines:validate", {"file": request["file"]})
    except ApiError:
        return {}  # the file itself is wrong, as was said already
    schema = declared["args_schema"]
    missing = [name for name in schema["required"] if name not in request["args"]]
    return {name: ask(name, schema["properties"][name]) for name in missing}


def _undecided(error: UnreachableError, key: str) -> UnreachableError:
    return UnreachableError(
        f"{error.message}; the pipeline may have started",
        sent=True,
        hint=f"the same command with --key {key} never starts a second one",
    )


def _print_started(invocation: Invocation, pipeline: Body) -> None:
    output = invocation.output
    if output.format is Format.TABLE:
        output.text(f"{pipeline['id']}\n")
    else:
        output.item(pipeline, VIEW, brief=True)


def _attend(invocation: Invocation, pipeline: Body) -> int:
    output, settings = invocation.output, invocation.settings
    # Where a result for programs was asked for, it alone goes to standard output.
    for_programs = not output.format.for_people
    transcript = Transcript(output, Style(), to_stderr=for_programs)
    patience = invocation.patience()
    patience.saw_sign()
    follower = PipelineFollower(
        invocation.client,
        write=transcript.write,
        pause=transcript.pause,
        tell=output.tell,
        patience=patience,
        deadline=Deadline(
            invocation.clock,
            invocation.options.timeout,
            hint=f"attach again: gamenode logs -f {pipeline['id']}",
        ),
        settings=settings,
    )
    try:
        ended = follower.follow(pipeline)
    except UnreachableError as error:
        raise UnreachableError(
            f"{error.message}; the pipeline goes on",
            sent=True,
            hint=f"attach again: gamenode logs -f {pipeline['id']}",
        ) from error
    finally:
        transcript.pause()
    if for_programs:
        output.item(ended, VIEW)
    completed = ended["status"] == Status.COMPLETED
    output.tell(f"pipeline {ended['id']}: {outcome(ended)}", code=BOLD if completed else RED)
    if completed:
        return EXIT_OK
    for step in ended["steps"]:
        if step["status"] == Status.FAILED:
            output.tell(f"step {step['name']}: {outcome(step)}", code=RED)
            # On a terminal its last lines may stand right above.
            seen = output.on_terminal() and follower.last_written == (step["name"], step["attempt"])
            if step["attempt"] and not seen:
                _tell_tail(invocation, ended["id"], step)
    return EXIT_ENDED_BADLY


def _tell_tail(invocation: Invocation, pipeline_id: str, step: Body) -> None:
    output = invocation.output
    transcript = Transcript(output, Style(), to_stderr=True)
    try:
        log_source(
            invocation.client,
            pipeline_id,
            step["name"],
            attempt=step["attempt"],
            begin={"tail": invocation.settings.tail_lines},
            patience=invocation.patience(),
            settings=invocation.settings,
        ).read(transcript.write, follow=False, deadline=Deadline(invocation.clock, _TAIL_S))
    except (ApiError, GameNodeError) as error:
        # The pipeline's end is the news; that its last lines could not be had is a remark to it.
        if not (isinstance(error, ApiError) and error.code == ErrorCode.LOG_NOT_FOUND):
            output.tell(f"its last lines could not be read: {error}")
    transcript.pause()
