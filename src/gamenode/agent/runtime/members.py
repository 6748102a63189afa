"""Which processes belong to a run, and how they are signalled. Linux; every call may block.

A run has its own control group (version 2) where the agent may make one: nothing leaves that.
Elsewhere it is the session of its supervisor, which a process that calls setsid(2) leaves.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What identifies a process while this boot lasts: its number and when it started."""

    pid: int
    started_ticks: int
    session: int
    zombie: bool

    @classmethod
    def parse(cls, line: str) -> ProcessStat:
        """Read a line of /proc/PID/stat; a ValueError if it is none."""
        # The name, in parentheses, may hold spaces and parentheses itself.
        pid, _, rest = line.partition(" (")
        fields = rest.rpartition(") ")[2].split()
        try:
            return cls(int(pid), int(fields[19]), int(fields[3]), fields[0] in "ZX")
        except IndexError as error:
            raise ValueError(line) from error

    @classmethod
    def of(cls, pid: int) -> ProcessStat | None:
        """Return the process `pid`, None if there is none."""
        try:
            return cls.parse(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            return None

    def lives(self) -> bool:
        """Return whether exactly this process is there still."""
        now = ProcessStat.of(self.pid)
        return now is not None and now.started_ticks == self.started_ticks

    def hold(self) -> int | None:
        """Return a pidfd of exactly this process, for the caller to close; None if it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if not self.lives():
            os.close(pidfd)
            return None
        return pidfd


class Members(Protocol):
    """The living processes of one run, its supervisor not counted."""

    def pids(self) -> set[int]:
        """Return their numbers."""

    def remove(self) -> None:
        """Give back what the host keeps for the set. Only when it is empty; safe to repeat."""


@dataclass(frozen=True, slots=True)
class Session:
    """The processes of a session whose first one was the supervisor."""

    supervisor: ProcessStat

    def pids(self) -> set[int]:
        """Return who is in the session, by a look at every process."""
        leader = ProcessStat.of(self.supervisor.pid)
        if leader is not None and leader.started_ticks != self.supervisor.started_ticks:
            # The kernel gives a number again only when no session bears it: ours is empty.
            return set()
        found = set()
        for entry in os.listdir("/proc"):  # noqa: PTH208 - a Path for each process is a waste
            if entry.isdecimal() and int(entry) != self.supervisor.pid:
                it = ProcessStat.of(int(entry))
                if it is not None and it.session == self.supervisor.pid and not it.zombie:
                    found.add(it.pid)
        return found

    def remove(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The processes of a control group."""

    path: Path

    @classmethod
    def parent(cls) -> Path | None:
        """Return the agent's own group if it can make groups of version 2 below it, else None."""
        own = _own_group()
        if own is None:
            return None
        probe = cls(own / f"gamenode-probe-{os.getpid()}")
        try:
            probe.make()
            # A kernel before 5.14 cannot kill a group; one below a threaded one takes no process.
            usable = (probe.path / "cgroup.kill").exists() and (
                probe.path / "cgroup.type"
            ).read_text() == "domain\n"
            probe.remove()
        except OSError:
            return None
        return own if usable and os.access(own / "cgroup.procs", os.W_OK) else None

    def make(self) -> None:
        """Make the group, empty.

        Raises:
            OSError: it cannot be made, or there is one in which something lives.
        """
        self.remove()
        self.path.mkdir()

    def pids(self) -> set[int]:
        """Return who is in the group, or in one that a member made below it."""
        found: set[int] = set()
        for listing in self.path.rglob("cgroup.procs"):
            # A group that is removed meanwhile is not found, or has no device any more.
            with suppress(OSError):
                found.update(int(pid) for pid in listing.read_text().split())
        return found

    def remove(self) -> None:
        """Remove the group and what was made below it."""
        groups = {listing.parent for listing in self.path.rglob("cgroup.procs")}
        for group in sorted(groups, reverse=True):
            with suppress(FileNotFoundError):
                group.rmdir()


def _own_group() -> Path | None:
    """Return the folder of the control group of version 2 that this process is in."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    name = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 ") and name is not None:
            return Path(mount.split()[4]) / name
    return None


def signal_all(members: Members, number: signal.Signals) -> int:
    """Send `number` to every member; return how many there were.

    A number that was given to another process meanwhile is not hit: each is held by a descriptor
    before it is looked at again.
    """
    held = {}
    try:
        for pid in members.pids():
            with suppress(ProcessLookupError):
                held[pid] = os.pidfd_open(pid)
        still = members.pids() if held else set()
        for pid, descriptor in held.items():
            if pid in still:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
    finally:
        for descriptor in held.values():
            os.close(descriptor)
    return len(still)
