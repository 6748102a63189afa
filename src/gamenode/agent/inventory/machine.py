"""What kind of machine this is, and which boot of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from gamenode.agent.inventory.hostfiles import text
from gamenode.domain.node import NodeType

_CONTAINER_MARKS: Final = (
    ".dockerenv",
    "run/.containerenv",
    "run/systemd/container",
    "var/run/secrets/kubernetes.io",
)
_CONTAINER_GROUP: Final = re.compile(r"docker|kubepods|containerd|libpod|lxc|buildkit")
_HYPERVISORS: Final = re.compile(
    r"qemu|kvm|vmware|virtualbox|innotek|xen|bochs|parallels|openstack|bhyve|nutanix|hyper-v"
    r"|virtual machine|amazon ec2|google compute engine|alibaba cloud ecs|digitalocean"
    r"|hetzner vserver",
    re.IGNORECASE,
)
_FIRMWARE: Final = "sys/class/dmi/id"


def node_type(root: Path) -> NodeType:
    """Return what kind of machine this looks like; a setting of the agent overrides it."""
    if _in_container(root):
        return NodeType.CONTAINER
    firmware = " ".join(
        text(root / _FIRMWARE / name) or "" for name in ("sys_vendor", "product_name")
    )
    if firmware.endswith(".metal"):
        return NodeType.PHYSICAL  # a cloud's whole machines bear its name, too
    if _HYPERVISORS.search(firmware) or _under_hypervisor(root):
        return NodeType.VIRTUAL
    return NodeType.PHYSICAL


def boot_id(root: Path) -> str:
    """Return what names this boot of the host."""
    # Without it a restart of the host cannot be told from one of the agent.
    return text(root / "proc/sys/kernel/random/boot_id") or f"unknown-{os.uname().nodename}"


def host_id(root: Path) -> str:
    """Return what names this host through all its boots; empty where nothing does.

    In a container the file belongs to its image, or is made anew with each container.
    """
    return "" if _in_container(root) else text(root / "etc/machine-id") or ""


def _in_container(root: Path) -> bool:
    if text(root / "proc/2/comm") == "kthreadd":
        # No container sees the kernel's threads; a disk that was made from a container's image
        # still has its marks.
        return False
    return any((root / mark).exists() for mark in _CONTAINER_MARKS) or bool(
        _CONTAINER_GROUP.search(text(root / "proc/1/cgroup") or "")
    )


def _under_hypervisor(root: Path) -> bool:
    flags = re.search(r"^flags\s*:\s*(.*)$", text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return (
        (flags is not None and "hypervisor" in flags[1].split())
        # Machines without x86's flags: what the device tree or Xen says.
        or (root / "sys/firmware/devicetree/base/hypervisor").exists()
        or text(root / "sys/hypervisor/type") == "xen"
    )
