"""Disks, from sysfs: what `lsblk` shows, without what lies on top of a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gamenode.agent.inventory.hostfiles import entries, number, text
from gamenode.domain.inventory import Disk

_SECTOR_BYTES: Final = 512
"""The unit of `size` in sysfs, whatever the disk's own sectors are."""
_NO_DISK: Final = re.compile(
    r"(loop|ram|zram|sr|fd|nbd|dm-|md|drbd|rbd|zd|mmcblk\d+(boot|rpmb))\d*.*"
)
_UDEV_SERIAL: Final = re.compile(r"^E:ID_SERIAL_SHORT=(.+)$", re.MULTILINE)
_PAGE_HEADER_BYTES: Final = 4


def collect(root: Path) -> tuple[Disk, ...]:
    """Return the disks that are there; memory, images and drives without a medium are none."""
    mounts = _mounts(root)
    return tuple(_disk(root, block, mounts) for block in _blocks(root))


def _blocks(root: Path) -> Iterator[Path]:
    for block in entries(root / "sys/block"):
        hidden = number(block / "hidden")  # one of several paths to a disk that is shown, too
        if not _NO_DISK.fullmatch(block.name) and number(block / "size") and not hidden:
            yield block


def _disk(root: Path, block: Path, mounts: Mapping[str, tuple[str, ...]]) -> Disk:
    rotational = number(block / "queue/rotational")
    sectors = number(block / "size")
    return Disk(
        # An SD card has a name where others have a model.
        model=text(block / "device/model") or text(block / "device/name"),
        capacity_bytes=sectors * _SECTOR_BYTES if sectors is not None else None,
        type=None if rotational is None else "hdd" if rotational else "ssd",
        interface=_interface(block),
        path="/dev/" + block.name.replace("!", "/"),
        serial=_serial(root, block),
        mounts=tuple(
            sorted(mount for number in _numbers(root, block) for mount in mounts.get(number, ()))
        ),
    )


def _interface(block: Path) -> str | None:
    if block.name.startswith("nvme"):
        return "nvme"
    if block.name.startswith("mmcblk"):
        return "mmc"
    place = str(block.resolve())
    for sign, interface in (
        ("/usb", "usb"),
        ("/ata", "sata"),
        ("/end_device-", "sas"),
        ("/virtio", "virtio"),
        ("/vbd-", "xen"),
        ("/host", "scsi"),
    ):
        if sign in place:
            return interface
    return None


def _serial(root: Path, block: Path) -> str | None:
    for path in ("serial", "device/serial"):
        if serial := text(block / path):
            return serial
    try:
        # The disk's own answer: SCSI's page of vital product data 0x80.
        page = (block / "device/vpd_pg80").read_bytes()[_PAGE_HEADER_BYTES:]
    except OSError:
        page = b""
    if serial := page.decode("ascii", "ignore").strip(" \0"):
        return serial
    device = text(root / "run/udev/data" / f"b{text(block / 'dev')}")
    found = _UDEV_SERIAL.search(device or "")
    return found[1] if found else None


def _numbers(root: Path, block: Path) -> set[str]:
    """Return the device numbers of a disk, its partitions, and all volumes that use them."""
    found: set[str] = set()
    waiting = [block]
    while waiting:
        device = waiting.pop()
        own = text(device / "dev")
        if own is None or own in found:
            continue
        found.add(own)
        waiting += [part for part in entries(device) if (part / "partition").exists()]
        waiting += [root / "sys/block" / user.name for user in entries(device / "holders")]
    return found


def _mounts(root: Path) -> dict[str, tuple[str, ...]]:
    """Return where each device is mounted, by its number.

    A part of a file system that is mounted once more elsewhere (as containers do all the time) is
    no mount of its disk.
    """
    numbers = {
        f"/dev/{device.name}": text(device / "dev") for device in entries(root / "sys/class/block")
    }
    mounts: dict[str, tuple[str, ...]] = {}
    for line in (text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        _, _, number_, subtree, path, *_ = before.split(" ")
        kind, source, *options = after.split(" ", 2)
        if kind == "btrfs":
            # Its device numbers are made up; the whole of a mount is a subvolume.
            whole = re.search(r"(?:^|,)subvol=([^,]+)", options[0] if options else "")
            number_ = numbers.get(source) or number_
            subtree = "/" if whole and whole[1] == subtree else subtree
        if subtree == "/":
            unescaped = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
            if unescaped not in mounts.get(number_, ()):
                mounts[number_] = (*mounts.get(number_, ()), unescaped)
    return mounts
