"""Errors that nobody expected: whole in the log, by number to the caller, as events to all (J2)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import EventType, NewEvent
from gamenode.lib.clock import Clock
from gamenode.lib.ids import Ids
from gamenode.lib.tasks import Wake
from gamenode.server.db.database import Database
from gamenode.server.events import store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalErrorSettings:
    """The bounds of telling of errors."""

    interval_s: float = 60.0
    """At most one event a place in this time."""
    places_max: int = 1_000
    """Places that are told apart; what happens at further ones is told together."""


@dataclass(slots=True)
class _Place:
    count: int = 0
    error_id: str = ""
    """The newest one's."""
    told_s: float = field(default=float("-inf"))


class InternalErrors:
    """Turns unexpected errors into answers at once, and into events soon.

    The event is the administrator's notice. The first error at a place is told at once, those of
    the minute after it together, with their number, when the minute is over. Answers do not wait
    for that: the database may be what is broken.

    Source: J2.
    """

    def __init__(
        self, database: Database, *, clock: Clock, ids: Ids, settings: InternalErrorSettings
    ) -> None:
        """Know of no error yet; `run` appends the events."""
        self._database = database
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._places: dict[str, _Place] = {}
        self._wake = Wake()

    def report(self, error: Exception, *, place: str, request_id: str = "") -> GameNodeError:
        """Log `error` whole under a new id; return what may be told of it: that id.

        `place` says where it happened; it comes from a fixed set, such as the operations' names.
        """
        error_id = self._ids.new()
        _log.error(
            "an unexpected error at %s",
            place,
            exc_info=error,
            extra={"event": "error.internal", "error_id": error_id, "request_id": request_id},
        )
        if place not in self._places and len(self._places) >= self._settings.places_max:
            place = "elsewhere"
        known = self._places.setdefault(place, _Place())
        known.count += 1
        known.error_id = error_id
        self._wake.ring()
        return GameNodeError(
            ErrorCode.INTERNAL,
            "the server failed to answer this request",
            hint="look for the id in the server's log",
            error_id=error_id,
        )

    async def run(self) -> None:
        """Append the events that are due, until cancelled."""
        while True:
            await self._tell_due()
            await self._wake.wait(self._wait_s())

    async def _tell_due(self) -> None:
        now_s = self._clock.monotonic_s()
        for name, place in list(self._places.items()):
            if not place.count or place.told_s + self._settings.interval_s > now_s:
                continue
            event = NewEvent(
                type=EventType.ERROR_INTERNAL,
                at=self._clock.now(),
                message=f"{place.count} unexpected error(s) at {name}; the newest is in the log",
                data={"place": name, "count": str(place.count), "error_id": place.error_id},
            )
            told = place.count
            await self._database.write(partial(store.append, event=event))
            place.count -= told
            place.told_s = now_s

    def _wait_s(self) -> float:
        """Return how long nothing is due, unless something happens."""
        now_s = self._clock.monotonic_s()
        due_s = [
            place.told_s + self._settings.interval_s - now_s
            for place in self._places.values()
            if place.count
        ]
        return max(0.0, min(due_s, default=self._settings.interval_s))
