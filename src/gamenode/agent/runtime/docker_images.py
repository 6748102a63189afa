"""The images that this agent pulled, and when they go again.

Only those: whatever somebody else put into the engine, or gave a name of their own, is theirs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aiodocker import DockerError

from gamenode.agent.runtime.docker_engine import Engine
from gamenode.agent.runtime.docker_reference import canonical
from gamenode.agent.runtime.docker_settings import DockerSettings
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock, Instant
from gamenode.lib.durable import write_private

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Image:
    used_at: Instant
    names: set[str] = field(default_factory=set)
    """Under which references it was pulled, in full."""


class PulledImages:
    """Remembers across restarts what was pulled here and when it was last used.

    What a crash keeps from being remembered stays in the engine, which only costs room.
    """

    def __init__(
        self, engine: Engine, settings: DockerSettings, *, file: Path, clock: Clock
    ) -> None:
        """Read what `file` remembers."""
        self._engine = engine
        self._settings = settings
        self._file = file
        self._clock = clock
        self._images = _read(file)
        self._writing = asyncio.Lock()

    def used(self, image: str) -> None:
        """Note that something is about to run from `image`; kept on disk by the next `tidy`."""
        name = canonical(image)
        for it in self._images.values():
            if name in it.names:
                it.used_at = self._clock.now()

    async def pulled(self, image: str, *, before: str | None) -> None:
        """Note a pull of `image`, which was `before` until then; an id, None for nothing.

        What was there before us stays somebody else's, also when a pull brought a newer one.
        """
        now, name = self._clock.now(), canonical(image)
        if before is not None and name not in self._images.get(before, _Image(now)).names:
            return
        shown = await self._inspect(image)
        if shown is None:
            return
        it = self._images.setdefault(shown["Id"], _Image(now))
        it.used_at = now
        it.names.add(name)
        await self._write()

    async def tidy(self) -> None:
        """Remove what nothing uses: after its age, and sooner while the disk is too full.

        Raises:
            DockerError: the engine does not answer.
        """
        if not self._images:
            return
        now = self._clock.now()
        client = await self._engine.client()
        for container in await client.containers.list(all=1):
            if (used := self._images.get(container["ImageID"])) is not None:
                used.used_at = now
        root = (await self._engine.facts()).root
        for image_id, it in sorted(self._images.items(), key=lambda pair: pair[1].used_at):
            unused_s = (now - it.used_at) / NANOSECONDS_PER_S
            if unused_s < self._settings.images_unused_s_min:
                break
            if unused_s >= self._settings.images_age_s or await self._is_full(root):
                await self._remove(image_id, it)
        await self._write()

    async def _is_full(self, root: Path) -> bool:
        try:
            disk = await asyncio.to_thread(shutil.disk_usage, root)
        except OSError:
            return False  # the engine is on another host, or hides its folder
        return disk.used > (disk.used + disk.free) * self._settings.images_disk_used_ratio_max

    async def _remove(self, image_id: str, it: _Image) -> None:
        """Remove an image; one that has other names than ours loses ours alone."""
        shown = await self._inspect(image_id)
        if shown is not None:
            names = [name for name in shown.get("RepoTags") or () if name != "<none>:<none>"]
            ours = [name for name in names if canonical(name) in it.names]
            try:
                for name in ours if names else [image_id]:
                    await self._delete(name)
            except DockerError as error:
                if error.status == HTTPStatus.CONFLICT:
                    return  # something uses it after all
                raise
            _log.info(
                "image removed",
                extra={"event": "image.removed", "image": ", ".join(sorted(it.names))},
            )
        del self._images[image_id]

    async def _inspect(self, image: str) -> Mapping[str, Any] | None:
        client = await self._engine.client()
        try:
            shown: Mapping[str, Any] = await client.images.inspect(image)
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        return shown

    async def _delete(self, image: str) -> None:
        client = await self._engine.client()
        try:
            _ = await client.images.delete(image)
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def _write(self) -> None:
        async with self._writing:
            content = {
                image_id: {"names": sorted(it.names), "used_at": it.used_at}
                for image_id, it in self._images.items()
            }
            text = json.dumps({"images": content}, indent=1).encode()
            try:
                await asyncio.to_thread(write_private, self._file, text)
            except OSError as error:
                # A full disk must not keep a step from starting; the next write has it all.
                _log.warning(
                    "the list of pulled images cannot be written: %s",
                    error,
                    extra={"event": "images.write_failed"},
                )


def _read(file: Path) -> dict[str, _Image]:
    try:
        images = json.loads(file.read_text())["images"]
        return {
            image_id: _Image(Instant(int(it["used_at"])), set(map(str, it["names"])))
            for image_id, it in images.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _log.warning(
            "the list of pulled images cannot be read; they stay: %s",
            error,
            extra={"event": "images.read_failed"},
        )
        return {}
