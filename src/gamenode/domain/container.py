"""How the texts of a container must look: the Compose specification's short forms.

The pipeline file is checked by this table when it is read, and again where a value was filled in.
Beside it: which fields a runtime honours, and the ports that a container takes of its host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

PORT_MAX: Final = 65_535


@dataclass(frozen=True, slots=True)
class Form:
    """What a text must be: a name for people, a pattern for all of it, an example."""

    what: str
    pattern: str
    example: str
    accepts: Callable[[str], bool] = lambda _: True
    """What the pattern cannot say."""

    def fits(self, text: str) -> bool:
        """Return whether `text` is one."""
        return bool(re.fullmatch(self.pattern, text, re.ASCII)) and self.accepts(text)

    def refusal(self, text: str) -> tuple[str, str]:
        """Return what is wrong with a `text` that does not fit, and advice."""
        return f"{shown(text)} is not {self.what}", f"write {self.what} such as {self.example}"

    def problem(self, text: str) -> tuple[str, str] | None:
        """Return what is wrong with `text`, and advice; or None."""
        return None if self.fits(text) else self.refusal(text)


_SHOWN_MAX: Final = 80
_PATH: Final = r"/[^:\0]*"


def shown(text: str) -> str:
    """Return `text` quoted for a message, and not longer than that bears."""
    return repr(text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…")


def normal_port(text: str) -> str:
    """Return the port with its host part written out; 0 is any that is free.

    Parts that are templates are left alone, and so is what is no port at all.
    """
    body, slash, protocol = text.partition("/")
    match body.rsplit(":", 2):
        case [container] if container:
            body = f"0:{container}"
        case [address, "", container] if address and container:
            body = f"{address}:0:{container}"
        case _:
            pass
    return body + slash + protocol


def _is_port(text: str) -> bool:
    *address, host, container = text.partition("/")[0].rsplit(":", 2)
    return (
        all(_is_address(part.strip("[]")) for part in address)
        and int(host) <= PORT_MAX
        and 0 < int(container) <= PORT_MAX
    )


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


FORMS: Final[Mapping[str, Form]] = {
    "image": Form("an image", r"[A-Za-z0-9][^\s]{0,511}", "alpine:3.20"),
    "container_name": Form("a container name", r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "game-1"),
    "hostname": Form("a host name", r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", "game-1"),
    "working_dir": Form("an absolute path", r"/[^\0]*", "/data"),
    "user": Form("a user", r"[^\s:]+(?::[^\s:]+)?", "1000:1000"),
    "volumes": Form(
        "a volume",
        rf"(?:{_PATH}|[A-Za-z0-9][A-Za-z0-9_.-]*):{_PATH}(?::[A-Za-z]+(?:,[A-Za-z]+)*)?",
        "/srv/data:/data:ro",
    ),
    "tmpfs": Form("a tmpfs", rf"{_PATH}(?::[^\s:]+)?", "/run:size=64m"),
    "ports": Form(
        "a port",
        r"(?:(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+):)?[0-9]{1,5}:[0-9]{1,5}(?:/(?:tcp|udp|sctp))?",
        "8080:80",
        _is_port,
    ),
    "devices": Form("a device", rf"{_PATH}(?::{_PATH}(?::[rwm]{{1,3}})?)?", "/dev/kvm"),
    "cap_add": Form("a capability", r"[A-Za-z_]+", "SYS_NICE"),
    "cap_drop": Form("a capability", r"[A-Za-z_]+", "ALL"),
    "security_opt": Form("a security option", r"[^\s][^\0]*", "no-new-privileges:true"),
    "extra_hosts": Form("a host and its address", r"[^\s:=]+:[^\s]+", "db:10.0.0.5"),
    "network_mode": Form("a network mode", r"[A-Za-z0-9][A-Za-z0-9_.:/-]*", "host"),
    "restart": Form(
        "a restart policy", r"no|always|unless-stopped|on-failure(?::[0-9]{1,4})?", "on-failure:3"
    ),
    "stop_signal": Form("a signal", r"(?:SIG)?[A-Z][A-Z0-9+-]{1,14}|[0-9]{1,2}", "SIGINT"),
    "pull_policy": Form("a pull policy", r"always|missing|never", "missing"),
}
"""By the field of `ContainerSpec` that they stand in. Fields that are absent take any text."""


HONOURED: Final[Mapping[str, frozenset[str]]] = {
    "process": frozenset(
        {
            "command",
            "commands",
            "entrypoint",
            "environment",
            "working_dir",
            "user",
            "ulimits",
            "ports",  # reserved by placement; a process listens where it likes
            "restart",
            "stop_grace_period_s",
            "stop_signal",
            "image",  # these three mean nothing here, and harm nothing
            "pull_policy",
            "init",
        }
    )
}
"""The fields of `ContainerSpec` that a runtime honours; one that is absent here honours all."""

FILE_KEYS: Final[Mapping[str, str]] = {
    "shm_size_bytes": "shm_size",
    "cpus": "deploy.resources.limits.cpus",
    "memory_bytes": "deploy.resources.limits.memory",
    "memory_reservation_bytes": "deploy.resources.reservations.memory",
    "devices_reserved": "deploy.resources.reservations.devices",
}
"""The pipeline file's names of those fields that have another one there."""


# Ports of a host

ANY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared, not listened on
_PUBLISHED: Final = re.compile(
    r"(?:(?:(?P<address>\[[^\]]*\]|[0-9.]+):)?(?P<host>[0-9]+(?:-[0-9]+)?)?:)?"
    r"(?P<container>[0-9]+(?:-[0-9]+)?)(?:/(?P<protocol>tcp|udp|sctp))?"
)


@dataclass(frozen=True, slots=True, order=True)
class HostPort:
    """A port of a host, on one of its addresses or on all."""

    number: int
    protocol: str = "tcp"
    address: str = ""

    def meets(self, other: HostPort) -> bool:
        """Return whether only one of the two can be listened on."""
        if (self.number, self.protocol) != (other.number, other.protocol):
            return False
        both = {self.address, other.address}
        return len(both) == 1 or bool(both & ANY_ADDRESS)

    def __str__(self) -> str:
        """Return it as people write it: `127.0.0.1:8080/tcp`."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}{':' if address else ''}{self.number}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports of a host, both ends included."""

    first: int
    last: int

    def __len__(self) -> int:
        """Return how many there are."""
        return max(0, self.last - self.first + 1)

    def __iter__(self) -> Iterator[int]:
        """Return every one, the lowest first."""
        return iter(range(self.first, self.last + 1))


def host_ports(text: str) -> tuple[HostPort, ...] | str:
    """Return what `[[ADDRESS:]HOST:]CONTAINER[/PROTOCOL]` takes of a host.

    That is the ports it names, or the protocol of one that is to be chosen for it. Nothing for a
    text that is no port, as while a part of it is a template, and for a range without host ports:
    those are not reserved, and the engine chooses.
    """
    match = _PUBLISHED.fullmatch(text)
    if match is None:
        return ()
    protocol = match["protocol"] or "tcp"
    first, _, last = (match["host"] or "0").partition("-")
    if not int(first):
        return () if "-" in match["container"] else protocol
    address = (match["address"] or "").strip("[]")
    return tuple(
        HostPort(number, protocol, address) for number in range(int(first), int(last or first) + 1)
    )


def with_host_port(text: str, number: int) -> str:
    """Return a text whose host port is to be chosen, with the one that was."""
    body, slash, protocol = normal_port(text).partition("/")
    head, _, container = body.rpartition(":")
    address = head.rpartition(":")[0]
    return f"{address}{':' if address else ''}{number}:{container}{slash}{protocol}"


def text_problem(path: str, text: str) -> tuple[str, str] | None:
    """Return what is wrong with the text at `path`, such as `ports[0]`, and advice; or None."""
    form = FORMS.get(re.split(r"[.\[]", path, maxsplit=1)[0])
    return form.problem(text) if form else None
