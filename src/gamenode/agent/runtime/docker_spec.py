"""The one way from a container spec to what an engine is asked to create.

The engine's names: https://docs.docker.com/reference/api/engine/ (ContainerCreate).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from gamenode.agent.runtime import RunKey, StartError
from gamenode.domain.pipeline import ContainerSpec, DeviceReservation, Healthcheck, Reason
from gamenode.lib.clock import NANOSECONDS_PER_S

LABEL_NODE: Final = "gamenode.node"
_LABEL_PIPELINE: Final = "gamenode.pipeline"
_LABEL_STEP: Final = "gamenode.step"
_LABEL_ATTEMPT: Final = "gamenode.attempt"
_LABEL_RUN: Final = "gamenode.run"
_LABEL_NAME: Final = "gamenode.container_name"

_PORT: Final = re.compile(
    r"""
    (?:(?:(?P<address>\[[0-9a-fA-F:]+\]|[0-9]+(?:\.[0-9]+){3}):)?(?P<host>[0-9]+(?:-[0-9]+)?)?:)?
    (?P<container>[0-9]+(?:-[0-9]+)?)
    (?:/(?P<protocol>tcp|udp|sctp))?
    """,
    re.VERBOSE,
)
_CDI_GPU: Final = "nvidia.com/gpu"
_PODMAN_CDI: Final = (5, 4)
"""The first Podman whose API honours a device request by CDI name; older ones drop it silently."""
_ENGINE_NETWORKS: Final = re.compile(r"|default|bridge|host|none|container:.*")


def container_name(run: RunKey) -> str:
    """Return the name that makes a run's container the only one of it on its engine (P1)."""
    return f"gamenode-{run.pipeline_id}-{run.step}-{run.attempt}-{run.run}"


def run_of(labels: Mapping[str, str]) -> RunKey:
    """Return the run that a container's labels name; a KeyError or ValueError if they do not."""
    return RunKey(
        labels[_LABEL_PIPELINE],
        labels[_LABEL_STEP],
        int(labels[_LABEL_ATTEMPT]),
        int(labels[_LABEL_RUN]),
    )


def create_body(
    run: RunKey,
    container: ContainerSpec,
    *,
    service: bool,
    node_id: str,
    log_config: Mapping[str, Any] | None,
    podman: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return the body of the engine's create call, with every key of `container` in it.

    `container_name` cannot name the container, whose name is the run's: it is a label, and an
    alias in a network of the user's own. A restart policy counts for services only. `podman` is
    the engine's version where it is Podman.

    Raises:
        StartError: START_FAILED, a value that the engine has no form for; UNSUPPORTED, devices
            that it cannot give.
    """
    volumes = [volume for volume in container.volumes if ":" in volume]
    ports = [_port(text) for text in container.ports]
    body: dict[str, Any] = {
        "Image": container.image,
        "Hostname": container.hostname,
        "User": container.user,
        "WorkingDir": container.working_dir,
        "Env": [f"{name}={value}" for name, value in container.environment.items()],
        "Labels": {
            **container.labels,
            **({_LABEL_NAME: container.container_name} if container.container_name else {}),
            LABEL_NODE: node_id,
            _LABEL_PIPELINE: run.pipeline_id,
            _LABEL_STEP: run.step,
            _LABEL_ATTEMPT: str(run.attempt),
            _LABEL_RUN: str(run.run),
        },
        "Volumes": {volume: {} for volume in container.volumes if ":" not in volume},
        "ExposedPorts": {inside: {} for pairs in ports for inside, _ in pairs},
        "StopTimeout": math.ceil(container.stop_grace_period_s),
        "HostConfig": {
            "Binds": volumes,
            "Tmpfs": dict(_split(mount) for mount in container.tmpfs),
            "PortBindings": _bindings(pair for pairs in ports for pair in pairs),
            "Devices": [_device(text) for text in container.devices],
            "DeviceRequests": [
                _device_request(it) if podman is None else _cdi_request(it, podman)
                for it in container.devices_reserved
            ],
            "Privileged": container.privileged,
            "CapAdd": list(container.cap_add),
            "CapDrop": list(container.cap_drop),
            "SecurityOpt": list(container.security_opt),
            "ShmSize": container.shm_size_bytes,
            "Ulimits": [
                {"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard}
                for limit in container.ulimits
            ],
            "ExtraHosts": [host.replace("=", ":", 1) for host in container.extra_hosts],
            "NetworkMode": container.network_mode or "default",
            "RestartPolicy": _restart_policy(container.restart if service else ""),
            "NanoCpus": round(container.cpus * NANOSECONDS_PER_S),
            "Memory": container.memory_bytes,
            "MemoryReservation": container.memory_reservation_bytes,
            "Init": True if container.init is None else container.init,
            "ReadonlyRootfs": container.read_only,
        },
    }
    if container.commands:
        body["Entrypoint"] = ["sh", "-e", "-c", "\n".join(container.commands)]
    else:
        # An absent one is the image's own; an empty list would take it away.
        if container.entrypoint:
            body["Entrypoint"] = list(container.entrypoint)
        if container.command:
            body["Cmd"] = list(container.command)
    if container.stop_signal:
        body["StopSignal"] = container.stop_signal
    if container.healthcheck is not None:
        body["Healthcheck"] = _healthcheck(container.healthcheck)
    if log_config is not None:
        body["HostConfig"]["LogConfig"] = log_config
    if container.container_name and not _ENGINE_NETWORKS.fullmatch(container.network_mode):
        body["NetworkingConfig"] = {
            "EndpointsConfig": {container.network_mode: {"Aliases": [container.container_name]}}
        }
    return body


def _split(text: str) -> tuple[str, str]:
    """Split at the first colon."""
    head, _, tail = text.partition(":")
    return head, tail


def _port(text: str) -> list[tuple[str, dict[str, str] | None]]:
    """Read `[[ADDRESS:]HOST:]CONTAINER[/PROTOCOL]`; ports may be ranges of equal length."""
    match = _PORT.fullmatch(text)
    if match is None:
        raise StartError(Reason.START_FAILED, f"ports: {text!r} is no port")
    inside = _range(match["container"])
    outside = _range(match["host"]) if match["host"] else None
    if outside is not None and len(outside) != len(inside):
        raise StartError(Reason.START_FAILED, f"ports: {text!r} joins ranges of unequal length")
    address = (match["address"] or "").strip("[]")
    protocol = match["protocol"] or "tcp"
    return [
        (
            f"{port}/{protocol}",
            {"HostIp": address, "HostPort": str(outside[index]) if outside is not None else ""},
        )
        for index, port in enumerate(inside)
    ]


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _bindings(pairs: Any) -> dict[str, list[dict[str, str]]]:
    bindings: dict[str, list[dict[str, str]]] = {}
    for inside, outside in pairs:
        bindings.setdefault(inside, []).append(outside)
    return bindings


def _device(text: str) -> dict[str, str]:
    """Read `HOST[:CONTAINER[:PERMISSIONS]]`."""
    host, inside = _split(text)
    inside, permissions = _split(inside)
    return {
        "PathOnHost": host,
        "PathInContainer": inside or host,
        "CgroupPermissions": permissions or "rwm",
    }


def _device_request(it: DeviceReservation) -> dict[str, Any]:
    everything = not it.count and not it.device_ids
    return {
        "Driver": it.driver,
        "Count": -1 if everything else it.count,
        "DeviceIDs": list(it.device_ids),
        "Capabilities": [list(it.capabilities)],
    }


def _cdi_request(it: DeviceReservation, podman: tuple[int, int]) -> dict[str, Any]:
    """Return a reservation in Podman's form: it knows GPUs by the names of their CDI file only."""
    if podman < _PODMAN_CDI:
        version, least = (".".join(map(str, them)) for them in (podman, _PODMAN_CDI))
        raise StartError(
            Reason.UNSUPPORTED,
            f"Podman {version} leaves out devices that are asked for over its API; GPUs need"
            f" Podman {least} or newer",
        )
    if "gpu" not in it.capabilities or it.driver not in {"", "nvidia", "cdi"}:
        wanted = ", ".join(filter(None, (it.driver, *it.capabilities)))
        raise StartError(
            Reason.UNSUPPORTED, f"devices: Podman can reserve NVIDIA GPUs alone, not {wanted}"
        )
    which = it.device_ids or tuple(str(index) for index in range(max(it.count, 0))) or ("all",)
    return {
        "Driver": "cdi",
        "DeviceIDs": [f"{_CDI_GPU}={name.removeprefix(f'{_CDI_GPU}=')}" for name in which],
    }


def _restart_policy(text: str) -> dict[str, Any]:
    name, limit = _split(text or "no")
    if limit and not limit.isdecimal():
        raise StartError(Reason.START_FAILED, f"restart: {text!r} is no policy")
    return {"Name": name, "MaximumRetryCount": int(limit or 0)}


def _healthcheck(check: Healthcheck) -> dict[str, Any]:
    return {
        "Test": ["NONE"] if check.disable else list(check.test),
        "Interval": round(check.interval_s * NANOSECONDS_PER_S),
        "Timeout": round(check.timeout_s * NANOSECONDS_PER_S),
        "Retries": check.retries,
        "StartPeriod": round(check.start_period_s * NANOSECONDS_PER_S),
    }
