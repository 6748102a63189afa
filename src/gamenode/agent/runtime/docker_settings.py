"""Every bound of the docker runtime; apart from it, so that reading settings costs no client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerSettings:
    """The bounds of the docker runtime."""

    call_s: float = 120.0
    """How long the engine may take to answer what is not a wait for a container."""
    retry_s: float = 1.0
    """How long to wait before an engine that did not answer is asked again."""
    idle_poll_s: float = 1.0
    """How long output is gathered while nobody follows."""
    pull_stall_s: float = 120.0
    """A pull of an image that makes no progress for so long is given up, and begun again."""
    pull_tries: int = 3
    """How often a pull is tried that breaks, stalls, or meets a registry in trouble."""
    pull_backoff_s: float = 2.0
    """How long to wait before the second try of a pull; each further wait is twice as long."""
    podman_restart_s: float = 3.0
    """How long Podman may take to start again what its restart policy says; it shows it as ended
    meanwhile."""
    created_age_s: float = 3600.0
    """A container that was created and never started is removed when it is older."""
    images_age_s: float = 7 * 86400.0
    """An image that this agent pulled is removed when nothing has used it for so long."""
    images_disk_used_ratio_max: float = 0.85
    """Above this share of the engine's disk, such images go sooner: first what was longest unused.
    """
    images_unused_s_min: float = 600.0
    """No image goes sooner than so long after its last use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """Where this node's credentials for private registries are."""

    auth_file: Path = Path("/etc/gamenode/registry-auth.json")
    """Like docker's `config.json`, its `auths` alone; mode 0600, owned by root or the agent's user.
    """
