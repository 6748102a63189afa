"""What every runtime promises, each on a host of its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.engine import Engine, may_raise_limits
from tests.support.runtimes import (
    FakeRuntimeHost,
    ProcessRuntimeHost,
    RuntimeHost,
    ShellHost,
    commands_with,
    ends,
    first_block,
    new_run,
    opened,
    until_ended,
    until_printed,
    whole_log,
)

from gamenode.agent.runtime import Ended, Running, Runtime, StartError
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Reason, Ulimit


@pytest.fixture(
    params=[
        "fake",
        "process",
        "process-in-sessions",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.docker),
    ]
)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> RuntimeHost:
    match request.param:
        case "fake":
            return FakeRuntimeHost()
        case "docker":
            engine: Engine = request.getfixturevalue("engine")
            return engine.host(node_id=f"node-{uuid.uuid4()}")
        case "podman":
            podman: Engine = request.getfixturevalue("podman")
            return podman.host(node_id=f"node-{uuid.uuid4()}")
        case kind:
            return ProcessRuntimeHost(tmp_path / "runs", groups=kind == "process")


@pytest.fixture
async def runtime(host: RuntimeHost) -> AsyncIterator[Runtime]:
    async with opened(host) as runtime:
        yield runtime


async def test_a_run_ends_with_its_exit_code(host: RuntimeHost, runtime: Runtime) -> None:
    good, bad = new_run(), new_run()
    started_at = await runtime.start(good, host.step(), service=False)
    await runtime.start(bad, host.step(exit_code=7), service=False)

    end = await ends(runtime, good)
    assert (end.exit_code, end.signal, end.reason) == (0, None, Reason.NONE)
    assert end.started_at == started_at
    assert end.started_at <= end.ended_at

    end = await ends(runtime, bad)
    assert (end.exit_code, end.signal, end.reason) == (7, None, Reason.EXIT_CODE)
    assert "7" in end.message


async def test_a_run_starts_once_however_often_it_is_asked_for(
    host: RuntimeHost, runtime: Runtime
) -> None:
    run, step = new_run(), host.step(prints=b"once\n", lasts_s=0.3)
    async with asyncio.TaskGroup() as group:
        starts = [group.create_task(runtime.start(run, step, service=False)) for _ in range(8)]
    instants = {start.result() for start in starts}
    await ends(runtime, run)
    # Also when it has ended.
    instants.add(await runtime.start(run, step, service=False))

    assert len(instants) == 1
    assert await whole_log(runtime, run) == {LogStream.STDOUT: b"once\n"}
    assert list(await runtime.runs()) == [run]


async def test_another_agent_does_not_start_it_again(host: RuntimeHost, runtime: Runtime) -> None:
    run, step = new_run(), host.step(prints=b"once\n", lasts_s=0.3)
    other = host.runtime()
    try:
        async with asyncio.TaskGroup() as group:
            starts = [
                group.create_task(it.start(run, step, service=False)) for it in (runtime, other)
            ]
        assert len({start.result() for start in starts}) == 1
        await ends(runtime, run)
        await other.start(run, step, service=False)
        assert await whole_log(other, run) == {LogStream.STDOUT: b"once\n"}
    finally:
        await other.close()


async def test_runs_of_one_step_do_not_meet(host: RuntimeHost, runtime: Runtime) -> None:
    first = new_run()
    second = type(first)(first.pipeline_id, first.step, 2, 1)
    third = type(first)(first.pipeline_id, first.step, 1, 2)
    for code, run in enumerate((first, second, third)):
        await runtime.start(run, host.step(exit_code=code), service=False)
    assert [(await ends(runtime, run)).exit_code for run in (first, second, third)] == [0, 1, 2]


async def test_what_was_never_started_is_not_found(runtime: Runtime) -> None:
    run = new_run()
    assert await runtime.find(run) is None
    await runtime.stop(run, grace_s=1.0)
    await runtime.remove(run)
    with pytest.raises(KeyError):
        await runtime.wait(run)
    with pytest.raises(KeyError):
        await whole_log(runtime, run)
    assert await runtime.runs() == {}


async def test_what_cannot_start_says_why_and_leaves_nothing(
    host: RuntimeHost, runtime: Runtime
) -> None:
    run, (step, word) = new_run(), host.broken_step()
    with pytest.raises(StartError, match=word) as caught:
        await runtime.start(run, step, service=False)
    assert caught.value.reason is Reason.START_FAILED
    assert await runtime.find(run) is None
    assert await runtime.runs() == {}


async def test_a_new_agent_takes_over_what_runs_and_what_has_ended(host: RuntimeHost) -> None:
    lives, ended = new_run(), new_run()
    first = host.runtime()
    await first.start(ended, host.step(exit_code=3), service=False)
    await ends(first, ended)
    started_at = await first.start(
        lives, host.step(prints=b"hello\n", lasts_s=0.5, exit_code=4), service=False
    )
    await first.close()

    async with opened(host) as second:
        found = await second.find(lives)  # on a busy machine it may have ended
        assert found is not None
        assert found.started_at == started_at
        found = await second.find(ended)
        assert isinstance(found, Ended)
        assert found.exit_code == 3
        assert set(await second.runs()) == {lives, ended}
        end = await ends(second, lives)
        assert (end.exit_code, end.started_at) == (4, started_at)
        assert await whole_log(second, lives) == {LogStream.STDOUT: b"hello\n"}


async def test_an_end_without_an_agent_is_found_later(host: RuntimeHost) -> None:
    run = new_run()
    first = host.runtime()
    await first.start(run, host.step(lasts_s=0.2, exit_code=5), service=False)
    await first.close()
    async with opened(host) as second:
        assert (await until_ended(second, run)).exit_code == 5


async def test_a_cancelled_wait_has_no_effect(host: RuntimeHost, runtime: Runtime) -> None:
    run = new_run()
    await runtime.start(run, host.step(lasts_s=0.3, exit_code=6), service=False)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await runtime.wait(run)
    assert (await ends(runtime, run)).exit_code == 6


async def test_a_stop_ends_a_run_by_its_signal(host: RuntimeHost, runtime: Runtime) -> None:
    run = new_run()
    await runtime.start(run, host.step(prints=b"up\n", lasts_s=60.0), service=True)
    await first_block(runtime, run)
    before_s = time.monotonic()
    await runtime.stop(run, grace_s=20.0)
    assert time.monotonic() - before_s < 10.0
    end = await runtime.find(run)
    assert isinstance(end, Ended)
    assert (end.exit_code, end.signal, end.reason) == (None, 15, Reason.SIGNAL)
    await runtime.stop(run, grace_s=20.0)  # harmless


async def test_a_stop_right_after_the_start_finds_the_run(
    host: RuntimeHost, runtime: Runtime
) -> None:
    run = new_run()
    await runtime.start(run, host.step(lasts_s=60.0), service=False)
    async with asyncio.timeout(15.0):
        await runtime.stop(run, grace_s=1.0)
    assert isinstance(await runtime.find(run), Ended)


async def test_what_ignores_a_stop_is_killed_after_the_grace(
    host: RuntimeHost, runtime: Runtime
) -> None:
    run = new_run()
    step = host.step(prints=b"up\n", lasts_s=60.0, ignores_stop=True)
    await runtime.start(run, step, service=False)
    await first_block(runtime, run)
    before_s = time.monotonic()
    await runtime.stop(run, grace_s=1.0)
    assert 0.9 < time.monotonic() - before_s < 1.0 + 5.0  # P11
    end = await ends(runtime, run)
    assert (end.exit_code, end.signal, end.reason) == (None, 9, Reason.SIGNAL)


async def test_a_log_comes_back_byte_for_byte(host: RuntimeHost, runtime: Runtime) -> None:
    run = new_run()
    out = "line\n\nlänger\n\r\nno newline at the end".encode()
    await runtime.start(run, host.step(prints=out, complains=b"oh\nno\n"), service=False)
    assert await whole_log(runtime, run) == {LogStream.STDOUT: out, LogStream.STDERR: b"oh\nno\n"}


async def test_a_log_goes_on_from_a_position(host: RuntimeHost, runtime: Runtime) -> None:
    run = new_run()
    step = host.step(prints=b"one\ntwo\nthree\n", complains=b"un\ndeux\n")
    await runtime.start(run, step, service=False)
    await ends(runtime, run)

    position = LogPosition(stdout_bytes=4, stdout_lines=1, stderr_bytes=8, stderr_lines=2)
    assert await whole_log(runtime, run, position) == {LogStream.STDOUT: b"two\nthree\n"}
    # In the middle of a line, where nothing more had been printed when it was read.
    position = LogPosition(stdout_bytes=6, stdout_lines=1, stderr_bytes=0, stderr_lines=0)
    assert await whole_log(runtime, run, position) == {
        LogStream.STDOUT: b"o\nthree\n",
        LogStream.STDERR: b"un\ndeux\n",
    }


async def test_a_log_ends_with_its_run_and_not_before(host: RuntimeHost, runtime: Runtime) -> None:
    run = new_run()
    await runtime.start(run, host.step(prints=b"early\n", lasts_s=0.4), service=False)
    before_s = time.monotonic()
    assert await whole_log(runtime, run, live=False) == {LogStream.STDOUT: b"early\n"}
    assert time.monotonic() - before_s > 0.2
    assert isinstance(await runtime.find(run), Ended)


async def test_a_run_is_removed_only_when_it_has_ended(host: RuntimeHost, runtime: Runtime) -> None:
    run = new_run()
    await runtime.start(run, host.step(lasts_s=60.0), service=False)
    with pytest.raises(GameNodeError) as caught:
        await runtime.remove(run)
    assert caught.value.code is ErrorCode.CONFLICT
    assert isinstance(await runtime.find(run), Running)

    await runtime.stop(run, grace_s=0.0)
    await runtime.remove(run)
    await runtime.remove(run)  # safe to repeat
    assert await runtime.find(run) is None
    assert await runtime.runs() == {}


@pytest.fixture(
    params=["process", "process-in-sessions", pytest.param("docker", marks=pytest.mark.docker)]
)
def spec_host(request: pytest.FixtureRequest, tmp_path: Path) -> ShellHost:
    """Return a host for what a spec says; Podman is asked all of it in one test, being slow."""
    return shell_host(request, tmp_path)


@pytest.fixture(
    params=[
        "process",
        "process-in-sessions",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("podman", marks=pytest.mark.docker),
    ]
)
def real_host(request: pytest.FixtureRequest, tmp_path: Path) -> ShellHost:
    """Return a host that runs what it is given."""
    return shell_host(request, tmp_path)


def shell_host(request: pytest.FixtureRequest, tmp_path: Path) -> ShellHost:
    if request.param in {"docker", "podman"}:
        engine: Engine = request.getfixturevalue(
            "engine" if request.param == "docker" else "podman"
        )
        return engine.host(node_id=f"node-{uuid.uuid4()}")
    return ProcessRuntimeHost(tmp_path / "runs", groups=request.param == "process")


async def printed_by(host: ShellHost, container: ContainerSpec) -> tuple[bytes, Ended]:
    """Run `container` and return what it printed, and its end."""
    run = new_run()
    async with opened(host) as runtime:
        await runtime.start(run, replace(container, image=host.image), service=False)
        end = await ends(runtime, run)
        return (await whole_log(runtime, run)).get(LogStream.STDOUT, b""), end


async def test_arguments_reach_the_step_as_they_are(spec_host: ShellHost) -> None:
    args = ("$(touch x)", "a  b", "*", "-n", "", "'", '"', "\\", "`id`", "${HOME}", "\n", "ü")
    step = ContainerSpec(command=("printf", "<%s>", *args))
    printed, _ = await printed_by(spec_host, step)
    assert printed.decode() == "".join(f"<{arg}>" for arg in args)


async def test_the_entrypoint_comes_before_the_command(spec_host: ShellHost) -> None:
    step = ContainerSpec(entrypoint=("printf", "%s-"), command=("a", "b"))
    assert (await printed_by(spec_host, step))[0] == b"a-b-"


async def test_commands_stop_at_the_first_failure(spec_host: ShellHost) -> None:
    step = ContainerSpec(commands=("X=1", "echo $X", "(exit 3)", "echo never"))
    printed, end = await printed_by(spec_host, step)
    assert (printed, end.exit_code) == (b"1\n", 3)


async def test_a_step_sees_its_own_environment_and_not_the_agents(
    spec_host: ShellHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAMENODE_TOKEN", "secret")
    awkward = "a b\n$HOME 'x' \"y\" = \\"
    step = ContainerSpec(command=("env",), environment={"MINE": "yes", "AWKWARD": awkward})
    printed, _ = await printed_by(spec_host, step)
    assert b"MINE=yes\n" in printed
    assert f"AWKWARD={awkward}\n".encode() in printed
    assert b"PATH=" in printed
    assert b"secret" not in printed
    assert b"GAMENODE" not in printed


async def test_a_command_that_is_not_there_is_named(real_host: ShellHost) -> None:
    run = new_run()
    step = ContainerSpec(image=real_host.image, command=("no-such-program",))
    async with opened(real_host) as runtime:
        try:
            await runtime.start(run, step, service=False)
        except StartError as error:
            reason, message = error.reason, error.message
        else:
            end = await ends(runtime, run)
            reason, message = end.reason, end.message
            assert end.exit_code == 127
    assert reason in {Reason.START_FAILED, Reason.EXIT_CODE}
    assert "no-such-program" in message


async def test_a_working_dir_and_limits_are_honoured(spec_host: ShellHost) -> None:
    step = ContainerSpec(
        commands=("pwd", "ulimit -n", "ulimit -Hn"),
        working_dir="/tmp",
        ulimits=(Ulimit(name="nofile", soft=123, hard=456),),
    )
    assert (await printed_by(spec_host, step))[0] == b"/tmp\n123\n456\n"


async def test_a_step_runs_as_its_user(spec_host: ShellHost) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    step = ContainerSpec(commands=("id -u; id -g",), user="12345:54321")
    assert (await printed_by(spec_host, step))[0] == b"12345\n54321\n"


async def test_its_own_stop_signal_comes_first(real_host: ShellHost) -> None:
    run = new_run()
    step = ContainerSpec(
        image=real_host.image,
        commands=(
            "trap 'echo bye; exit 9' USR1",
            "trap '' TERM",
            "echo up",
            "while :; do sleep 0.05 || :; done",  # the signal reaches every process
        ),
        stop_signal="SIGUSR1",
    )
    async with opened(real_host) as runtime:
        await runtime.start(run, step, service=True)
        await first_block(runtime, run)
        await runtime.stop(run, grace_s=10.0)
        assert (await ends(runtime, run)).exit_code == 9
        assert (await whole_log(runtime, run))[LogStream.STDOUT] == b"up\nbye\n"


async def test_a_kill_reaches_grandchildren_that_ignore_signals(real_host: ShellHost) -> None:
    run = new_run()
    marker = f"{300 + int.from_bytes(os.urandom(2)) / 1e5:.5f}"
    step = ContainerSpec(
        image=real_host.image,
        commands=(
            "trap '' TERM INT HUP",
            f"(sleep {marker} & sleep {marker})& echo up",
            f"sleep {marker}",
        ),
    )
    async with opened(real_host) as runtime:
        await runtime.start(run, step, service=False)
        await first_block(runtime, run)
        await runtime.stop(run, grace_s=0.2)
        assert isinstance(await runtime.find(run), Ended)
        assert commands_with(marker) == []


async def test_what_a_step_leaves_behind_ends_with_it(real_host: ShellHost) -> None:
    run = new_run()
    marker = f"{300 + int.from_bytes(os.urandom(2)) / 1e5:.5f}"
    step = ContainerSpec(image=real_host.image, commands=(f"sleep {marker} & sleep 0.2; exit 2",))
    async with opened(real_host) as runtime:
        await runtime.start(run, step, service=False)
        assert (await ends(runtime, run)).exit_code == 2
        assert commands_with(marker) == []


async def test_a_service_is_started_again_by_its_policy_and_not_after_a_stop(
    real_host: ShellHost,
) -> None:
    run = new_run()
    step = ContainerSpec(
        image=real_host.image, commands=("echo again", "sleep 0.1; exit 1"), restart="always"
    )
    async with opened(real_host) as runtime:
        await runtime.start(run, step, service=True)
        await until_printed(runtime, run, b"again\nagain\n")
        assert isinstance(await runtime.find(run), Running)
        await runtime.stop(run, grace_s=1.0)
        assert isinstance(await runtime.find(run), Ended)


async def test_a_policy_is_for_services_alone_and_counts(real_host: ShellHost) -> None:
    task, service = new_run(), new_run()
    step = ContainerSpec(
        image=real_host.image, commands=("echo once; exit 4",), restart="on-failure:1"
    )
    async with opened(real_host) as runtime:
        await runtime.start(task, step, service=False)
        await runtime.start(service, step, service=True)
        assert (await ends(runtime, task)).exit_code == 4
        assert (await ends(runtime, service)).exit_code == 4
        assert await whole_log(runtime, task) == {LogStream.STDOUT: b"once\n"}
        assert await whole_log(runtime, service) == {LogStream.STDOUT: b"once\nonce\n"}


async def test_binary_output_comes_back_exactly(real_host: ShellHost) -> None:
    run = new_run()
    step = ContainerSpec(
        image=real_host.image,
        # Long lines, every byte, no newline at the end.
        commands=(
            "i=0; while [ $i -lt 3 ]",
            "do head -c 40000 /dev/urandom | tee -a /tmp/$NAME; i=$((i+1)); done",
            "sha256sum < /tmp/$NAME >&2",
            "rm /tmp/$NAME",
        ),
        environment={"NAME": f"gamenode-{uuid.uuid4()}"},
    )
    async with opened(real_host) as runtime:
        await runtime.start(run, step, service=False)
        await ends(runtime, run)
        log = await whole_log(runtime, run)
    printed, digest = log[LogStream.STDOUT], log[LogStream.STDERR].split()[0].decode()
    assert len(printed) == 120_000
    assert hashlib.sha256(printed).hexdigest() == digest


async def test_lines_come_at_once_from_the_moment_somebody_follows(real_host: ShellHost) -> None:
    run = new_run()
    step = ContainerSpec(
        image=real_host.image,
        commands=("i=0; while [ $i -lt 12 ]; do echo line; sleep 0.1; i=$((i+1)); done",),
    )
    async with opened(real_host) as runtime:
        await runtime.start(run, step, service=False)
        live = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, live.set)
        async with asyncio.timeout(20.0):
            blocks = [block async for block in runtime.read_log(run, LogPosition(), live=live)]
    assert len(blocks) > 5  # what was printed before, then a line at a time
    assert b"".join(block.data for block in blocks) == 12 * b"line\n"


@pytest.mark.docker
async def test_podman_takes_a_spec_as_docker_does(podman: Engine) -> None:
    step = ContainerSpec(
        entrypoint=("sh", "-c"),
        command=(
            'id -u; pwd; hostname; echo "$A"; grep -c /scratch /proc/mounts; echo "$0"',
            "a  *",
        ),
        environment={"A": "b=c d"},
        hostname="a-host",
        labels={"mine": "yes"},
        memory_bytes=64 * 1024 * 1024,
        read_only=True,
        tmpfs=("/scratch",),
        user="12345:54321",
        working_dir="/tmp",
    )
    printed, _ = await printed_by(podman.host(node_id=f"node-{uuid.uuid4()}"), step)
    assert printed == b"12345\n/tmp\na-host\nb=c d\n1\na  *\n"


@pytest.mark.docker
async def test_podman_takes_limits_as_docker_does(podman: Engine) -> None:
    if not may_raise_limits():
        pytest.skip("needs CAP_SYS_RESOURCE: Podman raises limits beside those of a step")
    step = ContainerSpec(
        commands=("ulimit -n",), ulimits=(Ulimit(name="nofile", soft=123, hard=456),)
    )
    printed, _ = await printed_by(podman.host(node_id=f"node-{uuid.uuid4()}"), step)
    assert printed == b"123\n"
