"""What every runtime promises, each on a host of its own."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.engine import Engine
from tests.support.runtimes import (
    FakeRuntimeHost,
    ProcessRuntimeHost,
    RuntimeHost,
    ends,
    first_block,
    new_run,
    opened,
    whole_log,
)

from gamenode.agent.runtime import Ended, Running, Runtime, StartError
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import Reason


@pytest.fixture(
    params=[
        "fake",
        "process",
        "process-in-sessions",
        pytest.param("docker", marks=pytest.mark.docker),
    ]
)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> RuntimeHost:
    match request.param:
        case "fake":
            return FakeRuntimeHost()
        case "docker":
            engine: Engine = request.getfixturevalue("engine")
            return engine.host(node_id=f"node-{uuid.uuid4()}")
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
    started_at = await first.start(
        lives, host.step(prints=b"hello\n", lasts_s=0.5, exit_code=4), service=False
    )
    await first.start(ended, host.step(exit_code=3), service=False)
    await ends(first, ended)
    await first.close()

    async with opened(host) as second:
        assert await second.find(lives) == Running(started_at=started_at)
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
    async with opened(host) as second, asyncio.timeout(20.0):
        while isinstance(await second.find(run), Running):
            await asyncio.sleep(0.02)
        end = await second.find(run)
        assert isinstance(end, Ended)
        assert end.exit_code == 5


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
