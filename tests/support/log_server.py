"""A process that stores logs and gives them to followers: AppendLogs, and nothing else of a server.

`python -m tests.support.log_server FOLDER` prints two ports: gRPC, and one that answers every
connection with the log `KEY`, followed to its end.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc.aio
import uvloop
from tests.support.logs import KEY

from gamenode.domain.log import LogKey, LogPosition
from gamenode.lib.clock import SystemClock
from gamenode.server.db.database import Database, DatabaseSettings
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService, LogSettings
from gamenode.server.logs.streamer import From, LogStreamer, StreamerSettings
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

SERVICE = "gamenode.v1.GameNodeService"
MESSAGE_BYTES_MAX = 2 * 1024 * 1024


async def append_logs(service: LogService, request: pb.AppendLogsRequest) -> pb.AppendLogsResponse:
    log, position = request.log, request.position
    answer = await service.append(
        LogKey(log.pipeline_id, log.step_id, log.attempt, log.run),
        node_id=request.node_id,
        offset=request.offset,
        chunk=request.chunk,
        checksum=request.checksum,
        position=LogPosition(
            stdout_bytes=position.stdout_bytes,
            stdout_lines=position.stdout_lines,
            stderr_bytes=position.stderr_bytes,
            stderr_lines=position.stderr_lines,
        ),
        now=SystemClock().now(),
    )
    return pb.AppendLogsResponse(next_offset=answer.next_offset, hash=answer.hash)


async def serve(folder: Path) -> None:
    clock = SystemClock()
    url = f"sqlite:///{folder / 'gamenode.db'}"
    database = Database.open(DatabaseSettings(url=url), clock=clock)
    files = LogFiles(folder / "logs")
    service = LogService(database, files, settings=LogSettings())
    streamer = LogStreamer(service, files, clock=clock, settings=StreamerSettings())

    async def ended(_: LogKey) -> bool:
        return False

    async def follow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for piece in streamer.follow(KEY, From(), ended):
            writer.write(piece.data)
            await writer.drain()
        writer.close()

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)])
    method = grpc.unary_unary_rpc_method_handler(
        lambda request, _: append_logs(service, request),
        request_deserializer=pb.AppendLogsRequest.FromString,
        response_serializer=pb.AppendLogsResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(SERVICE, {"AppendLogs": method})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    followers = await asyncio.start_server(follow, "127.0.0.1", 0)
    print(port, followers.sockets[0].getsockname()[1], flush=True)
    async with followers:
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
