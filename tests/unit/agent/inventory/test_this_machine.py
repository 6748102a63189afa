"""What is collected here, against what the programs say that people would ask."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gamenode.agent.inventory.addresses import ask_addresses
from gamenode.agent.inventory.collector import Collector, CollectorSettings, host_parts
from gamenode.domain.inventory import Inventory
from gamenode.lib.clock import SystemClock


def _say(*words: str) -> str:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    settings = CollectorSettings(part_timeout_s=30.0, program_timeout_s=20.0)
    parts = host_parts(settings, engine_socket=Path("/var/run/docker.sock"))
    collector = Collector(parts, clock=SystemClock(), settings=settings)
    collection = asyncio.run(collector.collect())
    assert collection.failed == ()
    return collection.inventory


def _lscpu() -> dict[str, str]:
    def fields(nodes: list[dict[str, Any]]) -> Any:
        for node in nodes:
            yield node["field"].rstrip(":"), node["data"]
            yield from fields(node.get("children", []))

    return dict(fields(json.loads(_say("lscpu", "-J", "-B"))["lscpu"]))


def test_processors_are_those_of_lscpu(inventory: Inventory) -> None:
    said, cpus = _lscpu(), inventory.hardware.cpu

    assert len(cpus) == int(said["Socket(s)"])
    assert sum(it.threads or 0 for it in cpus) == int(said["CPU(s)"])
    cores = int(said["Core(s) per socket"])
    for cpu in cpus:
        assert (cpu.model, cpu.architecture) == (said["Model name"], said["Architecture"])
        assert cpu.cores == cores
        assert cpu.threads == cores * int(said["Thread(s) per core"])
        if cpu.frequency_hertz is not None:
            assert cpu.frequency_hertz == pytest.approx(float(said["CPU max MHz"]) * 1e6, rel=1e-3)
    for name, field in (
        ("L1d", "l1d_cache_bytes"),
        ("L1i", "l1i_cache_bytes"),
        ("L2", "l2_cache_bytes"),
        ("L3", "l3_cache_bytes"),
    ):
        size = said.get(f"{name} cache", "0").split(" ")[0]
        assert sum(getattr(it, field) or 0 for it in cpus) == int(size)


def test_memory_is_that_of_proc(inventory: Inventory) -> None:
    found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())

    assert found is not None
    assert inventory.hardware.memory.total_bytes == int(found[1]) * 1024


def test_disks_are_those_of_lsblk(inventory: Inventory) -> None:
    columns = "NAME,PATH,SIZE,MODEL,SERIAL,ROTA,TYPE,MOUNTPOINTS"
    listed = json.loads(_say("lsblk", "-J", "-b", "-o", columns))["blockdevices"]
    memory = re.compile(r"zram|ram|loop|nbd|fd")
    said = {
        it["path"]: it
        for it in listed
        if it["type"] == "disk" and it["size"] and not memory.match(it["name"])
    }

    assert [it.path for it in inventory.hardware.disk] == sorted(said)
    for disk in inventory.hardware.disk:
        it = said[disk.path or ""]
        assert disk.capacity_bytes == it["size"]
        assert disk.type == ("hdd" if it["rota"] else "ssd")
        assert it["model"] in {disk.model, None}
        assert it["serial"] in {disk.serial, None}  # lsblk knows it from udev alone
        assert set(disk.mounts) <= set(_mounts(it))


def _mounts(node: dict[str, Any]) -> list[str]:
    below = [mount for child in node.get("children", []) for mount in _mounts(child)]
    return [*filter(None, node["mountpoints"]), *below]


def test_the_disk_of_the_root_file_system_says_so(inventory: Inventory) -> None:
    source = _say("findmnt", "-n", "-o", "SOURCE", "/").strip()
    if not source.startswith("/dev/"):
        pytest.skip(f"the root file system is on {source}")

    assert any("/" in it.mounts for it in inventory.hardware.disk)


def test_interfaces_are_those_of_ip(inventory: Inventory) -> None:
    said = {it["ifname"]: it for it in json.loads(_say("ip", "-j", "address"))}

    assert inventory.network.interfaces
    for interface in inventory.network.interfaces:
        it = said[interface.name or ""]
        assert interface.mac == it["address"]
        assert set(interface.addresses) == {
            f"{entry['local']}/{entry['prefixlen']}"
            for entry in it["addr_info"]
            if entry["scope"] in {"global", "site"} and not entry.get("dynamic")
        }
    cards = {path.name for path in Path("/sys/class/net").iterdir() if (path / "device").exists()}
    assert cards <= {it.name for it in inventory.network.interfaces}


def test_every_address_is_one_that_ip_lists() -> None:
    said = {
        (it["ifindex"], f"{entry['local']}/{entry['prefixlen']}")
        for it in json.loads(_say("ip", "-j", "address"))
        for entry in it["addr_info"]
    }

    assert {(it.interface, it.text) for it in ask_addresses()} == said


def test_the_system_is_that_of_uname_and_os_release(inventory: Inventory) -> None:
    kernel, system = inventory.software.kernel, inventory.software.os

    assert kernel.release == _say("uname", "-r").strip()
    assert f"{kernel.major}.{kernel.minor}." in f"{kernel.release}."
    assert system.architecture == _say("uname", "-m").strip()
    described = platform.freedesktop_os_release()
    assert system.distribution == described["ID"]
    assert system.version == described.get("VERSION_ID", system.version)


@pytest.mark.parametrize("program", ["dockerd", "containerd", "runc"])
def test_runtimes_are_the_installed_ones(inventory: Inventory, program: str) -> None:
    printed = _say(program, "--version")

    version = getattr(inventory.software.runtimes, program.replace("dockerd", "docker"))
    assert version is not None
    if not Path("/var/run/docker.sock").exists():  # else what runs counts
        assert version in printed
