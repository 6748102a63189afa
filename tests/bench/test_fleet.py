"""What a big fleet costs the server, and what simulating it costs: CPU a heartbeat, memory a node.

Server and simulator are processes of their own on this machine. The processor time is that of the
server alone, over a minute in which every node is online, at the interval that a fleet has.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.support.fleet import PROGRAM, START_S_MAX, environment, free_address

pytestmark = pytest.mark.bench

SIZES = (1_000, 5_000)
MEASURED_S = 60.0
STARTS_PER_S = 50.0
SETTLE_S = 20.0
CPU_MS_MAX, NODE_KIB_MAX, AGENT_KIB_MAX = 0.15, 80.0, 300.0


@dataclass(frozen=True)
class Row:
    nodes: int
    cpu_ms: float
    core_percent: float
    node_kib: float
    agent_kib: float
    p50_ms: float
    p99_ms: float


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    print("\n\nnodes   CPU a heartbeat  of a core  memory a node  an agent   p50      p99")
    for row in rows:
        print(
            f"{row.nodes:<6}  {row.cpu_ms:.3f} ms         {row.core_percent:4.1f} %"
            f"     {row.node_kib:5.1f} KiB      {row.agent_kib:5.1f} KiB"
            f"  {row.p50_ms:5.1f} ms {row.p99_ms:5.1f} ms"
        )
    print(
        f"target  {CPU_MS_MAX:.3f} ms                    {NODE_KIB_MAX:5.1f} KiB"
        f"      {AGENT_KIB_MAX:5.1f} KiB\n"
    )


@pytest.mark.parametrize("nodes", SIZES)
def test_the_cost_of_a_fleet(nodes: int, tmp_path: Path, table: list[Row]) -> None:
    http, grpc = free_address(), free_address()
    data, settled_s = tmp_path / "server", nodes / STARTS_PER_S + SETTLE_S
    server = _start(
        tmp_path, "server", "server", "--http", http, "--grpc", grpc, "--data", str(data)
    )
    _await(tmp_path / "server.err", '"server.ready"', server)
    empty_kib = _kib(server)
    sim = _start(
        tmp_path,
        "sim",
        *("sim", "--nodes", str(nodes), "--server", grpc, "--interval", "1s", "-o", "json"),
        *("--duration", f"{settled_s + MEASURED_S + 10:.0f}s"),
        *("--token-file", str(data / "admin-token")),
    )
    _await(tmp_path / "sim.err", "online 0/", sim)
    alone_kib = _kib(sim)
    time.sleep(settled_s)
    before_s, begun_s, beats = _cpu_s(server), time.monotonic(), _beats(tmp_path / "sim.err")
    time.sleep(MEASURED_S)
    used_s, took_s = _cpu_s(server) - before_s, time.monotonic() - begun_s
    beats = _beats(tmp_path / "sim.err") - beats
    server_kib, sim_kib = _kib(server), _kib(sim)
    assert sim.wait(START_S_MAX + MEASURED_S) == 0, (tmp_path / "sim.out").read_text()
    server.send_signal(signal.SIGTERM)
    server.wait(START_S_MAX)
    outcome = json.loads((tmp_path / "sim.out").read_text())
    figures = {figure["name"]: figure["value"] for figure in outcome["figures"]}
    assert figures["online"] == nodes
    table.append(
        Row(
            nodes=nodes,
            cpu_ms=used_s * 1000 / beats,
            core_percent=used_s / took_s * 100,
            node_kib=(server_kib - empty_kib) / nodes,
            agent_kib=(sim_kib - alone_kib) / nodes,
            p50_ms=figures["heartbeat_p50_s"] * 1000,
            p99_ms=figures["heartbeat_p99_s"] * 1000,
        )
    )


def _start(folder: Path, name: str, *arguments: str) -> psutil.Popen:
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("wb") as err:
        return psutil.Popen(
            (*PROGRAM, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment(),
        )


def _await(said: Path, text: str, program: psutil.Popen) -> None:
    deadline_s = time.monotonic() + START_S_MAX
    while text not in said.read_text():
        assert program.poll() is None, said.read_text()
        assert time.monotonic() < deadline_s, said.read_text()
        time.sleep(0.05)


def _beats(said: Path) -> int:
    """Return how many heartbeats were answered, as the newest summary says."""
    return int(said.read_text().rpartition("heartbeats ")[2].partition("/")[0])


def _cpu_s(program: psutil.Popen) -> float:
    used = program.cpu_times()
    return float(used.user + used.system)


def _kib(program: psutil.Popen) -> float:
    return float(program.memory_info().rss / 1024)
