"""The one program. Each command imports its app only when it runs."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import signal
import subprocess
import sys
import tomllib
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from gamenode import __version__
from gamenode.cli.command import DURATION, Command, Invocation, pass_invocation
from gamenode.cli.main import cli
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.folder import FolderError
from gamenode.lib.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from gamenode.agent.settings import AgentSettings
    from gamenode.server.app import Server
    from gamenode.server.settings import ServerSettings
    from gamenode.sim.fleet import FleetSettings, Outcome
    from gamenode.telemetry import LogLevel

_PREFIX: Final = "GAMENODE_"
_DEV_CHILD: Final = "GAMENODE_DEV_CHILD"
# One host's environment may serve both programs, and under `dev` it does: what only the other one
# knows is no mistake. Named here, since neither program imports the other's settings.
SERVER_SECTIONS: Final = frozenset(
    {
        "server",
        "clock",
        "database",
        "access",
        "api",
        "connections",
        "rpc",
        "agent_link",
        "nodes",
        "states",
        "inventories",
        "dispatch",
        "pipelines",
        "verifier",
        "logs",
        "log_reading",
        "log_followers",
        "events",
        "internal_errors",
        "metrics",
    }
)
AGENT_SECTIONS: Final = frozenset(
    {
        "agent",
        "envs",
        "link",
        "session",
        "conditions",
        "clock",
        "collector",
        "inventory",
        "runner",
        "logs",
        "secrets",
    }
)
_LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_CHILD_STOP_S: Final = 40.0
_ONLINE_S: Final = 15.0

Settings = TypeVar("Settings")
Result = TypeVar("Result")


@click.command(
    "server",
    cls=Command,
    examples="""
    gamenode server --data /var/lib/gamenode
    gamenode server --config /etc/gamenode/server.toml
    """,
)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--http", metavar="ADDR", help="Where HTTP listens.  [127.0.0.1:8080]")
@click.option("--grpc", metavar="ADDR", help="Where gRPC listens.  [127.0.0.1:9090]")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="The data folder.")
@click.option("--database", metavar="URL", help="postgresql://…  [SQLite in the data folder]")
@click.option("--log-level", type=click.Choice(_LOG_LEVELS))
def server_command(config: Path | None, database: str | None, **flags: object) -> None:
    """Run the control plane."""
    from gamenode.server.settings import ServerSettings  # noqa: PLC0415 - see the module

    sections: dict[str, Mapping[str, object]] = {"server": flags, "database": {"url": database}}
    settings = _settings(ServerSettings, config, sections, foreign=AGENT_SECTIONS)
    _run(_serve(settings), level=settings.server.log_level, fast=True)


@click.command(
    "agent",
    cls=Command,
    examples="""
    gamenode agent --server 127.0.0.1:9090
    gamenode agent --config /etc/gamenode/agent.toml
    """,
)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--server", metavar="ADDR", help="The server's gRPC address.  [127.0.0.1:9090]")
@click.option("--node", "node_id", metavar="ID", help="This node's id.  [the host's name]")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="The data folder.")
@click.option("--runtime", type=click.Choice(["auto", "docker", "process"]))
@click.option("--log-level", type=click.Choice(_LOG_LEVELS))
def agent_command(config: Path | None, **flags: object) -> None:
    """Run the agent of this host. On SIGTERM it leaves; what it started goes on.

    What steps may have of the host, its owner says in /etc/gamenode/policy.toml.
    """
    from gamenode.agent.settings import AgentSettings  # noqa: PLC0415 - see the module

    settings = _settings(AgentSettings, config, {"agent": flags}, foreign=SERVER_SECTIONS)
    _run(_act(settings, child=_DEV_CHILD in os.environ), level=settings.agent.log_level)


@click.command(
    "dev",
    cls=Command,
    examples="""
    gamenode dev
    gamenode dev --agents 3 --runtime process
    """,
)
@click.option("--http", metavar="ADDR", help="Where HTTP listens.  [127.0.0.1:8080]")
@click.option("--grpc", metavar="ADDR", help="Where gRPC listens.  [127.0.0.1:9090]")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("gamenode-data"),
    help="The data folder.  [./gamenode-data]",
)
@click.option("--runtime", type=click.Choice(["auto", "docker", "process"]), default="auto")
@click.option("--agents", type=click.IntRange(1, 100), default=1, help="How many nodes.  [1]")
@click.option("--log-level", type=click.Choice(_LOG_LEVELS), default="warning", help="[warning]")
def dev_command(
    http: str | None,
    grpc: str | None,
    data: Path,
    runtime: str,
    agents: int,
    log_level: str,
) -> None:
    """Run a server and its agents on this machine, for this machine alone.

    Its agents allow steps everything that you may do: no node policy is read.
    """
    from gamenode.server.access.manager import AuthMode  # noqa: PLC0415 - see the module
    from gamenode.server.settings import ServerSettings  # noqa: PLC0415 - see the module

    data = data.absolute()
    flags = {"http": http, "grpc": grpc, "data": data / "server", "log_level": log_level}
    sections: dict[str, Mapping[str, object]] = {"server": flags, "access": {"auth": AuthMode.NONE}}
    settings = _settings(ServerSettings, None, sections, foreign=AGENT_SECTIONS)
    names = ["local"] if agents == 1 else [f"local-{number}" for number in range(1, agents + 1)]
    children = [
        _spawn_agent(name, settings.server.grpc, data, runtime, log_level) for name in names
    ]
    try:
        _run(_develop(settings, names, children), level=settings.server.log_level, fast=True)
    finally:
        # Nothing of a start that failed may stay behind: the agents leave; they end no step.
        for child in children:
            assert child.stdin is not None
            child.stdin.close()


@click.command(
    "sim",
    cls=Command,
    examples="""
    gamenode sim --nodes 1000
    gamenode sim --nodes 200 --duration 10m --faults partition=0.05/30s,kill=0.01,skew=0.01:90s
    """,
)
@click.option("--nodes", type=click.IntRange(1, 20_000), required=True, help="How many nodes.")
@click.option("--server", metavar="ADDR", default="127.0.0.1:9090", help="[127.0.0.1:9090]")
@click.option("--duration", type=DURATION, default="5m", show_default=True, metavar="DURATION")
@click.option(
    "--faults",
    metavar="SPEC",
    default="",
    help="KIND=RATIO/DURATION,…: partition, silence and kill strike that share of the nodes each "
    "minute, for so long; slow (late by up to) and skew (clock off by) are for good.",
)
@click.option("--seed", type=int, help="The same seed draws the same faults.  [random]")
@click.option(
    "--interval",
    type=DURATION,
    default="5s",
    show_default=True,
    metavar="DURATION",
    help="How often a summary is written to standard error.",
)
@click.option(
    "--log-level",
    type=click.Choice(_LOG_LEVELS),
    default="error",
    help="[error]",
)
@pass_invocation
def sim_command(
    invocation: Invocation,
    *,
    nodes: int,
    server: str,
    duration: float,
    faults: str,
    seed: int | None,
    interval: float,
    log_level: str,
) -> int:
    """Simulate many nodes, and say which of the server's promises were kept.

    Ends with 3 if one was not.
    """
    from gamenode.cli.errors import EXIT_ENDED_BADLY  # noqa: PLC0415 - see the module
    from gamenode.sim.faults import parse_faults  # noqa: PLC0415 - see the module
    from gamenode.sim.fleet import FleetSettings  # noqa: PLC0415 - see the module
    from gamenode.sim.report import VIEW  # noqa: PLC0415 - see the module

    settings = FleetSettings(
        nodes=nodes,
        server=server,
        duration_s=duration,
        faults=parse_faults(faults),
        seed=secrets.randbits(32) if seed is None else seed,
        summary_interval_s=interval,
    )
    invocation.output.tell(f"seed {settings.seed}")
    from gamenode.telemetry import LogLevel  # noqa: PLC0415 - see the module

    outcome = _run(_simulate(settings, invocation), level=LogLevel(log_level))
    invocation.output.item(outcome.body(), VIEW)
    return 0 if outcome.kept else EXIT_ENDED_BADLY


async def _simulate(settings: FleetSettings, invocation: Invocation) -> Outcome:
    from gamenode.sim.fleet import Fleet  # noqa: PLC0415 - see the module

    with TemporaryDirectory(prefix="gamenode-sim-") as folder:
        fleet = Fleet(
            settings,
            folder=Path(folder),
            token=invocation.target.token,
            clock=invocation.clock,
            tell=invocation.output.tell,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, fleet.end)
        return await fleet.run()


async def _serve(settings: ServerSettings) -> None:
    stopped = _on_signals()
    server = _make_server(settings)
    await server.start()
    await stopped.wait()
    await server.stop()


async def _act(settings: AgentSettings, *, child: bool) -> None:
    from gamenode.agent.app import Agent  # noqa: PLC0415 - see the module
    from gamenode.agent.policy import OpenPolicy  # noqa: PLC0415 - see the module
    from gamenode.lib.clock import SystemClock  # noqa: PLC0415 - see the module

    stopped = _on_signals()
    orphaned = asyncio.Event()
    if child:
        # The end of our standard input is the death of `gamenode dev`: leave, end nothing.
        asyncio.get_running_loop().add_reader(0, orphaned.set)
    from random import Random  # noqa: PLC0415 - beside its use

    agent = Agent(
        settings,
        clock=SystemClock(),
        random=Random(),  # noqa: S311 - spreads retries
        # Under `gamenode dev` the user and the machine's owner are one.
        policy=OpenPolicy() if child else None,
    )
    running = agent.start()
    waits = [asyncio.ensure_future(stopped.wait()), asyncio.ensure_future(orphaned.wait())]
    try:
        await asyncio.wait([running, *waits], return_when=asyncio.FIRST_COMPLETED)
        if child and stopped.is_set():
            ended = await agent.end_everything("gamenode dev was stopped")
            if ended:
                click.echo(f"ended {ended} running step(s) on node {agent.node_id}", err=True)
        failed = running.done() and not running.cancelled()
        await agent.stop()
        if failed:
            running.result()
    finally:
        for wait in waits:
            wait.cancel()


async def _develop(
    settings: ServerSettings, names: Sequence[str], children: Sequence[subprocess.Popen[bytes]]
) -> None:
    stopped = _on_signals()
    server = _make_server(settings)
    await server.start()
    online = asyncio.ensure_future(server.wait_online(names))
    waiting = asyncio.ensure_future(stopped.wait())
    await asyncio.wait([online, waiting], timeout=_ONLINE_S, return_when=asyncio.FIRST_COMPLETED)
    if not stopped.is_set():
        _say_ready(settings, names, online=online.done())
    await waiting
    online.cancel()
    click.echo("stopping: steps and services that were started here are ended", err=True)
    for child in children:
        child.send_signal(signal.SIGTERM)
    for child in children:
        await asyncio.to_thread(_wait_for, child)
    await server.stop()


def _say_ready(settings: ServerSettings, names: Sequence[str], *, online: bool) -> None:
    state = "online" if online else "not online yet: see the messages above"
    click.echo(f"GameNode {__version__} is ready")
    click.echo(f"  web   http://{settings.server.http}/")
    click.echo(f"  gRPC  {settings.server.grpc}")
    click.echo(f"  data  {settings.server.data.parent}")
    click.echo(f"  node  {', '.join(names)} ({state})")
    click.echo("Try: gamenode run examples/hello.yaml      Ctrl-C ends everything started here")
    sys.stdout.flush()


def _spawn_agent(
    name: str, server: str, data: Path, runtime: str, log_level: str
) -> subprocess.Popen[bytes]:
    """Start an agent process; before the server is imported, so that both load side by side."""
    arguments = ["--server", server, "--node", name, "--data", str(data / "agents" / name)]
    arguments += ["--runtime", runtime, "--log-level", log_level]
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "gamenode", "agent", *arguments],
        stdin=subprocess.PIPE,
        env={**os.environ, _DEV_CHILD: "1"},
        start_new_session=True,  # Ctrl-C is ours to hand on
    )


def _wait_for(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_CHILD_STOP_S)
    except subprocess.TimeoutExpired:
        click.echo("an agent does not end; its steps go on and are adopted next time", err=True)
        child.kill()
        child.wait()


def _make_server(settings: ServerSettings) -> Server:
    from random import Random  # noqa: PLC0415 - beside its use

    from gamenode.lib.clock import SystemClock  # noqa: PLC0415 - see the module
    from gamenode.lib.ids import UuidV7  # noqa: PLC0415 - see the module
    from gamenode.server.app import Server  # noqa: PLC0415 - see the module

    # Every agent and every reader is a descriptor, and the usual first limit is 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # The database and the logs hold what people run, and keys: for their owner alone, also in a
    # folder that others may enter.
    os.umask(0o077)
    clock = SystemClock()
    return Server(settings, clock=clock, ids=UuidV7(clock), random=Random())  # noqa: S311 - spreads retries


def _on_signals() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped


def _run(main: Coroutine[Any, Any, Result], *, level: LogLevel, fast: bool = False) -> Result:
    from gamenode.telemetry import set_up_logging  # noqa: PLC0415 - see the module

    set_up_logging(level)
    factory = None
    if fast:
        import uvloop  # noqa: PLC0415 - the server's alone

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main)
    except FolderError as error:
        raise GameNodeError(
            ErrorCode.CONFLICT, str(error), hint="choose another folder with --data"
        ) from error


def _settings(
    settings_type: type[Settings],
    config: Path | None,
    flags: Mapping[str, Mapping[str, object]],
    *,
    foreign: frozenset[str],
) -> Settings:
    try:
        file = tomllib.loads(config.read_text(encoding="utf-8")) if config is not None else {}
        return load_settings(
            settings_type,
            file=file,
            file_name=str(config),
            environment=os.environ,
            prefix=_PREFIX,
            flags=flags,
            foreign=foreign,
        )
    except SettingsError as error:
        raise GameNodeError(ErrorCode.INVALID_REQUEST, str(error)) from error
    except (ValueError, OSError) as error:  # a ValueError: not UTF-8, or not TOML
        raise GameNodeError(ErrorCode.INVALID_REQUEST, f"{config}: {error}") from error


for _command in (dev_command, server_command, agent_command, sim_command):
    cli.add_command(_command)


def main() -> None:
    """Run the program."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    cli()


if __name__ == "__main__":
    main()
