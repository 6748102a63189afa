"""The agent's only gRPC client. Protobuf ends here; what comes out are domain values."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, Protocol

import grpc
import grpc.aio

from gamenode.domain.command import (
    LivingInstances,
    NumberedReport,
    OrderAnswer,
    ServerWord,
    Statement,
)
from gamenode.domain.errors import GameNodeError
from gamenode.domain.inventory import Collection, CollectionAnswer
from gamenode.domain.log import AppendAnswer, LogKey, LogPosition
from gamenode.domain.node import Heartbeat, Registration, RegistrationAnswer
from gamenode.wire import codec
from gamenode.wire.cri import checksum
from gamenode.wire.errors import code_of
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)


class LinkError(Exception):
    """The server could not be asked, or refused."""

    def __init__(self, message: str, *, transient: bool) -> None:
        """Say why, and whether the same call may go well later."""
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Bounds of the link."""

    call_timeout_s: float = 15.0
    """How long an answer of the server is waited for."""
    connect_backoff_first_s: float = 0.05
    """The wait before a second try to connect; it doubles with each."""
    connect_backoff_most_s: float = 5.0
    """The longest such wait."""
    keepalive_s: float = 20.0
    """How often a silent connection is tried."""
    message_bytes_max: int = 16 * 1024 * 1024
    """A longer message of the server is refused."""


class AgentStream(Protocol):
    """One open stream to the server. After an error it is of no more use."""

    async def read(self) -> ServerWord | None:
        """Return what the server says next; None for words that this agent does not know.

        Raises:
            LinkError: the stream has ended.
        """

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Say that the node is alive."""

    async def report(self, reports: list[NumberedReport]) -> None:
        """Say what became of the node's work."""

    async def answer(self, sequence: int, answer: OrderAnswer) -> None:
        """Answer an order by its sequence."""

    async def instances(self, living: LivingInstances) -> None:
        """Say which instances live now, after everything that was reported before."""

    async def goodbye(self, reason: str) -> None:
        """Say that the agent leaves on purpose, and end the stream."""

    async def close(self) -> None:
        """Drop the stream. Safe to repeat."""


class Link(Protocol):
    """How an agent reaches its server: over gRPC, or in tests through a lossy stand-in."""

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Register the node.

        Raises:
            LinkError: the server refused, or could not be asked; so does `open`.
        """

    async def open(self, statement: Statement) -> AgentStream:
        """Open a stream with a statement."""

    async def update_inventory(self, collection: Collection) -> CollectionAnswer:
        """Bring what the node is made of."""

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        """Store one chunk of a log at its offset; an empty one asks where to go on.

        Raises:
            GameNodeError: what the server refused, or UNAVAILABLE.
        """

    async def close(self) -> None:
        """Close the connection."""


class GrpcLink:
    """The link over gRPC: one channel, opened at the first call."""

    def __init__(self, address: str, settings: LinkSettings) -> None:
        """Reach the server at `address` (host:port)."""
        self._address = address
        self._settings = settings
        self._channel: grpc.aio.Channel | None = None
        self._session = ("", "")
        self._registered = asyncio.Event()

    async def register(self, registration: Registration) -> RegistrationAnswer:
        """Register the node; later calls name the session that this opened."""
        try:
            response = await self._stub().Register(
                codec.encode_registration(registration),
                timeout=self._settings.call_timeout_s,
                wait_for_ready=True,
            )
        except grpc.aio.AioRpcError as error:
            raise _link_error(error) from error
        self._session = (registration.node_id, response.session_id)
        if response.session_id:
            self._registered.set()
        return codec.decode_registration_answer(response)

    async def open(self, statement: Statement) -> AgentStream:
        """Open a stream with a statement."""
        stream = _GrpcStream(self._stub().Connect(), self._settings.call_timeout_s)
        try:
            await stream.write(pb.AgentMessage(statement=codec.encode_statement(statement)))
        except BaseException:
            await stream.close()
            raise
        return stream

    async def update_inventory(self, collection: Collection) -> CollectionAnswer:
        """Bring what the node is made of."""
        node_id, session_id = self._session
        request = codec.encode_resource_info(collection, node_id=node_id, session_id=session_id)
        try:
            response = await self._stub().UpdateResourceInfo(
                request, timeout=self._settings.call_timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise _link_error(error) from error
        return codec.decode_resource_answer(response)

    async def append_logs(
        self, key: LogKey, offset: int, chunk: bytes, position: LogPosition
    ) -> AppendAnswer:
        """Store one chunk of a log, once there is a session to name."""
        await self._registered.wait()
        node_id, session_id = self._session
        request = codec.encode_append(
            node_id=node_id,
            session_id=session_id,
            key=key,
            offset=offset,
            chunk=chunk,
            checksum=checksum(chunk),
            position=position,
        )
        try:
            response = await self._stub().AppendLogs(request, timeout=self._settings.call_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from error
        return codec.decode_append_answer(response)

    async def close(self) -> None:
        """Close the connection; another call opens it again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _stub(self) -> pb_grpc.GameNodeServiceAsyncStub:
        if self._channel is None:
            settings = self._settings
            self._channel = grpc.aio.insecure_channel(
                self._address,
                options=[
                    ("grpc.initial_reconnect_backoff_ms", _ms(settings.connect_backoff_first_s)),
                    ("grpc.min_reconnect_backoff_ms", _ms(settings.connect_backoff_most_s)),
                    ("grpc.max_reconnect_backoff_ms", _ms(settings.connect_backoff_most_s)),
                    ("grpc.keepalive_time_ms", _ms(settings.keepalive_s)),
                    # Silence is judged by heartbeats alone, so keepalive must never be first (RL5).
                    ("grpc.keepalive_timeout_ms", 60_000),
                    ("grpc.max_receive_message_length", settings.message_bytes_max),
                    ("grpc.max_send_message_length", settings.message_bytes_max),
                    # Many agents in one process each need a connection of their own.
                    ("grpc.use_local_subchannel_pool", 1),
                    ("grpc.enable_http_proxy", 0),
                ],
            )
        return pb_grpc.GameNodeServiceStub(self._channel)


class _GrpcStream:
    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[pb.AgentMessage, pb.ServerMessage],
        write_timeout_s: float,
    ) -> None:
        self._call = call
        self._write_timeout_s = write_timeout_s
        self._writing = asyncio.Lock()

    async def read(self) -> ServerWord | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _link_error(error) from error
        except asyncio.CancelledError:
            # A call that was given up on this side, as by a write that took too long, says the same
            # as a task that somebody cancels.
            task = asyncio.current_task()
            if not self._call.cancelled() or (task is not None and task.cancelling()):
                raise
            raise LinkError("the stream was given up", transient=True) from None
        if not isinstance(message, pb.ServerMessage):
            raise LinkError("the server ended the stream", transient=True)
        return codec.decode_server_word(message)

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        await self.write(pb.AgentMessage(heartbeat=codec.encode_heartbeat(heartbeat)))

    async def report(self, reports: list[NumberedReport]) -> None:
        messages = pb.StatusReports(reports=[codec.encode_report(report) for report in reports])
        await self.write(pb.AgentMessage(reports=messages))

    async def answer(self, sequence: int, answer: OrderAnswer) -> None:
        await self.write(pb.AgentMessage(answer=codec.encode_answer(sequence, answer)))

    async def instances(self, living: LivingInstances) -> None:
        await self.write(pb.AgentMessage(instances=codec.encode_instances(living)))

    async def goodbye(self, reason: str) -> None:
        await self.write(pb.AgentMessage(goodbye=pb.Goodbye(reason=reason)))
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._call.done_writing()
                while isinstance(await self._call.read(), pb.ServerMessage):
                    pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            return

    async def close(self) -> None:
        self._call.cancel()

    async def write(self, message: pb.AgentMessage) -> None:
        try:
            # One at a time: gRPC ends a call on which two writes meet.
            async with asyncio.timeout(self._write_timeout_s), self._writing:
                await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise _link_error(error) from error
        except asyncio.InvalidStateError as error:
            raise LinkError("the stream has ended", transient=True) from error
        except TimeoutError as error:
            raise LinkError("the server does not read", transient=True) from error


def _link_error(error: grpc.aio.AioRpcError) -> LinkError:
    code = error.code()
    return LinkError(f"{code.name}: {error.details()}", transient=code in _TRANSIENT)


def _refusal(error: grpc.aio.AioRpcError) -> GameNodeError:
    """Return the error that the server raised, read back from its status."""
    name, _, message = (error.details() or "").partition(": ")
    return GameNodeError(code_of(name, grpc_status=error.code().name), message or name)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
