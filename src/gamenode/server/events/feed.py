"""Live events: numbered at the commit, announced after it, and always read from the table."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Final

from sqlalchemy import Connection

from gamenode.domain.audit import AuditEntry
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event, EventFilter, NewEvent
from gamenode.lib.tasks import Supervisor, Wake, every
from gamenode.server.db.database import Database
from gamenode.server.events import audit, store
from gamenode.server.events.audit import AuditHead

_log = logging.getLogger(__name__)
_ALL: Final = EventFilter()


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFeedSettings:
    """The bounds of the feed."""

    batch_max: int = 500
    """Events in one batch of a follower."""
    followers_max: int = 1_000
    """Followers at the same time; more are refused."""
    watches_max: int = 10_000
    """Watches at the same time; more are refused."""
    poll_s: float = 2.0
    """How often commits are looked for that nobody announced: another server's, or one whose
    outcome was not known."""
    idle_s: float = 60.0
    """How often a follower that is sent nothing moves its cursor on, ahead of retention."""


@dataclass(frozen=True, slots=True)
class _Committed:
    events: Sequence[Event]
    audit_head: AuditHead | None


class Watch:
    """Sees every event about one entity that commits after the watch was taken."""

    def __init__(self, wake: Wake) -> None:
        """Be rung by the feed."""
        self._wake = wake

    async def changed(self, timeout_s: float) -> bool:
        """Wait until there was such an event since the last call; return False after `timeout_s`.

        At once, if it came between the taking of the watch and this call.
        """
        return await self._wake.wait(timeout_s)


class EventFeed:
    """Gives events their ids and the audit log its links, as a commit hook, and tells who waits.

    A follower is woken and then reads the table from its cursor, so a slow or reconnecting one
    misses nothing and holds nothing but its cursor.

    Source: H2.
    """

    def __init__(
        self, database: Database, *, settings: EventFeedSettings, audit_key: bytes
    ) -> None:
        """Serve `database`; the caller registers this hook with `Database.on_commit`."""
        self._database = database
        self._settings = settings
        self._audit_key = audit_key
        self._audit_head: AuditHead | None = None
        self._head = 0
        self._seen = 0  # everything up to here was announced
        self._announced: set[int] = set()  # and these beyond it
        self._followers: dict[Wake, EventFilter] = {}
        self._watches: dict[str, dict[Wake, EventFilter]] = {}
        self._watch_count = 0
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._supervisor = Supervisor(expected=GameNodeError)
        self._closed = False

    async def start(self) -> None:
        """Learn the head, and look for commits that nobody announces from now on."""
        self._head = self._seen = await self._database.read(store.head)
        self._audit_head = await self._database.read(audit.head)
        self._supervisor.keep(
            "events.poll", lambda: every(self._settings.poll_s, self._announce_missed)
        )

    async def close(self) -> None:
        """End every follower, watch and the poll. Safe to repeat."""
        self._closed = True
        for wake in (*self._followers, *chain.from_iterable(self._watches.values())):
            wake.ring()
        await self._supervisor.close()

    @property
    def closed(self) -> bool:
        """Whether nothing more is told: the server is stopping."""
        return self._closed

    @property
    def audit_head(self) -> AuditHead | None:
        """The end of the audit log, as this server saw it last."""
        return self._audit_head

    def on_events(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Call `listener` on the event loop with the events of each commit, once each."""
        self._listeners.append(listener)

    async def read_after(
        self, after: int | None, *, wanted: EventFilter, limit: int
    ) -> Sequence[Event]:
        """Return stored events with ids above `after` (None: from the oldest).

        Raises:
            GameNodeError: CURSOR_EXPIRED, see `store.read_after`.
        """

        def read(conn: Connection) -> Sequence[Event]:
            first = store.oldest(conn) if after is None else after
            return store.read_after(conn, first, wanted=wanted, limit=limit)

        return await self._database.read(read)

    def follow(
        self,
        after: int | None,
        wanted: EventFilter,
    ) -> AsyncGenerator[list[Event], None]:
        """Yield what is `wanted` with ids above `after`, in batches, each event once, in order.

        `after` None means from now: everything that commits after this call. Ends with the feed.

        Raises:
            GameNodeError: CURSOR_EXPIRED, see `store.read_after`, also later, for a reader slower
                than retention; RESOURCE_EXHAUSTED, too many follow.
        """
        return self._follow(self._head if after is None else after, wanted)

    @contextmanager
    def watch(self, entity_id: str, wanted: EventFilter = _ALL) -> Iterator[Watch]:
        """Watch for events that are `wanted` about `entity_id` or its parts ("<entity>/<part>").

        Take it before reading the entity: no change can then fall between reading and waiting.

        Raises:
            GameNodeError: RESOURCE_EXHAUSTED, too many watch.
        """
        if self._watch_count >= self._settings.watches_max:
            raise self._too_many("watches")
        wake = Wake()
        self._watch_count += 1
        self._watches.setdefault(entity_id, {})[wake] = wanted
        try:
            yield Watch(wake)
        finally:
            self._watch_count -= 1
            wakes = self._watches[entity_id]
            del wakes[wake]
            if not wakes:
                del self._watches[entity_id]

    # The commit hook (rule RC4)

    def before_commit(self, conn: Connection, collected: Sequence[object]) -> object:
        """Store the group's events and audit entries, in the order in which groups commit."""
        happened = [item for item in collected if isinstance(item, NewEvent)]
        entries = [item for item in collected if isinstance(item, AuditEntry)]
        if len(happened) + len(entries) != len(collected):
            raise TypeError("neither an event nor an audit entry was collected")
        if not collected:
            return _Committed((), None)
        self._database.lock_commits(conn)
        head = (
            audit.link_all(conn, entries, key=self._audit_key, known=self._audit_head)
            if entries
            else None
        )
        return _Committed(store.insert_all(conn, happened), head)

    def after_commit(self, outcome: object) -> None:
        """Wake who waits for these events, and log the audit log's head, so that a cut shows."""
        assert isinstance(outcome, _Committed)
        if outcome.audit_head is not None:
            self._audit_head = outcome.audit_head
            head = outcome.audit_head.link.hex()
            _log.info("audit log grew", extra={"event": "audit.head", "head": head})
        # The poll may have been faster.
        fresh = [event for event in outcome.events if event.id > self._seen]
        self._announced.update(event.id for event in fresh)
        self._announce(fresh)

    async def _announce_missed(self) -> None:
        """Announce what was committed and not announced here."""
        more = True
        while more:
            page, cursor = await self._read(self._seen, EventFilter())
            fresh = [event for event in page if event.id not in self._announced]
            self._seen = cursor
            self._announced = {number for number in self._announced if number > cursor}
            self._announce(fresh)
            more = len(page) == self._settings.batch_max

    def _announce(self, happened: Sequence[Event]) -> None:
        if not happened:
            return
        self._head = max(self._head, happened[-1].id)
        for wake, wanted in self._followers.items():
            if any(wanted.matches(event) for event in happened):
                wake.ring()
        for event in happened:
            for entity_id in {event.entity_id, event.entity_id.partition("/")[0]}:
                for wake, wanted in self._watches.get(entity_id, {}).items():
                    if wanted.matches(event):
                        wake.ring()
        for listener in self._listeners:
            try:
                listener(happened)
            except Exception:  # noqa: BLE001 - one listener's fault is not the others'
                _log.exception("a listener failed", extra={"event": "events.listener_failed"})

    async def _follow(self, cursor: int, wanted: EventFilter) -> AsyncGenerator[list[Event], None]:
        if len(self._followers) >= self._settings.followers_max:
            raise self._too_many("followers")
        wake = Wake()
        self._followers[wake] = wanted
        try:
            while not self._closed:
                batch, cursor = await self._read(cursor, wanted)
                if batch:
                    yield batch
                if len(batch) < self._settings.batch_max:
                    await wake.wait(self._settings.idle_s)
        finally:
            del self._followers[wake]

    async def _read(self, after: int, wanted: EventFilter) -> tuple[list[Event], int]:
        """Return the next events and the cursor behind them, and behind what is not wanted."""
        limit = self._settings.batch_max

        def batch(conn: Connection) -> tuple[list[Event], int]:
            found = store.read_after(conn, after, wanted=wanted, limit=limit)
            return found, found[-1].id if len(found) == limit else store.head(conn)

        return await self._database.read(batch)

    @staticmethod
    def _too_many(what: str) -> GameNodeError:
        return GameNodeError(
            ErrorCode.RESOURCE_EXHAUSTED, f"too many {what} of events", retry_after_s=5.0
        )
