"""Every key of a step's container, as a real engine shows that it took it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

import pytest
from tests.support.engine import IMAGE, Engine
from tests.support.runtimes import new_run

from gamenode.agent.runtime import RunKey, StartError
from gamenode.agent.runtime.docker import DockerRuntime
from gamenode.agent.runtime.docker_spec import container_name
from gamenode.domain.pipeline import (
    ContainerSpec,
    DeviceReservation,
    Healthcheck,
    Ulimit,
)

pytestmark = pytest.mark.docker

MIB: Final = 1024 * 1024
STEP: Final = ContainerSpec(
    image=IMAGE,
    container_name="db",
    hostname="a-host",
    entrypoint=("sh", "-c"),
    command=("exit 0",),
    environment={"A": "b=c d"},
    working_dir="/tmp",
    user="1:2",
    volumes=("/usr:/host:ro", "/anonymous"),
    tmpfs=("/scratch:size=1m",),
    ports=("127.0.0.1:5000-5001:6000-6001/udp", "9"),
    devices=("/dev/null:/dev/nothing:r",),
    cap_add=("NET_ADMIN",),
    cap_drop=("CHOWN",),
    security_opt=("no-new-privileges",),
    shm_size_bytes=2 * MIB,
    ulimits=(Ulimit(name="nofile", soft=64, hard=128),),
    extra_hosts=("a:10.0.0.1",),
    network_mode="none",
    healthcheck=Healthcheck(test=("CMD", "true"), interval_s=1.5, timeout_s=1.0, retries=2),
    restart="on-failure:1",
    stop_grace_period_s=2.5,
    stop_signal="SIGINT",
    cpus=0.5,
    memory_bytes=64 * MIB,
    memory_reservation_bytes=32 * MIB,
    labels={"mine": "yes"},
    read_only=True,
)

Shown = dict[str, Any]


def capabilities(names: list[str]) -> list[str]:
    """Return them as engines of every age write them."""
    return [name.removeprefix("CAP_") for name in names]


KEYS: Final[dict[str, tuple[Callable[[Shown], Any], Any]]] = {
    "image": (lambda it: it["Config"]["Image"], IMAGE),
    "container_name": (lambda it: it["Config"]["Labels"]["gamenode.container_name"], "db"),
    "hostname": (lambda it: it["Config"]["Hostname"], "a-host"),
    "entrypoint": (lambda it: it["Config"]["Entrypoint"], ["sh", "-c"]),
    "command": (lambda it: it["Config"]["Cmd"], ["exit 0"]),
    "environment": (lambda it: "A=b=c d" in it["Config"]["Env"], True),
    "working_dir": (lambda it: it["Config"]["WorkingDir"], "/tmp"),
    "user": (lambda it: it["Config"]["User"], "1:2"),
    "volumes": (
        lambda it: sorted((m["Type"], m["Destination"], m["RW"]) for m in it["Mounts"]),
        [("bind", "/host", False), ("volume", "/anonymous", True)],
    ),
    "tmpfs": (lambda it: it["HostConfig"]["Tmpfs"], {"/scratch": "size=1m"}),
    "ports": (
        lambda it: it["HostConfig"]["PortBindings"],
        {
            "6000/udp": [{"HostIp": "127.0.0.1", "HostPort": "5000"}],
            "6001/udp": [{"HostIp": "127.0.0.1", "HostPort": "5001"}],
            "9/tcp": [{"HostIp": "", "HostPort": ""}],
        },
    ),
    "devices": (
        lambda it: it["HostConfig"]["Devices"],
        [{"PathOnHost": "/dev/null", "PathInContainer": "/dev/nothing", "CgroupPermissions": "r"}],
    ),
    "cap_add": (lambda it: capabilities(it["HostConfig"]["CapAdd"]), ["NET_ADMIN"]),
    "cap_drop": (lambda it: capabilities(it["HostConfig"]["CapDrop"]), ["CHOWN"]),
    "security_opt": (lambda it: it["HostConfig"]["SecurityOpt"], ["no-new-privileges"]),
    "shm_size": (lambda it: it["HostConfig"]["ShmSize"], 2 * MIB),
    "ulimits": (
        lambda it: it["HostConfig"]["Ulimits"],
        [{"Name": "nofile", "Soft": 64, "Hard": 128}],
    ),
    "extra_hosts": (lambda it: it["HostConfig"]["ExtraHosts"], ["a:10.0.0.1"]),
    "network_mode": (lambda it: it["HostConfig"]["NetworkMode"], "none"),
    "healthcheck": (
        lambda it: it["Config"]["Healthcheck"],
        {
            "Test": ["CMD", "true"],
            "Interval": 1_500_000_000,
            "Timeout": 1_000_000_000,
            "Retries": 2,
        },
    ),
    "restart": (
        lambda it: it["HostConfig"]["RestartPolicy"],
        {"Name": "on-failure", "MaximumRetryCount": 1},
    ),
    "stop_grace_period": (lambda it: it["Config"]["StopTimeout"], 3),
    "stop_signal": (lambda it: it["Config"]["StopSignal"], "SIGINT"),
    "deploy.resources.limits.cpus": (lambda it: it["HostConfig"]["NanoCpus"], 500_000_000),
    "deploy.resources.limits.memory": (lambda it: it["HostConfig"]["Memory"], 64 * MIB),
    "deploy.resources.reservations.memory": (
        lambda it: it["HostConfig"]["MemoryReservation"],
        32 * MIB,
    ),
    "labels": (lambda it: it["Config"]["Labels"]["mine"], "yes"),
    "init": (lambda it: it["HostConfig"]["Init"], True),
    "read_only": (lambda it: it["HostConfig"]["ReadonlyRootfs"], True),
    "(log)": (
        lambda it: it["HostConfig"]["LogConfig"],
        {"Type": "local", "Config": {"max-size": str(256 * MIB), "max-file": "4"}},
    ),
}


def shown_after(
    engine: Engine, make: Callable[[DockerRuntime, RunKey], Coroutine[Any, Any, object]]
) -> tuple[RunKey, Shown]:
    run = new_run()

    async def with_runtime() -> None:
        runtime = engine.host("fra-31").runtime()
        try:
            await make(runtime, run)
        finally:
            await runtime.close()

    asyncio.run(with_runtime())
    shown: Shown = json.loads(engine.docker("inspect", container_name(run)))[0]
    return run, shown


@pytest.fixture(scope="module")
def started(engine: Engine) -> Iterator[tuple[RunKey, Shown]]:
    async def start(runtime: DockerRuntime, run: RunKey) -> None:
        await runtime.start(run, STEP, service=True)
        await runtime.wait(run)

    run, shown = shown_after(engine, start)
    yield run, shown
    engine.docker("rm", "-fv", container_name(run))


@pytest.mark.parametrize("key", KEYS)
def test_the_engine_has_it(started: tuple[RunKey, Shown], key: str) -> None:
    look, wanted = KEYS[key]
    assert look(started[1]) == wanted


def test_a_step_is_found_by_its_labels(engine: Engine, started: tuple[RunKey, Shown]) -> None:
    run, _ = started
    for label in (f"step={run.step}", f"pipeline={run.pipeline_id}", "node=fra-31", "attempt=1"):
        listed = engine.docker(
            "ps", "-a", "--filter", f"label=gamenode.{label}", "--format", "{{.Names}}"
        )
        assert container_name(run) in listed.split()


def test_privileged_and_commands_and_no_init(engine: Engine) -> None:
    step = ContainerSpec(image=IMAGE, privileged=True, init=False, commands=("true", "true"))
    # Created alone: not every machine of tests may start it.
    run, shown = shown_after(engine, lambda runtime, run: runtime._create(run, step, service=False))
    engine.docker("rm", "-f", container_name(run))
    assert shown["HostConfig"]["Privileged"] is True
    assert shown["HostConfig"]["Init"] is False
    assert shown["Config"]["Entrypoint"] == ["sh", "-e", "-c", "true\ntrue"]


def test_a_gpu_that_the_engine_cannot_give_fails_the_start(engine: Engine) -> None:
    gpu = DeviceReservation(capabilities=("gpu",), device_ids=("GPU-1",))
    step = ContainerSpec(image=IMAGE, command=("true",), devices_reserved=(gpu,))
    with pytest.raises(StartError, match="device driver"):
        shown_after(engine, lambda runtime, run: runtime.start(run, step, service=False))
