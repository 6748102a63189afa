"""Hosts of tests/fixtures/hosts, put up as folders.

`tree.txt` has one entry a line: `/path: content`, `/path = bytes in hexadecimal`,
`/path -> target` for a link, `/path/` for an empty folder, `$ words:` for what a program prints;
lines that begin with `|` belong to the entry above them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from gamenode.agent.inventory import nvml
from gamenode.agent.inventory.addresses import Address
from gamenode.agent.inventory.collector import Host

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hosts"
NAMES = tuple(sorted(folder.name for folder in FIXTURES.iterdir()))


def put_up(name: str, folder: Path) -> Host:
    """Return the host of that name, as files below `folder`."""
    source = FIXTURES / name
    folder.mkdir(parents=True, exist_ok=True)
    programs: dict[str, str] = {}
    for head, block in _entries((source / "tree.txt").read_text()):
        if head.startswith("$ "):
            programs[head[2:-1]] = block
        else:
            _make(folder, head, block)
    if (source / "smbios.hex").exists():
        lines = (source / "smbios.hex").read_text().splitlines()
        table = b"".join(bytes.fromhex(line) for line in lines if not line.startswith("#"))
        _write(folder / "sys/firmware/dmi/tables/DMI", table)
    addresses = [Address(*it) for it in json.loads((source / "addresses.json").read_text())]
    engine = source / "engine.json"
    cards = source / "nvml.json"
    return Host(
        root=folder,
        run=lambda *words: programs.get(" ".join(words)),
        folders="",
        engine=lambda: json.loads(engine.read_text()) if engine.exists() else None,
        engine_socket=folder / "var/run/docker.sock",
        addresses=lambda: addresses,
        nvidia=lambda: nvml.collect(FakeNvml(json.loads(cards.read_text()))),
        machine="aarch64" if name.startswith("arm") else "x86_64",
    )


class FakeNvml:
    """NVIDIA's management library, answering from a fixture; what that lacks is not supported."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 - the library's name
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802 - the library's name
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802 - the library's name
        return str(self._answers["driver"])

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802 - the library's name
        return int(self._answers["cuda"])

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - the library's name
        return len(self._answers["gpus"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802 - the library's name
        return self._answers["gpus"][index]

    def __getattr__(self, name: str) -> Any:
        field = {
            "nvmlDeviceGetName": "name",
            "nvmlDeviceGetUUID": "uuid",
            "nvmlDeviceGetArchitecture": "architecture",
            "nvmlDeviceGetCudaComputeCapability": "capability",
            "nvmlDeviceGetPowerManagementLimit": "power_milliwatts",
            "nvmlDeviceGetNumGpuCores": "cores",
            "nvmlDeviceGetMemoryInfo": "memory_bytes",
            "nvmlDeviceGetPciInfo": "bus_id",
        }[name]

        def ask(card: dict[str, Any]) -> Any:
            if field not in card:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            answer = card[field]
            return SimpleNamespace(total=answer, busId=answer) if field in _STRUCTURES else answer

        return ask


_STRUCTURES = ("memory_bytes", "bus_id")


def _entries(text: str) -> Iterator[tuple[str, str]]:
    head, block = "", list[str]()
    for line in text.splitlines():
        if line.startswith("|"):
            block.append(line[1:] + "\n")
            continue
        if head:
            yield head, "".join(block)
        head, block = line, []
    if head:
        yield head, "".join(block)


def _make(root: Path, head: str, block: str) -> None:
    path, link, target = head.partition(" -> ")
    if link:
        place = root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
    elif head.endswith("/"):
        (root / head[1:]).mkdir(parents=True, exist_ok=True)
    elif " = " in head:
        path, _, content = head.partition(" = ")
        _write(root / path[1:], bytes.fromhex(content))
    elif block:
        _write(root / head[1:-1], block.encode())
    else:
        path, _, content = head.partition(": ")
        _write(root / path[1:], content.encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _ = path.write_bytes(content)
