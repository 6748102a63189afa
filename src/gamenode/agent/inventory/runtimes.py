"""Versions of the container runtimes: what the engine runs, else what is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

from gamenode.agent.inventory.programs import Run
from gamenode.domain.inventory import Runtimes

Engine = Callable[[], Mapping[str, Any] | None]
"""The engine's answer to `GET /version`, or None where none answers."""

_PROGRAMS: Final = ("dockerd", "containerd", "runc")
_VERSION: Final = re.compile(r"\bv?(\d+\.\d+[^\s,]*)")


def collect(run: Run, engine: Engine) -> Runtimes:
    """Return the versions; each is absent where that program is not installed.

    Raises:
        ProgramError: a program did not say its version in time.
    """
    running = _components(engine())
    return Runtimes(
        docker=running.get("engine") or _version(run("dockerd", "--version")),
        containerd=running.get("containerd") or _version(run("containerd", "--version")),
        runc=running.get("runc") or _version(run("runc", "--version")),
    )


def glance(folders: str, engine_socket: Path) -> object:
    """Return what differs when a runtime was installed, exchanged or started."""
    found = []
    for program in _PROGRAMS:
        path = shutil.which(program, path=folders)
        state = Path(path).stat() if path else None
        found.append((path, state and (state.st_ino, state.st_size, state.st_mtime_ns)))
    return tuple(found), engine_socket.exists()


def has_engine(engine_socket: Path) -> bool:
    """Return whether a container engine may be reached at this socket."""
    return engine_socket.is_socket() and os.access(engine_socket, os.R_OK | os.W_OK)


def engine_at(path: Path, timeout_s: float) -> Engine:
    """Return what asks the engine at this socket."""

    def ask() -> Mapping[str, Any] | None:
        connection = _UnixConnection(path, timeout_s)
        try:
            connection.request("GET", "/version")
            answer = json.loads(connection.getresponse().read())
        except (OSError, HTTPException, ValueError):
            return None  # no engine, or none that runs: the programs are asked
        finally:
            connection.close()
        return answer if isinstance(answer, dict) else None

    return ask


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


def _components(answer: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the parts of an engine by name; Podman speaks this API and is no Docker Engine."""
    listed = (answer or {}).get("Components") or ()
    return {
        str(it.get("Name", "")).lower(): str(it["Version"]).removeprefix("v")
        for it in listed
        if it.get("Version")
    }


def _version(printed: str | None) -> str | None:
    found = _VERSION.search(printed or "")
    return found[1] if found else None
