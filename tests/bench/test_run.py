"""What a user waits for: a step's start and end, its log, the programs' own start and size.

Server, agent and client are processes of their own, their data is on the disk. Each figure stands
beside a reference that was measured in the same run: what the machine takes without us.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tests.support.engine import IMAGE, Engine
from tests.support.fleet import (
    PROGRAM,
    ROOT,
    Fleet,
    ask,
    environment,
    free_address,
    running_fleet,
)

pytestmark = pytest.mark.bench

RUNS, RUN_LENGTH = 5, 50
BURST_S, BURST_CONNECTIONS = 10.0, 16
BURST_OPEN, BURST_REFERENCE = 256, 300
LINES = 400
LOG_BYTES = 400_000_000
IDLE_S = 30.0
STARTS = 5

MS = 1e-6
"""Milliseconds in a nanosecond."""


@dataclass(frozen=True)
class Row:
    what: str
    value: float
    unit: str
    reference: float | None
    of: str
    target: str


@dataclass
class Table:
    """The figures, printed together at the end."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        target: str = "",
        reference: float | None = None,
        of: str = "",
    ) -> None:
        """Add a figure; `target` is such as `<= 8`, in the same unit."""
        self.rows.append(Row(what, value, unit, reference, of, target))

    def __str__(self) -> str:
        lines = [("what", "measured", "target", "", "reference", "ratio", "of what")]
        lines += [
            (
                row.what,
                f"{_figure(row.value)} {row.unit}",
                row.target,
                "" if not row.target else "met" if _met(row) else "MISSED",
                "" if row.reference is None else f"{_figure(row.reference)} {row.unit}",
                "" if not row.reference else f"{row.value / row.reference:.2f}",
                row.of,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _met(row: Row) -> bool:
    sign, bound = row.target.split()
    return row.value <= float(bound) if sign == "<=" else row.value >= float(bound)


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    table = Table()
    yield table
    print(f"\n\n{table}\n")


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A folder of the tree's own disk: /tmp may be memory, where nothing is ever synced."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "build"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def fleet(disk: Path) -> Iterator[Fleet]:
    with running_fleet(disk) as fleet:
        with fleet.connect() as connection:
            for _ in range(20):
                _run(connection, _file(["true"]))
        yield fleet


# A step's start and end


def test_start_and_end_of_a_step(fleet: Fleet, disk: Path, table: Table) -> None:
    stamp = disk / "stamp"
    commands = [f"date +%s%N >{stamp}"]

    def directly() -> tuple[float, float]:
        began_at = time.time_ns()
        subprocess.run(("/bin/sh", "-e", "-c", commands[0]), check=True)
        return began_at, float(stamp.read_text())

    with fleet.connect() as connection:

        def through_gamenode() -> tuple[float, float]:
            return _run(connection, _file(commands)), float(stamp.read_text())

        _add_starts(table, "process", through_gamenode, directly, ("<= 8", "<= 20", "<= 15"))


@pytest.mark.docker
def test_start_and_end_of_a_container(
    engine: Engine, disk: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk / "containers"
    folder.mkdir()
    stamp = folder / "stamp"
    # busybox has no nanoseconds in its date; the file's own time has.
    command = "echo >/out/stamp"
    container = {"image": IMAGE, "volumes": [f"{folder}:/out"], "commands": [command]}
    direct = ("run", "--rm", "--net=none", "-v", f"{folder}:/out", IMAGE, "/bin/sh", "-ec", command)
    monkeypatch.setenv("GAMENODE_AGENT__ENGINE_SOCKET", str(engine.socket))
    policy = folder / "policy.toml"
    policy.write_text(f"[containers]\nmounts = ['{folder}']\n")
    policy.chmod(0o600)
    monkeypatch.setenv("GAMENODE_AGENT__POLICY", str(policy))

    def started_at() -> float:
        return float(stamp.stat().st_mtime_ns)

    def directly() -> tuple[float, float]:
        began_at = time.time_ns()
        engine.docker(*direct)
        return began_at, started_at()

    with running_fleet(folder, runtime="docker") as fleet, fleet.connect() as connection:

        def through_gamenode() -> tuple[float, float]:
            return _run(connection, _steps({"container": container})), started_at()

        through_gamenode()
        median = _add_starts(table, "docker", through_gamenode, directly, ("", "", ""), length=8)
    table.add(
        "docker: overhead of a container step over docker run, p50",
        median["ours end 50"] - median["direct end 50"],
        "ms",
        target="<= 30",
    )


def _add_starts(
    table: Table,
    name: str,
    through_gamenode: Callable[[], tuple[float, float]],
    directly: Callable[[], tuple[float, float]],
    targets: tuple[str, str, str],
    *,
    length: int = RUN_LENGTH,
) -> dict[str, float]:
    """Add the median of some runs; both ways take turns, so that the machine is the same.

    Returns it by way, what and percentile, in milliseconds.
    """
    figures: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for way, run in (("ours", through_gamenode), ("direct", directly)):
            starts_ms, ends_ms = [], []
            for _ in range(length):
                submitted_at, started_at = run()
                ends_ms.append((time.time_ns() - submitted_at) * MS)
                starts_ms.append((started_at - submitted_at) * MS)
            for what, values in (("start", starts_ms), ("end", ends_ms)):
                for cut in (50, 99):
                    figures.setdefault(f"{way} {what} {cut}", []).append(_quantile(values, cut))
    median = {key: statistics.median(values) for key, values in figures.items()}
    of = "the command alone" if name == "process" else "docker run"
    for (what, label), cut, target in (
        (("start", "submitted -> first instruction"), 50, targets[0]),
        (("start", "submitted -> first instruction"), 99, targets[1]),
        (("end", "submitted -> end seen"), 50, targets[2]),
        (("end", "submitted -> end seen"), 99, ""),
    ):
        table.add(
            f"{name}: {label}, p{cut}",
            median[f"ours {what} {cut}"],
            "ms",
            target=target,
            reference=median[f"direct {what} {cut}"],
            of=of,
        )
    return median


# Many pipelines


async def test_pipelines_a_second(fleet: Fleet, table: Table) -> None:
    await _burst(fleet, 1.0)
    before_s = _cpu_s(fleet.server), _cpu_s(fleet.agent), _children_cpu_s(fleet.agent)
    rate, ended = await _burst(fleet, BURST_S)
    after_s = _cpu_s(fleet.server), _cpu_s(fleet.agent), _children_cpu_s(fleet.agent)
    alone = await asyncio.to_thread(_commands_a_second)
    table.add(
        "process: one-step pipelines end to end",
        *(rate, "/s"),
        target=">= 250",
        reference=alone,
        of="commands alone, one after the other",
    )
    names = ("server", "agent", "steps and supervisors")
    for name, before, after in zip(names, before_s, after_s, strict=True):
        table.add(f"  of it, {name} CPU a pipeline", (after - before) / ended * 1e3, "ms")


def _commands_a_second() -> float:
    began_s = time.perf_counter()
    for _ in range(BURST_REFERENCE):
        subprocess.run(("/bin/sh", "-e", "-c", "true"), check=True)
    return BURST_REFERENCE / (time.perf_counter() - began_s)


async def _burst(fleet: Fleet, length_s: float) -> tuple[float, int]:
    """Submit over and over for `length_s`; return ends a second, and how many there were."""
    submitted: set[str] = set()
    ended: dict[str, float] = {}
    all_ended = asyncio.Event()
    submitting = True
    # Submitting must not run away from what is done, or its queue is all that is measured.
    room = asyncio.Semaphore(BURST_OPEN)

    async def watch() -> None:
        async with _open(fleet) as (reader, writer):
            writer.write(
                b"GET /api/v1/events?follow=1&type=pipeline.completed HTTP/1.1\r\n"
                b"host: %b\r\naccept: text/event-stream\r\n\r\n" % fleet.address.encode()
            )
            async for line in reader:
                if line.startswith(b"data: "):
                    ended[json.loads(line[6:])["entity_id"]] = time.perf_counter()
                    room.release()
                    if not submitting and len(ended) >= len(submitted):
                        all_ended.set()

    body = json.dumps({"file": _file(["true"])}).encode()
    request = (
        b"POST /api/v1/pipelines HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (fleet.address.encode(), len(body), body)
    )

    async def submit(until_s: float) -> None:
        async with _open(fleet) as (reader, writer):
            while time.perf_counter() < until_s:
                await room.acquire()
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                assert b" 201 " in head, head
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                submitted.add(json.loads(await reader.readexactly(length))["id"])

    watching = asyncio.ensure_future(watch())
    await asyncio.sleep(0.2)
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(BURST_CONNECTIONS):
            group.create_task(submit(began_s + length_s))
    submitting = False
    if len(ended) < len(submitted):
        async with asyncio.timeout(60.0):
            await all_ended.wait()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert ended.keys() == submitted
    return len(ended) / (max(ended.values()) - began_s), len(ended)


@asynccontextmanager
async def _open(fleet: Fleet) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = fleet.address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


# Logs


def test_a_line_reaches_its_follower(fleet: Fleet, table: Table) -> None:
    script = f"i=0; while [ $i -lt {LINES} ]; do date +%s%N; sleep 0.02; i=$((i+1)); done"
    waits_ms = []
    with fleet.connect() as connection, fleet.connect() as following:
        log = _follow(following, _submit(connection, _file([script])), "cri")
        while chunk := log.read1():
            arrived_at = time.time_ns()
            waits_ms += [(arrived_at - int(line.split()[-1])) * MS for line in chunk.splitlines()]
    assert len(waits_ms) == LINES
    pipe = _pipe_waits_ms(script)
    for cut, target in ((50, "<= 15"), (99, "<= 50")):
        table.add(
            f"log: line written -> at a follower, p{cut}",
            *(_quantile(waits_ms, cut), "ms"),
            target=target,
            reference=_quantile(pipe, cut),
            of="the same through a pipe",
        )


def _pipe_waits_ms(script: str) -> list[float]:
    with subprocess.Popen(("/bin/sh", "-ec", script), stdout=subprocess.PIPE) as printing:
        assert printing.stdout is not None
        return [(time.time_ns() - int(line)) * MS for line in printing.stdout]


def test_a_big_log_reaches_its_follower(fleet: Fleet, disk: Path, table: Table) -> None:
    source = disk / "lines"
    block = b"".join(b"%09d %b\n" % (number, b"x" * 89) for number in range(10_000))
    with source.open("wb") as file:
        for _ in range(LOG_BYTES // len(block)):
            file.write(block)
    wanted = _sha256(source)
    began_s = time.perf_counter()
    with subprocess.Popen(("cat", source), stdout=subprocess.PIPE) as copy:
        assert isinstance(copy.stdout, io.BufferedReader)
        _drain(copy.stdout.read1)
    alone = LOG_BYTES / (time.perf_counter() - began_s) / 1e6
    for form in ("raw", "cri"):
        with fleet.connect() as connection, fleet.connect() as following:
            began_s = time.perf_counter()
            pipeline_id = _submit(connection, _file([f"cat {source}"]))
            length, digest = _drain(_follow(following, pipeline_id, form).read1)
            took_s = time.perf_counter() - began_s
            _await_end(connection, pipeline_id)
        if form == "raw":
            assert (length, digest) == (LOG_BYTES, wanted), "bytes were lost"
        table.add(
            f"log: 400 MB of lines to a follower, {form}",
            *(LOG_BYTES / took_s / 1e6, "MB/s"),
            target=">= 150",
            reference=alone,
            of="cat through a pipe",
        )


def _drain(read: Callable[[int], bytes]) -> tuple[int, str]:
    length, digest = 0, hashlib.sha256()
    while block := read(1 << 20):
        length += len(block)
        digest.update(block)
    return length, digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _follow(
    connection: http.client.HTTPConnection, pipeline_id: str, form: str
) -> http.client.HTTPResponse:
    connection.request(
        "GET", f"/api/v1/pipelines/{pipeline_id}/steps/only/logs?follow=1&format={form}"
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return response


# The programs themselves


def test_idle_programs_are_small(disk: Path, table: Table) -> None:
    folder = disk / "idle"
    folder.mkdir()
    with running_fleet(folder) as fleet:
        with fleet.connect() as connection:
            _run(connection, _file(["true"]))
        time.sleep(2.0)
        programs = {"agent": fleet.agent, "server": fleet.server}
        before_s = {name: _cpu_s(program) for name, program in programs.items()}
        time.sleep(IDLE_S)
        bounds = {"agent": ("<= 55", "<= 0.3"), "server": ("", "")}
        empty = _empty_python_mb()
        for name, program in programs.items():
            memory, cpu = bounds[name]
            table.add(
                f"{name}: memory, idle",
                *(program.memory_info().rss / 1e6, "MB"),
                target=memory,
                reference=empty,
                of="an empty Python",
            )
            used = (_cpu_s(program) - before_s[name]) / IDLE_S * 100
            table.add(f"{name}: of a core, idle", used, "%", target=cpu)
        _add_supervisor(fleet, table)


def _add_supervisor(fleet: Fleet, table: Table) -> None:
    with fleet.connect() as connection:
        pipeline_id = _submit(connection, _file(["exec sleep 60"]))
        memory = _supervisor(fleet, "sleep").memory_full_info()
        table.add("supervisor of a step: memory", memory.rss / 1e6, "MB")
        table.add("  of it, its own alone", memory.uss / 1e6, "MB")
        ask(connection, "POST", f"/api/v1/pipelines/{pipeline_id}:cancel", {"reason": "measured"})
        _await_end(connection, pipeline_id)


def _supervisor(fleet: Fleet, command: str) -> psutil.Process:
    """Return the child of the agent that waits for `command`."""
    deadline_s = time.monotonic() + 10.0
    while time.monotonic() < deadline_s:
        for child in fleet.agent.children():
            if any(grandchild.name() == command for grandchild in child.children()):
                return child
    raise AssertionError("the step did not start")


def _empty_python_mb() -> float:
    with subprocess.Popen(
        (sys.executable, "-c", "import sys; sys.stdin.read()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as empty:
        time.sleep(0.5)
        return float(psutil.Process(empty.pid).memory_info().rss / 1e6)


def test_programs_start_at_once(disk: Path, table: Table) -> None:
    alone_s = _median_s((sys.executable, "-c", "pass"))
    help_s = _median_s((*PROGRAM, "--help"))
    table.add(
        "gamenode --help",
        *(help_s, "s"),
        target="<= 0.12",
        reference=alone_s,
        of="an empty Python",
    )
    fresh = [_dev_start_s(disk / f"dev-{number}") for number in range(STARTS)]
    again = [_dev_start_s(disk / "dev-0") for _ in range(STARTS)]
    for name, starts in (("fresh", fresh), ("existing", again)):
        table.add(
            f"gamenode dev -> ready, node online; {name} data",
            *(statistics.median(starts), "s"),
            target="<= 1.2",
            reference=alone_s,
            of="an empty Python",
        )


def _median_s(command: Sequence[str]) -> float:
    times_s = []
    for _ in range(9):
        began_s = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def _dev_start_s(data: Path) -> float:
    began_s = time.perf_counter()
    with subprocess.Popen(
        (
            *(*PROGRAM, "dev", "--http", free_address(), "--grpc", free_address()),
            *("--data", str(data), "--runtime", "process"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    ) as dev:
        assert dev.stdout is not None
        for line in dev.stdout:
            if b"(online)" in line:
                break
        took_s = time.perf_counter() - began_s
        dev.send_signal(signal.SIGTERM)
        dev.stdout.read()
        assert dev.wait(30.0) == 0
    return took_s


# What they share


def _file(commands: Sequence[str]) -> str:
    return _steps({"container": {"commands": commands}})


def _steps(step: Mapping[str, object]) -> str:
    # JSON is YAML.
    return json.dumps({"name": "bench", "steps": [{"name": "only", **step}]})


def _run(connection: http.client.HTTPConnection, file: str) -> float:
    """Submit a pipeline and return when, once its end was seen."""
    submitted_at = time.time_ns()
    _await_end(connection, _submit(connection, file))
    return submitted_at


def _submit(connection: http.client.HTTPConnection, file: str) -> str:
    pipeline_id: str = ask(connection, "POST", "/api/v1/pipelines", {"file": file})["id"]
    return pipeline_id


def _await_end(connection: http.client.HTTPConnection, pipeline_id: str) -> None:
    ended = ask(connection, "GET", f"/api/v1/pipelines/{pipeline_id}?wait=30s")
    assert ended["status"] in ("COMPLETED", "CANCELLED"), ended


def _cpu_s(program: psutil.Process) -> float:
    used = program.cpu_times()
    return float(used.user + used.system)


def _children_cpu_s(program: psutil.Process) -> float:
    used = program.cpu_times()
    return float(used.children_user + used.children_system)


def _quantile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]
