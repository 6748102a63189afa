"""Memory modules, from the firmware's tables.

Source: DMTF DSP0134, System Management BIOS Reference Specification 3.7, sections 6.1, 7.17, 7.18.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from gamenode.domain.inventory import MemoryModule

_HEADER_BYTES: Final = 4
_MEMORY_ARRAY: Final = 16
_MEMORY_DEVICE: Final = 17
_END_OF_TABLE: Final = 127
_SYSTEM_MEMORY: Final = 3
_MEBIBYTE: Final = 1024 * 1024
_SIZE_UNKNOWN: Final = 0xFFFF
_SIZE_EXTENDED: Final = 0x7FFF
_SIZE_IN_KIBIBYTES: Final = 0x8000
_SPEED_EXTENDED: Final = 0xFFFF
_TYPES: Final = {
    0x0F: "SDRAM",
    0x12: "DDR",
    0x13: "DDR2",
    0x14: "DDR2 FB-DIMM",
    0x18: "DDR3",
    0x19: "FBD2",
    0x1A: "DDR4",
    0x1B: "LPDDR",
    0x1C: "LPDDR2",
    0x1D: "LPDDR3",
    0x1E: "LPDDR4",
    0x20: "HBM",
    0x21: "HBM2",
    0x22: "DDR5",
    0x23: "LPDDR5",
    0x24: "HBM3",
}
# What firmware writes where nobody filled in a value.
_PLACEHOLDER: Final = re.compile(
    r"(0x)?0+|(0x)?f+|n/?a|none|null|unknown|undefined|not (specified|available|provided)"
    r"|to be filled by o\.?e\.?m\.?|(ser(ial)?num|partnum|manufacturer|array)\d*|default string"
    r"|no ?dimm|empty|\W*",
    re.IGNORECASE,
)
_CHANNEL: Final = (
    # "P0 CHANNEL A", "ChannelA-DIMM0", "Node0 Channel1": the channel is named.
    re.compile(r"(?:(?:P|CPU|PROC|NODE)\D{0,2}(\d+).*)?CHANNEL\W?([A-P]|\d+)", re.IGNORECASE),
    # "CPU1_DIMM_A1", "P1-DIMMA1", "DIMM_B2": a letter for the channel, a number for its slot.
    re.compile(r"(?:(?:P|CPU|PROC)\D{0,2}(\d+)\W?_?)?DIMM[ _-]?([A-P])\d", re.IGNORECASE),
)


@dataclass(frozen=True, slots=True)
class _Structure:
    type: int
    handle: int
    formatted: bytes
    strings: tuple[str, ...]

    def byte(self, offset: int) -> int | None:
        return self._integer(offset, 1)

    def word(self, offset: int) -> int | None:
        return self._integer(offset, 2)

    def double_word(self, offset: int) -> int | None:
        return self._integer(offset, 4)

    def string(self, offset: int) -> str | None:
        """Return a string, but not one that stands for an unknown value."""
        index = self.byte(offset)
        if not index or index > len(self.strings):
            return None
        string = self.strings[index - 1].strip()
        return None if _PLACEHOLDER.fullmatch(string) else string

    def _integer(self, offset: int, length: int) -> int | None:
        # Older firmware has shorter structures: what lies behind their end is not known.
        piece = self.formatted[offset : offset + length]
        return int.from_bytes(piece, "little") if len(piece) == length else None


def memory_modules(table: bytes) -> tuple[MemoryModule, ...]:
    """Return the modules in the sockets of the main board; an empty socket is none.

    Raises:
        ValueError: the table is damaged.
    """
    structures = tuple(_structures(table))
    other_arrays = {
        it.handle
        for it in structures
        if it.type == _MEMORY_ARRAY and it.byte(0x05) != _SYSTEM_MEMORY
    }
    found = [
        (_module(it, size_bytes), it.string(0x11))
        for it in structures
        if it.type == _MEMORY_DEVICE
        and it.word(0x04) not in other_arrays
        and (size_bytes := _size_bytes(it))
    ]
    # "DIMM 0" of the first processor and "DIMM 0" of the second: the bank tells them apart.
    slots = Counter(module.slot for module, _ in found)
    return tuple(
        replace(module, slot=f"{bank} {module.slot}")
        if bank and module.slot and slots[module.slot] > 1
        else module
        for module, bank in found
    )


def _structures(table: bytes) -> Iterator[_Structure]:
    at = 0
    while at + _HEADER_BYTES <= len(table):
        kind, length = table[at], table[at + 1]
        end = table.find(b"\0\0", at + length)
        if length < _HEADER_BYTES or end < 0:
            raise ValueError(f"the SMBIOS table is damaged at byte {at}")
        strings = table[at + length : end].decode("latin-1").split("\0")
        handle = int.from_bytes(table[at + 2 : at + 4], "little")
        yield _Structure(kind, handle, table[at : at + length], tuple(filter(None, strings)))
        if kind == _END_OF_TABLE:
            return
        at = end + 2


def _module(it: _Structure, size_bytes: int) -> MemoryModule:
    slot, bank = it.string(0x10), it.string(0x11)
    return MemoryModule(
        slot=slot or bank,
        size_bytes=size_bytes,
        type=_TYPES.get(it.byte(0x12) or 0),
        frequency_hertz=_transfers_per_s(it, 0x20, 0x58) or _transfers_per_s(it, 0x15, 0x54),
        serial=it.string(0x18),
        manufacturer=it.string(0x17),
        part_number=it.string(0x1A),
        channel=_channel(bank) or _channel(slot),
    )


def _size_bytes(it: _Structure) -> int | None:
    """Return the size; 0: the socket is empty."""
    size = it.word(0x0C)
    if size is None or size == _SIZE_UNKNOWN:
        return None
    if size == _SIZE_EXTENDED:
        extended = it.double_word(0x1C)
        return (extended & 0x7FFFFFFF) * _MEBIBYTE if extended is not None else None
    if size & _SIZE_IN_KIBIBYTES:
        return (size & ~_SIZE_IN_KIBIBYTES) * 1024
    return size * _MEBIBYTE


def _transfers_per_s(it: _Structure, offset: int, extended_offset: int) -> float | None:
    speed = it.word(offset)
    if speed == _SPEED_EXTENDED:
        speed = it.double_word(extended_offset)
    return speed * 1e6 if speed else None


def _channel(locator: str | None) -> str | None:
    for pattern in _CHANNEL:
        match = pattern.search(locator or "")
        if match:
            channel = match[2].upper()
            return channel if match[1] is None else f"{match[1]}-{channel}"
    return None
