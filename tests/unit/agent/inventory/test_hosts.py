from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.hosts import NAMES, put_up

from gamenode.agent.inventory import machine
from gamenode.agent.inventory.collector import Collector, CollectorSettings, Host, parts_of
from gamenode.agent.inventory.programs import ProgramError
from gamenode.domain.inventory import (
    Cpu,
    Disk,
    Gpu,
    GpuDriver,
    Inventory,
    Kernel,
    Memory,
    MemoryModule,
    NetworkInterface,
    OperatingSystem,
    Runtimes,
)
from gamenode.domain.inventory_diff import describe, diff
from gamenode.domain.node import NodeType
from gamenode.lib.clock import SystemClock

MIB, GIB = 2**20, 2**30


def _collector(host: Host) -> Collector:
    return Collector(parts_of(host), clock=SystemClock(), settings=CollectorSettings())


async def _collected(name: str, folder: Path) -> Inventory:
    collection = await _collector(put_up(name, folder)).collect()
    assert collection.failed == ()
    return collection.inventory


async def test_a_server_shows_each_socket_module_and_gpu(tmp_path: Path) -> None:
    inventory = await _collected("dual-socket-4gpu", tmp_path)

    first = Cpu(
        model="Intel(R) Xeon(R) Gold 5222 CPU @ 3.80GHz",
        cores=4,
        threads=8,
        frequency_hertz=3.9e9,
        cache_bytes=16896 * 1024,
        architecture="x86_64",
        socket=0,
        l1d_cache_bytes=4 * 32 * 1024,
        l1i_cache_bytes=4 * 32 * 1024,
        l2_cache_bytes=4 * MIB,
        l3_cache_bytes=16896 * 1024,
    )
    assert inventory.hardware.cpu == (first, replace(first, socket=1))
    memory = inventory.hardware.memory
    assert replace(memory, modules=()) == Memory(
        total_bytes=131650284 * 1024, type="DDR4", frequency_hertz=2.933e9, channels=8
    )
    # Empty sockets, and the flash part of another array, are no modules.
    assert [it.slot for it in memory.modules] == [
        f"P{cpu}-DIMM{channel}1" for cpu in (1, 2) for channel in "ABDE"
    ]
    assert memory.modules[0] == MemoryModule(
        slot="P1-DIMMA1",
        size_bytes=16 * GIB,
        type="DDR4",
        frequency_hertz=2.933e9,
        serial="03A11100",
        manufacturer="Samsung",
        part_number="M393A2K40CB2-CVF",
        channel="0-0",
    )
    # The management chip's display is no GPU.
    assert [(it.pci_address, it.power_watts) for it in inventory.hardware.gpu] == [
        ("0000:18:00.0", 450.0),
        ("0000:3b:00.0", 450.0),
        ("0000:86:00.0", 450.0),
        ("0000:af:00.0", 350.0),
    ]
    assert inventory.hardware.gpu[0] == Gpu(
        model="NVIDIA GeForce RTX 4090",
        memory_bytes=24564 * MIB,
        architecture="Ada",
        driver_version="550.54.14",
        compute_capability="8.9",
        power_watts=450.0,
        cuda_cores=16384,
        uuid="GPU-5f0d2c1a-0000-4000-8000-000000000000",
        pci_address="0000:18:00.0",
        vendor="NVIDIA",
    )
    assert inventory.software.gpu_driver == GpuDriver(
        driver_version="550.54.14", compute_version="12.4"
    )


async def test_a_disk_has_the_mounts_of_every_volume_on_it(tmp_path: Path) -> None:
    inventory = await _collected("dual-socket-4gpu", tmp_path)

    ssd = Disk(
        model="SAMSUNG MZ7LH480",
        capacity_bytes=937703088 * 512,
        type="ssd",
        interface="sata",
        path="/dev/sda",
        serial="S4EVNX0M100001",
        mounts=("/",),
    )
    assert inventory.hardware.disk == (
        Disk(
            model="INTEL SSDPE2KX020T8",
            capacity_bytes=3907029168 * 512,
            type="ssd",
            interface="nvme",
            path="/dev/nvme0n1",
            serial="PHLJ9510000A2P0BGN",
            mounts=("/srv/game data",),
        ),
        ssd,
        replace(ssd, path="/dev/sdb", serial="S4EVNX0M100002"),
    )


async def test_only_the_hosts_own_interfaces_and_configured_addresses_count(
    tmp_path: Path,
) -> None:
    inventory = await _collected("dual-socket-4gpu", tmp_path)

    speed = 10_000_000_000
    bond = NetworkInterface(
        name="bond0", mac="3c:ec:ef:0a:10:00", speed_bits_per_second=speed, virtual=True
    )
    card = NetworkInterface(
        name="eno1",
        mac="3c:ec:ef:0a:10:00",
        speed_bits_per_second=speed,
        driver="ixgbe",
        virtual=False,
    )
    assert inventory.network.interfaces == (
        bond,
        replace(bond, name="bond0.100", addresses=("10.20.0.11/24", "2001:db8:20::11/64")),
        card,
        # Down, so without speed; in a bond, and still known by its own address.
        replace(card, name="eno2", mac="3c:ec:ef:0a:10:01", speed_bits_per_second=None),
    )


async def test_the_engines_word_wins_over_what_is_installed(tmp_path: Path) -> None:
    host = put_up("dual-socket-4gpu", tmp_path)
    stopped = await _collector(replace(host, engine=lambda: None)).collect()

    assert (await _collector(host).collect()).inventory.software.runtimes == Runtimes(
        docker="26.0.0", containerd="1.6.28", runc="1.1.12"
    )
    assert stopped.inventory.software.runtimes == Runtimes(containerd="1.7.13", runc="1.1.12")


async def test_podman_is_no_docker_engine(tmp_path: Path) -> None:
    answer = {"Components": [{"Name": "Podman Engine", "Version": "5.0.2"}]}
    host = replace(put_up("kvm-guest", tmp_path), engine=lambda: answer)

    assert (await _collector(host).collect()).inventory.software.runtimes == Runtimes()


async def test_an_amd_gpu_is_named_by_the_hosts_list_of_devices(tmp_path: Path) -> None:
    inventory = await _collected("amd-gpu-desktop", tmp_path)

    # The Intel card belongs to a guest.
    assert inventory.hardware.gpu == (
        Gpu(
            vendor="AMD",
            model="Navi 22 [Radeon RX 6700/6700 XT/6750 XT / 6800M/6850M XT]",
            memory_bytes=12868124672,
            power_watts=186.0,
            uuid="5c88007d4c1e3a21",
            pci_address="0000:0b:00.0",
        ),
    )


async def test_a_desktop_has_its_subvolumes_its_stick_and_no_leased_address(
    tmp_path: Path,
) -> None:
    inventory = await _collected("amd-gpu-desktop", tmp_path)

    assert inventory.software.os == OperatingSystem(
        distribution="arch", version="rolling", architecture="x86_64"
    )
    assert inventory.hardware.cpu[0].l3_cache_bytes == 2 * 8 * MIB  # two instances
    memory = inventory.hardware.memory
    assert (memory.frequency_hertz, memory.channels) == (2.666e9, 2)
    assert [(it.slot, it.serial) for it in memory.modules] == [("DIMM_A2", None), ("DIMM_B2", None)]
    assert [(it.serial, it.interface, it.mounts) for it in inventory.hardware.disk] == [
        ("S4EWNX0R100003", "nvme", ("/", "/boot", "/home")),
        ("4C530001", "usb", ()),
    ]
    assert [(it.name, it.addresses) for it in inventory.network.interfaces] == [
        ("enp5s0", ("fd00:1::23/64",)),
        ("wg0", ("10.9.0.2/32",)),
    ]


async def test_what_a_guest_does_not_show_is_absent(tmp_path: Path) -> None:
    inventory = await _collected("kvm-guest", tmp_path)

    assert inventory.hardware.cpu == tuple(
        Cpu(model="Common KVM processor", cores=1, threads=1, architecture="x86_64", socket=socket)
        for socket in (0, 1)
    )
    assert inventory.hardware.memory == Memory(total_bytes=8142412 * 1024)
    assert inventory.hardware.gpu == ()
    assert inventory.hardware.disk == (
        Disk(
            capacity_bytes=32 * GIB,
            type="hdd",
            interface="virtio",
            path="/dev/vda",
            mounts=("/",),
        ),
    )
    assert inventory.software.gpu_driver == GpuDriver()
    assert inventory.software.kernel == Kernel(
        major=6, minor=1, patch=0, release="6.1.0-21-cloud-amd64"
    )


async def test_a_container_without_lscpu_is_described_by_the_kernel_alone(tmp_path: Path) -> None:
    inventory = await _collected("container", tmp_path)

    (cpu,) = inventory.hardware.cpu
    assert (cpu.model, cpu.architecture) == ("Intel(R) Core(TM) i5-8259U CPU @ 2.30GHz", "x86_64")
    assert (cpu.cores, cpu.threads, cpu.frequency_hertz) == (2, 4, 3.8e9)
    assert inventory.hardware.disk == ()
    assert [(it.name, it.virtual, it.addresses) for it in inventory.network.interfaces] == [
        ("eth0", True, ("172.17.0.2/16",))
    ]


async def test_two_kinds_of_cores_are_one_socket(tmp_path: Path) -> None:
    inventory = await _collected("arm-two-core-kinds", tmp_path)

    (cpu,) = inventory.hardware.cpu
    assert cpu.model == "Cortex-A55 + Cortex-A76"
    assert (cpu.cores, cpu.threads, cpu.frequency_hertz) == (8, 8, 2.4e9)
    (disk,) = inventory.hardware.disk
    assert (disk.model, disk.interface, disk.type) == ("DV4064", "mmc", "ssd")
    assert inventory.software.os.version == "24.04"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dual-socket-4gpu", NodeType.PHYSICAL),
        ("amd-gpu-desktop", NodeType.PHYSICAL),
        ("arm-two-core-kinds", NodeType.PHYSICAL),
        ("kvm-guest", NodeType.VIRTUAL),
        ("container", NodeType.CONTAINER),
        ("firecracker-guest", NodeType.VIRTUAL),  # its disk has a container's marks
    ],
)
def test_the_kind_of_machine_is_told_by_its_firmware_and_kernel(
    tmp_path: Path, name: str, expected: NodeType
) -> None:
    assert machine.node_type(put_up(name, tmp_path).root) is expected


@pytest.mark.parametrize(("name", "expected"), [("kvm-guest", "0123abcd"), ("container", "")])
def test_a_host_has_a_name_through_all_its_boots_and_a_container_none(
    tmp_path: Path, name: str, expected: str
) -> None:
    root = put_up(name, tmp_path).root
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc" / "machine-id").write_text("0123abcd\n")
    assert machine.host_id(root) == expected


@pytest.mark.parametrize("name", NAMES)
async def test_the_same_host_has_one_hash_however_often_it_is_collected(
    tmp_path: Path, name: str
) -> None:
    collector = _collector(put_up(name, tmp_path))

    first = await collector.collect()

    assert {(await collector.collect()).hash for _ in range(5)} == {first.hash}
    assert not await collector.may_have_changed()


def _update_driver(root: Path) -> None:
    version = root / "proc/driver/nvidia/version"
    _ = version.write_text(version.read_text().replace("550.54.14", "555.42.02"))


def _replace_disk(root: Path) -> None:
    device = (root / "sys/block/sdb/device").resolve()
    _ = (device / "vpd_pg80").write_bytes(b"\0\x80\0\x0eS4EVNX0M100009")


def _add_address(root: Path) -> None:
    _ = (root / "sys/class/net/bond0.100/ifindex").write_text("6")


def _upgrade_kernel(root: Path) -> None:
    _ = (root / "proc/sys/kernel/osrelease").write_text("5.15.0-107-generic")


def _pull_a_module(root: Path) -> None:
    table = root / "sys/firmware/dmi/tables/DMI"
    content = table.read_bytes()
    size = content.index(b"\x48\0\x40\0\0\x40") + 4  # behind 72 and 64 bits of width
    _ = table.write_bytes(content[:size] + b"\0\0" + content[size + 2 :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _replace_disk,
            [
                "disk[S4EVNX0M100009] added (SAMSUNG MZ7LH480)",
                "disk[S4EVNX0M100002] removed (SAMSUNG MZ7LH480)",
            ],
        ),
        (_upgrade_kernel, ["kernel.release 5.15.0-105-generic → 5.15.0-107-generic"]),
        (
            _add_address,
            ["interfaces[bond0.100].addresses 10.20.0.11/24, 2001:db8:20::11/64 → 172.17.0.1/16"],
        ),
        (_pull_a_module, ["memory.channels 8 → 7", "memory.modules[03A11100] removed"]),
    ],
    ids=lambda it: it.__name__ if callable(it) else "",
)
async def test_a_change_of_the_host_is_seen_at_a_glance_and_named(
    tmp_path: Path, change: Any, words: list[str]
) -> None:
    host = put_up("dual-socket-4gpu", tmp_path)
    collector = _collector(host)
    before = await collector.collect()

    change(host.root)

    assert await collector.may_have_changed()
    after = await collector.collect()
    named = [describe(it) for it in diff(before.inventory, after.inventory)]
    assert [line.split(" (M393")[0] for line in named] == words


async def test_a_gpu_whose_driver_was_exchanged_is_seen_at_a_glance(tmp_path: Path) -> None:
    host = put_up("dual-socket-4gpu", tmp_path)
    collector = _collector(host)
    _ = await collector.collect()

    _update_driver(host.root)

    assert await collector.may_have_changed()


async def test_a_program_that_fails_costs_its_own_part_only(tmp_path: Path) -> None:
    def run(*words: str) -> str | None:
        raise ProgramError(f"{words[0]} is broken")

    host = replace(put_up("dual-socket-4gpu", tmp_path), run=run, engine=lambda: None)

    collection = await _collector(host).collect()

    assert [it.part for it in collection.failed] == ["runtimes"]
    assert "dockerd is broken" in collection.failed[0].reason
    assert collection.inventory.hardware.cpu[0].cores == 4  # lscpu is not all there is


async def test_a_system_that_does_not_describe_itself_is_a_kernel(tmp_path: Path) -> None:
    host = put_up("kvm-guest", tmp_path)
    (host.root / "etc/os-release").unlink()

    found = (await _collector(host).collect()).inventory.software.os

    assert (found.distribution, found.version) == ("linux", "6.1.0-21-cloud-amd64")
