"""The streams of agents, and who was heard when: what dies with this process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gamenode.domain.command import (
    Acknowledged,
    Closed,
    CloseReason,
    FencedOrder,
    FollowLog,
    Order,
    OrderAnswer,
    ServerWord,
    Welcome,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.node import HeartbeatResult, Session
from gamenode.lib.clock import Clock, Instant


class AgentConnection:
    """The server's handle on one stream of an agent: one method for each thing it may ask.

    Words wait in a bounded queue until the stream's writer takes them. An agent that does not read
    is dropped, and says at its next stream what it holds.
    """

    def __init__(
        self, *, session: Session, stream_number: int, boot_id: str, words_max: int
    ) -> None:
        """Speak for a stream that is being opened."""
        self.session = session
        self.stream_number = stream_number
        self.boot_id = boot_id
        self._words_max = words_max
        self._words: deque[ServerWord] = deque()
        self._ready = asyncio.Event()
        self._sequence = 0
        self._asked: dict[int, asyncio.Future[OrderAnswer]] = {}
        self._closed: Closed | None = None
        self._opened = False

    @property
    def node_id(self) -> str:
        """Return whose stream this is."""
        return self.session.node_id

    @property
    def usable(self) -> bool:
        """Return whether orders can be sent: the statement is reconciled, the stream stands."""
        return self._opened and self._closed is None

    def welcome(self, word: Welcome) -> None:
        """Say that the statement is reconciled; before, nothing else may be sent (rule RL1)."""
        self._say(word)
        self._opened = True

    async def ask(self, order: Order, *, timeout_s: float) -> OrderAnswer:
        """Send an order and return the agent's answer.

        Raises:
            GameNodeError: NODE_OFFLINE if the stream ends first; TIMEOUT. The agent may have taken
                the order all the same; its next statement says so.
        """
        if not self.usable:
            raise self._gone()
        self._sequence += 1
        sequence = self._sequence
        answer: asyncio.Future[OrderAnswer] = asyncio.get_running_loop().create_future()
        self._asked[sequence] = answer
        self._say(
            FencedOrder(
                session_epoch=self.session.epoch,
                stream_number=self.stream_number,
                sequence=sequence,
                order=order,
            )
        )
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise GameNodeError(
                ErrorCode.TIMEOUT, f"node {self.node_id} did not answer within {timeout_s:g} s"
            ) from error
        finally:
            del self._asked[sequence]

    def answered(self, sequence: int, answer: OrderAnswer) -> None:
        """Hand an agent's answer to whoever asked; a late one is dropped."""
        future = self._asked.get(sequence)
        if future is not None and not future.done():
            future.set_result(answer)

    def say(self, word: HeartbeatResult | Acknowledged | FollowLog) -> None:
        """Say something that is not answered."""
        self._say(word)

    def close(self, closed: Closed) -> None:
        """End the stream, with a word that says why. Safe to repeat."""
        if self._closed is not None:
            return
        self._closed = closed
        self._ready.set()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(self._gone())

    async def next_words(self) -> list[ServerWord]:
        """Return what to write next; the last word of a stream is `Closed`, then nothing."""
        while not self._words and self._closed is None:
            self._ready.clear()
            await self._ready.wait()
        words = list(self._words)
        self._words.clear()
        if self._closed is not None:
            words.append(self._closed)
        return words

    def _say(self, word: ServerWord) -> None:
        if self._closed is not None:
            return
        if len(self._words) >= self._words_max:
            self.close(Closed(reason=CloseReason.PROTOCOL, message="the agent does not read"))
            return
        self._words.append(word)
        self._ready.set()

    def _gone(self) -> GameNodeError:
        return GameNodeError(
            ErrorCode.NODE_OFFLINE,
            f"the stream of node {self.node_id} has ended",
            retry_after_s=5.0,
        )


@dataclass(slots=True)
class Liveness:
    """When a node was last heard, and through what."""

    session: Session
    online: bool
    heard_s: float
    """By the monotonic clock."""
    heard_at: Instant
    signs: int = 0
    """How many signs of life there were."""
    stream_number: int = 0
    """The newest stream's number within the session."""
    connection: AgentConnection | None = None
    broken_s: float | None = None
    """Since when its stream is broken, by the monotonic clock; None while it stands."""
    flushed_at: Instant | None = None
    round_trip_s: float | None = None
    clock_skew_s: float | None = None
    duplicate_s: float | None = None
    """When another host last tried to register as this node, by the monotonic clock."""


class ConnectionManager:
    """Who is heard, and who is not any more.

    Source: C2, C3, RL5, promises P7 and P8.
    """

    def __init__(
        self, *, clock: Clock, heartbeat_timeout_s: float, reconnect_grace_s: float
    ) -> None:
        """Know nobody yet."""
        self._clock = clock
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._reconnect_grace_s = reconnect_grace_s
        self._nodes: dict[str, Liveness] = {}

    def heard(self, session: Session, *, online: bool = True) -> Liveness:
        """Count a sign of life of a session; return what is known of its node.

        `online` is how the node was last written down, for one that was not heard of yet.
        """
        known = self._nodes.get(session.node_id)
        if known is None or known.session != session:
            known = Liveness(
                session=session,
                online=online,
                heard_s=self._clock.monotonic_s(),
                heard_at=self._clock.now(),
            )
            self._nodes[session.node_id] = known
        known.heard_s = self._clock.monotonic_s()
        known.heard_at = self._clock.now()
        known.signs += 1
        known.broken_s = None
        return known

    def get(self, node_id: str) -> Liveness | None:
        """Return what is known of a node."""
        return self._nodes.get(node_id)

    def drop(self, node_id: str) -> Liveness | None:
        """Forget a node; return what was known of it."""
        return self._nodes.pop(node_id, None)

    def every(self) -> Iterable[tuple[str, Liveness]]:
        """Return every node that was heard of."""
        return list(self._nodes.items())

    def connection(self, node_id: str) -> AgentConnection | None:
        """Return the stream of a node, if it can be used."""
        known = self._nodes.get(node_id)
        if known is None or known.connection is None or not known.connection.usable:
            return None
        return known.connection

    def alive(self, node_id: str) -> Liveness | None:
        """Return what is known of a node whose stream stands, and was heard within the timeout.

        The stream of a host that lost its power stands for hours and says nothing.
        """
        known = self._nodes.get(node_id)
        if known is None or known.connection is None:
            return None
        return known if self._silence_s(known) < self._heartbeat_timeout_s else None

    def attach(self, connection: AgentConnection, *, online: bool) -> Liveness | None:
        """Make `connection` the node's stream; the one before is told that it is superseded.

        None if the session had a newer stream already: this one was delayed on its way (RL2).
        """
        known = self._nodes.get(connection.node_id)
        if (
            known is not None
            and known.session == connection.session
            and known.stream_number > connection.stream_number
        ):
            return None
        known = self.heard(connection.session, online=online)
        before = known.connection
        known.connection = connection
        known.stream_number = connection.stream_number
        if before is not None:
            before.close(Closed(reason=CloseReason.SUPERSEDED, message="a newer stream took over"))
        return known

    def is_newest(self, connection: AgentConnection) -> bool:
        """Return whether its node has no newer stream, though this one may have ended."""
        known = self._nodes.get(connection.node_id)
        return (
            known is not None
            and known.session == connection.session
            and known.stream_number == connection.stream_number
        )

    def detach(self, connection: AgentConnection) -> bool:
        """Note that a stream ended; return whether it was still the node's own."""
        known = self._nodes.get(connection.node_id)
        if known is None or known.connection is not connection:
            return False
        known.connection = None
        known.broken_s = self._clock.monotonic_s()
        return True

    def silent(self) -> list[tuple[str, Liveness, str]]:
        """Return who must be taken for offline now, and why."""
        return [
            (node_id, known, cause)
            for node_id, known in self._nodes.items()
            if (cause := self.why_silent(known))
        ]

    def why_silent(self, known: Liveness) -> str:
        """Return why a node that counts as online must be taken for offline; empty: it must not."""
        if not known.online:
            return ""
        silence_s = self._silence_s(known)
        if silence_s >= self._heartbeat_timeout_s:
            return f"no heartbeat for {silence_s:.1f} s"
        broken_s = known.broken_s
        if broken_s is None or self._clock.monotonic_s() - broken_s < self._reconnect_grace_s:
            return ""
        return "its connection broke and did not come back"

    def _silence_s(self, known: Liveness) -> float:
        return self._clock.monotonic_s() - known.heard_s
