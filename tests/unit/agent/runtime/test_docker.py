"""What the docker runtime makes of a spec, of an engine's answers and of its log."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.engine import IMAGE, Engine, image, running_engine
from tests.support.runtimes import ends, first_block, new_run, opened, whole_log

from gamenode.agent.conditions import ConditionSettings, HostConditions
from gamenode.agent.runtime import Ended, RunKey, StartError
from gamenode.agent.runtime.docker import _found, _instant
from gamenode.agent.runtime.docker_engine import EngineFacts
from gamenode.agent.runtime.docker_log import Frames, Skip, log_config
from gamenode.agent.runtime.docker_spec import container_name, create_body, run_of
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.node import ConditionType
from gamenode.domain.pipeline import (
    ContainerSpec,
    DeviceReservation,
    Healthcheck,
    Reason,
    Ulimit,
)
from gamenode.lib.clock import ClockSettings, ClockWatch

RUN = RunKey("0190-ab", "game", 2, 3)


def body_of(
    container: ContainerSpec, *, service: bool = False, podman: tuple[int, int] | None = None
) -> dict[str, Any]:
    return create_body(
        RUN, container, service=service, node_id="fra-07", log_config=None, podman=podman
    )


def test_a_container_is_named_and_labelled_after_its_run() -> None:
    assert container_name(RUN) == "gamenode-0190-ab-game-2-3"
    body = body_of(ContainerSpec(image="x", labels={"mine": "1", "gamenode.run": "99"}))
    assert body["Labels"]["mine"] == "1"
    assert body["Labels"]["gamenode.node"] == "fra-07"
    assert run_of(body["Labels"]) == RUN


def test_every_key_reaches_the_engine() -> None:
    container = ContainerSpec(
        image="game:1",
        container_name="db",
        hostname="h",
        command=("run", "--fast"),
        entrypoint=("/start",),
        environment={"A": "b=c"},
        working_dir="/w",
        user="1:2",
        volumes=("/host:/in:ro", "named:/n", "/anonymous"),
        tmpfs=("/run", "/tmp:size=1m"),
        ports=("8080:80", "127.0.0.1:5000-5001:6000-6001/udp", "9", "[::1]:7:8"),
        devices=("/dev/dri", "/dev/a:/dev/b:r"),
        privileged=True,
        cap_add=("NET_ADMIN",),
        cap_drop=("ALL",),
        security_opt=("seccomp=unconfined",),
        shm_size_bytes=5,
        ulimits=(Ulimit(name="nofile", soft=1, hard=-1),),
        extra_hosts=("a:1.2.3.4", "b=::1"),
        network_mode="games",
        healthcheck=Healthcheck(test=("CMD", "true"), interval_s=1.5, retries=2),
        restart="on-failure:3",
        stop_grace_period_s=1.5,
        cpus=0.5,
        memory_bytes=6,
        memory_reservation_bytes=7,
        devices_reserved=(DeviceReservation(capabilities=("gpu",), driver="nvidia"),),
        init=False,
        stop_signal="SIGINT",
        read_only=True,
    )
    body = body_of(container, service=True)
    host = body.pop("HostConfig")
    del body["Labels"]
    assert body == {
        "Image": "game:1",
        "Hostname": "h",
        "User": "1:2",
        "WorkingDir": "/w",
        "Env": ["A=b=c"],
        "Volumes": {"/anonymous": {}},
        "ExposedPorts": {"80/tcp": {}, "6000/udp": {}, "6001/udp": {}, "9/tcp": {}, "8/tcp": {}},
        "StopTimeout": 2,
        "Entrypoint": ["/start"],
        "Cmd": ["run", "--fast"],
        "StopSignal": "SIGINT",
        "Healthcheck": {
            "Test": ["CMD", "true"],
            "Interval": 1_500_000_000,
            "Timeout": 0,
            "Retries": 2,
            "StartPeriod": 0,
        },
        "NetworkingConfig": {"EndpointsConfig": {"games": {"Aliases": ["db"]}}},
    }
    assert host == {
        "Binds": ["/host:/in:ro", "named:/n"],
        "Tmpfs": {"/run": "", "/tmp": "size=1m"},
        "PortBindings": {
            "80/tcp": [{"HostIp": "", "HostPort": "8080"}],
            "6000/udp": [{"HostIp": "127.0.0.1", "HostPort": "5000"}],
            "6001/udp": [{"HostIp": "127.0.0.1", "HostPort": "5001"}],
            "9/tcp": [{"HostIp": "", "HostPort": ""}],
            "8/tcp": [{"HostIp": "::1", "HostPort": "7"}],
        },
        "Devices": [
            {"PathOnHost": "/dev/dri", "PathInContainer": "/dev/dri", "CgroupPermissions": "rwm"},
            {"PathOnHost": "/dev/a", "PathInContainer": "/dev/b", "CgroupPermissions": "r"},
        ],
        "DeviceRequests": [
            {"Driver": "nvidia", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]]}
        ],
        "Privileged": True,
        "CapAdd": ["NET_ADMIN"],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["seccomp=unconfined"],
        "ShmSize": 5,
        "Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": -1}],
        "ExtraHosts": ["a:1.2.3.4", "b:::1"],
        "NetworkMode": "games",
        "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "NanoCpus": 500_000_000,
        "Memory": 6,
        "MemoryReservation": 7,
        "Init": False,
        "ReadonlyRootfs": True,
    }


def test_what_is_not_said_is_the_images_own_and_an_init_is_there() -> None:
    body = body_of(ContainerSpec(image="x", restart="always"))
    assert not {"Cmd", "Entrypoint", "Healthcheck", "StopSignal"} & set(body)
    assert body["HostConfig"]["Init"] is True
    assert body["HostConfig"]["RestartPolicy"]["Name"] == "no"  # a task has none


def test_commands_are_one_shells() -> None:
    body = body_of(ContainerSpec(image="x", commands=("a", "b"), entrypoint=("not", "this")))
    assert body["Entrypoint"] == ["sh", "-e", "-c", "a\nb"]
    assert "Cmd" not in body


@pytest.mark.parametrize(
    ("reservation", "docker", "podman"),
    [
        (
            DeviceReservation(capabilities=("gpu",)),
            {"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]]},
            ["nvidia.com/gpu=all"],
        ),
        (
            DeviceReservation(capabilities=("gpu", "utility"), count=2, driver="nvidia"),
            {
                "Driver": "nvidia",
                "Count": 2,
                "DeviceIDs": [],
                "Capabilities": [["gpu", "utility"]],
            },
            ["nvidia.com/gpu=0", "nvidia.com/gpu=1"],
        ),
        (
            DeviceReservation(capabilities=("gpu",), device_ids=("GPU-1", "nvidia.com/gpu=0")),
            {
                "Driver": "",
                "Count": 0,
                "DeviceIDs": ["GPU-1", "nvidia.com/gpu=0"],
                "Capabilities": [["gpu"]],
            },
            ["nvidia.com/gpu=GPU-1", "nvidia.com/gpu=0"],
        ),
    ],
)
def test_gpus_are_asked_for_as_each_engine_knows_them(
    reservation: DeviceReservation, docker: dict[str, Any], podman: list[str]
) -> None:
    container = ContainerSpec(image="x", devices_reserved=(reservation,))
    assert body_of(container)["HostConfig"]["DeviceRequests"] == [docker]
    by_name = body_of(container, podman=(5, 4))["HostConfig"]["DeviceRequests"]
    assert by_name == [{"Driver": "cdi", "DeviceIDs": podman}]


@pytest.mark.parametrize(
    ("reservation", "podman", "advice"),
    [
        (DeviceReservation(capabilities=("gpu",)), (4, 3), "Podman 5.4 or newer"),
        (DeviceReservation(capabilities=("tpu",)), (5, 4), "NVIDIA GPUs alone, not tpu"),
        (DeviceReservation(capabilities=("gpu",), driver="amd"), (5, 4), "not amd, gpu"),
    ],
)
def test_devices_that_podman_would_leave_out_fail_the_start(
    reservation: DeviceReservation, podman: tuple[int, int], advice: str
) -> None:
    with pytest.raises(StartError, match=advice) as caught:
        body_of(ContainerSpec(image="x", devices_reserved=(reservation,)), podman=podman)
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("podman", "drivers", "kind"),
    [
        (None, {"local", "json-file"}, "local"),
        (None, {"json-file"}, None),
        ((4, 3), {"k8s-file", "journald"}, "k8s-file"),
        ((4, 3), {"journald"}, None),
    ],
)
def test_a_log_is_kept_where_every_byte_comes_back(
    podman: tuple[int, int] | None, drivers: set[str], kind: str | None
) -> None:
    facts = EngineFacts(podman=podman, log_drivers=frozenset(drivers), root=Path("/"))
    config = log_config(facts, 4096)
    assert (config["Type"] if config else None) == kind


@pytest.mark.docker
async def test_a_log_that_an_engine_may_change_says_so_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gamenode.agent.runtime.docker.log_config", lambda *_: None)
    host, run = engine.host("fra-10"), new_run()
    async with opened(host) as runtime:
        await runtime.start(run, host.step(prints=b"a\nb\n"), service=False)
        await ends(runtime, run)
        log = await whole_log(runtime, run)
        rest = await whole_log(runtime, run, LogPosition(stdout_bytes=2, stdout_lines=1))
        shown = json.loads(engine.docker("inspect", container_name(run)))[0]
    assert shown["HostConfig"]["LogConfig"]["Type"] == "json-file"  # the engine's own choice
    assert log[LogStream.GAMENODE].startswith(b"inexact: ")
    assert log[LogStream.STDOUT] == b"a\nb\n"
    assert rest == {LogStream.STDOUT: b"b\n"}


@pytest.mark.parametrize("port", ["", "x", "1:2:3", "1-3:1-2", "80/icmp"])
def test_what_is_no_port_is_said_before_anything_starts(port: str) -> None:
    with pytest.raises(StartError, match="ports"):
        body_of(ContainerSpec(image="x", ports=(port,)))


def test_an_instant_keeps_its_nanoseconds() -> None:
    assert _instant("1970-01-01T00:00:01.123456789Z") == 1_123_456_789
    assert _instant("1970-01-01T01:00:01.1+01:00") == 1_100_000_000
    assert _instant("1970-01-01T00:00:02Z") == 2_000_000_000


def test_a_container_that_was_not_started_is_not_there() -> None:
    assert _found({"Status": "created"}) is None


@pytest.mark.parametrize(
    ("code", "killed", "reason"),
    [(137, True, Reason.OOM_KILLED), (0, True, Reason.NONE), (137, False, Reason.SIGNAL)],
)
def test_want_of_memory_is_told_from_a_kill(code: int, killed: bool, reason: Reason) -> None:
    end = _found(
        {
            "Status": "exited",
            "ExitCode": code,
            "OOMKilled": killed,
            "StartedAt": "2026-01-01T00:00:00Z",
            "FinishedAt": "2026-01-01T00:00:01Z",
            "Program": "x",
        }
    )
    assert isinstance(end, Ended)
    assert end.reason is reason


frames = st.lists(st.tuples(st.sampled_from((1, 2)), st.binary(max_size=20)), max_size=20)


@given(frames=frames, size=st.integers(1, 50))
def test_frames_come_apart_however_they_are_cut(frames: list[tuple[int, bytes]], size: int) -> None:
    sent = b"".join(
        bytes((stream, 0, 0, 0)) + len(text).to_bytes(4) + text for stream, text in frames
    )
    taker = Frames()
    got: dict[LogStream, bytes] = {LogStream.STDOUT: b"", LogStream.STDERR: b""}
    for start in range(0, len(sent), size):
        for stream, text in taker.blocks(sent[start : start + size]):
            got[stream] += text
    for number, stream in ((1, LogStream.STDOUT), (2, LogStream.STDERR)):
        assert got[stream] == b"".join(text for it, text in frames if it == number)


@given(text=st.text("a\n", max_size=60).map(str.encode), data=st.data())
def test_what_was_read_is_skipped_to_the_byte(text: bytes, data: st.DataObject) -> None:
    read = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, len(text)))
    skip = Skip(text[:read].count(b"\n"), read)
    for _ in range(2):  # the second time after the engine ended its log
        assert skip.rest(text[:cut]) + skip.rest(text[cut:]) == text[read:]
        assert not skip.missing
        skip.again()
        read = len(text)


@pytest.mark.docker
async def test_an_image_that_is_not_to_be_had_is_said(engine: Engine) -> None:
    async with opened(engine.host("fra-01")) as runtime:
        for policy in ("never", "missing"):
            run = new_run()
            step = ContainerSpec(image="localhost:1/no/such:1", command=("x",), pull_policy=policy)
            with pytest.raises(StartError, match="no/such") as caught:
                await runtime.start(run, step, service=False)
            assert caught.value.reason is Reason.IMAGE_PULL
            assert await runtime.find(run) is None


@pytest.mark.docker
async def test_a_container_that_a_crash_left_unstarted_is_taken_up(engine: Engine) -> None:
    run = new_run()
    step = ContainerSpec(image=IMAGE, command=("echo", "once"))
    body = create_body(run, step, service=False, node_id="fra-02", log_config=None, podman=None)
    args = [f"--label={name}={value}" for name, value in body["Labels"].items()]
    engine.docker("create", "--name", container_name(run), *args, IMAGE, "echo", "once")
    async with opened(engine.host("fra-02")) as runtime:
        assert await runtime.find(run) is None
        await runtime.start(run, step, service=False)
        assert (await ends(runtime, run)).exit_code == 0
        assert await whole_log(runtime, run) == {LogStream.STDOUT: b"once\n"}


@pytest.mark.docker
async def test_nodes_that_share_an_engine_do_not_see_each_other(engine: Engine) -> None:
    async with opened(engine.host("fra-03")) as one, opened(engine.host("fra-04")) as other:
        run = new_run()
        await one.start(run, ContainerSpec(image=IMAGE, command=("true",)), service=False)
        assert list(await one.runs()) == [run]
        assert await other.runs() == {}


@pytest.mark.docker
async def test_a_log_shorter_than_what_was_read_is_an_explicit_gap(engine: Engine) -> None:
    host = engine.host("fra-05")
    async with opened(host) as runtime:
        run = new_run()
        await runtime.start(run, host.step(prints=b"short\n"), service=False)
        await ends(runtime, run)
        log = await whole_log(runtime, run, LogPosition(stdout_bytes=100, stdout_lines=10))
    assert list(log) == [LogStream.GAMENODE]
    assert b"stdout" in log[LogStream.GAMENODE]


@pytest.mark.docker
async def test_what_the_engine_really_applies(engine: Engine) -> None:
    run = new_run()
    step = ContainerSpec(
        image=IMAGE,
        hostname="a-host",
        tmpfs=("/scratch:size=1m",),
        read_only=True,
        command=("sh", "-c", "hostname; touch /scratch/x && touch /x; echo $?"),
        memory_bytes=64 * 1024 * 1024,
        labels={"mine": "yes"},
    )
    async with opened(engine.host("fra-06")) as runtime:
        await runtime.start(run, step, service=False)
        await ends(runtime, run)
        assert (await whole_log(runtime, run))[LogStream.STDOUT] == b"a-host\n1\n"
        shown = json.loads(engine.docker("inspect", container_name(run)))[0]
        assert shown["HostConfig"]["Memory"] == 64 * 1024 * 1024
        assert shown["HostConfig"]["LogConfig"]["Type"] == "local"
        assert shown["Config"]["Labels"]["mine"] == "yes"


@pytest.mark.docker
@pytest.mark.usefixtures("engine")  # it says whether this machine can run one
async def test_a_wait_outlives_a_restart_of_the_engine(tmp_path: Path) -> None:
    run, engines = new_run(), ExitStack()
    try:
        first = await asyncio.to_thread(engines.enter_context, running_engine(tmp_path))
        first.docker("import", "-", IMAGE, stdin=image())
        host = first.host("fra-08")
        async with asyncio.timeout(60.0), opened(host) as runtime:
            await runtime.start(run, host.step(prints=b"up\n", lasts_s=60.0), service=False)
            await first_block(runtime, run)
            waiting = asyncio.ensure_future(ends(runtime, run))
            await asyncio.to_thread(engines.close)  # it takes its containers with it
            await asyncio.to_thread(engines.enter_context, running_engine(tmp_path))
            assert (await waiting).signal is not None
            assert await whole_log(runtime, run) == {LogStream.STDOUT: b"up\n"}
    finally:
        await asyncio.to_thread(engines.close)


@pytest.mark.docker
@pytest.mark.usefixtures("engine")  # it says whether this machine can run one
async def test_a_run_and_its_log_outlive_a_kill_of_the_engine(tmp_path: Path) -> None:
    run, engines = new_run(), ExitStack()

    def start() -> Engine:
        return engines.enter_context(running_engine(tmp_path, live_restore=True))

    try:
        first = await asyncio.to_thread(start)
        first.docker("import", "-", IMAGE, stdin=image())
        host = first.host("fra-09")
        count = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo line $i; sleep 0.01; done"
        step = ContainerSpec(image=IMAGE, commands=(count,))
        async with asyncio.timeout(60.0), opened(host) as runtime:
            conditions = HostConditions(
                tmp_path, runtime, ClockWatch(host.clock, ClockSettings()), ConditionSettings()
            )
            await runtime.start(run, step, service=False)
            await first_block(runtime, run)
            waiting = asyncio.ensure_future(ends(runtime, run))
            reading = asyncio.ensure_future(whole_log(runtime, run))
            assert ConditionType.ENGINE_DOWN not in await conditions.look()

            first.kill()
            assert ConditionType.ENGINE_DOWN in await conditions.look()
            finding = asyncio.ensure_future(runtime.find(run))
            await asyncio.to_thread(start)

            assert ConditionType.ENGINE_DOWN not in await conditions.look()
            assert await finding is not None
            assert (await waiting).exit_code == 0
            lines = "".join(f"line {number}\n" for number in range(1, 201))
            assert await reading == {LogStream.STDOUT: lines.encode()}
            assert await whole_log(runtime, run) == {LogStream.STDOUT: lines.encode()}
    finally:
        await asyncio.to_thread(engines.close)
