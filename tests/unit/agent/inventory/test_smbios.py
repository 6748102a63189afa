from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.hosts import FIXTURES

from gamenode.agent.inventory.smbios import memory_modules
from gamenode.domain.inventory import MemoryModule

_END = bytes([127, 4, 0, 0, 0, 0])


def _device(
    slot: str,
    bank: str,
    *,
    size: int = 8192,
    extended_size: int = 0,
    speed: int = 4800,
    extended_speed: int = 0,
    length: int = 0x5C,
) -> bytes:
    body = bytearray(length)
    body[0:4] = bytes([17, length, 1, 0])
    for offset, width, value in (
        (0x0C, 2, size),
        (0x10, 1, 1),
        (0x11, 1, 2),
        (0x12, 1, 0x22),
        (0x15, 2, speed),
        (0x1C, 4, extended_size),
        (0x54, 4, extended_speed),
    ):
        if offset + width <= length:
            body[offset : offset + width] = value.to_bytes(width, "little")
    strings = b"\0".join(it.encode() for it in (slot, bank) if it)
    return bytes(body) + strings + b"\0\0"


@pytest.mark.parametrize(
    ("slot", "bank", "channel"),
    [
        ("DIMM 0", "P0 CHANNEL A", "0-A"),
        ("ChannelB-DIMM0", "BANK 2", "B"),
        ("Controller1-ChannelA-DIMM0", "BANK 1", "A"),
        ("P1-DIMMC1", "P0_Node1_Channel2_Dimm0", "0-2"),
        ("CPU2_DIMM_A1", "NODE 2", "2-A"),
        ("DIMM_B2", "BANK 3", "B"),
        ("A1", "Not Specified", None),
        ("RAM slot #0", "Bank 0", None),
    ],
)
def test_the_channel_is_what_the_board_prints(slot: str, bank: str, channel: str | None) -> None:
    (module,) = memory_modules(_device(slot, bank) + _END)

    assert module.channel == channel


def test_large_sizes_and_high_speeds_stand_in_their_extended_fields() -> None:
    table = _device(
        "A1", "", size=0x7FFF, extended_size=64 * 1024, speed=0xFFFF, extended_speed=70_000
    )

    assert memory_modules(table + _END) == (
        MemoryModule(slot="A1", size_bytes=64 * 2**30, type="DDR5", frequency_hertz=7e10),
    )


def test_old_and_short_structures_say_less() -> None:
    (module,) = memory_modules(_device("A1", "", size=0x8000 | 512, length=0x15) + _END)

    assert module == MemoryModule(slot="A1", size_bytes=512 * 1024, type="DDR5")


def test_slots_of_one_name_are_told_apart_by_their_bank() -> None:
    table = _device("DIMM 0", "P0 CHANNEL A") + _device("DIMM 0", "P1 CHANNEL A") + _END

    assert [it.slot for it in memory_modules(table)] == [
        "P0 CHANNEL A DIMM 0",
        "P1 CHANNEL A DIMM 0",
    ]


def test_a_table_that_ends_too_early_is_damaged() -> None:
    with pytest.raises(ValueError, match="damaged at byte 0"):
        _ = memory_modules(_device("A1", "B1")[:-3])


def _real_table() -> bytes:
    lines = (FIXTURES / "dual-socket-4gpu/smbios.hex").read_text().splitlines()
    return b"".join(bytes.fromhex(line) for line in lines if not line.startswith("#"))


@given(st.binary(max_size=200), st.integers(0, 900))
@example(b"\0\0\0\0", 0)
def test_no_bytes_of_a_firmware_bring_the_reader_down(noise: bytes, at: int) -> None:
    table = _real_table()

    with suppress(ValueError):
        _ = memory_modules(table[:at] + noise + table[at:])
