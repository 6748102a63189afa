"""The way from a simulated agent to the server: the real one, which can be cut, stilled or slow."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from random import Random
from typing import Any, TypeVar

from gamenode.agent.link import AgentStream, GrpcLink, LinkError, LinkSettings
from gamenode.domain.command import (
    LivingInstances,
    NumberedReport,
    OrderAnswer,
    ServerWord,
    Statement,
)
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.inventory import Collection, CollectionAnswer
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition
from gamenode.domain.node import Heartbeat, HeartbeatResult, Registration, RegistrationAnswer
from gamenode.lib.clock import Clock
from gamenode.sim.judge import Judge

_Answer = TypeVar("_Answer")


class SimulatedLink:
    """A `Link` over gRPC on which faults can be laid; the judge hears what passes."""

    def __init__(
        self,
        node_id: str,
        address: str,
        settings: LinkSettings,
        *,
        judge: Judge,
        clock: Clock,
        random: Random,
        delay_s_max: float = 0.0,
    ) -> None:
        """Reach the server at `address`; what is sent waits up to `delay_s_max` first."""
        self._node_id = node_id
        self._settings = settings
        self._real = GrpcLink(address, settings)
        self._judge = judge
        self._clock = clock
        self._random = random
        self._delay_s_max = delay_s_max
        self._cut = False
        self._passable: asyncio.Event | None = None
        """Not None while silent; set when that ends."""
        self._calls: set[asyncio.Task[Any]] = set()
        self._ghosts: list[AgentStream] = []

    # Faults

    async def cut(self) -> None:
        """Break the connection; until `heal` there is no other."""
        self._cut = True
        for call in self._calls:
            call.cancel()
        await self._real.close()

    def still(self) -> None:
        """Let nothing pass until `heal`, though the connection stands."""
        self._passable = asyncio.Event()

    async def heal(self) -> None:
        """Let everything pass again."""
        self._cut = False
        passable, self._passable = self._passable, None
        if passable is not None:
            passable.set()
        ghosts, self._ghosts = self._ghosts, []
        for stream in ghosts:
            await stream.close()

    # What an agent asks for

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Register the node."""
        await self.way()
        answer = await self._unless_cut(self._real.register(registration))
        if answer.session_id:
            self._judge.registered(self._node_id, answer)
        return answer

    async def open(self, statement: Statement) -> AgentStream:
        """Open a stream with a statement."""
        await self.way()
        stream = await self._unless_cut(self._real.open(statement))
        self._judge.connected(self._node_id)
        return _SimulatedStream(stream, self, self._node_id, self._judge, self._clock)

    async def update_inventory(self, collection: Collection) -> CollectionAnswer:
        """Bring what the node is made of."""
        await self.way()
        return await self._unless_cut(self._real.update_inventory(collection))

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        """Store one chunk of a log."""
        try:
            await self.way()
            return await self._unless_cut(self._real.append_logs(key, offset, chunk, position))
        except LinkError as error:
            raise GameNodeError(ErrorCode.UNAVAILABLE, str(error)) from error

    async def close(self) -> None:
        """Close the connection."""
        await self._real.close()

    # What its streams need

    async def way(self) -> None:
        """Wait as long as the faults let nothing pass.

        Raises:
            LinkError: there is no way to the server, or none for longer than a call may take.
        """
        if self._passable is not None:
            try:
                async with asyncio.timeout(self._settings.call_timeout_s):
                    await self._passable.wait()
            except TimeoutError as error:
                raise LinkError("nothing passes", transient=True) from error
        if self._delay_s_max:
            await asyncio.sleep(self._delay_s_max * self._random.random())
        if self._cut:
            raise LinkError("there is no way to the server", transient=True)

    async def passable(self) -> None:
        """Wait for as long as it is silent."""
        if self._passable is not None:
            await self._passable.wait()

    def keep(self, stream: AgentStream) -> bool:
        """Return whether a stream that is given up has to stand, since its end cannot pass."""
        if self._passable is None:
            return False
        self._ghosts.append(stream)
        return True

    async def _unless_cut(self, call: Coroutine[Any, Any, _Answer]) -> _Answer:
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if not self._cut or (ours is not None and ours.cancelling()):
                raise
            raise LinkError("the connection broke", transient=True) from None
        finally:
            self._calls.discard(task)


class _SimulatedStream:
    """A stream of a simulated link."""

    def __init__(
        self, real: AgentStream, link: SimulatedLink, node_id: str, judge: Judge, clock: Clock
    ) -> None:
        self._real = real
        self._link = link
        self._node_id = node_id
        self._judge = judge
        self._clock = clock
        self._sending = asyncio.Lock()
        """What is sent arrives in that order, however slow it is."""
        self._sent_s: float | None = None

    async def read(self) -> ServerWord | None:
        word = await self._real.read()
        await self._link.passable()
        if isinstance(word, HeartbeatResult) and self._sent_s is not None:
            round_trip_s = self._clock.monotonic_s() - self._sent_s
            self._sent_s = None
            self._judge.answered(self._node_id, round_trip_s, counted=word.counted)
        return word

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        async with self._sending:
            await self._link.way()
            self._judge.beat(self._node_id)
            self._sent_s = self._clock.monotonic_s()
            await self._real.heartbeat(heartbeat)

    async def report(self, reports: list[NumberedReport]) -> None:
        async with self._sending:
            await self._link.way()
            await self._real.report(reports)

    async def answer(self, sequence: int, answer: OrderAnswer) -> None:
        async with self._sending:
            await self._link.way()
            await self._real.answer(sequence, answer)

    async def instances(self, living: LivingInstances) -> None:
        async with self._sending:
            await self._link.way()
            await self._real.instances(living)

    async def goodbye(self, reason: str) -> None:
        async with self._sending:
            with suppress(LinkError):
                await self._link.way()
                await self._real.goodbye(reason)

    async def close(self) -> None:
        if not self._link.keep(self._real):
            await self._real.close()
