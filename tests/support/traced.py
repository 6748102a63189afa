"""The system calls of a program, in their order, as strace saw them."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.cluster import eventually

_DATA_BYTES_MAX = 65_536
_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
_SUCCEEDED = re.compile(r"\) += \d+(<.*>)?$")


@dataclass(slots=True)
class Call:
    """One system call. Positions grow with time: a call ends before all that begin behind it."""

    name: str
    arguments: str
    begun: int
    ended: int | None = None
    """None: it failed, or had not ended when the trace did."""


@dataclass(slots=True)
class Trace:
    """What was traced."""

    path: Path
    calls: list[Call] = field(default_factory=list)

    def read(self) -> None:
        """Read the calls from the file."""
        open_calls: dict[str, Call] = {}
        with self.path.open(encoding="latin-1") as lines:
            for position, line in enumerate(lines):
                text = line.rstrip()
                if begun := _CALL.match(text):
                    thread, name, rest = begun.groups()
                    call = Call(name, rest, position)
                    self.calls.append(call)
                    if text.endswith("<unfinished ...>"):
                        open_calls[thread] = call
                    elif _SUCCEEDED.search(text):
                        call.ended = position
                elif resumed := _RESUMED.match(text):
                    thread, name, _ = resumed.groups()
                    before = open_calls.pop(thread, None)
                    if before is not None and before.name == name and _SUCCEEDED.search(text):
                        before.ended = position

    def of(self, names: Sequence[str], *words: str) -> Iterator[Call]:
        """Yield the calls with one of these names and all of these words in their arguments."""
        for call in self.calls:
            if call.name in names and all(word in call.arguments for word in words):
                yield call

    def is_durable_before(self, written: Call, file: str, later: Call) -> bool:
        """Return whether `file` was synchronised between a write to it and what came later."""
        return any(
            written.begun < sync.begun and sync.ended is not None and sync.ended < later.begun
            for sync in self.of(("fsync", "fdatasync"), file)
        )


@contextmanager
def traced(pid: int, path: Path, calls: Sequence[str]) -> Iterator[Trace]:
    """Trace all threads of a running program while the block runs."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace: make test-deps")
    said = path.with_suffix(".stderr")
    with said.open("wb") as stderr:
        tracer = subprocess.Popen(
            (
                *("strace", "-f", "-y", "-s", str(_DATA_BYTES_MAX), "-o", str(path)),
                *("-e", f"trace={','.join(calls)}", "-e", "signal=none", "-p", str(pid)),
            ),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
        )

    def attached() -> bool:
        if tracer.poll() is not None:
            pytest.skip(f"this host lets nobody trace: {said.read_text().strip()}")
        return "attached" in said.read_text()

    trace = Trace(path)
    try:
        eventually(attached, "strace is attached")
        yield trace
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=30.0)
    trace.read()
