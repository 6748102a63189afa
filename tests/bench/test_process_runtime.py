"""What a start, an end and a log of a plain process cost; `make bench` prints it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import quantiles

import pytest
from tests.support.runtimes import ProcessRuntimeHost, ends, new_run, opened

from gamenode.domain.log import LogPosition
from gamenode.domain.pipeline import ContainerSpec

pytestmark = pytest.mark.bench

RUNS = 200
LOG_BYTES = 1_000_000_000


@pytest.mark.parametrize("groups", [True, False], ids=["groups", "sessions"])
async def test_start_and_end(tmp_path: Path, groups: bool) -> None:
    host = ProcessRuntimeHost(tmp_path / "runs", groups=groups)
    starts, firsts, wholes = [], [], []
    async with opened(host) as runtime:
        for _ in range(RUNS):
            run = new_run()
            before_ns = time.time_ns()
            await runtime.start(run, ContainerSpec(command=("date", "+%s%N")), service=False)
            starts.append(time.time_ns() - before_ns)
            await ends(runtime, run)
            wholes.append(time.time_ns() - before_ns)
            printed = next(host.root.glob(f"{run.pipeline_id}.*/stdout")).read_text()
            firsts.append(int(printed) - before_ns)
            await runtime.remove(run)
    for name, samples in (
        ("start() returns", starts),
        ("the step's clock", firsts),
        ("wait() returns", wholes),
    ):
        cuts = quantiles(samples, n=100)
        print(f"{name:18} p50 {cuts[49] / 1e6:6.2f} ms   p99 {cuts[98] / 1e6:6.2f} ms")


async def test_log_throughput(tmp_path: Path) -> None:
    host = ProcessRuntimeHost(tmp_path / "runs", groups=True)
    run = new_run()
    async with opened(host) as runtime:
        step = ContainerSpec(
            commands=(f"yes 0123456789abcdefghijklmnopqrstuv | head -c {LOG_BYTES}",)
        )
        await runtime.start(run, step, service=False)
        await ends(runtime, run)
        before_s, total = time.perf_counter(), 0
        async for block in runtime.read_log(run, LogPosition(), live=asyncio.Event()):
            total += len(block.data)
        rate = total / (time.perf_counter() - before_s) / 1e6
    assert total == LOG_BYTES
    print(f"read_log           {rate:6.0f} MB/s")


async def test_live_latency(tmp_path: Path) -> None:
    host = ProcessRuntimeHost(tmp_path / "runs", groups=True)
    run, live = new_run(), asyncio.Event()
    live.set()

    async with opened(host) as runtime:
        step = ContainerSpec(commands=("for i in $(seq 100); do date +%s%N; sleep 0.02; done",))
        await runtime.start(run, step, service=False)
        lags = [
            time.time_ns() - int(block.data.split()[-1])
            async for block in runtime.read_log(run, LogPosition(), live=live)
        ]
    cuts = quantiles(lags, n=100)
    print(f"a line, live       p50 {cuts[49] / 1e6:6.2f} ms   p99 {cuts[98] / 1e6:6.2f} ms")
