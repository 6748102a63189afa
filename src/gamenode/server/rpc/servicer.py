"""The gRPC face: authorise, decode, call, encode. It keeps nothing (L1)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid
from gamenode.domain.event import EventFilter
from gamenode.domain.inventory import Collection
from gamenode.domain.node import Session
from gamenode.domain.pipeline import NewPipeline
from gamenode.lib.clock import Clock, after
from gamenode.server.events.feed import EventFeed
from gamenode.server.logs.manager import LogManager
from gamenode.server.logs.service import LogService
from gamenode.server.logs.streamer import From
from gamenode.server.metrics.service import MetricService
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.server.rpc.agent_link import AgentLink
from gamenode.server.rpc.interceptors import calling_actor
from gamenode.wire import codec
from gamenode.wire.cri import parse
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcSettings:
    """Bounds of the gRPC edge."""

    message_bytes_max: int = 4 * 1024 * 1024
    """A larger message is refused before it is read."""
    inventory_interval_s: float = 24 * 3600.0
    """When a node is asked to report its inventory again, after it did (B2)."""


class GameNodeServer(pb_grpc.GameNodeServiceServicer):
    """Serves `gamenode.v1.GameNodeService`."""

    def __init__(
        self,
        *,
        nodes: NodeManager,
        pipelines: PipelineManager,
        logs: LogManager,
        log_service: LogService,
        metrics: MetricService,
        feed: EventFeed,
        link: AgentLink,
        clock: Clock,
        settings: RpcSettings,
    ) -> None:
        """Hand on to the managers."""
        self._settings = settings
        self._nodes = nodes
        self._pipelines = pipelines
        self._logs = logs
        self._log_service = log_service
        self._clock = clock
        self._metrics = metrics
        self._feed = feed
        self._link = link

    # Agents

    async def Register(  # noqa: N802 - the contract's name
        self, request: pb.RegisterRequest, context: Context
    ) -> pb.RegisterResponse:
        """Announce a node."""
        del context
        registration = codec.decode_registration(request)
        return codec.encode_registration_answer(await self._nodes.register(registration))

    async def Heartbeat(  # noqa: N802 - the contract's name
        self, request: pb.HeartbeatRequest, context: Context
    ) -> pb.HeartbeatResponse:
        """Count a sign of life."""
        del context
        result = await self._nodes.heartbeat(codec.decode_heartbeat(request))
        session = self._nodes.session_of(request.node_id, request.session_id)
        if result.counted and session is not None and request.HasField("resource_info"):
            info = pb.ResourceInfo()
            info.CopyFrom(request.resource_info)
            info.node_id = request.node_id
            refusal = self.refuse_inventory(info)
            if refusal is not None:
                raise refusal
            await self._nodes.update_resource_info(session, self._collection(info))
        return codec.encode_heartbeat_result(result)

    async def ReportMetrics(  # noqa: N802 - the contract's name
        self, request: pb.MetricsReport, context: Context
    ) -> pb.ReportResponse:
        """Keep measured values, durably."""
        del context
        if self._nodes.session_of(request.node_id, request.session_id) is None:
            return pb.ReportResponse(accepted=False, stale=True, error=_REGISTER_AGAIN)
        if request.spool_id and not (request.sequence and request.content_hash):
            raise invalid("sequence", "and content_hash must be set with spool_id")
        await self._metrics.append(
            node_id=request.node_id,
            spool_id=request.spool_id,
            sequence=request.sequence,
            content_hash=request.content_hash,
            report=request.SerializeToString(),
        )
        return pb.ReportResponse(accepted=True)

    async def UpdateResourceInfo(  # noqa: N802 - the contract's name
        self, request: pb.ResourceInfo, context: Context
    ) -> pb.UpdateResponse:
        """Replace what is known of a node's parts."""
        del context
        session = self._nodes.session_of(request.node_id, request.session_id)
        if session is None or not await self._nodes.update_resource_info(
            session, self._collection(request)
        ):
            return pb.UpdateResponse(accepted=False, stale=True, error=_REGISTER_AGAIN)
        next_report_at = after(self._clock.now(), self._settings.inventory_interval_s)
        return pb.UpdateResponse(accepted=True, next_report_time=next_report_at)

    async def UpdatePipelineStatus(  # noqa: N802 - the contract's name
        self, request: pb.PipelineStatusUpdate, context: Context
    ) -> pb.UpdateResponse:
        """Take a simple client's word for a pipeline."""
        del context
        node_id, session = await self._sender(request.pipeline_id, request.session_id)
        report = codec.decode_pipeline_report(request)
        result = await self._pipelines.update_status(report, node_id=node_id, session=session)
        return codec.encode_report_result(result)

    async def UpdateStepStatus(  # noqa: N802 - the contract's name
        self, request: pb.StepStatusUpdate, context: Context
    ) -> pb.UpdateResponse:
        """Take a simple client's word for a step."""
        del context
        node_id, session = await self._sender(request.pipeline_id, request.session_id)
        report = codec.decode_step_report(request)
        result = await self._pipelines.update_step_status(report, node_id=node_id, session=session)
        return codec.encode_report_result(result)

    async def Connect(  # type: ignore[override] # noqa: N802 - words are written, not yielded
        self, request_iterator: AsyncIterator[pb.AgentMessage], context: Context
    ) -> None:
        """Live with one stream of one agent."""
        await self._link.serve(request_iterator, context)

    async def AppendLogs(  # noqa: N802 - the contract's name
        self, request: pb.AppendLogsRequest, context: Context
    ) -> pb.AppendLogsResponse:
        """Store one chunk of a log, durably."""
        del context
        if self._nodes.session_of(request.node_id, request.session_id) is None:
            raise GameNodeError(ErrorCode.STALE, _REGISTER_AGAIN)
        key = codec.decode_log_key(request.log)
        await self._pipelines.check_log_owner(key, request.node_id)
        answer = await self._log_service.append(
            key,
            node_id=request.node_id,
            offset=request.offset,
            chunk=request.chunk,
            checksum=request.checksum,
            position=codec.decode_position(request.position),
            now=self._clock.now(),
        )
        return codec.encode_append_answer(answer)

    # Operators and other services

    async def Execute(  # noqa: N802 - the contract's name
        self, request: pb.ExecuteRequest, context: Context
    ) -> pb.ExecuteResponse:
        """Create a pipeline; it is on its way when this answers."""
        del context
        pipeline = await self._pipelines.create(
            NewPipeline(
                file=request.file,
                args=dict(request.args),
                envs=dict(request.envs),
                node=request.node_id,
                selector=request.selector,
                priority=request.priority,
                idempotency_key=request.idempotency_key,
            ),
            by=calling_actor(),
        )
        return pb.ExecuteResponse(
            pipeline_id=pipeline.id, status=codec.encode_status(pipeline.status)
        )

    async def Cancel(  # noqa: N802 - the contract's name
        self, request: pb.PipelineCancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Want a pipeline's end."""
        del context
        pipeline = await self._pipelines.cancel(
            request.pipeline_id, reason=request.reason, force=request.force, by=calling_actor()
        )
        message = (
            "cancelled"
            if pipeline.status.terminal
            else f"wanted; node {pipeline.node_id} ends it and says so"
        )
        return pb.CancelResponse(accepted=True, message=message)

    async def StreamLogs(  # noqa: N802 - the contract's name
        self, request: pb.LogRequest, context: Context
    ) -> AsyncIterator[pb.LogEntry]:
        """Stream a step's log; with `follow`, until the step ends."""
        del context
        key = await self._logs.open(request.pipeline_id, request.step_id, request.attempt)
        sequence = 0
        start = From(offset=request.offset)
        async with aclosing(self._logs.read(key, start, follow=request.follow)) as slices:
            async for piece in slices:
                for line in parse(piece.data, piece.offset):
                    sequence += 1
                    yield codec.encode_log_line(line, sequence)

    async def WatchEvents(  # noqa: N802 - the contract's name
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.Event]:
        """Stream events after a cursor, then live ones."""
        del context
        wanted = EventFilter(
            types=frozenset({request.type}) if request.type else frozenset(),
            node_id=request.node_id,
        )
        after = request.after if request.HasField("after") else None
        async for batch in self._feed.follow(after, wanted):
            for event in batch:
                yield codec.encode_event(event)
        # Events have no end of their own.
        raise GameNodeError(
            ErrorCode.UNAVAILABLE, "the server is stopping", retry_after_s=_STOPPING_RETRY_S
        )

    async def _sender(self, pipeline_id: str, session_id: str) -> tuple[str, Session | None]:
        """Return the node that a report must come from, and its session if it is the newest."""
        node_id = await self._pipelines.node_of(pipeline_id)
        return node_id, self._nodes.session_of(node_id, session_id)

    # Rules beyond the contract's own

    def refuse_registration(self, request: pb.RegisterRequest) -> GameNodeError | None:
        """Return why a node that says this of itself cannot register, or None (A2)."""
        inventory, failed = codec.decode_parts(request)
        node_type = codec.decode_node_type(request)
        return self._nodes.refusal(request.node_id, inventory, node_type, failed)

    def refuse_inventory(self, info: pb.ResourceInfo) -> GameNodeError | None:
        """Return why an inventory cannot be taken, or None (B5)."""
        inventory, failed = codec.decode_parts(info)
        return self._nodes.refusal(info.node_id, inventory, None, failed)

    def _collection(self, info: pb.ResourceInfo) -> Collection:
        return codec.decode_resource_info(info, now=self._clock.now())


_STOPPING_RETRY_S: Final = 1.0
_REGISTER_AGAIN: Final = "the session is unknown or superseded: register again"
