"""A server and an agent as a user runs them: processes of their own, data on the disk."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "gamenode")
START_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """One server and one node."""

    address: str
    """Where its HTTP listens."""
    server: psutil.Process
    agent: psutil.Process
    node: str

    @contextmanager
    def connect(self) -> Iterator[http.client.HTTPConnection]:
        """Hold a connection to the server that is kept alive."""
        connection = http.client.HTTPConnection(self.address, timeout=120.0)
        with closing(connection):
            yield connection


def environment() -> dict[str, str]:
    """Return the environment in which the program is this tree's."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def free_address() -> str:
    """Return an address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> Any:
    """Send one request on a connection that is kept; return what the JSON answer says."""
    headers = {"content-type": "application/json"}
    content = json.dumps(body).encode() if body is not None else None
    connection.request(method, path, body=content, headers=headers)
    response = connection.getresponse()
    answer = response.read()
    assert response.status < 300, answer
    return json.loads(answer)


@contextmanager
def running_fleet(
    folder: Path, *, runtime: str = "process", more: Sequence[str] = ()
) -> Iterator[Fleet]:
    """Start a server and an agent with data below `folder`; `more` goes to the agent."""
    http_address, grpc_address = free_address(), free_address()
    server = _spawn(
        folder / "server.log",
        *("server", "--http", http_address, "--grpc", grpc_address),
        *("--data", str(folder / "server"), "--log-level", "warning"),
        GAMENODE_ACCESS__AUTH="none",
    )
    agent = _spawn(
        folder / "agent.log",
        *("agent", "--server", grpc_address, "--node", "bench", "--runtime", runtime),
        *("--data", str(folder / "agent"), "--log-level", "warning", *more),
    )
    try:
        fleet = Fleet(http_address, psutil.Process(server.pid), psutil.Process(agent.pid), "bench")
        _await_online(fleet, folder, server, agent)
        yield fleet
    finally:
        for process in (agent, server):
            process.send_signal(signal.SIGTERM)
            process.wait(START_S_MAX)


def _spawn(log: Path, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            (*PROGRAM, *arguments), stdout=output, stderr=output, env=environment() | settings
        )


def _await_online(fleet: Fleet, folder: Path, *processes: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S_MAX
    while True:
        assert all(process.poll() is None for process in processes), _logs(folder)
        assert time.monotonic() < deadline_s, _logs(folder)
        try:
            with fleet.connect() as connection:
                node = ask(connection, "GET", f"/api/v1/nodes/{fleet.node}")
        except (OSError, AssertionError):
            time.sleep(0.05)
            continue
        if node["online"] and node["link"]["state"] == "connected":
            return


def _logs(folder: Path) -> str:
    return "\n".join(log.read_text() for log in folder.glob("*.log"))
