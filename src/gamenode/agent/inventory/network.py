"""Network interfaces, from sysfs; their addresses from the kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from gamenode.agent.inventory.addresses import Address
from gamenode.agent.inventory.hostfiles import entries, number, target_name, text
from gamenode.domain.inventory import Network, NetworkInterface

_CONTAINER_LINK: Final = re.compile(
    r"(veth|docker|br-|cni|cali|cilium|flannel|lxc|lxd|virbr|vnet|tap|ifb|dummy|kube-|nodelocaldns)"
    r".*|(tunl|sit|gre|gretap|erspan|ip6tnl|ip6gre|ip_vti|ip6_vti)0"
)
"""What engines and hypervisors name the links that come and go with their guests, and what the
kernel names the ends of tunnels that appear with a module and lead nowhere."""
_NO_MAC: Final = "00:00:00:00:00:00"


def collect(root: Path, addresses: Callable[[], Iterable[Address]]) -> Network:
    """Return the interfaces that the host itself has, with the addresses that somebody configured.

    Left out are loopback, bridges and what belongs to a container or a guest. In a container its
    own interface stays, although it is one end of such a link.

    Raises:
        OSError: the kernel does not list the addresses.
    """
    listed = tuple(addresses())
    return Network(
        interfaces=tuple(
            _interface(entry, listed) for entry in entries(root / "sys/class/net") if _is_own(entry)
        )
    )


def _is_own(entry: Path) -> bool:
    if (entry / "device").exists():
        # A virtual function belongs to whichever guest has it now.
        return not (entry / "device/physfn").exists()
    return (
        entry.name != "lo"
        and not _CONTAINER_LINK.fullmatch(entry.name)
        and not (entry / "bridge").exists()
        and not (entry / "tun_flags").exists()
        and (entry / "ifindex").exists()
    )


def _interface(entry: Path, addresses: Iterable[Address]) -> NetworkInterface:
    # A member of a bond has the bond's address while it is one; its own is kept aside.
    mac = (text(entry / "bonding_slave/perm_hwaddr") or text(entry / "address") or "").lower()
    megabits = number(entry / "speed")  # -1, or an error: the link is down or has none
    index = number(entry / "ifindex")
    return NetworkInterface(
        name=entry.name,
        mac=mac if mac not in {"", _NO_MAC} else None,
        addresses=tuple(it.text for it in addresses if it.interface == index and it.configured),
        speed_bits_per_second=megabits * 1_000_000 if megabits and megabits > 0 else None,
        driver=target_name(entry / "device/driver"),
        virtual=not (entry / "device").exists(),
    )
