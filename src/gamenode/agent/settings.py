"""Every bound and address of an agent, by section. `app` alone reads the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gamenode.agent.conditions import ConditionSettings
from gamenode.agent.inventory.collector import CollectorSettings
from gamenode.agent.inventory_reporter import ReporterSettings
from gamenode.agent.link import LinkSettings
from gamenode.agent.runner import RunnerSettings
from gamenode.agent.secrets import SecretSettings
from gamenode.agent.session import SessionSettings
from gamenode.agent.uploader import UploaderSettings
from gamenode.lib.clock import ClockSettings
from gamenode.telemetry import LogLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """Which node this is, where its server is, what it runs steps with."""

    server: str = "127.0.0.1:9090"
    """Where the server's gRPC is."""
    node_id: str = ""
    """Empty: the host's name."""
    node_type: str = ""
    """`physical`, `virtual` or `container`. Empty: what the host looks like."""
    data: Path = Path("/var/lib/gamenode-agent")
    """The folder of the journal, the spool and the process runtime's runs."""
    runtime: str = "auto"
    """`docker`, `process`, or `auto`: docker where an engine answers, else process."""
    engine_socket: Path = Path("/var/run/docker.sock")
    """The engine's API; Podman's socket serves as well."""
    policy: Path = Path("/etc/gamenode/policy.toml")
    """What this host allows; without the file, the defaults of docs/operations/node-policy.md."""
    log_level: LogLevel = LogLevel.INFO
    """`debug`, `info`, `warning` or `error`."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the host says of itself; selectors know them as `host/NAME`."""
    release_wait_s: float = 5.0
    """How long an agent that ends everything waits for the server's acknowledgements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSettings:
    """Values that this node supplies to pipelines, by name."""

    values: Mapping[str, str] = field(default_factory=dict)
    """A table: name = "value". Pipelines name them; the server learns the names alone."""
    secret: frozenset[str] = frozenset()
    """Names of those whose values are masked in logs, and stand in `environment` alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """All of it."""

    agent: HostSettings = field(default_factory=HostSettings)
    envs: EnvSettings = field(default_factory=EnvSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    session: SessionSettings = field(default_factory=SessionSettings)
    conditions: ConditionSettings = field(default_factory=ConditionSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    logs: UploaderSettings = field(default_factory=UploaderSettings)
    secrets: SecretSettings = field(default_factory=SecretSettings)
    inventory: ReporterSettings = field(default_factory=ReporterSettings)
    collector: CollectorSettings = field(default_factory=CollectorSettings)
