"""The supervisors of process runs, some of which wait ready for the next run.

To start a supervisor takes milliseconds, and to join a control group ten where the kernel has to
wait for its readers. Neither depends on what will run, so it is done ahead. Everything here may
block, and may be called from several threads.
"""

from __future__ import annotations

import os
import subprocess
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

from gamenode.agent.runtime.claims import Claims, Draft
from gamenode.agent.runtime.members import Cgroup
from gamenode.agent.runtime.process_spec import Restart, Tools

_SCRIPT: Final = Path(__file__).with_name("supervisor.sh")
_ONCE: Final = Restart(0, "always")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A supervisor that has started nothing yet."""

    draft: Draft
    pid: int
    go: int
    """A word on this descriptor starts the run; its end without one ends the supervisor."""


class Supervisors:
    """Starts supervisors, and keeps a few that wait."""

    def __init__(self, tools: Tools, claims: Claims, *, ready_max: int) -> None:
        """Start none yet; keep at most `ready_max` ready."""
        self._tools = tools
        self._claims = claims
        self._ready_max = ready_max
        self._ready: deque[Waiting] = deque()
        self._lock = Lock()
        self._closed = False

    def take(self, groups: Path | None, restart: Restart) -> Waiting:
        """Return one for a run that is restarted so, with a control group below `groups`, if any.

        Raises:
            OSError: none can be started.
        """
        while restart == _ONCE and (waiting := self._take_ready()) is not None:
            if _lives(waiting):
                return waiting
            self.drop(waiting)
        return self._start(groups, restart)

    def fill(self, groups: Path | None) -> None:
        """Have as many ready as may be; fewer where the host does not let us."""
        with suppress(OSError):
            while len(self._ready) < self._ready_max and not self._closed:
                waiting = self._start(groups, _ONCE)
                with self._lock:
                    if not self._closed:
                        self._ready.append(waiting)
                        continue
                self.drop(waiting)

    def go(self, waiting: Waiting) -> None:
        """Start the run whose claim the draft has become.

        Raises:
            BrokenPipeError: the supervisor is dead, and nothing was started.
        """
        try:
            os.write(waiting.go, b"start\n")
        finally:
            os.close(waiting.go)
            os.close(waiting.draft.lock)

    def drop(self, waiting: Waiting) -> None:
        """End a supervisor that has no run, with its draft."""
        os.close(waiting.go)
        os.close(waiting.draft.lock)
        with suppress(ChildProcessError):
            os.waitpid(waiting.pid, 0)
        self._claims.drop(waiting.draft)

    def close(self) -> None:
        """End all that wait."""
        with self._lock:
            self._closed = True
        while (waiting := self._take_ready()) is not None:
            self.drop(waiting)

    def _take_ready(self) -> Waiting | None:
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def _start(self, groups: Path | None, restart: Restart) -> Waiting:
        tools = self._tools
        draft = self._claims.draft(groups)
        reading, go = os.pipe()
        try:
            if draft.cgroup:
                Cgroup(Path(draft.cgroup)).make()
            supervisor = subprocess.Popen(  # noqa: S603 - our own script
                (
                    *(tools.shell, _SCRIPT, draft.cgroup, str(restart.max), restart.on),
                    *(tools.sync, tools.mv, tools.sleep),
                ),
                stdin=reading,
                stdout=draft.lock,
                stderr=subprocess.DEVNULL,
                cwd=draft.folder,
                env={},
                start_new_session=True,
            )
        except OSError:
            os.close(go)
            os.close(draft.lock)
            self._claims.drop(draft)
            raise
        finally:
            os.close(reading)
        # Its end is seen and taken through a pidfd, like that of one which an earlier agent
        # started; the object would count it as abandoned.
        supervisor.returncode = 0
        return Waiting(draft, supervisor.pid, go)


def _lives(waiting: Waiting) -> bool:
    """Return whether nobody has ended a supervisor that waits, nor removed its folder."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, waiting.pid, options) is None and waiting.draft.exists()
    except ChildProcessError:
        return False
