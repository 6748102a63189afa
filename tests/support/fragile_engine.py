"""A container engine that a test kills, freezes and starts again; who made what is remembered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.support.cluster import eventually
from tests.support.engine import IMAGE, Engine, image

START_S_MAX = 60.0

_PROGRAMS = ("dockerd", "docker", "containerd", "runc", "busybox")


class FragileEngine:
    """An engine of one test module, as a program."""

    def __init__(self, folder: Path, *, live_restore: bool) -> None:
        """Start nothing yet. With `live_restore` containers outlive their engine."""
        self.engine = Engine(socket=folder / "engine.sock", folder=folder)
        self._live_restore = live_restore
        self._daemon: subprocess.Popen[bytes] | None = None
        self._listeners: list[subprocess.Popen[bytes]] = []
        (folder / "engine.json").write_text("{}")  # the host's own file is not for this one

    @property
    def alive(self) -> bool:
        return self._daemon is not None and self._daemon.poll() is None

    def start(self) -> None:
        """Start the engine, wait until it answers, and listen to what it does."""
        folder = self.engine.folder
        with (folder / "dockerd.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                (
                    "dockerd",
                    f"--host=unix://{self.engine.socket}",
                    f"--data-root={folder / 'data'}",
                    f"--exec-root={folder / 'exec'}",
                    f"--pidfile={folder / 'dockerd.pid'}",
                    f"--config-file={folder / 'engine.json'}",
                    f"--live-restore={str(self._live_restore).lower()}",
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
        deadline_s = time.monotonic() + START_S_MAX
        while not self._answers():
            if not self.alive or time.monotonic() > deadline_s:
                said = (folder / "dockerd.log").read_text()[-2000:]
                assert not self._listeners, f"the engine does not come back: {said}"
                pytest.skip(f"needs a container engine: dockerd does not start here: {said}")
            time.sleep(0.05)
        with (folder / "events").open("ab") as events:
            self._listeners.append(
                subprocess.Popen(
                    (
                        *("docker", "-H", f"unix://{self.engine.socket}", "events"),
                        *("--since", "0", "--filter", "event=create", "--format", "{{json .}}"),
                    ),
                    stdin=subprocess.DEVNULL,
                    stdout=events,
                    stderr=subprocess.DEVNULL,
                )
            )

    def send(self, number: signal.Signals) -> None:
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would, and its containerd with it; what runs in containers lives on."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()
        # Nobody may have taken the end of the containerd yet, and the next engine would take what
        # is left of it for alive, and wait for its answer.
        pid_file = self.engine.folder / "exec" / "containerd" / "containerd.pid"
        pid = int(pid_file.read_text())
        eventually(lambda: _is_dead(pid), "the engine's containerd is dead")
        pid_file.unlink()

    def made(self) -> Mapping[str, set[str]]:
        """Return the ids of all containers there ever were, by name."""
        found: dict[str, set[str]] = defaultdict(set)
        for line in (self.engine.folder / "events").read_text().splitlines():
            event = json.loads(line)
            if event["Type"] == "container":
                found[event["Actor"]["Attributes"]["name"]].add(event["Actor"]["ID"])
        for line in self.engine.docker(
            "ps", "-a", "--no-trunc", "--format", "{{.Names}} {{.ID}}"
        ).splitlines():
            name, _, identity = line.partition(" ")
            found[name].add(identity)
        return found

    def states(self, word: str) -> list[str]:
        """Return the states of the containers whose name has a word in it."""
        listed = self.engine.docker("ps", "-a", "--format", "{{.Names}} {{.State}}")
        lines = [line.split() for line in listed.splitlines()]
        return [state for name, state in lines if word in name]

    def stop(self) -> None:
        """End it with all that it runs."""
        if self.alive:
            self.send(signal.SIGCONT)
        else:
            self.start()
        for container in self.engine.docker("ps", "-aq").split():
            self.engine.docker("rm", "-f", container)
        assert self._daemon is not None
        self._daemon.terminate()
        self._daemon.wait(timeout=30.0)
        for listener in self._listeners:
            listener.kill()
            listener.wait()
        # An engine that died while it started a container does not know of its shim any more.
        for pid in _processes_of(self.engine.folder / "exec"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # A crash leaves what it had mounted, and so does an engine whose containers may live on.
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            mounted = line.split()[1]
            if Path(mounted).is_relative_to(self.engine.folder):
                subprocess.run(("umount", "--lazy", mounted), check=True)

    def _answers(self) -> bool:
        try:
            self.engine.docker("version")
        except subprocess.CalledProcessError:
            return False
        return True


@contextmanager
def fragile_engine(folder: Path, *, live_restore: bool) -> Iterator[FragileEngine]:
    """Run an engine with the tests' image in it."""
    if os.geteuid() != 0:
        pytest.skip("needs a container engine: only root can start one")
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs a container engine: make test-deps ({', '.join(missing)} missing)")
    fragile = FragileEngine(folder, live_restore=live_restore)
    fragile.start()
    try:
        fragile.engine.docker("import", "-", IMAGE, stdin=image())
        yield fragile
    finally:
        fragile.stop()
        eventually(lambda: not fragile.alive, "the engine has ended")


def _processes_of(folder: Path) -> list[int]:
    """Return the processes whose command line names something in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{folder}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _is_dead(pid: int) -> bool:
    """Return whether a process has ended, whoever has yet to take note of that."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
