"""Logs without processes and wires: scripted output, and links that lose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition, LogStream
from gamenode.lib.clock import Instant, SystemClock
from gamenode.server.logs.service import LogService
from gamenode.wire import cri

KEY = LogKey("01936d2c-9b1e-7000-8000-00000000abcd", "build", 1)
NODE = "node-1"


@dataclass(frozen=True)
class Block:
    stream: LogStream
    data: bytes
    at: Instant
    masked: tuple[tuple[int, int], ...] = ()


class Output:
    """What a step prints: kept like a runtime keeps it, and read from any position."""

    def __init__(self, blocks: Iterable[tuple[LogStream, bytes]] = ()) -> None:
        self._blocks = list(blocks)
        self._changed = asyncio.Event()
        self._ended = False
        self.readers = 0

    def print(self, data: bytes, stream: LogStream = LogStream.STDOUT) -> None:
        self._blocks.append((stream, data))
        self._changed.set()

    def end(self) -> Output:
        self._ended = True
        self._changed.set()
        return self

    def written(self, stream: LogStream = LogStream.STDOUT) -> bytes:
        return b"".join(data for of, data in self._blocks if of is stream)

    async def source(self, position: LogPosition, live: asyncio.Event) -> AsyncIterator[Block]:
        del live
        self.readers += 1
        skip = {
            LogStream.STDOUT: position.stdout_bytes,
            LogStream.STDERR: position.stderr_bytes,
            LogStream.GAMENODE: 0,
        }
        at = 0
        while True:
            while at < len(self._blocks):
                stream, data = self._blocks[at]
                at += 1
                skipped = min(skip[stream], len(data))
                skip[stream] -= skipped
                # Each reading finds other blocks, as it does in a file.
                size = max(1, len(data) // self.readers)
                for start in range(skipped, len(data), size):
                    yield Block(stream, data[start : start + size], SystemClock().now())
            if self._ended:
                return
            self._changed.clear()
            await self._changed.wait()


class DirectLink:
    """Calls a server in this process."""

    def __init__(self, service: LogService) -> None:
        self.service = service
        self.calls: list[tuple[int, int]] = []

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        self.calls.append((offset, len(chunk)))
        return await self.service.append(
            key,
            node_id=NODE,
            offset=offset,
            chunk=chunk,
            checksum=cri.checksum(chunk),
            position=position,
            now=SystemClock().now(),
        )


class LossyLink(DirectLink):
    """Loses chunks and answers, repeats and delays chunks, so that they overtake each other."""

    def __init__(self, service: LogService, random: Random, *, loss_ratio: float = 0.3) -> None:
        super().__init__(service)
        self._random = random
        self._loss_ratio = loss_ratio

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        await self._delay()
        self._lose("lost on the way there")
        if self._random.random() < self._loss_ratio:
            await super().append_logs(key, offset, chunk, position)
            await self._delay()
        answer = await super().append_logs(key, offset, chunk, position)
        await self._delay()
        self._lose("the answer was lost")
        return answer

    async def _delay(self) -> None:
        for _ in range(self._random.randrange(20)):
            await asyncio.sleep(0)

    def _lose(self, message: str) -> None:
        if self._random.random() < self._loss_ratio:
            raise GameNodeError(ErrorCode.UNAVAILABLE, message)


def chunks(log: Sequence[tuple[LogStream, bytes]]) -> list[tuple[int, bytes, LogPosition]]:
    """Return a log as a sender would send it: offset, chunk, position at its end."""
    sent: list[tuple[int, bytes, LogPosition]] = []
    offset, position = 0, LogPosition()
    for stream, data in log:
        framed = cri.frame(stream, SystemClock().now(), data)
        position = cri.advance(position, stream, len(data), framed)
        sent.append((offset, framed, replace(position)))
        offset += len(framed)
    return sent
