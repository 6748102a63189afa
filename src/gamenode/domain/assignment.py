"""What the steps of a pipeline ask of a node, and how what they get reaches their containers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from gamenode.domain.command import GrantedStep
from gamenode.domain.container import HONOURED, HostPort, host_ports, with_host_port
from gamenode.domain.pipeline import (
    ContainerSpec,
    DeviceReservation,
    Group,
    Placement,
    StepSpec,
)
from gamenode.domain.placement import Assignment, Demand
from gamenode.domain.selector import parse_selector

_HONOURED_EVERYWHERE: Final = frozenset.intersection(*HONOURED.values())
_GPU: Final = "gpu"


def demand_of(
    steps: Iterable[StepSpec | GrantedStep],
    placement: Placement,
    *,
    envs_needed: frozenset[str] = frozenset(),
    group: Group | None = None,
) -> Demand:
    """Return what a pipeline of these steps asks for; args are filled in, envs may not be.

    Steps run one after the other, so a host port that two of them name is asked for once.

    Raises:
        GameNodeError: INVALID_REQUEST, a selector that cannot be read.
    """
    keys: set[str] = set()
    named: set[HostPort] = set()
    dynamic: list[str] = []
    for step in steps:
        keys |= {key for key in step.container.used() if key not in _HONOURED_EVERYWHERE}
        for text in step.container.ports:
            match host_ports(text):
                case str() as protocol:
                    dynamic.append(protocol)
                case ports:
                    named |= set(ports)
    if placement.gpu is not None:
        keys.add("placement.gpu")
    return Demand(
        node_id=placement.node,
        selector=parse_selector(placement.selector),
        envs_needed=envs_needed,
        keys=frozenset(keys),
        cpu_millis=max(1, round(placement.cpus * 1000)) if placement.cpus else 0,
        memory_bytes=placement.memory_bytes,
        gpu=placement.gpu,
        ports=tuple(sorted(named)),
        dynamic_ports=tuple(dynamic),
        group=group,
    )


def assigned(steps: Sequence[GrantedStep], assignment: Assignment) -> tuple[GrantedStep, ...]:
    """Return the steps with what their node gives them written into their containers.

    Ports go, in order, where the file leaves the host port open. The GPU goes into every container
    that reserves one, or into all where none does.
    """
    ports = iter(assignment.ports)
    asking = [step for step in steps if any(_is_gpu(d) for d in step.container.devices_reserved)]
    with_gpu = {step.name for step in asking or steps} if assignment.gpu_id else set()
    return tuple(
        replace(step, container=_assigned(step.container, ports, gpu_id))
        for step in steps
        for gpu_id in [assignment.gpu_id if step.name in with_gpu else ""]
    )


def _assigned(container: ContainerSpec, ports: Iterator[int], gpu_id: str) -> ContainerSpec:
    texts = tuple(
        with_host_port(text, next(ports)) if isinstance(host_ports(text), str) else text
        for text in container.ports
    )
    devices = container.devices_reserved
    if gpu_id:
        one = DeviceReservation(capabilities=(_GPU,), device_ids=(gpu_id,))
        asked = [device for device in devices if _is_gpu(device)] or [one]
        given = replace(asked[0], count=0, device_ids=(gpu_id,))
        devices = (*(device for device in devices if not _is_gpu(device)), given)
    return replace(container, ports=texts, devices_reserved=devices)


def _is_gpu(device: DeviceReservation) -> bool:
    return _GPU in device.capabilities
