"""`gamenode logs`: what steps print."""

from __future__ import annotations

import difflib

import click

from gamenode.cli.client import Body, Query
from gamenode.cli.command import Command, Invocation, pass_invocation
from gamenode.cli.errors import EXIT_INTERRUPTED, EXIT_OK, ApiError
from gamenode.cli.follow import Deadline, PipelineFollower, log_source
from gamenode.cli.names import complete_pipelines, pipeline_id
from gamenode.cli.terminal import DIM
from gamenode.cli.transcript import Style, Transcript
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogStream


@click.command(
    "logs",
    cls=Command,
    examples="""
    gamenode logs 5f3a91c2
    gamenode logs -f 5f3a91c2/fetch --tail 100
    gamenode logs 5f3a91c2/fetch --since 10m --timestamps --stream stderr
    gamenode logs 5f3a91c2/fetch --raw > fetch.bin
    """,
)
@click.argument("pipeline", metavar="PIPELINE[/STEP]", shell_complete=complete_pipelines)
@click.option("-f", "--follow", is_flag=True, help="Go on until the end.")
@click.option("--tail", type=click.IntRange(0), help="Only the last N lines of each step.")
@click.option("--since", metavar="TIME", help="Only lines from then on: RFC 3339, or 10m ago.")
@click.option("--offset", type=click.IntRange(0), help="From this byte of one step's stored log.")
@click.option("--stream", type=click.Choice(["stdout", "stderr"]), help="Only this stream.")
@click.option("--attempt", type=click.IntRange(1), help="Of this try; the newest if not given.")
@click.option("--timestamps", is_flag=True, help="Put its time before each line.")
@click.option("--raw", is_flag=True, help="The step's own bytes, to a terminal too.")
@pass_invocation
def logs(
    invocation: Invocation,
    *,
    pipeline: str,
    follow: bool,
    tail: int | None,
    since: str | None,
    offset: int | None,
    stream: str | None,
    attempt: int | None,
    timestamps: bool,
    raw: bool,
) -> int:
    """Print the log of one step, or of every step in order."""
    if sum(value is not None for value in (tail, since, offset)) > 1:
        raise click.UsageError("--tail, --since and --offset exclude each other")
    if raw and (timestamps or not invocation.output.format.for_people):
        raise click.UsageError("--raw excludes --timestamps and -o")
    if attempt is not None and "/" not in pipeline:
        raise click.UsageError("--attempt needs PIPELINE/STEP")
    client = invocation.client
    part, _, step = pipeline.partition("/")
    whole_id = pipeline_id(client, part, settings=invocation.settings)
    found = client.get(f"/pipelines/{whole_id}")
    names = [each["name"] for each in found["steps"]]
    if step and step not in names:
        near = difflib.get_close_matches(step, names, n=1)
        raise GameNodeError(
            ErrorCode.STEP_NOT_FOUND,
            f"the pipeline has no step {step!r}",
            hint=f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}",
        )
    if offset is not None and not step and len(names) > 1:
        raise click.UsageError(f"--offset needs PIPELINE/STEP; there are {', '.join(names)}")
    begin: Query = {"tail": tail, "since": since, "offset": offset}
    style = Style(stream=LogStream(stream) if stream else None, timestamps=timestamps, raw=raw)
    transcript = Transcript(invocation.output, style)
    deadline = Deadline(
        invocation.clock, invocation.options.timeout, hint=f"again: gamenode logs -f {pipeline}"
    )
    try:
        if follow:
            _follow(invocation, transcript, deadline, found, step or None, attempt, begin)
        else:
            _read(invocation, transcript, deadline, found, step or None, attempt, begin)
    except KeyboardInterrupt:
        if follow:
            transcript.pause()
            invocation.output.tell(
                f"detached; the pipeline goes on. Attach again: gamenode logs -f {pipeline}"
            )
        return EXIT_INTERRUPTED
    finally:
        transcript.pause()
    return EXIT_OK


def _follow(
    invocation: Invocation,
    transcript: Transcript,
    deadline: Deadline,
    pipeline: Body,
    only: str | None,
    attempt: int | None,
    begin: Query,
) -> None:
    patience = invocation.patience()
    patience.saw_sign()
    PipelineFollower(
        invocation.client,
        write=transcript.write,
        pause=transcript.pause,
        tell=invocation.output.tell,
        patience=patience,
        deadline=deadline,
        settings=invocation.settings,
        only=only,
        attempt=attempt,
        begin=begin,
        # Earlier tries are over; who attaches wants the one that runs, and those to come.
        first_attempts={step["name"]: max(1, step["attempt"]) for step in pipeline["steps"]},
    ).follow(pipeline)


def _read(
    invocation: Invocation,
    transcript: Transcript,
    deadline: Deadline,
    pipeline: Body,
    only: str | None,
    attempt: int | None,
    begin: Query,
) -> None:
    patience = invocation.patience()
    patience.saw_sign()
    steps = pipeline["steps"]
    for number, step in enumerate(steps, 1):
        if only not in {None, step["name"]} or not (only or step["attempt"]):
            continue
        if only is None and len(steps) > 1:
            invocation.output.tell(f"step {number}/{len(steps)} {step['name']}", code=DIM)
        source = log_source(
            invocation.client,
            pipeline["id"],
            step["name"],
            attempt=attempt or 0,
            begin=begin,
            patience=patience,
            settings=invocation.settings,
        )
        try:
            source.read(transcript.write, follow=False, deadline=deadline)
        except ApiError as error:
            # A step that ran and printed nothing has no log; that is an answer, not an error.
            if error.code != ErrorCode.LOG_NOT_FOUND or step["attempt"] < (attempt or 1):
                raise
            invocation.output.tell(f"step {step['name']} has printed nothing", code=DIM)
        transcript.pause()
