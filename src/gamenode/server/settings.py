"""Every bound and address of a server, by section. `app` alone reads the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gamenode.lib.clock import ClockSettings
from gamenode.server.access.manager import AccessSettings
from gamenode.server.api.app import ApiSettings
from gamenode.server.api.connection import ConnectionSettings
from gamenode.server.db.database import DatabaseSettings
from gamenode.server.events.feed import EventFeedSettings
from gamenode.server.events.internal_errors import InternalErrorSettings
from gamenode.server.logs.manager import ManagerSettings
from gamenode.server.logs.service import LogSettings
from gamenode.server.logs.streamer import StreamerSettings
from gamenode.server.metrics.service import MetricSettings
from gamenode.server.nodes.manager import NodeSettings
from gamenode.server.nodes.service import InventorySettings
from gamenode.server.nodes.states import StateSettings
from gamenode.server.pipelines.dispatcher import DispatcherSettings
from gamenode.server.pipelines.manager import PipelineSettings
from gamenode.server.pipelines.verifier import VerifierSettings
from gamenode.server.rpc.agent_link import AgentLinkSettings
from gamenode.server.rpc.servicer import RpcSettings
from gamenode.telemetry import LogLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """Where the server listens, where its data lives, how it ends."""

    http: str = "127.0.0.1:8080"
    """Where HTTP listens; a loopback address, as long as nobody has to sign in."""
    grpc: str = "127.0.0.1:9090"
    """Where gRPC listens; as above."""
    data: Path = Path("/var/lib/gamenode")
    """The folder of the SQLite file, the logs and the key of the audit log."""
    log_level: LogLevel = LogLevel.INFO
    """`debug`, `info`, `warning` or `error`."""
    stop_s_max: float = 8.0
    """How long answers and streams may take to finish when the server stops."""
    event_keep_s: float = 30 * 24 * 3600.0
    """How long events are kept; a cursor that is older is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """All of it."""

    server: ListenSettings = field(default_factory=ListenSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    access: AccessSettings = field(default_factory=AccessSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    connections: ConnectionSettings = field(default_factory=ConnectionSettings)
    rpc: RpcSettings = field(default_factory=RpcSettings)
    agent_link: AgentLinkSettings = field(default_factory=AgentLinkSettings)
    nodes: NodeSettings = field(default_factory=NodeSettings)
    states: StateSettings = field(default_factory=StateSettings)
    inventories: InventorySettings = field(default_factory=InventorySettings)
    dispatch: DispatcherSettings = field(default_factory=DispatcherSettings)
    pipelines: PipelineSettings = field(default_factory=PipelineSettings)
    verifier: VerifierSettings = field(default_factory=VerifierSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    log_reading: StreamerSettings = field(default_factory=StreamerSettings)
    log_followers: ManagerSettings = field(default_factory=ManagerSettings)
    events: EventFeedSettings = field(default_factory=EventFeedSettings)
    internal_errors: InternalErrorSettings = field(default_factory=InternalErrorSettings)
    metrics: MetricSettings = field(default_factory=MetricSettings)
