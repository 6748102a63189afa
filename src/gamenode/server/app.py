"""The server's wiring: what is made of what, which loops run, how it starts and stops."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, cast

import grpc.aio
import uvicorn
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2

from gamenode.domain.command import Closed, CloseReason
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock, ClockWatch, after
from gamenode.lib.durable import write_private
from gamenode.lib.folder import hold_folder
from gamenode.lib.ids import Ids
from gamenode.lib.tasks import Supervisor
from gamenode.server.access.manager import AccessManager, AuthMode, is_loopback
from gamenode.server.access.refusals import Refusals
from gamenode.server.access.roles import ROLES, check_complete
from gamenode.server.access.service import AccessService
from gamenode.server.api.app import ApiSettings, Nouns, create_api
from gamenode.server.api.connection import BoundedConnection, ConnectionSettings
from gamenode.server.api.guard import ANY_HOST
from gamenode.server.db.database import Database
from gamenode.server.events import store as events
from gamenode.server.events.audit_log import AuditLog
from gamenode.server.events.feed import EventFeed
from gamenode.server.events.internal_errors import InternalErrors
from gamenode.server.logs.manager import LogManager
from gamenode.server.logs.media.files import LogFiles
from gamenode.server.logs.service import LogService
from gamenode.server.logs.streamer import LogStreamer
from gamenode.server.metrics.service import MetricService
from gamenode.server.nodes.manager import NodeManager
from gamenode.server.nodes.service import GameNodeService
from gamenode.server.pipelines.dispatcher import TaskDispatcher
from gamenode.server.pipelines.lost import LostPipelines
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.server.pipelines.planner import Planner
from gamenode.server.pipelines.retention import Retention
from gamenode.server.pipelines.secrets import SecretBox
from gamenode.server.pipelines.service import GamePipelineGRPCService
from gamenode.server.pipelines.verifier import AttemptVerifier
from gamenode.server.rpc.agent_link import AgentLink
from gamenode.server.rpc.interceptors import EdgeInterceptor
from gamenode.server.rpc.servicer import GameNodeServer
from gamenode.server.settings import ServerSettings
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GameNodeService"].full_name
_PURGE_INTERVAL_S: Final = 3600.0
_KEY_BYTES: Final = 32


class Server:
    """One server. It has no state outside this object, its folder and its database."""

    def __init__(self, settings: ServerSettings, *, clock: Clock, ids: Ids, random: Random) -> None:
        """Open the data and put everything together. Blocks; call before the loop has work.

        Raises:
            GameNodeError: an address that may not be listened on, or a database or key that cannot
                be used.
            FolderError: the data folder is another server's, or cannot be written to.
        """
        self._settings = settings
        self._clock = clock
        self._clock_watch = ClockWatch(clock, settings.clock)
        if settings.access.auth is AuthMode.NONE:
            for address in (settings.server.http, settings.server.grpc):
                require_loopback(address)
        data = settings.server.data
        self._lock = hold_folder(data)
        database_settings = settings.database
        if not database_settings.url:
            database_settings = replace(
                database_settings, url=f"sqlite:///{(data / 'gamenode.db').absolute()}"
            )
        self._database = Database.open(database_settings, clock=clock)
        audit_key = _key(
            data / "audit.key",
            "put it back from a backup: without it the audit log cannot be verified",
        )
        secret_box = SecretBox(
            _key(
                data / "secrets.key",
                "put it back from a backup: without it waiting pipelines lose their secrets",
            )
        )
        self._feed = EventFeed(self._database, settings=settings.events, audit_key=audit_key)
        self._database.on_commit(self._feed)
        self._access = AccessManager(
            AccessService(self._database), clock=clock, ids=ids, settings=settings.access
        )
        self._refusals = Refusals(self._database, clock=clock)
        self._internal_errors = InternalErrors(
            self._database, clock=clock, ids=ids, settings=settings.internal_errors
        )
        self._node_service = GameNodeService(self._database, settings.inventories)
        self._nodes = NodeManager(
            service=self._node_service,
            clock=clock,
            clock_watch=self._clock_watch,
            ids=ids,
            settings=settings.nodes,
            states=settings.states,
            inventories=settings.inventories,
            log_chunk_bytes_max=settings.logs.chunk_bytes_max,
        )
        self._pipeline_service = GamePipelineGRPCService(
            self._database, secret_box, restarts_max=settings.pipelines.restarts_max
        )
        files = LogFiles(data / "logs")
        self._log_service = LogService(self._database, files, settings=settings.logs)
        self._streamer = LogStreamer(
            self._log_service, files, clock=clock, settings=settings.log_reading
        )
        self._logs = LogManager(
            self._log_service,
            self._streamer,
            steps=self._pipeline_service,
            on_live=self._follow_log,
            settings=settings.log_followers,
        )
        self._dispatcher = TaskDispatcher(
            service=self._pipeline_service,
            nodes=self._nodes,
            logs=self._logs,
            clock=clock,
            settings=settings.dispatch,
        )
        self._pipelines = PipelineManager(
            service=self._pipeline_service,
            dispatcher=self._dispatcher,
            nodes=self._nodes,
            logs=self._log_service,
            log_manager=self._logs,
            feed=self._feed,
            clock=clock,
            ids=ids,
            settings=settings.pipelines,
        )
        self._lost = LostPipelines(
            service=self._pipeline_service,
            nodes=self._nodes,
            clock=clock,
            fail_s=settings.pipelines.lost_fail_s,
            sweep_interval_s=settings.pipelines.lost_sweep_interval_s,
        )
        self._retention = Retention(
            service=self._pipeline_service,
            logs=self._log_service,
            removed=self._pipelines.forget,
            clock=clock,
            clock_watch=self._clock_watch,
            settings=settings.pipelines,
        )
        self._metrics = MetricService(
            self._database,
            clock=clock,
            clock_watch=self._clock_watch,
            settings=settings.metrics,
        )
        self._nodes.on_change(self._dispatcher.wake)
        self._feed.on_events(self._dispatcher.hear)
        self._feed.on_events(self._lost.hear)
        self._supervisor = Supervisor(expected=GameNodeError)
        self._ready = False
        self._health = HealthServicer()
        self._rpc = self._make_rpc(random)
        self._http = _Http(
            uvicorn.Config(
                create_api(
                    Nouns(
                        pipeline_manager=self._pipelines,
                        pipeline_service=self._pipeline_service,
                        planner=Planner(
                            pipelines=self._pipelines,
                            service=self._pipeline_service,
                            nodes=self._nodes,
                            clock=clock,
                        ),
                        verifier=AttemptVerifier(
                            service=self._pipeline_service,
                            nodes=self._nodes,
                            settings=settings.verifier,
                        ),
                        nodes=self._nodes,
                        inventories=self._nodes.inventories,
                        logs=self._logs,
                        events=self._feed,
                        tokens=self._access,
                        audit=AuditLog(
                            self._database, key=audit_key, head=lambda: self._feed.audit_head
                        ),
                        why_not_ready=lambda: "" if self._ready else "it is starting or stopping",
                    ),
                    settings=_api_settings(settings),
                    authenticate=self._access.authenticate,
                    refusals=self._refusals,
                    internal_errors=self._internal_errors,
                    clock=clock,
                    ids=ids,
                ),
                http=_connection_type(settings.connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=round(settings.connections.idle_s_max),
                timeout_graceful_shutdown=round(settings.server.stop_s_max / 2),
            )
        )
        self._http_socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen and be ready.

        Raises:
            GameNodeError: CONFLICT, an address is taken.
        """
        self._http_socket = _listen(self._settings.server.http, "--http")
        await self._feed.start()
        await self._access.ensure_admin(self._settings.server.data / "admin-token")
        await self._nodes.load()
        _bind_rpc(self._rpc, self._settings.server.grpc)
        await self._rpc.start()
        self._supervisor.keep("nodes.judge", self._nodes.judge)
        self._supervisor.keep("nodes.flush", self._nodes.flush)
        self._supervisor.keep("nodes.states", self._nodes.states.run)
        self._supervisor.keep("dispatch", self._dispatcher.run)
        self._supervisor.keep("pipelines.lost", self._lost.run)
        self._supervisor.keep("pipelines.retention", self._retention.run)
        self._supervisor.keep("metrics.purge", self._metrics.purge)
        self._supervisor.keep("events.purge", self._purge_events)
        self._supervisor.keep("pipelines.forget_secrets", self._pipelines.forget_secrets)
        self._supervisor.keep("events.internal_errors", self._internal_errors.run)
        self._supervisor.keep("access.flush", self._access.flush)
        self._serving = asyncio.get_running_loop().create_task(
            self._http.serve([self._http_socket]), name="http"
        )
        await self._http.wait_started()
        self._ready = True
        for service in ("", _SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        _log.info(
            "ready: HTTP on %s, gRPC on %s",
            self._settings.server.http,
            self._settings.server.grpc,
            extra={"event": "server.ready"},
        )

    async def wait_online(self, node_ids: Sequence[str]) -> None:
        """Wait until these nodes can take work."""
        changed = asyncio.Event()
        self._nodes.on_change(changed.set)
        while any(self._nodes.connection(node_id) is None for node_id in node_ids):
            changed.clear()
            await changed.wait()

    async def stop(self) -> None:
        """Refuse new work, finish answers, close streams with a reason, close the data."""
        self._ready = False
        await self._health.enter_graceful_shutdown()
        stop_s = self._settings.server.stop_s_max
        self._nodes.close_all(Closed(reason=CloseReason.SHUTDOWN, message="the server is stopping"))
        await self._feed.close()
        self._streamer.end_followers()
        self._http.should_exit = True
        await asyncio.gather(self._rpc.stop(stop_s / 2), self._http_ended())
        await self._supervisor.close()
        await self._access.flush_now()
        await self._dispatcher.close()
        await self._nodes.states.close()
        self._streamer.close()
        await self._log_service.close()
        await self._database.aclose()
        os.close(self._lock)
        _log.info("stopped", extra={"event": "server.stopped"})

    async def _http_ended(self) -> None:
        if self._serving is not None:
            await self._serving
        elif self._http_socket is not None:
            self._http_socket.close()  # a start that failed half-way

    def _make_rpc(self, random: Random) -> grpc.aio.Server:
        settings = self._settings.rpc
        services = (
            pb.DESCRIPTOR.services_by_name["GameNodeService"],
            health_pb2.DESCRIPTOR.services_by_name["Health"],
            reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
        )
        check_complete(
            f"/{service.full_name}/{method.name}"
            for service in services
            for method in service.methods
        )
        servicer = GameNodeServer(
            nodes=self._nodes,
            pipelines=self._pipelines,
            logs=self._logs,
            log_service=self._log_service,
            metrics=self._metrics,
            feed=self._feed,
            link=AgentLink(
                nodes=self._nodes,
                pipelines=self._pipelines,
                random=random,
                settings=self._settings.agent_link,
            ),
            clock=self._clock,
            settings=settings,
        )
        edge = EdgeInterceptor(
            roles=ROLES,
            authenticate=self._access.authenticate,
            refusals=self._refusals,
            internal_errors=self._internal_errors,
            checks={
                pb.RegisterRequest: servicer.refuse_registration,
                pb.ResourceInfo: servicer.refuse_inventory,
            },
        )
        server = grpc.aio.server(
            interceptors=[edge],
            options=[
                ("grpc.max_receive_message_length", settings.message_bytes_max),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.max_metadata_size", 16 * 1024),
            ],
        )
        pb_grpc.add_GameNodeServiceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            [_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME], server
        )
        return server

    def _follow_log(self, pipeline_id: str, step: str, *, live: bool) -> None:
        self._dispatcher.follow_log(pipeline_id, step, live=live)

    async def _purge_events(self) -> None:
        while True:
            if self._clock_watch.jump_s() is None:  # else what is old cannot be told (rule RA6)
                before = after(self._clock.now(), -self._settings.server.event_keep_s)
                await self._database.write(partial(events.purge, before=before))
            await asyncio.sleep(_PURGE_INTERVAL_S)


class _Http(uvicorn.Server):
    """uvicorn, without its hands on the process's signals."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._started = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started.set()

    async def wait_started(self) -> None:
        """Wait until connections are taken."""
        await self._started.wait()


def _connection_type(settings: ConnectionSettings) -> type[asyncio.Protocol]:
    # The library calls what it gets, and says so with a narrower type.
    return cast("type[asyncio.Protocol]", partial(BoundedConnection, settings))


def _api_settings(settings: ServerSettings) -> ApiSettings:
    host, _ = split_address(settings.server.http)
    hosts = settings.api.hosts
    if not hosts and not is_loopback(host):
        # Nobody told by what names others reach it. A page that made its own name point here has
        # no token to send, and here everybody needs one.
        hosts = frozenset({ANY_HOST})
    return replace(settings.api, bound_host=host, hosts=hosts)


def require_loopback(address: str) -> None:
    """Refuse an address that others can reach, where nobody has to sign in.

    Raises:
        GameNodeError: INVALID_REQUEST.
    """
    host, _ = split_address(address)
    if not is_loopback(host):
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"will not listen on {address}: nobody has to sign in here, so whoever reaches it "
            "could run anything on every node",
            hint="listen on 127.0.0.1, or run gamenode server, which demands tokens",
        )


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`.

    Raises:
        GameNodeError: INVALID_REQUEST.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 - a port's range
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"{address} is no address",
            hint="write host:port, such as 127.0.0.1:8080",
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def _key(path: Path, hint: str) -> bytes:
    """Return a key of 32 bytes; the first start makes it, outside the database.

    Raises:
        GameNodeError: CONFLICT, the file holds no key.
    """
    if not path.exists():
        # Whole or not there: a crash must not leave an empty key, which anybody knows.
        write_private(path, os.urandom(_KEY_BYTES))
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise GameNodeError(ErrorCode.CONFLICT, f"{path} is not a key", hint=hint)
    return key


def _listen(address: str, flag: str) -> socket.socket:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise _taken(address, flag, error) from error
    listening.setblocking(False)  # noqa: FBT003 - the library's signature
    return listening


def _bind_rpc(server: grpc.aio.Server, address: str) -> None:
    # gRPC does not say why it cannot listen, and writes to standard error; a socket does say it.
    _listen(address, "--grpc").close()
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise _taken(address, "--grpc", error) from error


def _taken(address: str, flag: str, error: Exception) -> GameNodeError:
    return GameNodeError(
        ErrorCode.CONFLICT,
        f"cannot listen on {address}: {error}",
        hint=f"is a server running already? Else choose another address with {flag} HOST:PORT",
    )
