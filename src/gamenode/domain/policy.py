"""What a host's owner allows to run there: the rules, and what of a container they refuse.

Every rule is a list of what is allowed: what it does not name, or what cannot be read for certain,
is refused. Where a host path leads is not known here; see `gamenode.agent.policy`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from gamenode.domain.container import shown
from gamenode.domain.pipeline import ContainerSpec, DeviceReservation

LABELS_RESERVED: Final = "gamenode."
"""Labels that begin so say which run a container is; no step may set one."""

_PROPAGATING: Final = frozenset({"shared", "rshared"})
_MOUNT_OPTIONS: Final = frozenset(
    {"ro", "rw", "z", "Z", "nocopy", "private", "rprivate", "slave", "rslave"}
    | {"cached", "consistent", "delegated"}
)
"""What an engine may be told of a mount. Others of them reach the host: `U` changes owners there,
and an overlay's `upperdir` names a folder of it."""

_VOLUME_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TMPFS_OPTIONS: Final = frozenset(
    {"ro", "rw", "exec", "noexec", "suid", "nosuid", "nodev", "size", "mode", "uid", "gid"}
    | {"nr_inodes"}
)
_PERMISSIONS: Final = re.compile(r"[rwm]{1,3}")
_PATH_PART: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE: Final = re.compile(
    rf"[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?/{_PATH_PART}(?:/{_PATH_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@[A-Za-z0-9+._-]+:[0-9a-fA-F]{32,})?",
)
_IMAGE_ID: Final = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}")
_GPU_ID: Final = re.compile(r"[0-9]+(?::[0-9]+)?|(?:GPU|MIG)-[A-Za-z0-9/-]+")
_GPU_DRIVERS: Final = frozenset({"", "nvidia"})
_USER_NUMBERS: Final = re.compile(r"([0-9]{1,10})(?::([0-9]{1,10}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRules:
    """What containers may have of their host."""

    privileged: bool = False
    """Privileged containers, and mounts that propagate to the host."""
    mounts: tuple[str, ...] = ("/var/lib/gamenode/volumes",)
    """Host folders that may be mounted, with everything below them."""
    mount_envs: bool = True
    """Also the folders that the agent's own `[envs.values]` name."""
    volumes: tuple[str, ...] = ("*",)
    """Named volumes, by patterns of their names."""
    devices: tuple[str, ...] = ()
    """Host devices, by patterns of their paths."""
    gpus: bool = True
    """GPUs, reserved as `deploy.resources.reservations.devices`."""
    capabilities: tuple[str, ...] = (
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"),
        *("NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    )
    """What `cap_add` may name; `ALL` stands for every capability."""
    security_opt: tuple[str, ...] = ("no-new-privileges=true",)
    """What `security_opt` may say, by patterns of KEY=VALUE."""
    images: tuple[str, ...] = ("*",)
    """Images, by patterns of their full references, such as `docker.io/library/alpine:*`."""
    networks: tuple[str, ...] = ("default", "bridge", "none")
    """What `network_mode` may be, by patterns; `default` is a step that says nothing."""
    root: bool = True
    """Whether a container may run as root; without, `user` must be a number other than 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRules:
    """What steps may do that run as plain processes of the host, without a container."""

    allowed: bool = True
    """Whether they may run at all."""
    users: tuple[str, ...] = ("*",)
    """As which users, by name or number, or `USER:GROUP`; `*`: as any, root too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All of a host's rules. The defaults are those of a host without a policy file."""

    containers: ContainerRules = field(default_factory=ContainerRules)
    process: ProcessRules = field(default_factory=ProcessRules)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing of a container that is not allowed: the key, in the file's words, and why."""

    key: str
    why: str

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.key}: {self.why}"


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume in its short form. Without a source it is anonymous; with a slash, a host path."""

    source: str
    target: str
    options: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Volume | None:
        """Read `[SOURCE:]TARGET[:OPTION,…]`; None for what an engine might read otherwise."""
        match text.split(":"):
            case [target]:
                source, options = "", ""
            case [source, target] if source:
                options = ""
            case [source, target, options] if source and options:
                pass
            case _:
                return None
        # Podman takes a source such as ./here for a path of the host.
        named = not source or source.startswith("/") or _VOLUME_NAME.fullmatch(source)
        if not named or not target.startswith("/") or "\0" in text:
            return None
        return cls(source, target, tuple(options.split(",")) if options else ())

    @property
    def is_mount(self) -> bool:
        """Whether it is a path of the host."""
        return self.source.startswith("/")

    def at(self, source: str) -> str:
        """Return the short form of the same with another source."""
        return ":".join([source, self.target, *([",".join(self.options)] if self.options else [])])


@dataclass(frozen=True, slots=True)
class Device:
    """A device in its short form."""

    path: str
    inside: str
    permissions: str

    @classmethod
    def parse(cls, text: str) -> Device | None:
        """Read `HOST[:CONTAINER[:PERMISSIONS]]`; None for what is none."""
        path, _, rest = text.partition(":")
        inside, colon, permissions = rest.partition(":")
        if not path.startswith("/") or "\0" in text:
            return None
        if colon and not _PERMISSIONS.fullmatch(permissions):
            return None
        return cls(path, inside or path, permissions or "rwm")

    def at(self, path: str) -> str:
        """Return the short form of the same device, found at another path."""
        return f"{path}:{self.inside}:{self.permissions}"


def reserved_labels(container: ContainerSpec) -> Iterator[Refusal]:
    """Yield the labels that only an agent may set, whatever its policy."""
    for name in container.labels:
        if name.startswith(LABELS_RESERVED):
            yield Refusal(f"labels.{name}", f"labels {LABELS_RESERVED}* are the agent's own")


def refusals(container: ContainerSpec, rules: ContainerRules) -> Iterator[Refusal]:
    """Yield what `rules` refuse of a container, but for where host paths lead."""
    if container.privileged and not rules.privileged:
        yield Refusal("privileged", "true is not allowed (privileged)")
    yield from reserved_labels(container)
    yield from _volume_refusals(container, rules)
    for index, text in enumerate(container.tmpfs):
        for option in text.partition(":")[2].split(","):
            if option and option.partition("=")[0] not in _TMPFS_OPTIONS:
                yield Refusal(f"tmpfs[{index}]", f"{shown(option)} is no option of a tmpfs")
    for index, reserved in enumerate(container.devices_reserved):
        if why := _reservation_problem(reserved, rules):
            yield Refusal(f"deploy.resources.reservations.devices[{index}]", why)
    allowed = {_capability(name) for name in rules.capabilities}
    for index, name in enumerate(container.cap_add):
        if "ALL" not in allowed and _capability(name) not in allowed:
            yield Refusal(f"cap_add[{index}]", f"{name} is not among those allowed (capabilities)")
    options = [_security_option(text) for text in rules.security_opt]
    for index, text in enumerate(container.security_opt):
        if not matches(_security_option(text), options):
            yield Refusal(f"security_opt[{index}]", f"{shown(text)} is not allowed (security_opt)")
    if why := _image_problem(container.image, rules.images):
        yield Refusal("image", why)
    if not matches(container.network_mode or "default", rules.networks):
        mode = shown(container.network_mode)
        yield Refusal("network_mode", f"{mode} is not among {listed(rules.networks)} (networks)")
    if not rules.root and (why := _root_problem(container.user)):
        yield Refusal("user", why)


def matches(text: str, patterns: Iterable[str]) -> bool:
    """Return whether one of `patterns` matches all of `text`; `*` matches slashes too."""
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def listed(texts: Iterable[str]) -> str:
    """Return what is allowed, for a message."""
    return f"({', '.join(texts) or 'none'})"


def full_image(text: str) -> str:
    """Return the full form of an image's reference: `alpine` is `docker.io/library/alpine:latest`.

    By the engines' own rules; what is no reference comes back as some text that is none.
    """
    name, at, digest = text.partition("@")
    domain, slash, path = name.partition("/")
    if not slash or not (re.search("[.:A-Z]", domain) or domain == "localhost"):
        domain, path = "docker.io", name
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in path:
        path = f"library/{path}"
    if ":" not in path.rpartition("/")[2] and not at:
        path += ":latest"
    return f"{domain}/{path}{at}{digest}"


def _volume_refusals(container: ContainerSpec, rules: ContainerRules) -> Iterator[Refusal]:
    for index, text in enumerate(container.volumes):
        key = f"volumes[{index}]"
        volume = Volume.parse(text)
        if volume is None:
            yield Refusal(key, f"{shown(text)} cannot be read for certain")
            continue
        for option in volume.options:
            if option in _PROPAGATING and not rules.privileged:
                yield Refusal(key, f"the option {option} reaches the host (privileged)")
            elif option not in _MOUNT_OPTIONS | _PROPAGATING:
                yield Refusal(key, f"{shown(option)} is no option that a mount may have")
        named = volume.source and not volume.is_mount
        if named and not matches(volume.source, rules.volumes):
            yield Refusal(
                key, f"the volume {volume.source} is not among {listed(rules.volumes)} (volumes)"
            )


def _reservation_problem(reserved: DeviceReservation, rules: ContainerRules) -> str:
    if not rules.gpus:
        return "GPUs are not allowed (gpus)"
    if "gpu" not in reserved.capabilities or reserved.driver not in _GPU_DRIVERS:
        # Another driver, such as `cdi`, may bring any device, and mounts with it.
        return "only GPUs may be reserved: capabilities [gpu], and no driver but nvidia"
    for device_id in reserved.device_ids:
        if not _GPU_ID.fullmatch(device_id):
            return f"{shown(device_id)} is no GPU's number or UUID"
    return ""


def _capability(name: str) -> str:
    return name.upper().removeprefix("CAP_")


def _security_option(text: str) -> str:
    """Return KEY=VALUE, as an engine reads it."""
    if text == "no-new-privileges":
        return "no-new-privileges=true"
    return text if "=" in text else text.replace(":", "=", 1)


def _image_problem(image: str, patterns: tuple[str, ...]) -> str:
    if "*" in patterns:
        return ""
    full = full_image(image)
    if _IMAGE_ID.fullmatch(image):
        return f"{shown(image)} could be an image's id: write its name with a tag (images)"
    if not _IMAGE.fullmatch(full):
        return f"{shown(image)} is no reference to an image (images)"
    if not matches(full, patterns):
        return f"{full} is not among {listed(patterns)} (images)"
    return ""


def _root_problem(user: str) -> str:
    # What a name means, and who runs where none is given, only the image knows.
    numbers = _USER_NUMBERS.fullmatch(user)
    if numbers is None:
        return "it must be given as a number, such as 1000:1000 (root)"
    if 0 in {int(number) for number in numbers.groups() if number is not None}:
        return "root is not allowed (root)"
    return ""
