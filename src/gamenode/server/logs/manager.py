"""Who reads which log now.

Source: G2, G3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogKey, LogSlice
from gamenode.server.logs.service import LogService
from gamenode.server.logs.streamer import From, LogStreamer


class Steps(Protocol):
    """What is known of the steps that logs belong to."""

    async def log_key(self, pipeline_id: str, step: str, attempt: int) -> LogKey:
        """Return which log a try at a step has; attempt 0: the newest try, or the first to come.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND, STEP_NOT_FOUND; LOG_NOT_FOUND, no such try.
        """

    async def is_finished(self, key: LogKey) -> bool:
        """Return whether this try has ended: its log gets no more, unless a length says so."""


class OnLive(Protocol):
    """Is told whether somebody follows a step's log."""

    def __call__(self, pipeline_id: str, step: str, *, live: bool) -> None:
        """Have the node send each line at once, or no more. Must not block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerSettings:
    """The bounds of reading."""

    followers_max: int = 1000
    """How many may follow logs at once."""
    retry_s: float = 5.0
    """The advice to one follower too many."""


class LogManager:
    """Opens logs for readers, and tells when somebody follows one."""

    def __init__(
        self,
        service: LogService,
        streamer: LogStreamer,
        *,
        steps: Steps,
        on_live: OnLive,
        settings: ManagerSettings,
    ) -> None:
        """Call `on_live` when a step's first follower comes and when its last one goes."""
        self._service = service
        self._streamer = streamer
        self._steps = steps
        self._on_live = on_live
        self._settings = settings
        self._followers: Counter[tuple[str, str]] = Counter()

    async def open(self, pipeline_id: str, step: str, attempt: int = 0) -> LogKey:
        """Return which log to read; attempt 0 means the newest try.

        Raises:
            GameNodeError: PIPELINE_NOT_FOUND, STEP_NOT_FOUND, LOG_NOT_FOUND.
        """
        return await self._steps.log_key(pipeline_id, step, attempt)

    async def start(self, key: LogKey, start: From) -> int:
        """Return the offset, in bytes, at which a reading from `start` begins.

        Raises:
            GameNodeError: INVALID_REQUEST, `start` lies behind the end; INTERNAL, damage.
        """
        return await self._streamer.start(key, start)

    async def read(
        self, key: LogKey, start: From, *, follow: bool
    ) -> AsyncGenerator[LogSlice, None]:
        """Yield whole lines of a log as they are stored, of all streams; `follow` waits for more.

        The reader picks streams with `wire.cri`, so that offsets stay true. A reader that leaves
        early closes the generator.

        Raises:
            GameNodeError: INVALID_REQUEST, `start` lies behind the end; INTERNAL, the log is
                damaged; RESOURCE_EXHAUSTED, too many followers.
        """
        if not follow:
            async with aclosing(self._streamer.slices(key, start)) as slices:
                async for piece in slices:
                    yield piece
            return
        step = (key.pipeline_id, key.step)
        self._enter(step)
        try:
            following = self._streamer.follow(key, start, self._steps.is_finished)
            async with aclosing(following) as slices:
                async for piece in slices:
                    yield piece
        finally:
            self._leave(step)

    def is_live(self, pipeline_id: str, step: str) -> bool:
        """Return whether somebody follows a log of this step."""
        return self._followers[pipeline_id, step] > 0

    def followed(self) -> list[tuple[str, str]]:
        """Return every (pipeline, step) whose log somebody follows."""
        return list(self._followers)

    async def ended(self, key: LogKey) -> None:
        """Tell the followers that the step has ended, after the transaction that says so."""
        await self._service.ended(key)

    def _enter(self, step: tuple[str, str]) -> None:
        if self._followers.total() >= self._settings.followers_max:
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                "too many readers follow logs",
                retry_after_s=self._settings.retry_s,
            )
        self._followers[step] += 1
        if self._followers[step] == 1:
            self._on_live(*step, live=True)

    def _leave(self, step: tuple[str, str]) -> None:
        self._followers[step] -= 1
        if self._followers[step] == 0:
            del self._followers[step]
            self._on_live(*step, live=False)
