"""Fetching an image: how far it has come, when it is given up, when it is tried again."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from aiodocker import DockerError
from aiohttp import ClientResponse

from gamenode.agent.runtime import Progress, Pull, StartError
from gamenode.agent.runtime.docker_auth import auth_header
from gamenode.agent.runtime.docker_engine import BROKEN, Engine, is_unreachable
from gamenode.agent.runtime.docker_reference import is_exact, registry_of
from gamenode.agent.runtime.docker_settings import DockerSettings
from gamenode.domain.pipeline import Reason

_REFUSED: Final = re.compile(r"unauthorized|denied|forbidden|no basic auth", re.IGNORECASE)
_FINAL: Final = re.compile(
    r"not found|manifest unknown|invalid reference|no matching manifest|no space left",
    re.IGNORECASE,
)
"""What no further try will change."""
_RETRYING: Final = re.compile(r"Retrying in \d+ seconds?")
_FETCHED: Final = frozenset(
    {"Verifying Checksum", "Download complete", "Extracting", "Pull complete"}
)


class ImagePuller:
    """Fetches images into an engine."""

    def __init__(self, engine: Engine, settings: DockerSettings, auth_file: Path) -> None:
        """Fetch with the credentials in `auth_file`, where it has some."""
        self._engine = engine
        self._settings = settings
        self._auth_file = auth_file

    async def pull(self, image: str, progress: Progress) -> None:
        """Fetch `image`, and tell how far it has come. A cancel ends it at once.

        Raises:
            StartError: IMAGE_PULL; it cannot be had, or not now after several tries.
        """
        failures = 0
        while True:
            try:
                return await self._pull(image, progress)
            except DockerError as error:
                why = error.message
                if not is_unreachable(error) and _is_final(error):
                    raise self._failed(image, why) from error
                cause: Exception = error
            except BROKEN as error:
                why = str(error) or "the engine hung up"
                cause = error
            failures += 1
            if failures >= self._settings.pull_tries:
                raise self._failed(image, f"{why} (tried {failures} times)") from cause
            await asyncio.sleep(self._settings.pull_backoff_s * 2.0 ** (failures - 1))
            await self._engine.until_answered(self._engine.look)  # it may be restarting

    def _failed(self, image: str, why: str) -> StartError:
        message = f"image {image} cannot be pulled: {why}"
        if _REFUSED.search(why):
            message += (
                f"; this node's credentials for {registry_of(image)} belong in {self._auth_file}"
            )
        return StartError(Reason.IMAGE_PULL, message)

    async def _pull(self, image: str, progress: Progress) -> None:
        header = await asyncio.to_thread(auth_header, image, self._auth_file)
        stall_s = self._settings.pull_stall_s
        layers = _Layers()
        progress(Pull(image=image))
        loop = asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(stall_s) as limit,
                self._engine.request(
                    "POST",
                    "images/create",
                    params={"fromImage": image, **({} if is_exact(image) else {"tag": "latest"})},
                    headers={"X-Registry-Auth": header} if header else {},
                    endless=True,  # as long as it moves
                ) as answer,
            ):
                async for word in _words(answer):
                    if error := word.get("error"):
                        raise DockerError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
                    if layers.take(word):
                        limit.reschedule(loop.time() + stall_s)
                        done_bytes, total_bytes = layers.size()
                        progress(Pull(image=image, done_bytes=done_bytes, total_bytes=total_bytes))
        except TimeoutError as error:
            raise TimeoutError(f"it made no progress for {stall_s:g} s") from error


def _is_final(error: DockerError) -> bool:
    if error.status in {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
    }:
        return True
    return bool(_REFUSED.search(error.message) or _FINAL.search(error.message))


async def _words(answer: ClientResponse) -> AsyncIterator[Mapping[str, Any]]:
    """Yield what the engine says, an object a line."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield json.loads(line)
    if rest.strip():
        yield json.loads(rest)


@dataclass(slots=True)
class _Layer:
    status: str = ""
    step: int = 0
    done_bytes: int = 0
    total_bytes: int = 0


class _Layers:
    """The layers of an image on their way."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def take(self, word: Mapping[str, Any]) -> bool:
        """Take what the engine says next; return whether anything has moved."""
        layer = self._layers.setdefault(str(word.get("id", "")), _Layer())
        # The engine counts down to its own next try: that is no progress.
        status = _RETRYING.sub("Retrying", str(word.get("status", "")))
        detail = word.get("progressDetail") or {}
        step, total_bytes = int(detail.get("current") or 0), int(detail.get("total") or 0)
        moved = (status, step) != (layer.status, layer.step)
        layer.status, layer.step = status, step
        layer.total_bytes = max(layer.total_bytes, total_bytes)
        if status == "Downloading":
            layer.done_bytes = step
        elif status in _FETCHED:
            layer.done_bytes = layer.total_bytes
        return moved

    def size(self) -> tuple[int, int]:
        """Return how many bytes have come, and of how many that are known of."""
        layers = self._layers.values()
        return sum(it.done_bytes for it in layers), sum(it.total_bytes for it in layers)
