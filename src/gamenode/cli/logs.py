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
    reading = _Reading(
        invocation,
        transcript,
        Deadline(
            invocation.clock, invocation.options.timeout, hint=f"again: gamenode logs -f {pipeline}"
        ),
        only=step or None,
        attempt=attempt,
        begin=begin,
    )
    try:
        if follow:
            reading.follow(found)
        else:
            reading.read(found)
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


class _Reading:
    """What is read of a pipeline's logs: all steps or `only` one, one `attempt`, from `begin`."""

    def __init__(
        self,
        invocation: Invocation,
        transcript: Transcript,
        deadline: Deadline,
        *,
        only: str | None,
        attempt: int | None,
        begin: Query,
    ) -> None:
        self._invocation = invocation
        self._transcript = transcript
        self._deadline = deadline
        self._only = only
        self._attempt = attempt
        self._begin = begin
        self._patience = invocation.patience()
        self._patience.saw_sign()

    def follow(self, pipeline: Body) -> None:
        """Write what is there and what comes."""
        PipelineFollower(
            self._invocation.client,
            write=self._transcript.write,
            pause=self._transcript.pause,
            tell=self._invocation.output.tell,
            patience=self._patience,
            deadline=self._deadline,
            clock=self._invocation.clock,
            settings=self._invocation.settings,
            only=self._only,
            attempt=self._attempt,
            begin=self._begin,
            # Earlier tries are over; who attaches wants the one that runs, and those to come.
            first_attempts={step["name"]: max(1, step["attempt"]) for step in pipeline["steps"]},
        ).follow(pipeline)

    def read(self, pipeline: Body) -> None:
        """Write what is there."""
        output, steps = self._invocation.output, pipeline["steps"]
        for number, step in enumerate(steps, 1):
            name = step["name"]
            if self._only not in {None, name} or not (self._only or step["attempt"]):
                continue
            if self._only is None and len(steps) > 1:
                output.tell(f"step {number}/{len(steps)} {name}", code=DIM)
            source = log_source(
                self._invocation.client,
                pipeline["id"],
                name,
                attempt=self._attempt or 0,
                begin=self._begin,
                patience=self._patience,
                settings=self._invocation.settings,
            )
            try:
                source.read(self._transcript.write, follow=False, deadline=self._deadline)
            except ApiError as error:
                # A step that ran and printed nothing has no log: an answer, not an error.
                if error.code != ErrorCode.LOG_NOT_FOUND or step["attempt"] < (self._attempt or 1):
                    raise
                output.tell(f"step {name} has printed nothing", code=DIM)
            self._transcript.pause()
