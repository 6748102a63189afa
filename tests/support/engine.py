"""A real container engine of the tests' own: its socket, its folders, one tiny image."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.runtimes import ShellHost

from gamenode.agent.runtime.docker import DockerRuntime, DockerSettings
from gamenode.lib.clock import SystemClock

IMAGE = "gamenode-test:1"
START_S_MAX = 60.0

_PROGRAMS = ("dockerd", "docker", "containerd", "runc", "busybox")


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine."""

    socket: Path
    folder: Path

    def host(self, node_id: str) -> DockerRuntimeHost:
        """Return the engine as the host of one node's runs."""
        return DockerRuntimeHost(self, node_id)

    def docker(self, *args: str, stdin: bytes = b"") -> str:
        """Run the engine's own client."""
        done = subprocess.run(
            ("docker", "-H", f"unix://{self.socket}", *args),
            input=stdin,
            capture_output=True,
            check=True,
            timeout=60.0,
        )
        return done.stdout.decode()


class DockerRuntimeHost(ShellHost):
    """One node's share of an engine."""

    image = IMAGE

    def __init__(self, engine: Engine, node_id: str) -> None:
        self.engine = engine
        self._settings = DockerSettings(
            socket=engine.socket, node_id=node_id, retry_s=0.1, idle_poll_s=0.2
        )

    def runtime(self) -> DockerRuntime:
        return DockerRuntime(self._settings, clock=SystemClock())


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.geteuid() != 0:
        pytest.skip("needs a container engine: only root can start one")
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs a container engine: make test-deps ({', '.join(missing)} missing)")
    with running_engine(tmp_path_factory.mktemp("engine")) as engine:
        engine.docker("import", "-", IMAGE, stdin=image())
        yield engine


@contextmanager
def running_engine(folder: Path) -> Iterator[Engine]:
    """Start an engine in `folder`, and end it with all that it runs."""
    (folder / "engine.json").write_text("{}")  # the host's own file is not for this one
    engine = Engine(socket=folder / "engine.sock", folder=folder)
    with (folder / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(
            (
                "dockerd",
                f"--host=unix://{engine.socket}",
                f"--data-root={folder / 'data'}",
                f"--exec-root={folder / 'exec'}",
                f"--pidfile={folder / 'dockerd.pid'}",
                f"--config-file={folder / 'engine.json'}",
                # The host's network stays as it is.
                "--bridge=none",
                "--iptables=false",
                "--ip6tables=false",
                "--ip-forward=false",
            ),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_answer(engine, daemon)
        yield engine
    finally:
        # It ends its containers and its containerd with it.
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _await_answer(engine: Engine, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            engine.docker("version")
        except subprocess.CalledProcessError as error:
            if daemon.poll() is not None or time.monotonic() > deadline:
                log = (engine.folder / "dockerd.log").read_text()[-2000:]
                pytest.skip(f"needs a container engine: dockerd does not start here: {log}")
            del error
            time.sleep(0.1)
        else:
            return


def image() -> bytes:
    """Return the files of the image: a busybox, and its commands as links."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    commands = subprocess.run((busybox, "--list"), capture_output=True, check=True).stdout.split()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for folder in ("bin", "tmp", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        tar.add(busybox, "bin/busybox")
        for command in commands:
            link = tarfile.TarInfo(f"bin/{command.decode()}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            if command != b"busybox":
                tar.addfile(link)
    return packed.getvalue()
