"""The addresses of this host's interfaces, asked of the kernel.

`ip` is not installed everywhere, and no file tells a leased address from a configured one.

Source: rtnetlink(7); linux/if_addr.h.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_GET_ADDRESSES: Final = 22
_NEW_ADDRESS: Final = 20
_ERROR: Final = 2
_DONE: Final = 3
_REQUEST_DUMP: Final = 0x301
_HEADER: Final = struct.Struct("=IHHII")
_ADDRESS: Final = struct.Struct("=BBBBI")
_ATTRIBUTE: Final = struct.Struct("=HH")
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_FLAGS: Final = 8
_PERMANENT: Final = 0x80
_SCOPE_LINK: Final = 253
_ANSWER_BYTES_MAX: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface, with its prefix length."""

    interface: int
    """The kernel's number of the interface."""
    text: str
    configured: bool
    """Somebody chose it: not leased, not temporary, not made from the MAC address for the link."""


def ask_addresses(timeout_s: float = 1.0) -> tuple[Address, ...]:
    """Return the addresses of every interface in this network namespace.

    Raises:
        OSError: the kernel refuses, or does not answer in time.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(timeout_s)
        length = _HEADER.size + _ADDRESS.size
        request = _HEADER.pack(length, _GET_ADDRESSES, _REQUEST_DUMP, 1, 0)
        _ = kernel.send(request + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        found: list[Address] = []
        while True:
            answer = kernel.recv(_ANSWER_BYTES_MAX)
            for kind, message in _messages(answer):
                if kind == _DONE:
                    return tuple(found)
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", message)[0], "no addresses")
                if kind == _NEW_ADDRESS:
                    found += _addresses(message)


def _messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(answer):
        length, kind, *_ = _HEADER.unpack_from(answer, at)
        yield kind, answer[at + _HEADER.size : at + length]
        at += _aligned(max(length, _HEADER.size))


def _addresses(message: bytes) -> Iterator[Address]:
    family, prefix_length, flags, scope, interface = _ADDRESS.unpack_from(message)
    if family not in {socket.AF_INET, socket.AF_INET6}:
        return
    attributes = dict(_attributes(message[_ADDRESS.size :]))
    # On a point-to-point link the plain address is the other end's.
    packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    if packed is None:
        return
    if _IFA_FLAGS in attributes:
        flags = int.from_bytes(attributes[_IFA_FLAGS], sys.byteorder)
    yield Address(
        interface=interface,
        text=f"{socket.inet_ntop(family, packed)}/{prefix_length}",
        configured=bool(flags & _PERMANENT) and scope < _SCOPE_LINK,
    )


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(content):
        length, kind = _ATTRIBUTE.unpack_from(content, at)
        yield kind, content[at + _ATTRIBUTE.size : at + length]
        at += _aligned(max(length, _ATTRIBUTE.size))


def _aligned(length: int) -> int:
    return (length + 3) & ~3
