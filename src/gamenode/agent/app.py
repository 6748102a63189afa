"""The agent's wiring: what is made of what, how it starts and leaves."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
from concurrent.futures import Executor
from pathlib import Path
from random import Random
from typing import Final

from gamenode import __version__
from gamenode.agent.conditions import HostConditions
from gamenode.agent.inventory import machine, runtimes
from gamenode.agent.inventory.collector import Collector, host_parts
from gamenode.agent.inventory_reporter import Collecting, InventoryReporter
from gamenode.agent.journal import Journal
from gamenode.agent.link import GrpcLink, Link
from gamenode.agent.policy import FilePolicy, Policy
from gamenode.agent.runner import Runner
from gamenode.agent.runtime import Runtime
from gamenode.agent.secrets import Secrets
from gamenode.agent.session import Outbox, Session
from gamenode.agent.settings import AgentSettings, HostSettings
from gamenode.agent.spool.logs import LogSpool
from gamenode.agent.uploader import LogUploader
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.node import NodeType, Registration, node_id_of
from gamenode.lib.clock import Clock, ClockWatch
from gamenode.lib.folder import hold_folder
from gamenode.lib.tasks import Supervisor

_log = logging.getLogger(__name__)
_HOST: Final = Path("/")
_NODE_ID: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


class Agent:
    """One agent. It has no state outside this object and its folder."""

    def __init__(
        self,
        settings: AgentSettings,
        *,
        clock: Clock,
        random: Random,
        runtime: Runtime | None = None,
        link: Link | None = None,
        collector: Collecting | None = None,
        journal: Journal | None = None,
        policy: Policy | None = None,
        pool: Executor | None = None,
    ) -> None:
        """Open the data and put everything together.

        What is handed in stands in for what the settings would make. A `journal` that is handed in
        outlives this agent; the data folder then holds nothing but spooled logs, and is not locked.
        `pool` are threads that are shared with others.

        Raises:
            GameNodeError: a node id or type that is none; a policy file that cannot be used.
            FolderError: another agent holds the data folder, or it cannot be used.
        """
        self._settings = settings
        self._node_id = settings.agent.node_id or node_id_of(platform.node())
        if not _NODE_ID.fullmatch(self._node_id):
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST,
                f"{self._node_id!r} is no node id",
                hint="use 1 to 63 of a-z, 0-9, dot and dash; begin and end with a letter or digit",
            )
        self._node_type = _node_type(settings.agent)
        envs = settings.envs.values
        policy = policy or FilePolicy(settings.agent.policy, envs=envs)
        data = settings.agent.data.absolute()
        self._lock = None if journal is not None else hold_folder(data)
        self._runtime = runtime or _make_runtime(settings.agent, data, self._node_id, clock)
        self._link = link or GrpcLink(settings.agent.server, settings.link)
        self._owns_journal = journal is None
        self._journal = journal or Journal(data / "journal.db", pool=pool)
        self._outbox = Outbox()
        self._uploader = LogUploader(
            link=self._link,
            spool=LogSpool(data / "spool" / "logs"),
            settings=settings.logs,
            random=random,
            pool=pool,
        )
        secrets = Secrets(
            # Many agents may share a folder where journals are handed in.
            data / "secrets" if self._owns_journal else data / "secrets" / self._node_id,
            envs=settings.envs.values,
            secret_envs=settings.envs.secret,
            clock=clock,
            settings=settings.secrets,
            pool=pool,
        )
        self._runner = Runner(
            runtime=self._runtime,
            journal=self._journal,
            uploader=self._uploader,
            reporter=self._outbox,
            policy=policy,
            secrets=secrets,
            clock=clock,
            settings=settings.runner,
        )
        self._inventory = InventoryReporter(
            collector=collector
            or Collector(
                host_parts(settings.collector, engine_socket=settings.agent.engine_socket),
                clock=clock,
                settings=settings.collector,
            ),
            send=self._link.update_inventory,
            active=lambda: self._session.active,
            clock=clock,
            random=random,
            settings=settings.inventory,
        )
        self._session = Session(
            link=self._link,
            journal=self._journal,
            runner=self._runner,
            uploader=self._uploader,
            outbox=self._outbox,
            inventory=self._inventory,
            registration=self._registration,
            conditions=HostConditions(
                data, self._runtime, ClockWatch(clock, settings.clock), settings.conditions
            ).look,
            clock=clock,
            random=random,
            settings=settings.session,
        )
        self._supervisor = Supervisor()
        self._running: asyncio.Task[None] | None = None

    @property
    def node_id(self) -> str:
        """Return which node this is."""
        return self._node_id

    def start(self) -> asyncio.Task[None]:
        """Go on with what the journal holds and keep a session from now on."""
        self._runner.resume()
        self._supervisor.keep("inventory", self._inventory.run)
        self._running = asyncio.get_running_loop().create_task(self._session.run(), name="session")
        return self._running

    async def end_everything(self, reason: str) -> int:
        """End every step and service, and wait until the server knows; return how many ended."""
        ended = await self._runner.end_everything(reason)
        await self._runner.all_released(self._settings.agent.release_wait_s)
        return ended

    async def stop(self, reason: str = "the agent stops") -> None:
        """Leave: steps and services go on, and are adopted at the next start."""
        await self._supervisor.close()
        await self._session.leave(reason)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._session.close()
        await self._runner.close()
        await self._uploader.close()
        if self._owns_journal:
            await self._journal.close()
        await self._runtime.close()
        await self._link.close()
        if self._lock is not None:
            os.close(self._lock)

    async def _registration(self, last_session_epoch: int | None) -> Registration:
        collection = await self._inventory.collect()
        return Registration(
            node_id=self._node_id,
            type=self._node_type,
            inventory=collection.inventory,
            failed=collection.failed,
            inventory_hash=collection.hash,
            last_session_epoch=last_session_epoch,
            boot_id=machine.boot_id(_HOST),
            agent_version=__version__,
            env_names=frozenset(self._settings.envs.values),
            labels=self._settings.agent.labels,
            step_runtimes=frozenset({self._runtime.name}),
        )


def _node_type(settings: HostSettings) -> NodeType:
    if not settings.node_type:
        return machine.node_type(_HOST)
    try:
        return NodeType(settings.node_type)
    except ValueError as error:
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"there is no node type {settings.node_type}",
            hint=f"choose {', '.join(NodeType)}, or leave it out to have it guessed",
        ) from error


def _make_runtime(settings: HostSettings, data: Path, node_id: str, clock: Clock) -> Runtime:
    """Return the runtime that the settings name; each is imported only where it is used."""
    wanted = settings.runtime
    if wanted == "auto":
        wanted = "docker" if runtimes.has_engine(settings.engine_socket) else "process"
    match wanted:
        case "docker":
            from gamenode.agent.runtime.docker import (  # noqa: PLC0415 - costs 20 MB elsewhere
                DockerRuntime,
                DockerSettings,
            )

            return DockerRuntime(
                DockerSettings(socket=settings.engine_socket, node_id=node_id), clock=clock
            )
        case "process":
            from gamenode.agent.runtime.process import (  # noqa: PLC0415 - as above
                ProcessRuntime,
                ProcessSettings,
            )

            return ProcessRuntime(ProcessSettings(root=data / "runs"), clock=clock)
        case _:
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST,
                f"there is no runtime {wanted}",
                hint="choose auto, docker or process",
            )
