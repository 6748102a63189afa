"""The connection to a container engine: what it is, and how to ask until it answers."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from aiodocker import Docker, DockerError
from aiohttp import (
    ClientConnectionError,
    ClientPayloadError,
    ClientResponse,
    ClientTimeout,
    UnixConnector,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

BROKEN: Final = (ClientConnectionError, ClientPayloadError, TimeoutError)
"""What a connection to an engine breaks with."""
_UNREACHABLE: Final = 900
"""What aiodocker has as the status where no engine answered."""
_VERSION: Final = re.compile(r"([0-9]+)\.([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine says of itself."""

    podman: tuple[int, int] | None
    """Podman's version; None for a Docker Engine."""
    log_drivers: frozenset[str]
    """How it can keep a container's log."""
    root: Path
    """Where it keeps images and containers, on its own host."""


def is_unreachable(error: DockerError) -> bool:
    """Return whether no engine answered, so that nothing is known."""
    return error.status == _UNREACHABLE


class Engine:
    """One engine, over its socket."""

    def __init__(self, socket: Path, *, call_s: float, retry_s: float) -> None:
        """Talk to the engine at `socket`, from the first call on.

        A call may take `call_s`; an engine that does not answer is asked again after `retry_s`.
        """
        self.socket = socket
        self._call_s = call_s
        self._retry_s = retry_s
        self._client: Docker | None = None
        self._facts: EngineFacts | None = None
        self._answers = True

    async def client(self) -> Docker:
        """Return the client, which knows the engine's version.

        Raises:
            DockerError: the engine does not answer, or answers with an error.
        """
        _ = await self.facts()
        assert self._client is not None
        return self._client

    async def facts(self) -> EngineFacts:
        """Return what the engine said of itself when it last came up.

        Raises:
            DockerError: the engine does not answer, or answers with an error.
        """
        if self._client is None:
            connector = UnixConnector(
                str(self.socket),
                limit=0,  # a wait and a log of each container hold a connection each
            )
            self._client = Docker(
                "unix://localhost",
                connector=connector,
                timeout=ClientTimeout(total=self._call_s),
            )
        if self._facts is None:
            version = await self._client.version()
            self._client.api_version = f"v{version['ApiVersion']}"
            self._facts = _facts(version, await self._client.system.info())
        return self._facts

    async def look(self) -> None:
        """See that the engine answers.

        Raises:
            DockerError: the engine does not answer, or answers with an error.
        """
        client = await self.client()
        _ = await client.version()

    @asynccontextmanager
    async def request(
        self, method: str, path: str, *, endless: bool = False, **more: Any
    ) -> AsyncIterator[ClientResponse]:
        """Ask for what aiodocker has no method for; an `endless` answer may take any time.

        Raises:
            DockerError: the engine refuses.
        """
        client = await self.client()
        url = f"{client.docker_host}/{client.api_version}/{path}"
        if endless:
            more["timeout"] = ClientTimeout()
        async with client.session.request(method, url, **more) as answer:
            if not answer.ok:
                raise DockerError(answer.status, await _message(answer))
            yield answer

    async def until_answered(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Ask until the engine answers: what it does not say is not known.

        Raises:
            DockerError: the engine answers with an error.
        """
        while True:
            try:
                answer = await call()
            except DockerError as error:
                if not is_unreachable(error):
                    raise
                cause: Exception = error
            except BROKEN as error:
                cause = error
            else:
                self._answers = True
                return answer
            self._facts = None  # another version of it may come up
            if self._answers:
                self._answers = False
                _log.warning(
                    "the container engine does not answer",
                    extra={"event": "engine.unreachable", "error": str(cause)},
                )
            await asyncio.sleep(self._retry_s)

    async def close(self) -> None:
        """Hang up. Safe to repeat."""
        if self._client is not None:
            await self._client.close()
            await self._client.session.close()
            await self._client.connector.close()
            self._client = None


async def _message(answer: ClientResponse) -> str:
    """Return the engine's own words for a refusal."""
    text = await answer.text()
    if answer.content_type != "application/json":
        return text.strip()
    said = await answer.json()
    return str(said["message"]) if isinstance(said, Mapping) and "message" in said else text


def _facts(version: Mapping[str, Any], info: Mapping[str, Any]) -> EngineFacts:
    podman = None
    for component in version.get("Components") or ():
        if component.get("Name", "").startswith("Podman"):
            match = _VERSION.match(component.get("Version", ""))
            podman = (int(match[1]), int(match[2])) if match else (0, 0)
    return EngineFacts(
        podman=podman,
        log_drivers=frozenset((info.get("Plugins") or {}).get("Log") or ()),
        root=Path(info.get("DockerRootDir") or "/"),
    )
