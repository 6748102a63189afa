"""What a container spec means for a plain process: which keys count, and the command it becomes."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from shlex import join, quote
from typing import Final

from gamenode.agent.runtime import StartError
from gamenode.domain.pipeline import ContainerSpec, Reason

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where commands are looked for, unless the step's environment says otherwise."""

_HONOURED: Final = frozenset(
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
_FILE_KEYS: Final[Mapping[str, str]] = {
    "shm_size_bytes": "shm_size",
    "cpus": "deploy.resources.limits.cpus",
    "memory_bytes": "deploy.resources.limits.memory",
    "memory_reservation_bytes": "deploy.resources.reservations.memory",
    "devices_reserved": "deploy.resources.reservations.devices",
}
"""The pipeline file's names where they are not the fields'."""

_ULIMITS: Final = frozenset(
    {
        *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile"),
        *("nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
    }
)
_TEXT_BYTES_MAX: Final = 128 * 1024
"""The longest argument or variable that Linux passes on."""
_ID_MAX: Final = 2**32 - 2
"""The highest number of a user or group; the next one means none."""
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESTART: Final = re.compile(r"(no|always|unless-stopped|on-failure)(?::([0-9]{1,6}))?")


@dataclass(frozen=True, slots=True)
class Tools:
    """The host's programs that runs are started and kept with, by path."""

    shell: str
    sync: str
    mv: str
    sleep: str
    setpriv: str | None
    prlimit: str | None

    @classmethod
    def find(cls) -> Tools:
        """Look for them.

        Raises:
            FileNotFoundError: one that there is no going without is missing.
        """
        found = {name: shutil.which(name, path=PATH) for name in cls.__slots__}
        # dash is the smallest and quickest shell where a host has several.
        found["shell"] = shutil.which("dash", path=PATH) or shutil.which("sh", path=PATH)
        for name in ("shell", "sync", "mv", "sleep"):
            if found[name] is None:
                raise FileNotFoundError(name)
        return cls(**found)  # type: ignore[arg-type] # those that must not be None are not


@dataclass(frozen=True, slots=True)
class Restart:
    """How often a step is started again, and after what."""

    max: int  # -1: without end
    on: str  # always | failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is executed."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)  # it may hold secrets
    working_dir: Path
    user_id: int | None
    """The owner of what the step may write; None: the agent's user."""

    def script(self) -> bytes:
        """Return what a shell in an empty environment executes, word for word.

        Raises:
            StartError: START_FAILED; no program can be given this, and why.
        """
        texts = (*self.argv, *(f"{name}={value}" for name, value in self.environment.items()))
        if any("\0" in text for text in texts):
            raise _failed("an argument or environment variable has a null character")
        sizes = [len(os.fsencode(text)) + 1 for text in texts]
        if max(sizes) > _TEXT_BYTES_MAX or sum(sizes) > os.sysconf("SC_ARG_MAX"):
            raise _failed("the command, or its environment, is too long for this host")
        exports = (f"export {name}={quote(value)}" for name, value in self.environment.items())
        lines = (
            f"cd {quote(str(self.working_dir))} && unset OLDPWD || exit 126",
            *exports,
            f"exec {join(self.argv)} </dev/null",
        )
        return os.fsencode("\n".join(lines) + "\n")


def unsupported(container: ContainerSpec, tools: Tools) -> tuple[str, ...]:
    """Return the keys of `container` that plain processes cannot honour, in the file's words."""
    unset = ContainerSpec()
    keys = [
        _FILE_KEYS.get(item.name, item.name)
        for item in fields(ContainerSpec)
        if item.name not in _HONOURED and getattr(container, item.name) != getattr(unset, item.name)
    ]
    if container.user and (tools.setpriv is None or os.geteuid() != 0):
        keys.append("user")
    if container.restart and not _RESTART.fullmatch(container.restart):
        keys.append("restart")
    if container.stop_signal and stop_signal(container) is None:
        keys.append("stop_signal")
    keys += [
        f"ulimits.{limit.name}"
        for limit in container.ulimits
        if tools.prlimit is None or limit.name not in _ULIMITS
    ]
    # A shell does not pass other names on.
    keys += [
        f"environment.{name}" for name in container.environment if not _VARIABLE.fullmatch(name)
    ]
    return tuple(keys)


def stop_signal(container: ContainerSpec) -> signal.Signals | None:
    """Return the signal that asks the step to end, by name or number; None if it is none."""
    text = container.stop_signal.upper() or "SIGTERM"
    try:
        if text.isdecimal():
            return signal.Signals(int(text))
        return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"]
    except (KeyError, ValueError):
        return None


def restart(container: ContainerSpec, *, service: bool) -> Restart:
    """Return the restart policy; only a service has one."""
    match = _RESTART.fullmatch(container.restart) if service else None
    if match is None or match[1] == "no":
        return Restart(0, "always")
    if match[1] == "on-failure":
        return Restart(int(match[2] or -1), "failure")
    return Restart(-1, "always")


def command(container: ContainerSpec, tools: Tools, *, work: Path) -> Command:
    """Return what `container` becomes; `work` is where it runs unless it says otherwise.

    Raises:
        StartError: START_FAILED; it cannot run here, and why.
    """
    argv = _argv(container)
    user = _user(container.user)
    account = user.account if user else _account(os.geteuid())
    environment = {
        "PATH": PATH,
        "HOME": account.pw_dir if account else "/",
        "USER": account.pw_name if account else str(os.geteuid()),
        "LANG": "C.UTF-8",
        **container.environment,
    }
    working_dir = work / container.working_dir  # an absolute one stands alone
    if container.working_dir and not working_dir.is_dir():
        raise _failed(f"working_dir {container.working_dir} is not a folder")
    # A name with a slash is meant from the working folder, as everywhere.
    program = argv[0] if "/" not in argv[0] else str(working_dir / argv[0])
    if shutil.which(program, path=environment["PATH"]) is None:
        raise _failed(f"command not found, or not executable: {argv[0]}")
    return Command(
        argv=(
            *_limited(container, tools),
            *_privileged(tools, user),
            *argv,
        ),
        environment=environment,
        working_dir=working_dir,
        user_id=user.id if user else None,
    )


def _argv(container: ContainerSpec) -> tuple[str, ...]:
    if container.commands:
        return ("/bin/sh", "-e", "-c", "\n".join(container.commands))
    if argv := (*container.entrypoint, *container.command):
        return argv
    raise _failed("nothing to run: no commands, no command and no entrypoint")


def _limited(container: ContainerSpec, tools: Tools) -> tuple[str, ...]:
    if not container.ulimits:
        return ()
    assert tools.prlimit is not None
    limits = (
        f"--{limit.name}={_limit(limit.soft)}:{_limit(limit.hard)}" for limit in container.ulimits
    )
    return (tools.prlimit, *limits, "--")


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


def _privileged(tools: Tools, user: _User | None) -> tuple[str, ...]:
    """Return what changes to `user`, and has the kernel end the step with its supervisor."""
    if tools.setpriv is None:
        return ()
    become: tuple[str, ...] = ()
    if user is not None:
        groups = "--init-groups" if user.account else "--clear-groups"
        become = (f"--reuid={user.id}", f"--regid={user.group_id}", groups)
    return (tools.setpriv, "--pdeathsig=KILL", *become, "--")


@dataclass(frozen=True, slots=True)
class _User:
    id: int
    group_id: int
    account: pwd.struct_passwd | None


def _user(text: str) -> _User | None:
    """Read `user[:group]`, names or numbers; a number needs no account."""
    if not text:
        return None
    name, _, group = text.partition(":")
    try:
        account = _account(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        user_id = account.pw_uid if account else int(name)
        group_id = account.pw_gid if account else user_id
        if group:
            group_id = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError, OverflowError) as error:  # unknown, or nothing that could be one
        raise _unknown(text) from error
    if max(user_id, group_id) > _ID_MAX:
        raise _unknown(text)
    return _User(user_id, group_id, account)


def _account(user_id: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(user_id)
    except KeyError:
        return None


def _unknown(user: str) -> StartError:
    return _failed(f"user {user[:64]!r} is not known on this host")


def _failed(message: str) -> StartError:
    return StartError(Reason.START_FAILED, message)
