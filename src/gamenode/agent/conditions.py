"""What is wrong with this host, as far as its agent can see (N3)."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from gamenode.agent.runtime import Runtime
from gamenode.domain.node import ConditionType
from gamenode.lib.clock import ClockWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionSettings:
    """When the host counts as short of something."""

    disk_free_bytes_min: int = 512 * 1024 * 1024
    """With less room on the disk of the data folder, the node takes no work."""
    disk_free_ratio_min: float = 0.02
    """The same, as a share of the disk."""
    inode_free_ratio_min: float = 0.02
    """The same, for files."""
    engine_timeout_s: float = 2.0
    """How long the engine may take to say that it works."""


class HostConditions:
    """Looks at the disk below the agent's data, the runtime and the clock, once a heartbeat."""

    def __init__(
        self, data: Path, runtime: Runtime, clock_watch: ClockWatch, settings: ConditionSettings
    ) -> None:
        """Look at the file system that holds `data`."""
        self._data = data
        self._runtime = runtime
        self._clock_watch = clock_watch
        self._settings = settings

    async def look(self) -> dict[ConditionType, str]:
        """Return what holds now, and why. Never raises: what cannot be seen does not hold."""
        found = await asyncio.to_thread(self._disk)
        try:
            async with asyncio.timeout(self._settings.engine_timeout_s):
                problem = await self._runtime.problem()
        except TimeoutError:
            problem = f"no answer within {self._settings.engine_timeout_s:g} s"
        if problem:
            found[ConditionType.ENGINE_DOWN] = f"{self._runtime.name}: {problem}"
        jump_s = self._clock_watch.jump_s()
        if jump_s is not None:
            found[ConditionType.CLOCK_JUMP] = f"the host's clock jumped by {jump_s:+.1f} s"
        return found

    def _disk(self) -> dict[ConditionType, str]:
        try:
            disk = os.statvfs(self._data)
        except OSError as error:
            return {ConditionType.DISK_PRESSURE: f"{self._data}: {error.strerror}"}
        found: dict[ConditionType, str] = {}
        free_bytes = disk.f_bavail * disk.f_frsize
        total_bytes = disk.f_blocks * disk.f_frsize
        least = max(
            self._settings.disk_free_bytes_min, total_bytes * self._settings.disk_free_ratio_min
        )
        if free_bytes < least:
            found[ConditionType.DISK_PRESSURE] = (
                f"less than {least / 2**20:.0f} MiB are free below {self._data}"
            )
        if disk.f_files and disk.f_favail / disk.f_files < self._settings.inode_free_ratio_min:
            found[ConditionType.INODE_PRESSURE] = f"few inodes are free below {self._data}"
        return found
