"""A real image registry on loopback that asks for a name and a password."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.engine import IMAGE, Engine

USER, PASSWORD = "player", "correct horse"
START_S_MAX = 10.0
_HTPASSWD = "player:$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"
"""What `htpasswd -B` makes of them."""


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry."""

    address: str
    folder: Path

    def auths(self) -> dict[str, object]:
        """Return what a file of credentials says of it."""
        encoded = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        return {"auths": {self.address: {"auth": encoded}}}

    def publish(self, engine: Engine, name: str, *, size_bytes: int) -> str:
        """Push an image with a layer of `size_bytes` over the tests' own; return its reference."""
        image = f"{self.address}/{name}"
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            content = os.urandom(size_bytes)
            for path, text in (
                ("Dockerfile", f"FROM {IMAGE}\nADD big /".encode()),
                ("big", content),
            ):
                entry = tarfile.TarInfo(path)
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))
        # The classic builder: it needs nothing but the engine.
        engine.docker("build", "-q", "-t", image, "-", stdin=packed.getvalue(), DOCKER_BUILDKIT="0")
        (self.folder / "config.json").write_text(json.dumps(self.auths()))
        engine.docker("push", "-q", image, DOCKER_CONFIG=str(self.folder))
        engine.docker("rmi", image)
        return image


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if shutil.which("docker-registry") is None:
        pytest.skip("needs a registry: make test-deps (docker-registry missing)")
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@contextmanager
def running_registry(folder: Path) -> Iterator[Registry]:
    """Start a registry in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    (folder / "htpasswd").write_text(_HTPASSWD)
    (folder / "registry.json").write_text(
        json.dumps(
            {
                "version": 0.1,
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
                "http": {"addr": address},
                "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
            }
        )
    )
    with (folder / "registry.log").open("wb") as log:
        server_process = subprocess.Popen(
            ("docker-registry", "serve", str(folder / "registry.json")),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_answer(address)
        yield Registry(address, folder)
    finally:
        server_process.terminate()
        server_process.wait(timeout=10.0)


def _await_answer(address: str) -> None:
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/v2/", timeout=1.0):
                return
        except urllib.error.HTTPError as error:
            error.close()
            return  # it asks who is there
        except OSError:
            assert time.monotonic() < deadline, "the registry does not start"
            time.sleep(0.05)
