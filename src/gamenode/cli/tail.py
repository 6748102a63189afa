"""The last lines of a step, beside what is said of its end."""

from __future__ import annotations

from typing import Final

from gamenode.cli.client import Body
from gamenode.cli.command import Invocation
from gamenode.cli.errors import ApiError
from gamenode.cli.follow import Deadline, log_source
from gamenode.cli.transcript import Style, Transcript
from gamenode.domain.errors import ErrorCode, GameNodeError

_TAIL_S: Final = 10.0


def tell_tail(invocation: Invocation, pipeline_id: str, step: Body, *, heading: str = "") -> None:
    """Write the last lines that a step printed to standard error, below `heading`, if any."""
    output = invocation.output
    transcript = Transcript(output, Style(), to_stderr=True)
    unsaid = [heading] if heading else []

    def write(lines: bytes, offset: int) -> None:
        while unsaid:
            output.tell(unsaid.pop())
        transcript.write(lines, offset)

    try:
        log_source(
            invocation.client,
            pipeline_id,
            step["name"],
            attempt=step["attempt"],
            begin={"tail": invocation.settings.tail_lines},
            patience=invocation.patience(),
            settings=invocation.settings,
        ).read(write, follow=False, deadline=Deadline(invocation.clock, _TAIL_S))
    except (ApiError, GameNodeError) as error:
        # The pipeline's end is the news; that its last lines could not be had is a remark to it.
        if not (isinstance(error, ApiError) and error.code == ErrorCode.LOG_NOT_FOUND):
            output.tell(f"its last lines could not be read: {error}")
    transcript.pause()
