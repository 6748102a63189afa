"""What only plain processes have: a supervisor, a claim, control groups or sessions."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.runtimes import (
    ProcessRuntimeHost,
    commands_with,
    ends,
    first_block,
    new_run,
    opened,
    until,
    until_ended,
    whole_log,
)

from gamenode.agent.runtime import Ended, RunKey, Running, Runtime, StartError
from gamenode.agent.runtime.claims import Claim
from gamenode.agent.runtime.members import Cgroup
from gamenode.agent.runtime.process import ProcessRuntime
from gamenode.agent.runtime.process_spec import Restart
from gamenode.domain.errors import GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Healthcheck, Reason, Ulimit
from gamenode.lib.clock import Instant

RSS_BYTES_MAX = 3_000_000


@pytest.fixture(params=["group", "session"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> ProcessRuntimeHost:
    return ProcessRuntimeHost(tmp_path / "runs", groups=request.param == "group")


def folder(host: ProcessRuntimeHost, run: RunKey) -> Path:
    return host.root / f"{run.pipeline_id}.{run.step}.{run.attempt}.{run.run}"


def supervisor(host: ProcessRuntimeHost, run: RunKey) -> int:
    return int((folder(host, run) / "supervisor").read_text().split()[0])


def stat_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().split()


def rss_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that nothing here may touch."""
    other = subprocess.Popen(("sleep", "60"), start_new_session=True)
    try:
        yield other
    finally:
        other.kill()
        other.wait()


def marker() -> str:
    """Return a duration that no other sleep of this machine has."""
    return f"{300 + int.from_bytes(os.urandom(3)) / 1e8:.8f}"


async def test_the_death_of_the_supervisor_ends_the_step(host: ProcessRuntimeHost) -> None:
    run, it = new_run(), marker()
    step = ContainerSpec(commands=(f"sleep {it} & echo up; sleep {it}",))
    async with opened(host) as runtime:
        await runtime.start(run, step, service=False)
        await first_block(runtime, run)
        os.kill(supervisor(host, run), signal.SIGKILL)
        end = await ends(runtime, run)
        assert (end.exit_code, end.signal, end.reason) == (None, None, Reason.OUTCOME_UNKNOWN)
        assert commands_with(it) == []


async def test_the_kernel_ends_the_step_of_a_dead_supervisor_without_an_agent(
    host: ProcessRuntimeHost,
) -> None:
    run, it = new_run(), marker()
    runtime = host.runtime()
    step = ContainerSpec(commands=("echo up", f"exec sleep {it}"))
    await runtime.start(run, step, service=False)
    await first_block(runtime, run)
    await runtime.close()
    os.kill(supervisor(host, run), signal.SIGKILL)
    await until_gone(it)
    async with opened(host) as later:
        assert (await until_ended(later, run)).reason is Reason.OUTCOME_UNKNOWN


async def test_a_lost_claim_is_never_started_again(host: ProcessRuntimeHost) -> None:
    run = new_run()
    step = ContainerSpec(commands=("echo once; sleep 60",))
    first = host.runtime()
    started_at = await first.start(run, step, service=False)
    await first_block(first, run)
    await first.close()
    os.kill(supervisor(host, run), signal.SIGKILL)

    async with opened(host) as second:
        await until_ended(second, run)
        assert await second.start(run, step, service=False) == started_at
        end = await second.find(run)
        assert isinstance(end, Ended)
        assert end.reason is Reason.OUTCOME_UNKNOWN
        assert await whole_log(second, run) == {LogStream.STDOUT: b"once\n"}


async def test_a_claim_of_another_boot_has_ended_and_nobody_is_signalled(
    host: ProcessRuntimeHost,
) -> None:
    run = new_run()
    with bystander() as other:
        runtime = host.runtime()
        await runtime.start(run, ContainerSpec(command=("true",)), service=False)
        await ends(runtime, run)
        await runtime.close()
        # As after a reboot: the claim's process number is another's now.
        claim = json.loads((folder(host, run) / "claim").read_text())
        (folder(host, run) / "claim").write_text(json.dumps(claim | {"boot_id": "before"}))
        (folder(host, run) / "exit").unlink()
        (folder(host, run) / "supervisor").write_text(" ".join(stat_of(other.pid)))

        async with opened(host) as later:
            end = await later.find(run)
            assert isinstance(end, Ended)
            assert end.reason is Reason.OUTCOME_UNKNOWN
            await later.stop(run, grace_s=1.0)
        assert other.poll() is None


async def test_a_process_number_that_is_anothers_now_is_not_signalled(
    host: ProcessRuntimeHost,
) -> None:
    run = new_run()
    with bystander() as other:
        runtime = host.runtime()
        await runtime.start(run, ContainerSpec(command=("true",)), service=False)
        await ends(runtime, run)
        await runtime.close()
        (folder(host, run) / "exit").unlink()
        fields = stat_of(other.pid)
        fields[21] = str(int(fields[21]) - 1)  # it started at another time
        (folder(host, run) / "supervisor").write_text(" ".join(fields))

        async with opened(host) as later:
            await later.stop(run, grace_s=0.1)
            assert (await until_ended(later, run)).reason is Reason.OUTCOME_UNKNOWN
        assert other.poll() is None


async def test_a_killed_agent_leaves_a_run_that_the_next_one_adopts(
    host: ProcessRuntimeHost,
) -> None:
    run = new_run()
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _AGENT, str(host.root), run.pipeline_id, run.step),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert agent.stdout is not None
    started_at = Instant(int(await agent.stdout.readline()))
    agent.kill()
    await agent.wait()

    async with opened(host) as runtime:
        assert await runtime.find(run) == Running(started_at=started_at)
        end = await ends(runtime, run)
        assert end.exit_code == 11
        assert await whole_log(runtime, run) == {LogStream.STDOUT: b"one\ntwo\n"}


_AGENT = """
import asyncio, sys
from pathlib import Path
from gamenode.agent.runtime import RunKey
from gamenode.agent.runtime.process import ProcessRuntime, ProcessSettings
from gamenode.domain.pipeline import ContainerSpec
from gamenode.lib.clock import SystemClock

async def main():
    root, pipeline_id, step = sys.argv[1:]
    runtime = ProcessRuntime(ProcessSettings(root=Path(root)), clock=SystemClock())
    step = ContainerSpec(commands=("echo one; sleep 1; echo two; exit 11",))
    run = RunKey(pipeline_id, sys.argv[3], 1, 1)
    print(await runtime.start(run, step, service=False), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_process_that_leaves_its_session_belongs_to_the_run_in_a_control_group(
    tmp_path: Path,
) -> None:
    if Cgroup.parent() is None:
        pytest.skip("needs a control group (version 2) of the agent's own")
    host = ProcessRuntimeHost(tmp_path / "runs", groups=True)
    run, it = new_run(), marker()
    step = ContainerSpec(commands=(f"setsid sleep {it} & sleep 0.2",))
    async with opened(host) as runtime:
        await runtime.start(run, step, service=False)
        await ends(runtime, run)
        assert commands_with(it) == []


async def test_the_grace_is_for_all_that_the_step_runs(host: ProcessRuntimeHost) -> None:
    run = new_run()
    # The shell ends by the signal at once; the game it started takes a moment to save.
    game = "trap 'sleep 0.3; echo saved; exit 0' TERM; echo up; while :; do sleep 0.05 || :; done"
    step = ContainerSpec(command=("sh", "-c", 'sh -c "$0"; :', game))
    async with opened(host) as runtime:
        await runtime.start(run, step, service=True)
        await first_block(runtime, run)
        await runtime.stop(run, grace_s=10.0)
        assert (await whole_log(runtime, run))[LogStream.STDOUT] == b"up\nsaved\n"


async def test_the_supervisor_is_small(
    host: ProcessRuntimeHost,
) -> None:
    run = new_run()
    async with opened(host) as runtime:
        await runtime.start(run, host.step(prints=b"up\n", lasts_s=60.0), service=False)
        await first_block(runtime, run)
        assert rss_bytes(supervisor(host, run)) <= RSS_BYTES_MAX


async def test_neither_the_lock_nor_the_agents_files_reach_the_step(
    host: ProcessRuntimeHost,
) -> None:
    run = new_run()
    async with opened(host) as runtime:
        with (host.root / ".secret").open("wb") as secret:
            os.set_inheritable(secret.fileno(), True)  # noqa: FBT003 - as a careless library may
            await runtime.start(
                run, ContainerSpec(commands=("readlink /proc/self/fd/*",)), service=False
            )
        await ends(runtime, run)
        printed = (await whole_log(runtime, run))[LogStream.STDOUT].decode()
    assert "claim" not in printed
    assert "secret" not in printed


async def test_nothing_is_left_over_when_runs_are_removed(host: ProcessRuntimeHost) -> None:
    async with opened(host) as runtime:
        assert isinstance(runtime, ProcessRuntime)
        for _ in range(3):  # what is opened once and kept
            await one_run(runtime, host)
        await until_filled(runtime)
        before = descriptors(), zombies()
        groups = [await one_run(runtime, host) for _ in range(5)]
        await until_filled(runtime)
        assert (descriptors(), zombies()) == before
        assert await runtime.runs() == {}
        groups += [group_of(folder) for folder in host.root.iterdir()]
    assert list(host.root.iterdir()) == []
    assert left_of(groups) == []


async def test_what_waits_for_a_run_ends_with_its_agent(host: ProcessRuntimeHost) -> None:
    async with opened(host) as runtime:
        assert isinstance(runtime, ProcessRuntime)
        await one_run(runtime, host)
        await until_filled(runtime)
        while (waiting := runtime._supervisors._take_ready()) is not None:
            os.close(waiting.go)  # as the kernel does when the agent is killed
            os.close(waiting.draft.lock)
            gone(waiting.pid, reaped=True)
            assert not (waiting.draft.folder / "exit").exists()
        # The next agent takes away what is left.
        await host.runtime().close()
        assert list(host.root.iterdir()) == []


async def test_a_run_starts_when_what_waited_for_it_was_killed(host: ProcessRuntimeHost) -> None:
    async with opened(host) as runtime:
        assert isinstance(runtime, ProcessRuntime)
        await one_run(runtime, host)
        await until_filled(runtime)
        for waiting in runtime._supervisors._ready:
            os.kill(waiting.pid, signal.SIGKILL)
            gone(waiting.pid, reaped=False)
        await one_run(runtime, host)


async def test_a_run_whose_agent_was_killed_before_its_start_is_never_started(
    host: ProcessRuntimeHost,
) -> None:
    run = new_run()
    async with opened(host) as runtime:
        assert isinstance(runtime, ProcessRuntime)
        waiting = runtime._supervisors.take(runtime._groups, Restart(0, "always"))
        claim = Claim(
            boot_id=runtime._claims.boot_id,
            started_at=Instant(1),
            stop_signal=signal.SIGTERM,
            restarts=False,
            cgroup=waiting.draft.cgroup,
        )
        runtime._claims.make(run, waiting.draft, claim, b"echo started\n", owner_id=None)
        os.close(waiting.go)
        os.close(waiting.draft.lock)
        end = await ends(runtime, run)
        assert end.reason is Reason.OUTCOME_UNKNOWN
        assert await whole_log(runtime, run) == {}


async def one_run(runtime: Runtime, host: ProcessRuntimeHost) -> str:
    """Run something to its end; return its control group, which is gone."""
    run = new_run()
    await runtime.start(run, host.step(prints=b"x\n"), service=False)
    await ends(runtime, run)
    await whole_log(runtime, run)
    group = group_of(folder(host, run))
    await runtime.remove(run)
    return group


def left_of(groups: list[str]) -> list[str]:
    return [group for group in groups if group and Path(group).exists()]


def gone(pid: int, *, reaped: bool) -> None:
    """Wait for the end of a child, and take it or leave it."""
    os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))


def group_of(folder: Path) -> str:
    return str(json.loads((folder / "claim").read_text())["cgroup"])


async def until_filled(runtime: ProcessRuntime) -> None:
    assert runtime._filling is not None
    await runtime._filling


def zombies() -> int:
    """Return how many ended children this process has not taken the end of."""
    count = 0
    for listing in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = listing.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        count += fields[0] == "Z" and int(fields[1]) == os.getpid()
    return count


async def test_a_log_that_the_step_cut_goes_on_and_says_so(host: ProcessRuntimeHost) -> None:
    run = new_run()
    async with opened(host) as runtime:
        await runtime.start(run, host.step(prints=b"short\n"), service=False)
        await ends(runtime, run)
        log = await whole_log(runtime, run, LogPosition(stdout_bytes=1000, stdout_lines=10))
    assert LogStream.STDOUT not in log
    assert b"994 bytes" in log[LogStream.GAMENODE]


@pytest.mark.parametrize(
    ("pipeline_id", "step"),
    [
        ("..", "a"),
        ("a/b", "a"),
        ("a", ".."),
        ("", "a"),
        ("a", "b.c"),
        ("a" * 101, "a"),
        ("a\0", "a"),
    ],
)
async def test_a_key_that_is_no_name_reaches_no_path(
    host: ProcessRuntimeHost, pipeline_id: str, step: str
) -> None:
    run = RunKey(pipeline_id, step, 1, 1)
    async with opened(host) as runtime:
        with pytest.raises(GameNodeError, match="name of a pipeline or step"):
            await runtime.start(run, host.step(), service=False)
        assert list(host.root.iterdir()) == []


async def test_what_processes_cannot_honour_is_named(host: ProcessRuntimeHost) -> None:
    async with opened(host) as runtime:
        assert runtime.unsupported(ContainerSpec(image="x", command=("a",), ports=("1:1",))) == ()
        container = ContainerSpec(
            volumes=("/a:/b",),
            privileged=True,
            memory_bytes=1,
            healthcheck=Healthcheck(),
            restart="sometimes",
            stop_signal="SIGNOTHING",
            ulimits=(Ulimit(name="patience", soft=1, hard=1),),
            environment={"a.b": "c", "GOOD_1": "d"},
        )
        assert set(runtime.unsupported(container)) == {
            "volumes",
            "privileged",
            "deploy.resources.limits.memory",
            "healthcheck",
            "restart",
            "stop_signal",
            "ulimits.patience",
            "environment.a.b",
        }


@pytest.mark.parametrize(
    ("container", "message"),
    [
        (ContainerSpec(), "nothing to run"),
        (ContainerSpec(command=("true",), working_dir="/no/such/folder"), "/no/such/folder"),
        (ContainerSpec(command=("true",), user="nobody-at-all"), "nobody-at-all"),
        (ContainerSpec(command=("true",), user="9" * 5000), "is not known on this host"),
        (ContainerSpec(command=("true",), user="0:4294967295"), "is not known on this host"),
        (ContainerSpec(command=("true",), user="a\0b"), "is not known on this host"),
        (ContainerSpec(command=("/etc/passwd",)), "/etc/passwd"),
        (ContainerSpec(command=("true", "a\0b")), "null"),
        (ContainerSpec(command=("true", "x" * 3_000_000)), "too long"),
    ],
)
async def test_what_cannot_run_says_why(
    host: ProcessRuntimeHost, container: ContainerSpec, message: str
) -> None:
    async with opened(host) as runtime:
        with pytest.raises(StartError, match=message):
            await runtime.start(new_run(), container, service=False)
        assert list(host.root.iterdir()) == []


async def test_what_others_put_beside_the_runs_is_left_alone(host: ProcessRuntimeHost) -> None:
    async with opened(host) as runtime:
        for name in ("lost+found", "a.b.c", "a.b.1.x"):
            (host.root / name).mkdir()
        assert await runtime.runs() == {}


async def until_gone(it: str) -> None:
    await until(lambda: commands_with(it) == [])
