"""How long a command bears a server that is away."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from gamenode.cli.client import is_away
from gamenode.cli.errors import ApiError, SilentError
from gamenode.cli.settings import CliSettings
from gamenode.domain.errors import GameNodeError
from gamenode.lib.backoff import Backoff
from gamenode.lib.clock import Clock


class Patience:
    """Counts the failures in a row to reach the server, and waits between them.

    It says once that the server is away and once that it is back. `start_s_max` bounds the first
    absence while the server was never seen; `away_s_max` bounds any other.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        sleep: Callable[[float], None],
        random: Random,
        settings: CliSettings,
        tell: Callable[[str], None],
    ) -> None:
        """Wait with `sleep`; speak through `tell`."""
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._settings = settings
        self._tell = tell
        self._backoff = Backoff(
            first_s=settings.retry_s_first, most_s=settings.retry_s_most, jitter_ratio=0.5
        )
        self._failures = 0
        self._gone_since_s = 0.0
        self._seen = False

    def missed(self, error: ApiError | GameNodeError) -> None:
        """Wait before the next try.

        Raises:
            ApiError: `error` itself, where the server is there and refuses.
            GameNodeError: `error` itself, where it has been away for too long.
        """
        if not is_away(error):
            raise error
        now_s = self._clock.monotonic_s()
        if not self._failures:
            self._gone_since_s = now_s
        self._failures += 1
        gone_s_max = self._settings.away_s_max if self._seen else self._settings.start_s_max
        if now_s - self._gone_since_s >= gone_s_max:
            raise error
        if self._failures == 1 and not isinstance(error, SilentError):
            self._tell(f"{error}; trying again for {gone_s_max:g} s")
        delay_s = self._backoff.delay_s(self._failures, self._random)
        self._sleep(max(delay_s, min(_advised_s(error), gone_s_max)))

    def saw_sign(self) -> None:
        """Know from now on that there is a server, if it is not answering right now."""
        self._seen = True

    def met(self) -> None:
        """Take note of an answer."""
        if self._failures:
            self._tell("the server is back")
        self._failures = 0
        self._seen = True


def _advised_s(error: ApiError | GameNodeError) -> float:
    if isinstance(error, GameNodeError):
        return error.retry_after_s or 0.0
    return float(error.problem.get("retry_after_s") or 0.0)
