"""A real container engine of the tests' own: its socket, its folders, one tiny image."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.support.runtimes import ShellHost

from gamenode.agent.runtime.docker import DockerRuntime
from gamenode.agent.runtime.docker_settings import DockerSettings
from gamenode.lib.clock import Clock, SystemClock

IMAGE = "gamenode-test:1"
START_S_MAX = 60.0
_CAP_SYS_RESOURCE = 24
SETTINGS = DockerSettings(
    retry_s=0.1, idle_poll_s=0.2, pull_backoff_s=0.05, pull_stall_s=5.0, podman_restart_s=1.5
)
"""Those of a patient engine, for an impatient test."""

_PROGRAMS = ("dockerd", "docker", "containerd", "runc", "busybox")
_PODMAN_PROGRAMS = ("podman", "docker", "conmon", "runc", "busybox", "unshare")


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine."""

    socket: Path
    folder: Path
    daemon: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """Kill the daemon, as a crash would; what it runs may live on."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        # Its containerd goes with it. Where nobody reaps that, the next daemon takes it for alive.
        (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def host(self, node_id: str, settings: DockerSettings | None = None) -> DockerRuntimeHost:
        """Return the engine as the host of one node's runs."""
        return DockerRuntimeHost(self, node_id, settings or SETTINGS)

    def docker(self, *args: str, stdin: bytes = b"", **environment: str) -> str:
        """Run the engine's own client."""
        done = subprocess.run(
            ("docker", "-H", f"unix://{self.socket}", *args),
            input=stdin,
            env={**os.environ, **environment},
            capture_output=True,
            check=True,
            timeout=60.0,
        )
        return done.stdout.decode()


class DockerRuntimeHost(ShellHost):
    """One node's share of an engine."""

    image = IMAGE

    def __init__(self, engine: Engine, node_id: str, settings: DockerSettings = SETTINGS) -> None:
        self.engine = engine
        self.clock: Clock = SystemClock()
        self.data = engine.folder / node_id
        self.data.mkdir(exist_ok=True)
        self._node_id = node_id
        self._settings = settings

    @property
    def auth_file(self) -> Path:
        """Where the node's credentials are looked for."""
        return self.data / "registry-auth.json"

    def runtime(self) -> DockerRuntime:
        return DockerRuntime(
            self._settings,
            socket=self.engine.socket,
            node_id=self._node_id,
            data=self.data,
            auth_file=self.auth_file,
            log_bytes_max=1024 * 1024 * 1024,
            clock=self.clock,
        )


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.geteuid() != 0:
        pytest.skip("needs a container engine: only root can start one")
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs a container engine: make test-deps ({', '.join(missing)} missing)")
    with running_engine(tmp_path_factory.mktemp("engine")) as engine:
        engine.docker("import", "-", IMAGE, stdin=image())
        yield engine


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.geteuid() != 0:
        pytest.skip("needs Podman: only root can start one of its own")
    if missing := [name for name in _PODMAN_PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs Podman: make test-deps ({', '.join(missing)} missing)")
    with running_podman(tmp_path_factory.mktemp("podman")) as engine:
        engine.docker("import", "-", IMAGE, stdin=image())
        yield engine


@contextmanager
def running_podman(folder: Path) -> Iterator[Engine]:
    """Start Podman's service in `folder`, and end it with all that it runs."""
    engine = Engine(socket=folder / "podman.sock", folder=folder)
    # Nothing of the host's own configuration, and the OCI runtime that runs everywhere.
    init = shutil.which("docker-init") or shutil.which("catatonit") or ""
    (folder / "containers.conf").write_text(
        f"""[containers]
default_ulimits = []
init_path = "{init}"
[engine]
init_path = "{init}"
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
    )
    (folder / "storage.conf").write_text(
        f"""[storage]
driver = "overlay"
graphroot = "{folder / "data"}"
runroot = "{folder / "run"}"
"""
    )
    environment = {
        **os.environ,
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }
    podman = ("podman", "--tmpdir", str(folder / "tmp"))
    with (folder / "podman.log").open("wb") as log:
        service = subprocess.Popen(
            # In a network of its own: the host's stays as it is.
            ("unshare", "--net", *podman, "system", "service", "-t0", f"unix://{engine.socket}"),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_answer(engine, service, folder / "podman.log")
        yield engine
    finally:
        subprocess.run(
            (*podman, "rm", "-af", "-t", "0"), env=environment, check=False, timeout=60.0
        )
        service.terminate()
        service.wait(timeout=30.0)
        _unmount_below(folder)


@contextmanager
def running_engine(folder: Path, *, live_restore: bool = False) -> Iterator[Engine]:
    """Start an engine in `folder`, and end it with all that it runs.

    With `live_restore` its containers outlive it; whoever started them ends them.
    """
    # The host's own file is not for this one.
    (folder / "engine.json").write_text(json.dumps({"live-restore": live_restore}))
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
        _await_answer(engine, daemon, folder / "dockerd.log")
        yield replace(engine, daemon=daemon)
    finally:
        # It ends its containers and its containerd with it.
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        _unmount_below(folder)


def _unmount_below(folder: Path) -> None:
    """Undo the mounts that an engine left, or nobody can remove its folder."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed(mounted):
        if Path(place).is_relative_to(folder):
            subprocess.run(("umount", "-l", place), check=False, capture_output=True)


def _await_answer(engine: Engine, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            engine.docker("version")
        except subprocess.CalledProcessError as error:
            if daemon.poll() is not None or time.monotonic() > deadline:
                said = log.read_text()[-2000:]
                pytest.skip(f"needs a container engine: it does not start here: {said}")
            del error
            time.sleep(0.1)
        else:
            return


def may_raise_limits() -> bool:
    """Return whether this process may raise hard limits, as Podman does beside any that is set."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(effective >> _CAP_SYS_RESOURCE & 1)


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
