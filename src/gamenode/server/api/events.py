"""The route of events: a page of what happened, or what happens as it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from starlette.types import ASGIApp

from gamenode.domain.errors import invalid
from gamenode.domain.event import Event, EventFilter, EventType
from gamenode.server.api import page
from gamenode.server.api.decode import QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.api.streams import (
    NDJSON_MEDIA_TYPE,
    SSE_MEDIA_TYPE,
    Streams,
    accepts_events,
    closing,
    read_last_event_id,
)
from gamenode.server.events.feed import EventFeed
from gamenode.wire import http

EventId = Annotated[int, Meta(ge=0, le=2**63 - 1)]

_TYPES: Final = frozenset(EventType)
_FAMILIES: Final = frozenset(name.partition(".")[0] + "." for name in _TYPES) | {"node.inventory."}
_encode_json: Final = msgspec.json.Encoder().encode


class EventsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which events."""

    after: Annotated[
        EventId | None,
        Meta(
            description="Those behind this event's id. Without it: from the oldest one on, or, "
            "with `follow`, from now on.",
        ),
    ] = None
    type: Annotated[
        list[str],
        Meta(max_length=50, description="Only these types, or families such as `pipeline.`."),
    ] = msgspec.field(default_factory=list)
    node: Annotated[str, Meta(max_length=63, description="Only those of this node.")] = ""
    entity: Annotated[
        str, Meta(max_length=128, description="Only those of this pipeline or node.")
    ] = ""
    limit: page.Limit = 100
    follow: Annotated[bool, Meta(description="Go on with events as they come.")] = False


class EventRoutes:
    """Reads events."""

    def __init__(self, events: EventFeed, *, streams: Streams) -> None:
        """Speak for `events`."""
        self._events = events
        self._streams = streams

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/events",
                summary="Read or follow events",
                handler=self._read,
                query=QueryReader(EventsQuery),
                answer=http.EventList,
                media_types=(NDJSON_MEDIA_TYPE, SSE_MEDIA_TYPE),
                headers={"Last-Event-ID": "Go on behind this event; stands above `after`."},
            ),
        )

    async def _read(self, call: Call[EventsQuery, None]) -> ASGIApp:
        query = call.query
        wanted = EventFilter(
            types=frozenset(_read_type(name) for name in query.type),
            node_id=query.node,
            entity_id=query.entity,
        )
        if accepts_events(call.request):
            last_id = read_last_event_id(call.request)
            after = query.after if last_id is None else last_id
            return await self._follow(after, wanted, _to_events, SSE_MEDIA_TYPE)
        if query.follow:
            return await self._follow(query.after, wanted, _to_lines, NDJSON_MEDIA_TYPE)
        found = await self._events.read_after(query.after, wanted=wanted, limit=query.limit + 1)
        events, last = page.split(found, query.limit)
        return answer(
            http.EventList(
                items=[http.encode_event(event) for event in events],
                next_cursor=str(last.id) if last else None,
            )
        )

    async def _follow(
        self,
        after: int | None,
        wanted: EventFilter,
        encode: Callable[[Sequence[Event]], bytes],
        media_type: str,
    ) -> ASGIApp:
        if after is not None:
            # Says now, with its status, what a stream could say only once it had begun.
            await self._events.read_after(after, wanted=wanted, limit=1)
        batches = self._events.follow(after, wanted)
        return self._streams.respond(_encoded(batches, encode), media_type=media_type)


async def _encoded(
    batches: AsyncIterator[Sequence[Event]], encode: Callable[[Sequence[Event]], bytes]
) -> AsyncIterator[bytes]:
    async with closing(batches):
        async for batch in batches:
            yield encode(batch)


def _to_events(batch: Sequence[Event]) -> bytes:
    # JSON has no newline outside its escapes, so one data line holds it.
    return b"".join(
        b"id: %d\nevent: %b\ndata: %b\n\n"
        % (event.id, event.type.encode(), _encode_json(http.encode_event(event)))
        for event in batch
    )


def _to_lines(batch: Sequence[Event]) -> bytes:
    return b"".join(b"%b\n" % _encode_json(http.encode_event(event)) for event in batch)


def _read_type(name: str) -> str:
    if name in _TYPES or name in _FAMILIES:
        return name
    nearest = get_close_matches(name, _TYPES | _FAMILIES, n=1)
    raise invalid(
        "type",
        f"{name[:64]!r} is no type of event",
        advice=f"did you mean {nearest[0]}?" if nearest else f"one of {', '.join(sorted(_TYPES))}",
    )
