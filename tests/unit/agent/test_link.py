"""The agent's gRPC client against servers that misbehave, on the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from tests.support.machines import registration

from gamenode.agent.link import GrpcLink, LinkError, LinkSettings
from gamenode.domain.command import Statement, Welcome
from gamenode.domain.log import LogKey, LogPosition
from gamenode.domain.node import Heartbeat, Maintenance
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

STATEMENT = Statement(
    node_id="n1",
    session_id="s",
    stream_number=1,
    state_version=1,
    maintenance=Maintenance.NORMAL,
    held=(),
    boot_id="b",
)


async def connect(messages: AsyncIterator[pb.AgentMessage], context: Any) -> None:
    """Welcome the agent, then neither read nor answer."""
    await anext(messages)
    await context.write(pb.ServerMessage(welcome=pb.Welcome()))
    await asyncio.Event().wait()


async def register(_request: pb.RegisterRequest, _context: Any) -> pb.RegisterResponse:
    return pb.RegisterResponse(accepted=True, session_id="s7", heartbeat_interval_s=15)


async def append(request: pb.AppendLogsRequest, _context: Any) -> pb.AppendLogsResponse:
    assert (request.node_id, request.session_id) == ("n1", "s7")
    return pb.AppendLogsResponse(next_offset=len(request.chunk))


@pytest_asyncio.fixture
async def link() -> AsyncIterator[GrpcLink]:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        connect,
        request_deserializer=pb.AgentMessage.FromString,
        response_serializer=pb.ServerMessage.SerializeToString,
    )
    service = pb.DESCRIPTOR.services_by_name["GameNodeService"].full_name
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                service,
                {
                    "Connect": handler,
                    "Register": grpc.unary_unary_rpc_method_handler(
                        register,
                        request_deserializer=pb.RegisterRequest.FromString,
                        response_serializer=pb.RegisterResponse.SerializeToString,
                    ),
                    "AppendLogs": grpc.unary_unary_rpc_method_handler(
                        append,
                        request_deserializer=pb.AppendLogsRequest.FromString,
                        response_serializer=pb.AppendLogsResponse.SerializeToString,
                    ),
                },
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    opened = GrpcLink(f"127.0.0.1:{port}", LinkSettings(call_timeout_s=0.3))
    yield opened
    await opened.close()
    await server.stop(None)


async def test_a_stream_that_is_given_up_is_broken_and_not_a_cancelled_agent(
    link: GrpcLink,
) -> None:
    stream = await link.open(STATEMENT)
    assert isinstance(await stream.read(), Welcome)
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0.05)
    await stream.close()
    with pytest.raises(LinkError):
        await reading


async def test_a_server_that_does_not_read_breaks_the_stream_on_both_ends(link: GrpcLink) -> None:
    stream = await link.open(STATEMENT)
    assert isinstance(await stream.read(), Welcome)
    reading = asyncio.ensure_future(stream.read())
    beat = Heartbeat(node_id="n1" * 100_000, session_id="s")
    with pytest.raises(LinkError):
        for _ in range(100):
            await stream.heartbeat(beat)
    with pytest.raises(LinkError):
        await reading


async def test_a_log_waits_for_a_session_to_name(link: GrpcLink) -> None:
    sending = asyncio.ensure_future(link.append_logs(LogKey("p", "one", 1), 0, b"x", LogPosition()))
    await link.register(registration("n1"))
    assert (await sending).next_offset == 1


async def test_an_agent_that_is_cancelled_is_cancelled(link: GrpcLink) -> None:
    stream = await link.open(STATEMENT)
    assert isinstance(await stream.read(), Welcome)
    reading = asyncio.ensure_future(stream.read())
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
