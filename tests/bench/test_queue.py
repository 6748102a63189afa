"""What the queue does and costs: dispatches a second, and processor time while nothing changes.

Server and simulated agents are processes of their own. The references are of the same run: commits
one by one on the same disk, and the same server with an empty queue.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.fleet import PROGRAM, START_S_MAX, ask, environment, free_address

pytestmark = pytest.mark.bench

NODES, PIPELINES, QUEUED = 20, 1_000, 10_000
CREATORS = 4
IDLE_S = 20.0
DISPATCHES_PER_S_MIN, IDLE_CPU_PERCENT_MAX = 150.0, 1.0
STEP = "steps: [{name: one, container: {image: a, command: [a]}}]"
STUCK = f"name: stuck\nplacement: {{memory: 900TiB}}\n{STEP}"
TASK = f"name: task\n{STEP}"


@dataclass(frozen=True)
class Server:
    program: psutil.Popen
    http: str
    grpc: str

    @contextmanager
    def connect(self) -> Iterator[HTTPConnection]:
        with closing(HTTPConnection(self.http, timeout=120.0)) as connection:
            yield connection

    def get(self, path: str) -> Any:
        with self.connect() as connection:
            return ask(connection, "GET", path)

    def create(self, file: str, count: int) -> None:
        with ThreadPoolExecutor(CREATORS) as pool:
            list(pool.map(lambda _: self._create(file, count // CREATORS), range(CREATORS)))

    def _create(self, file: str, count: int) -> None:
        with self.connect() as connection:
            for _ in range(count):
                ask(connection, "POST", "/api/v1/pipelines", {"file": file})

    def idle_cpu_percent(self) -> float:
        before, begun_s = self.program.cpu_times(), time.monotonic()
        time.sleep(IDLE_S)
        after, took_s = self.program.cpu_times(), time.monotonic() - begun_s
        used_s = after.user + after.system - before.user - before.system
        return float(used_s / took_s * 100)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    http, grpc = free_address(), free_address()
    arguments = ("server", "--http", http, "--grpc", grpc, "--data", str(tmp_path / "server"))
    program = _start(tmp_path / "server.log", *arguments, GAMENODE_ACCESS__AUTH="none")
    try:
        _wait(lambda: '"server.ready"' in (tmp_path / "server.log").read_text())
        yield Server(program, http, grpc)
    finally:
        program.send_signal(signal.SIGTERM)
        program.wait(START_S_MAX)


@contextmanager
def agents(server: Server, folder: Path) -> Iterator[None]:
    sim = _start(
        folder / "sim.log",
        *("sim", "--nodes", str(NODES), "--server", server.grpc, "--duration", "10m"),
    )
    try:
        yield
    finally:
        sim.send_signal(signal.SIGTERM)
        sim.wait(START_S_MAX)


def test_the_dispatches_a_second(server: Server, tmp_path: Path) -> None:
    commits_per_s = _commits_per_s(tmp_path / "reference.db")
    server.create(TASK, PIPELINES)
    with agents(server, tmp_path):
        _wait(lambda: len(_dispatched(server)) == PIPELINES, timeout_s=120.0)
    times = sorted(_dispatched(server))
    rate = (PIPELINES - 1) / (times[-1] - times[0])
    print(
        f"\n\n{PIPELINES} queued pipelines, {NODES} agents: {rate:.0f} dispatches/s"
        f" (target {DISPATCHES_PER_S_MIN:.0f}); reference: {commits_per_s:.0f} single commits/s"
    )
    assert rate >= DISPATCHES_PER_S_MIN


def test_a_queue_costs_nothing_while_nothing_changes(server: Server, tmp_path: Path) -> None:
    with agents(server, tmp_path):
        _wait(lambda: len(_online(server)) == NODES)
        time.sleep(5.0)
        empty = server.idle_cpu_percent()
        server.create(STUCK, QUEUED)
        time.sleep(5.0)
        full = server.idle_cpu_percent()
    print(
        f"\n\n{QUEUED} queued, nothing free: {full:.2f} % of a core;"
        f" reference: {empty:.2f} % with an empty queue"
    )
    assert full - empty <= IDLE_CPU_PERCENT_MAX


def _dispatched(server: Server) -> list[float]:
    page = server.get(f"/api/v1/events?type=pipeline.dispatched&limit={PIPELINES}")
    return [datetime.fromisoformat(event["timestamp"]).timestamp() for event in page["items"]]


def _online(server: Server) -> list[Any]:
    found: list[Any] = server.get("/api/v1/nodes?online=true")["items"]
    return found


def _commits_per_s(path: Path) -> float:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE t (x)")
        begun_s = time.perf_counter()
        for number in range(PIPELINES):
            database.execute("INSERT INTO t VALUES (?)", (number,))
        return PIPELINES / (time.perf_counter() - begun_s)


def _start(log: Path, *arguments: str, **settings: str) -> psutil.Popen:
    with log.open("wb") as output:
        return psutil.Popen(
            (*PROGRAM, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment() | settings,
        )


def _wait(holds: Any, *, timeout_s: float = START_S_MAX) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
