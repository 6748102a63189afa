"""Reading logs as they grow, and following a pipeline from step to step to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gamenode.cli import terminal
from gamenode.cli.client import API, ApiClient, Body, Query, Request, segment
from gamenode.cli.errors import ApiError, SilentError
from gamenode.cli.output import instant
from gamenode.cli.patience import Patience
from gamenode.cli.settings import CliSettings
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import TERMINAL, Reason, Status
from gamenode.domain.quantity import span
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock

_OFFSET_HEADER: Final = "log-offset"
_POLL_GROWTH: Final = 1.5

Write = Callable[[bytes, int], None]
"""Gets whole lines and the offset of the first."""


class Teller(Protocol):
    """Says a line to people."""

    def __call__(self, text: str, *, code: str = "") -> None:
        """Say `text`, in the colour of an SGR code."""


class Deadline:
    """When a command stops waiting; what it waits for goes on."""

    def __init__(self, clock: Clock, wait_s: float | None, *, hint: str = "") -> None:
        """Stop after `wait_s`, or never; `hint` says how to go on."""
        self._clock = clock
        self._wait_s = wait_s
        self._hint = hint
        self._until_s = None if wait_s is None else clock.monotonic_s() + wait_s

    def within(self, seconds: float) -> float:
        """Return `seconds`, or what is left if that is less.

        Raises:
            GameNodeError: TIMEOUT, when nothing is left.
        """
        if self._until_s is None:
            return seconds
        left_s = self._until_s - self._clock.monotonic_s()
        if left_s <= 0:
            raise GameNodeError(
                ErrorCode.TIMEOUT,
                f"it did not end within {self._wait_s:g} s; it goes on",
                hint=self._hint,
            )
        return min(seconds, left_s)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one reading of a log brought."""

    taken_bytes: int
    ended: bool
    """Whether the server ended it; otherwise it fell silent."""


class LogSource:
    """One log from a position on. After a break it is read on exactly where it stood."""

    def __init__(
        self,
        client: ApiClient,
        path: str,
        *,
        attempt: int,
        begin: Query,
        patience: Patience,
        settings: CliSettings,
    ) -> None:
        """Read the log at `path` of one attempt (0: the newest) from where `begin` says."""
        self._client = client
        self._path = path
        self._attempt = attempt
        self._begin = begin
        self._patience = patience
        self._settings = settings
        self._offset: int | None = None

    def read(self, write: Write, *, follow: bool, deadline: Deadline) -> Pass:
        """Write what is there, and with `follow` what comes, until the server ends it.

        Raises:
            ApiError: the server refused, LOG_NOT_FOUND before there is any.
            GameNodeError: the server was away for too long; TIMEOUT.
        """
        begun_at: int | None = None
        while True:
            silence_s = deadline.within(self._settings.silence_s)
            try:
                request = Request("GET", API + self._path, self._query(follow=follow))
                with self._client.stream(request, silence_s=silence_s) as stream:
                    if self._offset is None:
                        self._offset = int(stream.header(_OFFSET_HEADER) or 0)
                    if begun_at is None:
                        begun_at = self._offset
                    for lines in _whole_lines(stream.read):
                        self._patience.met()
                        write(lines, self._offset)
                        self._offset += len(lines)
                        deadline.within(silence_s)
                    self._patience.met()
                    return Pass(self._offset - begun_at, ended=True)
            except SilentError as error:
                if follow and begun_at is not None and self._offset is not None:
                    self._patience.met()
                    return Pass(self._offset - begun_at, ended=False)
                self._patience.missed(error)
            except (ApiError, GameNodeError) as error:
                self._patience.missed(error)

    def _query(self, *, follow: bool) -> Query:
        begin = self._begin if self._offset is None else {"offset": self._offset}
        return {
            **begin,
            "attempt": self._attempt or None,
            "follow": follow or None,
            "format": "cri",
        }


class PipelineFollower:
    """Writes the logs of a pipeline's steps, one after the other, until it has ended.

    It looks at the pipeline, reads what logs there are, and looks again: what it knows of the
    state comes from the server alone, so a break of any kind costs a repeated look.
    """

    def __init__(
        self,
        client: ApiClient,
        *,
        write: Write,
        pause: Callable[[], None],
        tell: Teller,
        patience: Patience,
        deadline: Deadline,
        clock: Clock,
        settings: CliSettings,
        only: str | None = None,
        attempt: int | None = None,
        begin: Query | None = None,
        first_attempts: Mapping[str, int] | None = None,
    ) -> None:
        """Follow every step, or `only` one, or only one `attempt` of it.

        Each step begins at its attempt in `first_attempts`, and there where `begin` says.
        """
        self._client = client
        self._write = write
        self._pause = pause
        self._tell = tell
        self._patience = patience
        self._deadline = deadline
        self._clock = clock
        self._settings = settings
        self._only = only
        self._attempt = attempt
        self._begin = begin or {}
        self._first_attempts = first_attempts or {}
        self._sources: dict[tuple[str, int], LogSource] = {}
        self._read: set[tuple[str, int]] = set()
        self._said: set[str] = set()
        self._pull_said_s: float | None = None
        self.last_written: tuple[str, int] | None = None
        """The step and attempt whose text was written last."""

    def follow(self, pipeline: Body) -> Body:
        """Return the pipeline as it is when all that is followed has ended and been written."""
        poll_s = self._settings.poll_s_first
        while True:
            moved = self._read_logs(pipeline)
            if self._finished(pipeline):
                return pipeline
            if moved:
                poll_s = self._settings.poll_s_first
                pipeline = self._look(pipeline["id"], 0.0)
                continue
            self._say_waiting(pipeline)
            pipeline = self._look(pipeline["id"], poll_s)
            poll_s = min(self._settings.poll_s_most, poll_s * _POLL_GROWTH)

    def _finished(self, pipeline: Body) -> bool:
        if pipeline["status"] in TERMINAL:
            return True
        return any(
            step["name"] == self._only
            and (step["status"] in TERMINAL or (self._only, self._attempt) in self._read)
            for step in pipeline["steps"]
        )

    def _attempts(self, step: Body) -> Sequence[int]:
        if self._attempt is not None:
            return [self._attempt] if self._attempt <= step["attempt"] else []
        return range(self._first_attempt(step["name"]), step["attempt"] + 1)

    def _first_attempt(self, step: str) -> int:
        return self._attempt or self._first_attempts.get(step, 1)

    def _look(self, pipeline_id: str, wait_s: float) -> Body:
        while True:
            wait_s = self._deadline.within(wait_s) if wait_s else wait_s
            query = {"wait": f"{max(1, round(wait_s * 1000))}ms"} if wait_s else {}
            try:
                found: Body = self._client.get(f"/pipelines/{pipeline_id}", query, wait_s=wait_s)
            except (ApiError, GameNodeError) as error:
                self._patience.missed(error)
            else:
                self._patience.met()
                return found

    def _read_logs(self, pipeline: Body) -> bool:
        """Read the logs that there are; return whether that brought anything."""
        moved = False
        for number, step in enumerate(pipeline["steps"], 1):
            if self._only not in {None, step["name"]}:
                continue
            if step["status"] == Status.PENDING and pipeline["status"] not in TERMINAL:
                continue  # nothing of it is there yet
            name = step["name"]
            place = f"step {number}/{len(pipeline['steps'])} {name}"
            for attempt in self._attempts(step):
                if (name, attempt) not in self._read:
                    again = f", attempt {attempt}" if attempt > 1 else ""
                    self._say(f"{place}{again}")
                    self._say_pull(place, step)
                    moved |= self._read_log(pipeline, step, attempt)
            if step["status"] not in TERMINAL:
                break
            self._say(f"{place}: {outcome(step)}")
        return moved

    def _read_log(self, pipeline: Body, step: Body, attempt: int) -> bool:
        key = (step["name"], attempt)
        over = (
            pipeline["status"] in TERMINAL
            or step["status"] in TERMINAL
            or attempt < step["attempt"]
        )
        source = self._sources.get(key)
        if source is None:
            source = self._sources[key] = log_source(
                self._client,
                pipeline["id"],
                step["name"],
                attempt=attempt,
                begin=self._begin if attempt == self._first_attempt(step["name"]) else {},
                patience=self._patience,
                settings=self._settings,
            )
        taken_bytes = 0
        while True:
            try:
                done = source.read(self._written(key), follow=True, deadline=self._deadline)
            except ApiError as error:
                if error.code != ErrorCode.LOG_NOT_FOUND:
                    raise
                done = Pass(0, ended=True)  # it has written nothing, or nothing yet
            taken_bytes += done.taken_bytes
            if not over:
                break
            # A server that stops ends its streams as well. So a log is read to its end only when a
            # reading that began after the step's end brought nothing more.
            if not done.taken_bytes:
                if not done.ended:
                    self._say(f"the log of {key[0]} is not complete; the rest is on its node")
                self._read.add(key)
                break
        self._pause()
        return taken_bytes > 0

    def _written(self, key: tuple[str, int]) -> Write:
        def write(lines: bytes, offset: int) -> None:
            self.last_written = key
            self._write(lines, offset)

        return write

    def _say_waiting(self, pipeline: Body) -> None:
        waiting = pipeline.get("waiting")
        if not waiting:
            return
        if any(reason["passes"] for reason in waiting):
            self._say(f"waiting: {pipeline['message']}")
        else:
            self._say(
                f"waiting, though it can never fit as things are: {pipeline['message']}"
                f" (gamenode pipelines explain {pipeline['id']} says what to do)"
            )

    def _say_pull(self, place: str, step: Body) -> None:
        """Say how far an image has come: at once, then now and then."""
        if step["reason"] != Reason.PULLING:
            self._pull_said_s = None
            return
        now_s = self._clock.monotonic_s()
        if self._pull_said_s is None or now_s - self._pull_said_s >= self._settings.pull_said_s:
            self._pull_said_s = now_s
            self._say(f"{place}: {step['message']}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._tell(text, code=terminal.DIM)


def log_source(
    client: ApiClient,
    pipeline_id: str,
    step: str,
    *,
    attempt: int,
    begin: Query,
    patience: Patience,
    settings: CliSettings,
) -> LogSource:
    """Return the log of a step's attempt."""
    return LogSource(
        client,
        f"/pipelines/{pipeline_id}/steps/{segment(step)}/logs",
        attempt=attempt,
        begin=begin,
        patience=patience,
        settings=settings,
    )


def outcome(step: Body) -> str:
    """Return in words how a step, or a whole pipeline, ended: status, cause, time taken."""
    words = [step["status"]]
    causes = []
    if step.get("reason"):
        causes.append(step["reason"])
    if step.get("exit_code") is not None and step.get("reason") == Reason.EXIT_CODE:
        causes[-1] = f"exit code {step['exit_code']}"
    if step.get("signal"):
        causes.append(f"signal {step['signal']}")
    if causes:
        words.append(f"({', '.join(causes)})")
    took_s = duration_s(step)
    if took_s is not None:
        words.append(f"in {span(took_s)}")
    message = step.get("message")
    if message and message not in causes:
        words.append(f"- {message}")
    return " ".join(words)


def duration_s(body: Body) -> float | None:
    """Return how long something ran, in seconds; `None` before its end or where it never ran."""
    started_at, ended_at = instant(body.get("started_at")), instant(body.get("ended_at"))
    if started_at is None or ended_at is None:
        return None
    return (ended_at - started_at) / NANOSECONDS_PER_S


def _whole_lines(read: Callable[[], bytes]) -> Iterator[bytes]:
    rest = b""
    while block := read():
        end = block.rfind(b"\n") + 1
        if not end:
            rest += block
            continue
        yield rest + block[:end] if rest else block[:end]
        rest = block[end:]
