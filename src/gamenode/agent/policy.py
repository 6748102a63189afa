"""The host's own last word on what starts there: a file of its owner's.

What is refused is refused for good: the step fails with the reason POLICY and is not tried again.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from gamenode.agent.runtime import StartError
from gamenode.domain.container import shown
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.domain.policy import (
    ContainerRules,
    Device,
    ProcessRules,
    Refusal,
    Rules,
    Volume,
    listed,
    matches,
    refusals,
    reserved_labels,
)
from gamenode.lib.settings import SettingsError, load_settings

_log = logging.getLogger(__name__)

_ALL: Final = Path("/")
_FILE_BYTES_MAX: Final = 64 * 1024
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH
_LOADER: Final = re.compile(
    r"LD_.*|MUSL_.*|GLIBC_TUNABLES|GCONV_PATH|GETCONF_DIR|HOSTALIASES|LOCALDOMAIN|LOCPATH"
    r"|MALLOC_.*|NIS_PATH|NLSPATH|RESOLV_HOST_CONF|RES_OPTIONS"
)
"""Variables that a C library obeys, and ignores where a program changes its user."""


class Policy(Protocol):
    """Has the last word before a start."""

    async def admit(self, container: ContainerSpec, *, runtime: str) -> ContainerSpec:
        """Return `container` as it may be started: host paths are those that they lead to.

        Asked again right before the start, since paths and rules may have changed meanwhile.

        Raises:
            StartError: POLICY; every key that is not allowed, and the rules.
        """


class OpenPolicy:
    """Allows everything, on a machine whose user and owner are one."""

    async def admit(self, container: ContainerSpec, *, runtime: str) -> ContainerSpec:  # noqa: ARG002 - the Protocol's
        """Return `container` as it is; the labels of runs are not a step's to set, even so."""
        _raise_for(list(reserved_labels(container)), "")
        return container


class FilePolicy:
    """The rules of a file, read again whenever it has changed. Without the file, the defaults.

    The file must be root's, or the agent's own user's, and nobody else's to write; so must the
    folders above it. While it cannot be used, nothing starts.
    """

    def __init__(self, path: Path, *, envs: Mapping[str, str]) -> None:
        """Read `path`; `envs` are the node's own values.

        Raises:
            GameNodeError: INVALID_REQUEST, the file cannot be used, and why.
        """
        self._path = path
        self._env_roots = [value for value in envs.values() if value.startswith("/")]
        try:
            self._known = _read(path)
        except _UnusableError as error:
            raise GameNodeError(
                ErrorCode.INVALID_REQUEST, f"the node's policy: {error}", hint=error.advice
            ) from error

    async def admit(self, container: ContainerSpec, *, runtime: str) -> ContainerSpec:
        """Judge by the rules as they are now."""
        return await asyncio.to_thread(self._admit, container, runtime)

    def _admit(self, container: ContainerSpec, runtime: str) -> ContainerSpec:
        rules = self._current()
        if runtime == "process":
            _raise_for(list(_process_refusals(container, rules.process)), self._path.name)
            return container
        found = list(refusals(container, rules.containers))
        volumes, refused_volumes = self._resolved_volumes(container, rules.containers)
        devices, refused_devices = _resolved_devices(container, rules.containers)
        _raise_for([*found, *refused_volumes, *refused_devices], self._path.name)
        return replace(container, volumes=tuple(volumes), devices=tuple(devices))

    def _current(self) -> Rules:
        try:
            # One attribute: several starts may come here at once, each on its thread.
            seen, rules = self._known
            if _signature(self._path) != seen:
                _, rules = self._known = _read(self._path)
        except _UnusableError as error:
            _log.error(
                "nothing starts: the node's policy cannot be used: %s",
                error,
                extra={"event": "policy.unusable"},
            )
            raise StartError(
                Reason.POLICY,
                f"nothing starts on this node, since its policy cannot be used: {error}",
            ) from error
        return rules

    def _resolved_volumes(
        self, container: ContainerSpec, rules: ContainerRules
    ) -> tuple[list[str], list[Refusal]]:
        """Return the volumes with the host paths that they lead to, and those outside the roots."""
        read = [(text, Volume.parse(text)) for text in container.volumes]
        if not any(volume is not None and volume.is_mount for _, volume in read):
            return list(container.volumes), []  # a disk that hangs holds up only who wants it
        roots, shown_roots = self._roots(rules)
        volumes: list[str] = []
        refused: list[Refusal] = []
        for index, (text, volume) in enumerate(read):
            if volume is None or not volume.is_mount:
                volumes.append(text)
                continue
            try:
                source = resolved(volume.source)
            except OSError as error:
                why = f"{volume.source}: {error.strerror}"
                refused.append(Refusal(f"volumes[{index}]", why))
                continue
            if ":" in str(source):
                # An engine would take what is behind it for something else.
                refused.append(Refusal(f"volumes[{index}]", f"{source} has a colon in its name"))
            elif any(source.is_relative_to(root) for root in roots):
                volumes.append(volume.at(str(source)))
            else:
                leads = _leads(volume.source, source)
                why = f"{leads} is outside the allowed roots {shown_roots}"
                refused.append(Refusal(f"volumes[{index}]", why))
        return volumes, refused

    def _roots(self, rules: ContainerRules) -> tuple[list[Path], str]:
        """Return the folders that may be mounted from, and what to tell of them.

        No link may be in the path of a root: one below another root could be made a link by whoever
        has that one mounted, and would then allow what it leads to.
        """
        named = [*rules.mounts]
        if rules.mount_envs:
            # Folders only, and never the whole host, which an env may name for other reasons.
            named += [root for root in self._env_roots if _is_folder_below_all(root)]
        roots: list[Path] = []
        told: list[str] = []
        for root in named:
            try:
                plain = resolved(root) == _plainly(root)
            except OSError:
                plain = False
            if plain:
                roots.append(_plainly(root))
            told.append(root if plain else f"{root}, which has a link in it or cannot be seen")
        return roots, listed(told)


class _UnusableError(Exception):
    """A policy file that cannot be used; the message says why, `advice` what to do."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


def resolved(path: str) -> Path:
    """Return where a host path leads: no link is left in it. What is missing stays as it is named.

    Raises:
        OSError: where it leads cannot be told: it goes up again with `..`, a link of it leads
            nowhere or in a circle, or it may not be looked at.
    """
    # An engine takes `..` away before it follows links, which may lead elsewhere.
    if ".." in path.split("/"):
        raise OSError(0, "a path must not go up with ..")
    there = _plainly(path)
    missing: list[str] = []
    while True:
        try:
            return Path(os.path.realpath(there, strict=True), *missing)
        except FileNotFoundError:
            if there.is_symlink():
                raise OSError(0, f"the link {there} leads nowhere") from None
            missing.insert(0, there.name)
            there = there.parent


def _plainly(path: str) -> Path:
    """Return an absolute path without what means nothing; two slashes at its head are one."""
    return Path("/" + path.lstrip("/"))


def _is_folder_below_all(path: str) -> bool:
    try:
        return Path(path).is_dir() and _plainly(path) != _ALL
    except OSError:
        return False


def _leads(named: str, found: Path) -> str:
    return named if named == str(found) else f"{named}, which is {found},"


def _resolved_devices(
    container: ContainerSpec, rules: ContainerRules
) -> tuple[list[str], list[Refusal]]:
    """Return the devices with the paths that they lead to, and those that are not allowed."""
    devices: list[str] = []
    refused: list[Refusal] = []
    # A name such as /dev/serial/by-id/… is a link; its owner allows what it leads to.
    named = {Path(os.path.realpath(it)) for it in rules.devices if not set("*?[") & set(it)}
    for index, text in enumerate(container.devices):
        key = f"devices[{index}]"
        device = Device.parse(text)
        if device is None:
            refused.append(Refusal(key, f"{shown(text)} is no path of a device"))
            continue
        try:
            path = resolved(device.path)
        except OSError as error:
            refused.append(Refusal(key, f"{device.path}: {error.strerror}"))
            continue
        if (path in named or matches(str(path), rules.devices)) and ":" not in str(path):
            devices.append(device.at(str(path)))
        else:
            leads = _leads(device.path, path)
            refused.append(Refusal(key, f"{leads} is not among {listed(rules.devices)} (devices)"))
    return devices, refused


def _process_refusals(container: ContainerSpec, rules: ProcessRules) -> Iterator[Refusal]:
    if not rules.allowed:
        yield Refusal("container", "this node runs no plain processes (process.allowed)")
        return
    if "*" in rules.users:
        return
    name, _, group = container.user.partition(":")
    user_id = _user_id(name) if name else os.geteuid()
    if not _names_of(user_id, group) & set(rules.users):
        who = container.user or f"user {user_id}, the agent's own,"
        yield Refusal("user", f"{who} is not among {listed(rules.users)} (process.users)")
    if user_id == os.geteuid():
        return
    for variable in container.environment:
        if _LOADER.fullmatch(variable):
            # The program that changes the user runs as the agent's, and would obey it.
            yield Refusal(f"environment.{variable}", "not where a step changes its user")


def _names_of(user_id: int | None, group: str) -> set[str]:
    """Return everything by which a rule may name a user, with `group` where one is given.

    A group that the user is in anyway need not be named: its processes have it without asking.
    """
    if user_id is None:
        return set()  # the runtime knows no such user either
    names = {str(user_id)}
    groups: set[int] = set()
    with suppress(KeyError, OverflowError):
        account = pwd.getpwuid(user_id)
        names.add(account.pw_name)
        groups.update(os.getgrouplist(account.pw_name, account.pw_gid))
    if not group:
        return names
    group_id = _group_id(group)
    if group_id is None:
        return set()
    group_names = {str(group_id)}
    with suppress(KeyError, OverflowError):
        group_names.add(grp.getgrgid(group_id).gr_name)
    named = {f"{user}:{its}" for user in names for its in group_names}
    return named | names if group_id in groups else named


def _user_id(text: str) -> int | None:
    with suppress(KeyError, ValueError):  # there is none, or none can be named so
        return int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid
    return None


def _group_id(text: str) -> int | None:
    with suppress(KeyError, ValueError):
        return int(text) if text.isdecimal() else grp.getgrnam(text).gr_gid
    return None


def _raise_for(found: Sequence[Refusal], file_name: str) -> None:
    if not found:
        return
    advice = f"; ask this node's owner: {file_name}" if file_name else ""
    raise StartError(Reason.POLICY, "; ".join(map(str, found)) + advice)


_Signature = tuple[int, ...]


def _signature(path: Path) -> _Signature | None:
    """Return what changes with a file; None: it is not there."""
    try:
        return _signature_of(path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _UnusableError(f"{path}: {error.strerror}") from error


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _UnusableError(f"{path}: {error.strerror}") from error


def _signature_of(found: os.stat_result) -> _Signature:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(path: Path) -> tuple[_Signature | None, Rules]:
    """Return the rules of a file, and by what to see that it has changed."""
    try:
        # Not to wait for ever where somebody put a pipe in its place.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None, Rules()
    except OSError as error:
        raise _UnusableError(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _UnusableError(f"{path} is not a file")
        _check_owner(path, found)
        for folder in Path(os.path.realpath(path)).parents:
            _check_owner(folder, _stat(folder))
        content = file.read(_FILE_BYTES_MAX + 1)
    if len(content) > _FILE_BYTES_MAX:
        raise _UnusableError(f"{path} is longer than {_FILE_BYTES_MAX} bytes")
    try:
        rules = load_settings(
            Rules,
            file=tomllib.loads(content.decode()),
            file_name=str(path),
            environment={},
            prefix="",
            flags={},
        )
    except SettingsError as error:
        raise _UnusableError(str(error)) from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise _UnusableError(f"{path}: {error}") from error
    for root in rules.containers.mounts:
        if not root.startswith("/") or ".." in root.split("/") or "\0" in root:
            raise _UnusableError(
                f"{path}: containers.mounts: {shown(root)} is not an absolute path without .."
            )
    return _signature_of(found), rules


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in {0, os.geteuid()}:
        raise _UnusableError(
            f"{path} belongs to user {found.st_uid}, who could change what this node allows",
            f"chown root {path}",
        )
    # In a folder such as /tmp everybody may write, but nobody change what is another's.
    if found.st_mode & _WRITABLE and not (
        stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    ):
        raise _UnusableError(
            f"{path} may be written to by others than its owner, who could change what this node"
            " allows",
            f"chmod go-w {path}",
        )
