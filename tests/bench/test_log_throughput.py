"""What logs cost: framing, storing, and the way from a step's output to a follower."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio
import pytest
from tests.support.log_server import MESSAGE_BYTES_MAX
from tests.support.logs import KEY, NODE, Block, DirectLink, Output, chunks

from gamenode.agent.spool.logs import LogSpool
from gamenode.agent.uploader import LogUploader, UploaderSettings
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition, LogStream
from gamenode.lib.clock import Instant, SystemClock
from gamenode.server.db.database import Database
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService, LogSettings
from gamenode.server.logs.streamer import From, LogStreamer, StreamerSettings
from gamenode.wire import cri
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as rpc

pytestmark = pytest.mark.bench

OpenDatabase = Callable[..., Awaitable[Database]]

MIB = 1024 * 1024
BLOCK = (b"2026 INFO some line of a build, about as long as they are, n=%06d" % 7).ljust(79) + b"\n"
BLOCK *= MIB // len(BLOCK)
OUTPUT_BYTES = 600 * 1000 * 1000


def report(line: str) -> None:
    print(f"\n{line}")


def test_framing_and_stripping() -> None:
    framed = cri.frame(LogStream.STDOUT, SystemClock().now(), BLOCK)
    for name, size, work in (
        ("frame", len(BLOCK), lambda: cri.frame(LogStream.STDOUT, Instant(1), BLOCK)),
        ("strip", len(framed), lambda: cri.strip(framed)),
        ("parse", len(framed), lambda: cri.parse(framed)),
    ):
        began_s = time.perf_counter()
        rounds = 0
        while time.perf_counter() - began_s < 0.5:
            work()
            rounds += 1
        rate = rounds * size / (time.perf_counter() - began_s) / 1e6
        report(f"{name}: {rate:.0f} MB/s of 80-byte lines")


async def test_storing(sqlite_url: str, open_database: OpenDatabase, tmp_path: Path) -> None:
    service = LogService(
        await open_database(sqlite_url), LogFiles(tmp_path / "logs"), settings=LogSettings()
    )
    link = DirectLink(service)
    half = BLOCK[: len(BLOCK) // 160 * 80]
    sent = chunks([(LogStream.STDOUT, half)] * 200)
    window = asyncio.Semaphore(4)

    async def send(offset: int, chunk: bytes, position: LogPosition) -> None:
        async with window:
            await link.append_logs(KEY, offset, chunk, position)

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for chunk in sent:
            group.create_task(send(*chunk))
    rate = sum(len(chunk) for _, chunk, _ in sent) / (time.perf_counter() - began_s) / 1e6
    report(f"append: {rate:.0f} MB/s of log, durable")
    await service.close()


async def test_live_latency(sqlite_url: str, open_database: OpenDatabase, tmp_path: Path) -> None:
    files = LogFiles(tmp_path / "logs")
    service = LogService(await open_database(sqlite_url), files, settings=LogSettings())
    streamer = LogStreamer(service, files, clock=SystemClock(), settings=StreamerSettings())
    agent = LogUploader(
        link=DirectLink(service), spool=LogSpool(tmp_path / "spool"), settings=UploaderSettings()
    )
    output = Output()
    agent.begin(KEY, output.source, new=True)
    agent.set_live(KEY.pipeline_id, KEY.step, live=True)

    async def ended(_: LogKey) -> bool:
        return False

    following = streamer.follow(KEY, From(), ended)
    waits_ms: list[float] = []
    for number in range(300):
        began_s = time.perf_counter()
        output.print(b"line %d\n" % number)
        await anext(following)
        waits_ms.append((time.perf_counter() - began_s) * 1000)
    cuts = statistics.quantiles(waits_ms, n=100)
    report(f"live, printed to followed: p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms")
    await following.aclose()
    await agent.close()
    await service.close()
    streamer.close()


class GrpcLink:
    """AppendLogs on the wire."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.GameNodeServiceStub(channel)

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        answer = await self._stub.AppendLogs(
            pb.AppendLogsRequest(
                node_id=NODE,
                session_id="bench",
                log=pb.LogKey(
                    pipeline_id=key.pipeline_id,
                    step_id=key.step,
                    attempt=key.attempt,
                    run=key.run,
                ),
                offset=offset,
                chunk=chunk,
                checksum=cri.checksum(chunk),
                position=pb.LogPosition(
                    stdout_bytes=position.stdout_bytes, stdout_lines=position.stdout_lines
                ),
            )
        )
        return AppendAnswer(
            next_offset=answer.next_offset, position=LogPosition(), hash=answer.hash
        )


async def blocks(position: LogPosition, live: asyncio.Event) -> AsyncIterator[Block]:
    del position, live
    for _ in range(OUTPUT_BYTES // len(BLOCK)):
        yield Block(LogStream.STDOUT, BLOCK, SystemClock().now())


async def test_end_to_end_over_grpc_with_a_follower(tmp_path: Path) -> None:
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.log_server", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    grpc_port, follow_port = (await server.stdout.readline()).split()
    follower = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FOLLOWER, follow_port.decode()),
        stdout=asyncio.subprocess.PIPE,
    )
    options = [("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{grpc_port.decode()}", options=options
        ) as channel:
            agent = LogUploader(
                link=GrpcLink(channel),
                spool=LogSpool(tmp_path / "spool"),
                settings=UploaderSettings(),
            )
            began_s = time.perf_counter()
            agent.begin(KEY, blocks, new=True)
            end = await agent.finish(KEY, 120.0)
            uploaded_s = time.perf_counter() - began_s
            assert end.length_bytes is not None
            assert follower.stdout is not None
            seen = 0
            while seen < end.length_bytes:
                seen = int(await follower.stdout.readline())
            followed_s = time.perf_counter() - began_s
            await agent.close()
    finally:
        for process in (follower, server):
            process.kill()
            await process.wait()
    assert end.complete
    report(
        f"end to end: {OUTPUT_BYTES / uploaded_s / 1e6:.0f} MB/s of step output uploaded, "
        f"{OUTPUT_BYTES / followed_s / 1e6:.0f} MB/s followed in another process"
    )


FOLLOWER = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
seen = 0
buffer = bytearray(1 << 20)
while read := connection.recv_into(buffer):
    seen += read
    print(seen, flush=True)
"""
