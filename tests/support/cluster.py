"""Real GameNode programs of a test's own: a server, agents, `dev`, and the operators' commands."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gamenode
from gamenode.agent.runtime.process import ProcessRuntime, ProcessSettings
from gamenode.lib.clock import SystemClock

WAIT_S = 30.0
POLL_S = 0.02
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")

_SOURCES = str(Path(gamenode.__file__).parents[1])
# Below the ports that the kernel gives to clients: none of theirs may sit on a server's address
# while that server is down.
_PORTS = range(10_000, 30_000)
_SHOWN_BYTES = 6_000

T = TypeVar("T")


def eventually(look: Callable[[], T | None], what: str, *, within_s: float = WAIT_S) -> T:
    """Return the first truthy thing that `look` returns; a server that is away is no answer."""
    deadline_s = time.monotonic() + within_s
    while True:
        found = None
        with suppress(OSError, http.client.HTTPException):
            found = look()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(POLL_S)


def step(name: str, *commands: str, **more: Any) -> dict[str, Any]:
    """Return a step of shell lines."""
    return {"name": name, "container": {"commands": list(commands)}, **more}


def pipeline(*steps: Mapping[str, Any], name: str = "test", **more: Any) -> str:
    """Return a pipeline file; every JSON document is a YAML one."""
    return json.dumps({"name": name, "steps": steps, **more})


def counting(lines: int, *, pause_s: float) -> str:
    """Return a shell line that prints `line 1`, `line 2` …"""
    return f"for n in $(seq {lines}); do echo line $n; sleep {pause_s}; done"


def counted(lines: int) -> str:
    """Return what `counting` prints."""
    return "".join(f"line {number}\n" for number in range(1, lines + 1))


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str


class Started:
    """A program that was started; what it says goes to files."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        *,
        within: Sequence[str] = (),
    ) -> None:
        """Start it; `within` is a command that runs it in a surrounding of its own."""
        self.name = name
        self._stdout, self._stderr = folder / f"{name}.stdout", folder / f"{name}.stderr"
        with self._stdout.open("ab") as stdout, self._stderr.open("ab") as stderr:
            self._process = subprocess.Popen(
                [*within, sys.executable, "-m", "gamenode", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env=env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()

    def wait(self, within_s: float = WAIT_S) -> int:
        """Return its exit code."""
        return self._process.wait(within_s)

    def stop(self, number: signal.Signals = signal.SIGTERM, within_s: float = WAIT_S) -> int:
        """Send a signal and return the exit code."""
        self.send(number)
        return self.wait(within_s)

    def done(self, within_s: float = WAIT_S) -> Done:
        """Wait for its end."""
        return Done(self.wait(within_s), self.stdout, self.stderr)


class Cluster:
    """The programs of one test, in one folder, on ports of their own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        """Start nothing yet; `settings` are environment variables without their `GAMENODE_`."""
        self.folder = folder.resolve()
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in _free_ports(2))
        self.started: list[Started] = []
        self.token = ""
        """The administrator's, once a server has made one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GAMENODE_")}
        self._env = {
            **kept,
            "PYTHONPATH": _SOURCES,
            "GAMENODE_URL": f"http://{self.http}",
            "HOME": str(self.folder),  # the operators' contexts
            **{f"GAMENODE_{name}": value for name, value in settings.items()},
        }

    @property
    def bearer(self) -> str:
        """The administrator's credentials."""
        return f"Bearer {self.token}"

    # Programs

    def start(
        self, *arguments: str, name: str, within: Sequence[str] = (), **settings: str
    ) -> Started:
        """Start a program and do not wait for anything."""
        env = {
            **self._env,
            "GAMENODE_TOKEN": self.token,
            **{f"GAMENODE_{key}": value for key, value in settings.items()},
        }
        number = len(self.started) + 1
        started = Started(f"{number:03}-{name}", arguments, self.folder, env, within=within)
        self.started.append(started)
        return started

    def server(self, **settings: str) -> Started:
        """Start the server and wait until it is ready."""
        server = self.start(
            *("server", "--http", self.http, "--grpc", self.grpc),
            *("--data", str(self.folder / "server")),
            name="server",
            **settings,
        )
        self.until_ready(server)
        first_token = self.folder / "server" / "admin-token"
        self.token = first_token.read_text().strip() if first_token.exists() else ""
        return server

    def agent(self, node: str = "n1", *arguments: str, **settings: str) -> Started:
        """Start the agent of a node and wait until the node can take work."""
        agent = self.agent_unawaited(node, *arguments, **settings)
        self.until_connected(node)
        return agent

    def agent_unawaited(
        self,
        node: str = "n1",
        *arguments: str,
        data: str = "",
        within: Sequence[str] = (),
        **settings: str,
    ) -> Started:
        """Start the agent of a node; `data` names its folder, where that is not the node's."""
        return self.start(
            *("agent", "--server", self.grpc, "--node", node),
            *("--data", str(self.folder / "agents" / (data or node))),
            *(() if "--runtime" in arguments else ("--runtime", "process")),
            *arguments,
            name=f"agent-{node}",
            within=within,
            **settings,
        )

    def dev(self, *arguments: str, **settings: str) -> Started:
        """Start `dev` and wait until it says that it is ready."""
        dev = self.dev_unawaited(*arguments, **settings)
        eventually(lambda: "Try:" in dev.stdout or not dev.alive, "dev is ready")
        assert dev.alive, dev.stderr
        return dev

    def dev_unawaited(self, *arguments: str, **settings: str) -> Started:
        """Start `dev`."""
        return self.start(
            *("dev", "--http", self.http, "--grpc", self.grpc, "--runtime", "process"),
            *("--data", str(self.folder)),
            *arguments,
            name="dev",
            **settings,
        )

    def command(self, *arguments: str, within_s: float = WAIT_S) -> Done:
        """Run an operator's command to its end."""
        return self.start(*arguments, name=arguments[0]).done(within_s)

    def run(self, file: str, *arguments: str, within_s: float = WAIT_S) -> Done:
        """Run `gamenode run` to its end."""
        return self.run_unawaited(file, *arguments).done(within_s)

    def run_unawaited(self, file: str, *arguments: str) -> Started:
        """Start `gamenode run`."""
        path = self.folder / f"{len(self.started) + 1:03}.yaml"
        path.write_text(file)
        return self.start("run", str(path), *arguments, name="run")

    def pipeline_of(self, run: Started) -> str:
        """Return the id of the pipeline that a `gamenode run` started, once it has said so."""

        def said() -> str | None:
            assert run.alive or "pipeline" in run.stderr, run.stderr
            words = run.stderr.split()
            return words[1] if words[:1] == ["pipeline"] and len(words) > 1 else None

        return eventually(said, "the pipeline is started")

    # HTTP

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        within_s: float = WAIT_S,
    ) -> Answer:
        """Ask the server; `body` is sent as JSON unless it is bytes."""
        content = body if isinstance(body, bytes) else None
        if body is not None and content is None:
            content = json.dumps(body).encode()
        credentials = {"authorization": self.bearer} if self.token else {}
        sent = {"content-type": "application/json", **credentials, **(headers or {})}
        connection = http.client.HTTPConnection(self.http, timeout=within_s)
        try:
            connection.request(method, path, body=content, headers=sent)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return what `/api/v1` answers to a GET that must succeed."""
        answer = self.request("GET", f"/api/v1{path}")
        assert answer.status == http.client.OK, answer
        return answer.json

    def create(self, file: str, *, key: str = "", **more: Any) -> str:
        """Create a pipeline over HTTP and return its id."""
        headers = {"idempotency-key": key} if key else {}
        answer = self.request("POST", "/api/v1/pipelines", {"file": file, **more}, headers=headers)
        assert answer.status == http.client.CREATED, answer
        return str(answer.json["id"])

    def ended(self, pipeline_id: str, *, within_s: float = WAIT_S) -> Any:
        """Wait for a pipeline's end and return it."""

        def look() -> Any:
            found = self.get(f"/pipelines/{pipeline_id}?wait=5s")
            return found if found["status"] in TERMINAL else None

        return eventually(look, f"{pipeline_id} ends", within_s=within_s)

    def until_step(self, pipeline_id: str, name: str, status: str) -> None:
        """Wait until a step has a status."""

        def look() -> bool:
            steps = self.get(f"/pipelines/{pipeline_id}")["steps"]
            return any(each["name"] == name and each["status"] == status for each in steps)

        eventually(look, f"step {name} is {status}")

    def log(self, pipeline_id: str, name: str, **query: object) -> str:
        """Return what a step printed."""
        more = "".join(f"&{key}={value}" for key, value in query.items())
        path = f"/api/v1/pipelines/{pipeline_id}/steps/{name}/logs?format=raw{more}"
        return self.request("GET", path).body.decode()

    def node(self, node: str = "n1") -> Any:
        """Return a node."""
        return self.get(f"/nodes/{node}")

    def until_ready(self, server: Started) -> None:
        """Wait until the server is ready."""

        def look() -> bool:
            assert server.alive, server.stderr
            return self.request("GET", "/readyz").status == http.client.OK

        eventually(look, "the server is ready")

    def until_connected(self, node: str = "n1") -> None:
        """Wait until a node can take work."""

        def look() -> bool:
            answer = self.request("GET", f"/api/v1/nodes/{node}")
            return answer.status == http.client.OK and _connected(answer.json)

        eventually(look, f"node {node} is connected")

    # The host

    def below(self) -> list[int]:
        """Return every process that works in this cluster's folder: programs and steps."""
        return _processes_in(self.folder)

    def steps(self) -> list[int]:
        """Return the processes of steps and their supervisors."""
        return [pid for folder in self._runs() for pid in _processes_in(folder, hidden=False)]

    def close(self) -> None:
        """End everything, steps first of all that could start some."""
        for started in self.started:
            if started.alive:
                started.send(signal.SIGCONT)
                started.kill()
        for pid in set(self.below()) - set(self.steps()):
            _kill(pid)
        for runs in self._runs():
            asyncio.run(_clear(runs))
        for pid in self.below():
            _kill(pid)
        eventually(lambda: not self.below(), "every process of the cluster is gone")

    def said(self) -> Iterator[tuple[str, str]]:
        """Yield what the programs said, for a failed test."""
        for started in self.started:
            text = f"{started.stdout[-_SHOWN_BYTES:]}{started.stderr[-_SHOWN_BYTES:]}"
            if text:
                yield started.name, text

    def _runs(self) -> list[Path]:
        return list((self.folder / "agents").glob("*/runs"))


@contextmanager
def cluster_in(folder: Path, **settings: str) -> Iterator[Cluster]:
    """Make a cluster, and end all of it."""
    cluster = Cluster(folder, **settings)
    try:
        yield cluster
    finally:
        cluster.close()


def _connected(node: Mapping[str, Any]) -> bool:
    return bool(node["online"]) and node["link"]["state"] == "connected"


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def _processes_in(folder: Path, *, hidden: bool = True) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):
                below = (entry / "cwd").readlink().relative_to(folder)
                if hidden or not str(below).startswith("."):
                    found.append(int(entry.name))
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _clear(runs: Path) -> None:
    """End and remove every run below a folder, with the control groups that nobody else would."""
    runtime = ProcessRuntime(ProcessSettings(root=runs), clock=SystemClock())
    try:
        for run in await runtime.runs():
            await runtime.stop(run, grace_s=0.0)
            async with asyncio.timeout(WAIT_S):
                await runtime.wait(run)
            await runtime.remove(run)
    finally:
        await runtime.close()
