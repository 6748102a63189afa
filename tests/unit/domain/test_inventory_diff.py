from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamenode.domain.inventory import (
    PARTS,
    Cpu,
    Disk,
    Gpu,
    GpuDriver,
    Hardware,
    Inventory,
    Kernel,
    Memory,
    MemoryModule,
    Network,
    NetworkInterface,
    OperatingSystem,
    Runtimes,
    Software,
    canonical,
    content_hash,
    with_parts_of,
)
from gamenode.domain.inventory_diff import Change, ChangeOp, apply, describe, diff, is_loss

# Few values, so that parts share identities and inventories share parts.
_TEXT = st.none() | st.sampled_from(["a", "b", "a@b", "a#2", "x].y", "["]) | st.text(max_size=3)
_INT = st.none() | st.integers(0, 2**40)
_FLOAT = st.none() | st.floats(0, 1e12)
_TEXTS = st.lists(st.sampled_from(["/", "/srv", "10.0.0.1/8"]), max_size=2).map(tuple)


def _some(part: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    by_type = {
        "str | None": _TEXT,
        "int | None": _INT,
        "float | None": _FLOAT,
        "bool | None": st.none() | st.booleans(),
        "tuple[str, ...]": _TEXTS,
    }
    for entry in dataclasses.fields(part):
        if entry.name not in fields:
            fields[entry.name] = by_type[str(entry.type)]
    return st.builds(part, **fields)


def _several(part: type[Any]) -> st.SearchStrategy[Any]:
    return st.lists(_some(part), max_size=3).map(tuple)


INVENTORIES: st.SearchStrategy[Inventory] = st.builds(
    Inventory,
    hardware=st.builds(
        Hardware,
        cpu=_several(Cpu),
        memory=_some(Memory, modules=_several(MemoryModule)),
        gpu=_several(Gpu),
        disk=_several(Disk),
    ),
    software=st.builds(
        Software,
        os=_some(OperatingSystem),
        kernel=_some(Kernel),
        gpu_driver=_some(GpuDriver),
        runtimes=_some(Runtimes),
    ),
    network=st.builds(Network, interfaces=_several(NetworkInterface)),
)

SERVER = Inventory(
    hardware=Hardware(
        cpu=(Cpu(model="EPYC", cores=32, socket=0), Cpu(model="EPYC", cores=32, socket=1)),
        memory=Memory(
            total_bytes=2**36,
            modules=(
                MemoryModule(slot="A1", serial="m1", size_bytes=2**35),
                MemoryModule(slot="B1", serial="m2", size_bytes=2**35),
            ),
        ),
        gpu=(
            Gpu(model="RTX 4090", uuid="GPU-5f", driver_version="550.54"),
            Gpu(model="RTX 4090", uuid="GPU-60", driver_version="550.54"),
        ),
        disk=(Disk(model="Disk One", serial="s1", path="/dev/sda"),),
    ),
    software=Software(gpu_driver=GpuDriver(driver_version="550.54")),
    network=Network(
        interfaces=(
            NetworkInterface(
                name="eno1", mac="3c:ec:ef:00:00:01", speed_bits_per_second=10**10, virtual=False
            ),
        )
    ),
)


def _with_hardware(**changed: Any) -> Inventory:
    return replace(SERVER, hardware=replace(SERVER.hardware, **changed))


@settings(max_examples=100, deadline=None)
@given(a=INVENTORIES, b=INVENTORIES)
def test_a_diff_makes_one_inventory_of_the_other(a: Inventory, b: Inventory) -> None:
    changes = diff(a, b)

    assert apply(changes, a) == canonical(b)
    assert (changes == ()) == (content_hash(a) == content_hash(b))


@settings(max_examples=30, deadline=None)
@given(it=INVENTORIES)
def test_the_stable_content_of_stable_content_is_itself(it: Inventory) -> None:
    assert canonical(canonical(it)) == canonical(it)
    assert diff(it, canonical(it)) == ()


def test_a_driver_update_names_the_gpu_by_its_uuid() -> None:
    first, second = SERVER.hardware.gpu
    # The other order, as a driver may list them after its update.
    after = _with_hardware(gpu=(second, replace(first, driver_version="555.42")))

    changes = diff(SERVER, after)

    assert changes == (Change(ChangeOp.CHANGED, "gpu[GPU-5f].driver_version", "550.54", "555.42"),)
    assert describe(changes[0]) == "gpu[GPU-5f].driver_version 550.54 → 555.42"


def test_a_module_in_another_slot_is_moved_not_lost_and_new() -> None:
    first, second = SERVER.hardware.memory.modules
    memory = replace(SERVER.hardware.memory, modules=(replace(first, slot="C1"), second))

    changes = diff(SERVER, _with_hardware(memory=memory))

    assert changes == (Change(ChangeOp.MOVED, "memory.modules[m1].slot", "A1", "C1"),)
    assert describe(changes[0]) == "memory.modules[m1] moved A1 → C1"


def test_a_replaced_disk_is_one_removed_and_one_added() -> None:
    after = _with_hardware(disk=(Disk(model="Disk Two", serial="s2", path="/dev/sda"),))

    assert [describe(change) for change in diff(SERVER, after)] == [
        "disk[s2] added (Disk Two)",
        "disk[s1] removed (Disk One)",
    ]


def test_a_second_interface_is_added_with_all_its_fields() -> None:
    card = NetworkInterface(name="eno2", mac="3c:ec:ef:00:00:02", addresses=("10.0.0.2/24",))
    after = replace(SERVER, network=Network(interfaces=(card, *SERVER.network.interfaces)))

    assert diff(SERVER, after) == (
        Change(
            ChangeOp.ADDED,
            "interfaces[3c:ec:ef:00:00:02]",
            None,
            {"name": "eno2", "mac": "3c:ec:ef:00:00:02", "addresses": ("10.0.0.2/24",)},
        ),
    )


def test_a_value_that_appears_was_not_reported_before() -> None:
    after = replace(SERVER, software=replace(SERVER.software, runtimes=Runtimes(docker="28.2.2")))

    (change,) = diff(SERVER, after)

    assert change == Change(ChangeOp.ADDED, "runtimes.docker", None, "28.2.2")
    assert describe(change) == "runtimes.docker 28.2.2, not reported before"


@pytest.mark.parametrize(
    "moved_by_itself",
    [
        _with_hardware(disk=(replace(SERVER.hardware.disk[0], path="/dev/sdb"),)),
        _with_hardware(cpu=SERVER.hardware.cpu[::-1]),
        _with_hardware(memory=replace(SERVER.hardware.memory, total_bytes=2**36 - 4096)),
        replace(
            SERVER,
            network=Network(
                interfaces=(replace(SERVER.network.interfaces[0], speed_bits_per_second=10**9),)
            ),
        ),
    ],
    ids=["device path", "order", "pages of the kernel", "link speed"],
)
def test_what_moves_by_itself_makes_no_version(moved_by_itself: Inventory) -> None:
    assert content_hash(moved_by_itself) == content_hash(SERVER)
    assert diff(SERVER, moved_by_itself) == ()


def test_a_frequency_hashes_alike_as_int_and_as_float() -> None:
    whole = _with_hardware(cpu=(Cpu(frequency_hertz=2_400_000_000),))
    real = _with_hardware(cpu=(Cpu(frequency_hertz=2.4e9),))

    assert content_hash(whole) == content_hash(real)


def test_parts_that_share_a_serial_number_are_told_apart_by_their_slot() -> None:
    twins = tuple(MemoryModule(slot=slot, serial="00000000") for slot in ("A1", "A2"))
    before = _with_hardware(memory=Memory(modules=twins))
    after = _with_hardware(memory=Memory(modules=(*twins[:1], replace(twins[1], type="DDR5"))))

    assert [change.path for change in diff(before, after)] == ["memory.modules[00000000@A2].type"]


@settings(max_examples=30, deadline=None)
@given(new=INVENTORIES, last=INVENTORIES)
def test_a_failed_part_stays_as_it_was_last_seen(new: Inventory, last: Inventory) -> None:
    assert with_parts_of(new, last, ()) == new
    assert with_parts_of(new, last, PARTS) == last
    kept = with_parts_of(new, last, {"gpu"})
    assert kept.hardware == replace(new.hardware, gpu=last.hardware.gpu)
    assert kept.software == replace(new.software, gpu_driver=last.software.gpu_driver)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (Change(ChangeOp.REMOVED, "gpu[G1]", {"model": "L4"}, None), True),
        (Change(ChangeOp.REMOVED, "memory.modules[M1]", {"slot": "A1"}, None), True),
        (Change(ChangeOp.REMOVED, "interfaces[eth1]", {"name": "eth1"}, None), False),
        (Change(ChangeOp.ADDED, "gpu[G1]", None, {"model": "L4"}), False),
        (Change(ChangeOp.REMOVED, "gpu[G1].driver_version", "550", None), False),
        (Change(ChangeOp.MOVED, "memory.modules[M1].slot", "A1", "B1"), False),
        (Change(ChangeOp.CHANGED, "cpu[0].cores", 16, 8), True),
        (Change(ChangeOp.CHANGED, "cpu[0].cores", 8, 16), False),
        (Change(ChangeOp.CHANGED, "memory.total_bytes", 64 << 30, 32 << 30), True),
        (Change(ChangeOp.CHANGED, "memory.total_bytes", 64 << 30, 63 << 30), False),
    ],
)
def test_a_loss_is_what_a_node_works_with(change: Change, lost: bool) -> None:
    assert is_loss(change) is lost
