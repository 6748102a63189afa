"""The server's end of an agent's stream: words in, words out, nothing decided."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Final

import grpc.aio

from gamenode.domain.command import (
    Closed,
    CloseReason,
    LivingInstances,
    NumberedReport,
    Statement,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.backoff import Backoff
from gamenode.lib.tasks import until_one_ends
from gamenode.server.nodes.connections import AgentConnection
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.wire import codec
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

_log = logging.getLogger(__name__)
_ENDED: Final = Closed(reason=CloseReason.PROTOCOL, message="the stream ended")

_Said = NumberedReport | LivingInstances
"""What an agent says of its work, in one order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLinkSettings:
    """Bounds of one stream."""

    statement_s_max: float = 15.0
    """How long a new stream may take to say the first word."""
    reports_waiting_max: int = 1_000
    """Reports that may wait for the database; then the stream is not read."""
    write_retry_first_s: float = 0.2
    """The wait after a write that failed; it doubles with each in a row."""
    write_retry_most_s: float = 5.0
    """The longest such wait."""


class AgentLink:
    """Serves `Connect`: one call is one stream of one agent.

    Reports are handed on in order by a task of their own, so that heartbeats are heard while the
    database is slow or its disk is full (RL5, P14).
    """

    def __init__(
        self,
        *,
        nodes: NodeManager,
        pipelines: PipelineManager,
        random: Random,
        settings: AgentLinkSettings,
    ) -> None:
        """Hand on to the managers."""
        self._nodes = nodes
        self._pipelines = pipelines
        self._random = random
        self._settings = settings

    async def serve(
        self,
        messages: AsyncIterator[pb.AgentMessage],
        context: grpc.aio.ServicerContext[pb.AgentMessage, pb.ServerMessage],
    ) -> None:
        """Live with one stream until either side ends it.

        Raises:
            GameNodeError: INVALID_REQUEST; the statement is not the first word, or does not come.
        """
        try:
            async with asyncio.timeout(self._settings.statement_s_max):
                first = await anext(messages, None)
        except TimeoutError as error:
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST,
                f"no statement within {self._settings.statement_s_max:g} s",
            ) from error
        if first is None:
            return
        if first.WhichOneof("content") != "statement":
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST, "the first message of a stream is the statement"
            )
        statement = codec.decode_statement(first.statement)
        connection = await self._nodes.attach(statement)
        if connection is None:
            closed = Closed(
                reason=CloseReason.REGISTER_AGAIN,
                message="the session is unknown or superseded: register again",
            )
            await context.write(codec.encode_server_word(closed))
            return
        reports: asyncio.Queue[_Said] = asyncio.Queue(self._settings.reports_waiting_max)
        try:
            # Words go out while the statement is reconciled: a stream that is closed meanwhile
            # still hears why.
            await until_one_ends(
                self._write(connection, context),
                self._read(connection, messages, reports),
                self._work(connection, statement, reports),
            )
        finally:
            # Whoever waits for an answer on it hears so now, and asks again on the next stream.
            connection.close(_ENDED)
            await asyncio.shield(self._nodes.detach(connection, "the stream ended"))

    async def _read(
        self,
        connection: AgentConnection,
        messages: AsyncIterator[pb.AgentMessage],
        reports: asyncio.Queue[_Said],
    ) -> None:
        async for message in messages:
            match message.WhichOneof("content"):
                case "heartbeat":
                    # Whose it is, the stream says; never the message (P15).
                    beat = replace(
                        codec.decode_heartbeat(message.heartbeat),
                        node_id=connection.node_id,
                        session_id=connection.session.session_id,
                    )
                    connection.say(await self._nodes.heartbeat(beat))
                case "reports":
                    for report in message.reports.reports:
                        await reports.put(codec.decode_report(report))
                case "instances":
                    # In one order with the reports: a service is never missed for having ended
                    # before it began.
                    await reports.put(codec.decode_instances(message.instances))
                case "answer":
                    answer = message.answer
                    connection.answered(answer.sequence, codec.decode_answer(answer))
                case "goodbye":
                    await self._nodes.goodbye(connection, message.goodbye.reason)
                    return
                case _:
                    connection.close(
                        Closed(
                            reason=CloseReason.PROTOCOL,
                            message="a statement is the first message, and only that",
                        )
                    )
                    return

    async def _work(
        self,
        connection: AgentConnection,
        statement: Statement,
        reports: asyncio.Queue[_Said],
    ) -> None:
        await self._persist(connection, partial(self._pipelines.reconcile, connection, statement))
        self._nodes.opened()
        while True:
            said = [await reports.get()]
            while not reports.empty():
                said.append(reports.get_nowait())
            for words in _in_order(said):
                if isinstance(words, LivingInstances):
                    write = partial(self._pipelines.hear_instances, connection, words)
                else:
                    write = partial(self._pipelines.hear, connection, words)
                await self._persist(connection, write)

    async def _persist(
        self, connection: AgentConnection, write: Callable[[], Awaitable[None]]
    ) -> None:
        """Write until it is on disk: what an agent said must not be lost to a full disk (P13)."""
        backoff = Backoff(
            first_s=self._settings.write_retry_first_s, most_s=self._settings.write_retry_most_s
        )
        failures = 0
        while True:
            try:
                await write()
            except GameNodeError as error:
                if error.code not in (
                    ErrorCode.STORAGE_FULL,
                    ErrorCode.UNAVAILABLE,
                    ErrorCode.RESOURCE_EXHAUSTED,
                ):
                    raise
                failures += 1
                if failures == 1:
                    _log.warning(
                        "reports wait: %s",
                        error,
                        extra={"event": "reports.waiting", "node_id": connection.node_id},
                    )
                await asyncio.sleep(backoff.delay_s(failures, self._random))
            else:
                return

    async def _write(
        self,
        connection: AgentConnection,
        context: grpc.aio.ServicerContext[pb.AgentMessage, pb.ServerMessage],
    ) -> None:
        while True:
            for word in await connection.next_words():
                await context.write(codec.encode_server_word(word))
                if isinstance(word, Closed):
                    return


def _in_order(said: Iterable[_Said]) -> Iterator[LivingInstances | list[NumberedReport]]:
    """Return what was said, with reports in as few lists as the order allows."""
    reports: list[NumberedReport] = []
    for word in said:
        if isinstance(word, NumberedReport):
            reports.append(word)
            continue
        if reports:
            yield reports
            reports = []
        yield word
    if reports:
        yield reports
