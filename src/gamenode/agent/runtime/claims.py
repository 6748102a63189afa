"""The claim that a process run has been started: a folder that appears whole, or not at all.

    ROOT/<pipeline>.<step>.<attempt>.<run>/
        claim        what was started, when and in which boot; its supervisor holds a lock on it
        supervisor   the supervisor's /proc/PID/stat, written by itself before the step starts
        start        what its supervisor executes, as a shell script
        stdout       what the step printed; stderr beside it
        work         where the step runs unless it says otherwise
        exit         its exit code; appears when it has ended

Everything here may block. Source: RA2, promise P1.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gamenode.agent.runtime import Ended, RunKey
from gamenode.agent.runtime.members import Cgroup, Members, ProcessStat, Session
from gamenode.domain.errors import invalid
from gamenode.domain.pipeline import Reason
from gamenode.lib.clock import Instant

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")
_NAME_MAX: Final = 100
_NAME: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([0-9]+)\.([0-9]+)", re.ASCII)
"""The name of a run's folder."""
_HIDDEN: Final = "."
"""Folders that are being made or removed begin with it; no run's name does."""


def folder_name(run: RunKey) -> str:
    """Return the name of `run`'s folder.

    Raises:
        GameNodeError: INVALID_REQUEST; the key has no place in a path.
    """
    for text in (run.pipeline_id, run.step):
        if not text or len(text) > _NAME_MAX or _UNSAFE.search(text):
            raise invalid("run", f"{text!r} is not the name of a pipeline or step")
    return f"{run.pipeline_id}.{run.step}.{run.attempt}.{run.run}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What was written before a run was started."""

    boot_id: str
    started_at: Instant
    stop_signal: int
    restarts: bool
    """Whether its supervisor may start it again."""
    cgroup: str
    """The run's own control group; empty where it has none."""


@dataclass(frozen=True, slots=True)
class Draft:
    """The folder of a run to come; nobody takes it for a run before it has that one's name."""

    folder: Path
    cgroup: str
    """The control group to come; empty where there are none."""
    lock: int
    """A descriptor of its claim, which holds the lock on it."""

    def exists(self) -> bool:
        """Return whether nobody has removed it."""
        return (self.folder / "claim").exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A run as its folder shows it."""

    claim: Claim
    supervisor: ProcessStat | None
    """None if it is dead."""
    end: Ended | None
    """Set where nothing of it lives."""


class Claims:
    """The claims below one folder, which one agent at a time uses."""

    def __init__(self, root: Path, *, adoption_s: float) -> None:
        """Keep runs below `root`. A new supervisor shows itself within `adoption_s` at most."""
        self._root = root
        self._adoption_s = adoption_s
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        """What tells one boot of this host from another."""
        # The step of another user passes through to its work folder, and sees nothing else.
        root.mkdir(parents=True, exist_ok=True, mode=0o711)
        for folder in root.iterdir():
            if folder.name.startswith(_HIDDEN):
                _remove(folder)

    def folder(self, run: RunKey) -> Path:
        """Return where `run` is kept."""
        return self._root / folder_name(run)

    def draft(self, groups: Path | None) -> Draft:
        """Make the folder of a run to come, with a control group below `groups`, if any.

        Raises:
            OSError: there is no room, or none that we may use.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}new-", dir=self._root))
        cgroup = str(groups / f"gamenode{folder.name}") if groups else ""
        lock = -1
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
            lock = os.open(folder / "claim", flags, 0o600)
            # Locked before it can be seen: a claim without a lock is always one that was lost.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(lock, json.dumps({"cgroup": cgroup}).encode())
            folder.chmod(0o711)
            (folder / "work").mkdir(0o700)
            for name in ("stdout", "stderr"):
                (folder / name).touch(0o600)
        except OSError:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Draft(folder, cgroup, lock)

    def drop(self, draft: Draft) -> None:
        """Remove a draft in which nothing lives."""
        _remove(draft.folder)

    def make(
        self, run: RunKey, draft: Draft, claim: Claim, start: bytes, *, owner_id: int | None
    ) -> None:
        """Claim `run`, once and for all; `start` says to its supervisor what to execute.

        Durable on return. `owner_id` is the user who owns what the step may write, if not ours.

        Raises:
            FileExistsError: it was claimed before.
        """
        folder = draft.folder
        descriptor = os.open(folder / "start", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(start)
        if owner_id is not None:
            for name in ("work", "stdout", "stderr"):
                os.chown(folder / name, owner_id, -1)
        text = json.dumps(asdict(claim)).encode()
        os.pwrite(draft.lock, text, 0)
        os.ftruncate(draft.lock, len(text))
        os.fsync(draft.lock)
        _sync_folder(folder)
        try:
            # Exclusive: a folder is renamed only onto one that is empty, and a claim's never is.
            folder.rename(self.folder(run))
        except OSError as error:
            if self.folder(run).exists():
                raise FileExistsError(str(self.folder(run))) from error
            raise
        _sync_folder(self._root)

    def read(self, run: RunKey) -> Claim | None:
        """Return the claim of `run`, None if there is none."""
        try:
            return Claim(**json.loads((self.folder(run) / "claim").read_bytes()))
        except FileNotFoundError:
            return None

    def attach(self, run: RunKey, *, now: Instant) -> Attached | None:
        """Return what there is of `run`; None without a claim."""
        if (claim := self.read(run)) is None:
            return None
        deadline = time.monotonic() + self._adoption_s
        while True:
            # In this order: what holds the lock may write its name only now.
            locked = self._locked(run)
            supervisor = self._supervisor(run)
            if not locked:
                members = self.members(run, claim)
                left = members is not None and members.pids()
                return Attached(
                    claim=claim,
                    supervisor=None,
                    end=None if left else self.end(run, claim, now=now),
                )
            if supervisor is not None and supervisor.lives():
                return Attached(claim=claim, supervisor=supervisor, end=None)
            if time.monotonic() > deadline:
                message = f"{self.folder(run)}: locked by a process that does not show itself"
                raise TimeoutError(message)
            time.sleep(0.002)  # it is just being started, or has just ended

    def members(self, run: RunKey, claim: Claim) -> Members | None:
        """Return the processes of `run`, None where nothing of it can live.

        That is so after a reboot, and as long as its supervisor has not come to start it.
        """
        if claim.boot_id != self.boot_id:
            return None
        if claim.cgroup:
            return Cgroup(Path(claim.cgroup))
        supervisor = self._supervisor(run)
        return None if supervisor is None else Session(supervisor)

    def shown(self, run: RunKey) -> bool:
        """Return whether the supervisor of `run` has written its name: signals reach its traps."""
        return self._supervisor(run) is not None

    def end(self, run: RunKey, claim: Claim, *, now: Instant) -> Ended:
        """Return how `run` ended; `now` counts where the host does not know when."""
        written = self.folder(run) / "exit"
        try:
            code = int(written.read_text())
        except FileNotFoundError:
            return Ended(
                reason=Reason.OUTCOME_UNKNOWN,
                message="its supervisor is gone and left no exit code",
                started_at=claim.started_at,
                ended_at=now,
            )
        # The file's time, since the agent may have been away; it is up to a tick behind the clock.
        ended_at = Instant(max(written.stat().st_mtime_ns, claim.started_at))
        return Ended.by_code(code, started_at=claim.started_at, ended_at=ended_at)

    def runs(self) -> list[RunKey]:
        """Return every run that is claimed."""
        # What somebody else has put there is none of ours.
        matches = map(_NAME.fullmatch, os.listdir(self._root))  # noqa: PTH208 - names are all it takes
        return [RunKey(m[1], m[2], int(m[3]), int(m[4])) for m in matches if m]

    def remove(self, run: RunKey) -> None:
        """Remove the folder of `run`, whole or not at all. Safe to repeat."""
        gone = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}gone-", dir=self._root))
        with suppress(FileNotFoundError):
            self.folder(run).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _locked(self, run: RunKey) -> bool:
        descriptor = os.open(self.folder(run) / "claim", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Shared, so that two that look do not take each other for the holder.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(descriptor)

    def _supervisor(self, run: RunKey) -> ProcessStat | None:
        try:
            return ProcessStat.parse((self.folder(run) / "supervisor").read_text())
        except (FileNotFoundError, ValueError):
            return None  # not written yet


def _remove(hidden: Path) -> None:
    """Remove a folder that is no run, and its control group."""
    # What began and was given up may have no claim; what was killed just now may live for a moment.
    with suppress(OSError, ValueError):
        if cgroup := json.loads((hidden / "claim").read_bytes())["cgroup"]:
            Cgroup(Path(cgroup)).remove()
    shutil.rmtree(hidden, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
