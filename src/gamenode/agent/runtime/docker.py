"""The runtime of containers, over the socket of a Docker Engine or of Podman.

The engine is what outlives the agent: a run's container is found by its name, which the engine
gives only once (P1), and all of a node's by their labels.

Source: F1, RA2, RI1, RI2, promises P1, P2, P11.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from aiodocker import Docker, DockerError
from aiohttp import (
    ClientConnectionError,
    ClientError,
    ClientPayloadError,
    ClientTimeout,
    UnixConnector,
)

from gamenode.agent.runtime import (
    Ended,
    Found,
    LogBlock,
    RunKey,
    Running,
    StartError,
)
from gamenode.agent.runtime import docker_spec as spec
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock, Instant

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_RFC3339: Final = re.compile(
    r"(?P<moment>[0-9-]{10}T[0-9:]{8})(?:\.(?P<fraction>[0-9]{1,9}))?(?P<zone>Z|[+-][0-9:]{5})"
)
_FRAME_HEADER_BYTES: Final = 8
_STREAMS: Final = {1: LogStream.STDOUT, 2: LogStream.STDERR}
_BUSY_BYTES: Final = 16 * 1024
"""A read of so much says that more is there: no pause is made."""

_BROKEN: Final = (ClientConnectionError, ClientPayloadError, TimeoutError)
_NOT_EXECUTED: Final = frozenset({126, 127})
"""The shells' exit codes for a command that is not executable, or not there."""

_UNREACHABLE: Final = 900
"""What aiodocker has as the status where no engine answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerSettings:
    """The bounds of the docker runtime."""

    socket: Path
    """The engine's socket."""
    node_id: str
    """Whose containers these are; several agents may share an engine."""
    call_s: float = 120.0
    """How long the engine may take to answer what is not a wait for a container."""
    pull_s: float = 3600.0
    """How long an image may take to come."""
    retry_s: float = 1.0
    """How long to wait before an engine that did not answer is asked again."""
    idle_poll_s: float = 1.0
    """How long output is gathered while nobody follows."""
    log_bytes_max: int = 1024 * 1024 * 1024
    """How much output the engine keeps of one container; older output goes first."""


class DockerRuntime:
    """Runs steps as containers."""

    name = "docker"

    def __init__(self, settings: DockerSettings, *, clock: Clock) -> None:
        """Talk to the engine at `settings.socket`, from the first call on."""
        self._settings = settings
        self._clock = clock
        self._client: Docker | None = None
        self._log_config: Mapping[str, Any] | None = None
        self._answers = True
        self._starting: WeakValueDictionary[RunKey, asyncio.Lock] = WeakValueDictionary()

    def unsupported(self, container: ContainerSpec) -> tuple[str, ...]:  # noqa: ARG002 - the Protocol's
        """Return nothing: a container spec is what an engine takes."""
        return ()

    async def prepare(self, container: ContainerSpec) -> None:
        """Have the image here, as `pull_policy` says: missing (default), always, or never."""
        await self._pull(container, always=container.pull_policy == "always")

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Pull what is missing, create the container under the run's name, start it."""
        async with self._starting.setdefault(run, asyncio.Lock()):
            state = await self._until_answered(lambda: self._state(run))
            if state is None:
                await self._pull(container, always=False)
                await self._create(run, container, service=service)
            elif state["Status"] != "created":
                return _instant(state["StartedAt"])
            return await self._start(run)

    async def _create(self, run: RunKey, container: ContainerSpec, *, service: bool) -> None:
        engine = await self._engine()
        body = spec.create_body(
            run,
            container,
            service=service,
            node_id=self._settings.node_id,
            log_config=self._log_config,
        )
        try:
            await engine.containers.create(body, name=spec.container_name(run))
        except DockerError as error:
            if error.status == HTTPStatus.CONFLICT:
                # The name is taken: an answer of the engine was lost, or another agent is at it.
                await self._until_shown(run)
                return
            reason = (
                Reason.IMAGE_PULL if error.status == HTTPStatus.NOT_FOUND else Reason.START_FAILED
            )
            raise StartError(
                reason, f"the engine refuses the container: {error.message}"
            ) from error

    async def _until_shown(self, run: RunKey) -> None:
        """Wait for a container whose name is taken: the engine takes it before it is made."""
        try:
            async with asyncio.timeout(self._settings.call_s):
                while await self._state(run) is None:  # noqa: ASYNC110 - the engine does not tell
                    await asyncio.sleep(self._settings.retry_s)
        except TimeoutError as error:
            message = f"the engine has no {spec.container_name(run)}, but does not give its name"
            raise StartError(Reason.START_FAILED, message) from error

    async def _start(self, run: RunKey) -> Instant:
        engine = await self._engine()
        refusal = None
        try:
            await engine.containers.container(spec.container_name(run)).start()
        except DockerError as error:
            if error.status != _UNREACHABLE:
                refusal = error.message
        except _BROKEN:
            # It may be starting this moment; only the engine knows, and a second request could
            # start again what has ended meanwhile.
            await asyncio.sleep(self._settings.retry_s)
        state = await self._until_answered(lambda: self._state(run))
        if state is not None and state["Status"] != "created":
            return _instant(state["StartedAt"])
        await self._delete(run)
        message = f"the engine cannot start it: {refusal or 'it gave no answer'}"
        raise StartError(Reason.START_FAILED, message)

    async def _pull(self, container: ContainerSpec, *, always: bool) -> None:
        engine = await self._engine()
        if container.pull_policy == "never":
            return
        try:
            if not always and await self._has(container.image):
                return
            async with asyncio.timeout(self._settings.pull_s):
                await engine.images.pull(container.image)
        except DockerError as error:
            message = f"image {container.image} cannot be pulled: {error.message}"
            raise StartError(Reason.IMAGE_PULL, message) from error
        except _BROKEN as error:
            message = f"image {container.image} did not come: {error or type(error).__name__}"
            raise StartError(Reason.IMAGE_PULL, message) from error

    async def _has(self, image: str) -> bool:
        engine = await self._engine()
        try:
            await engine.images.inspect(image)
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return True

    async def find(self, run: RunKey) -> Found | None:
        """Return what the engine says of the run's container.

        Waits for an engine that does not answer. One that was created and not started counts as
        not there: a start takes it up.
        """
        state = await self._until_answered(lambda: self._state(run))
        return None if state is None else _found(state)

    async def wait(self, run: RunKey) -> Ended:
        """Wait for the end of the container, also across restarts of the engine."""
        while True:
            with suppress(DockerError, *_BROKEN):
                engine = await self._engine()
                it = engine.containers.container(spec.container_name(run))
                await it.wait(condition="not-running")
            match await self.find(run):
                case None:
                    raise KeyError(run)
                case Ended() as end:
                    return end
                case Running():
                    # The engine went away, or is about to start it again.
                    await asyncio.sleep(self._settings.retry_s)

    async def stop(self, run: RunKey, *, grace_s: float) -> None:
        """Switch the restart policy off, then have the engine stop the container."""
        name = spec.container_name(run)
        while isinstance(await self.find(run), Running):
            try:
                engine = await self._engine()
                async with asyncio.timeout(grace_s + self._settings.call_s):
                    # First, or the engine starts again what ends by the signal (RI2).
                    await self._update(name, {"RestartPolicy": {"Name": "no"}})
                    await engine.containers.container(name).stop(t=math.ceil(grace_s))
            except (DockerError, *_BROKEN):
                await asyncio.sleep(self._settings.retry_s)

    async def read_log(
        self, run: RunKey, position: LogPosition, *, live: asyncio.Event
    ) -> AsyncIterator[LogBlock]:
        """Yield what the engine keeps, counted from the start of the container.

        The engine's own log ends when it restarts a container: then it is asked again from where
        it was.
        """
        read = {
            LogStream.STDOUT: _Skip(position.stdout_lines, position.stdout_bytes),
            LogStream.STDERR: _Skip(position.stderr_lines, position.stderr_bytes),
        }
        if await self.find(run) is None:
            raise KeyError(run)
        while True:
            with suppress(DockerError, *_BROKEN):
                async for stream, data in self._printed(run, live):
                    if rest := read[stream].rest(data):
                        yield LogBlock(stream=stream, data=rest, at=self._clock.now())
                # Asked once: an engine that has to be waited for may have cut the log short.
                state = await self._state(run)
                if state is None or not isinstance(_found(state), Running):
                    break
            await asyncio.sleep(self._settings.retry_s)
            if await self.find(run) is None:
                break
            for skip in read.values():
                skip.again()
        for gap in self._gaps(read):
            yield gap

    def _gaps(self, read: Mapping[LogStream, _Skip]) -> list[LogBlock]:
        """Return what to say of streams that are shorter than they were."""
        return [
            LogBlock(
                stream=LogStream.GAMENODE,
                data=f"{stream}: the engine keeps less than was read of it before\n".encode(),
                at=self._clock.now(),
            )
            for stream, skip in read.items()
            if skip.missing
        ]

    async def _printed(
        self, run: RunKey, live: asyncio.Event
    ) -> AsyncIterator[tuple[LogStream, bytes]]:
        """Yield all that the engine keeps of a log, and what is added while the container runs."""
        engine = await self._engine()
        async with engine.session.get(
            self._url(engine, f"containers/{spec.container_name(run)}/logs"),
            params={"stdout": "1", "stderr": "1", "follow": "1"},
            timeout=ClientTimeout(),  # as long as the container lives
        ) as answer:
            if not answer.ok:
                raise DockerError(answer.status, await answer.text())
            frames = _Frames()
            async for chunk in answer.content.iter_any():
                for block in frames.blocks(chunk):
                    yield block
                if not live.is_set() and len(chunk) < _BUSY_BYTES:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._settings.idle_poll_s):
                            await live.wait()

    async def remove(self, run: RunKey) -> None:
        """Remove the container and its anonymous volumes."""
        if isinstance(await self.find(run), Running):
            raise GameNodeError(ErrorCode.CONFLICT, f"{spec.container_name(run)} still runs")
        await self._until_answered(lambda: self._delete(run))

    async def _delete(self, run: RunKey) -> None:
        engine = await self._engine()
        try:
            await engine.containers.container(spec.container_name(run)).delete(v=True)
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def runs(self) -> Mapping[RunKey, Found]:
        """Return every container with this node's label."""
        label = f"{spec.LABEL_NODE}={self._settings.node_id}"
        found: dict[RunKey, Found] = {}
        for run in await self._until_answered(lambda: self._labelled(label)):
            if (state := await self.find(run)) is not None:
                found[run] = state
        return found

    async def _labelled(self, label: str) -> list[RunKey]:
        engine = await self._engine()
        filters = json.dumps({"label": [label]})
        listed = await engine.containers.list(all=1, filters=filters)
        return [spec.run_of(it["Labels"]) for it in listed]

    async def problem(self) -> str:
        """Return why the engine cannot be used now; empty when it answers."""
        try:
            engine = await self._engine()
            await engine.version()
        except (DockerError, ClientError, OSError) as error:
            return f"no engine answers at {self._settings.socket}: {error}"
        return ""

    async def close(self) -> None:
        """Hang up."""
        if self._client is not None:
            await self._client.close()
            await self._client.session.close()
            await self._client.connector.close()
            self._client = None

    async def _state(self, run: RunKey) -> dict[str, Any] | None:
        """Return the engine's State of the run's container, and its Path; None without one."""
        engine = await self._engine()
        try:
            shown = await engine.containers.container(spec.container_name(run)).show()
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        return {**shown["State"], "Path": shown["Path"]}

    async def _update(self, name: str, change: Mapping[str, Any]) -> None:
        engine = await self._engine()
        url = self._url(engine, f"containers/{name}/update")
        async with engine.session.post(url, json=change) as answer:
            if not answer.ok:
                raise DockerError(answer.status, await answer.text())

    @staticmethod
    def _url(engine: Docker, path: str) -> str:
        """Return where the engine has what aiodocker has no method for."""
        return f"{engine.docker_host}/{engine.api_version}/{path}"

    async def _until_answered(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Ask until the engine answers: what it does not say is not known."""
        while True:
            try:
                answer = await call()
            except DockerError as error:
                if error.status != _UNREACHABLE:
                    raise
                cause: Exception = error
            except _BROKEN as error:
                cause = error
            else:
                self._answers = True
                return answer
            if self._answers:
                self._answers = False
                _log.warning(
                    "the container engine does not answer",
                    extra={"event": "engine.unreachable", "error": str(cause)},
                )
            await asyncio.sleep(self._settings.retry_s)

    async def _engine(self) -> Docker:
        """Return the client, which knows the engine's version."""
        if self._client is None:
            connector = UnixConnector(
                str(self._settings.socket),
                limit=0,  # a wait and a log of each container hold a connection each
            )
            self._client = Docker(
                "unix://localhost",
                connector=connector,
                timeout=ClientTimeout(total=self._settings.call_s),
            )
        if self._log_config is None:
            version = await self._client.version()
            self._client.api_version = f"v{version['ApiVersion']}"
            self._log_config = _log_config(version, self._settings.log_bytes_max)
        return self._client


class _Frames:
    """Takes the engine's framing apart: stream, three zeros, length, bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def blocks(self, chunk: bytes) -> list[tuple[LogStream, bytes]]:
        """Return what is whole by `chunk`, the frames of a stream joined."""
        buffer = self._rest + chunk
        start = 0
        pieces: dict[LogStream, list[bytes]] = {stream: [] for stream in _STREAMS.values()}
        while len(buffer) - start >= _FRAME_HEADER_BYTES:
            end = start + _FRAME_HEADER_BYTES + int.from_bytes(buffer[start + 4 : start + 8])
            if end > len(buffer):
                break
            pieces[_STREAMS[buffer[start]]].append(buffer[start + _FRAME_HEADER_BYTES : end])
            start = end
        self._rest = buffer[start:]
        return [(stream, b"".join(parts)) for stream, parts in pieces.items() if parts]


class _Skip:
    """Drops what was read before: whole lines by count, then the begun line's bytes (RG1)."""

    def __init__(self, lines: int, size_bytes: int) -> None:
        self._lines = self._read_lines = lines
        self._bytes = self._read_bytes = size_bytes

    @property
    def missing(self) -> bool:
        """Whether the source was shorter than what is to be dropped."""
        return self._lines > 0 or self._bytes > 0

    def again(self) -> None:
        """Begin at the start of the source once more."""
        self._lines, self._bytes = self._read_lines, self._read_bytes

    def rest(self, data: bytes) -> bytes:
        """Return what of `data`, the next of the source, was not read before."""
        if self._lines and (ends := data.count(b"\n")) < self._lines:
            self._lines -= ends
            self._bytes -= len(data)
            return b""
        end = 0
        for _ in range(self._lines):
            end = data.index(b"\n", end) + 1
        self._lines = 0
        self._bytes -= end
        begun = min(max(self._bytes, 0), len(data) - end)
        self._bytes -= begun
        new = data[end + begun :]
        self._read_lines += new.count(b"\n")
        self._read_bytes += len(new)
        return new


def _found(state: Mapping[str, Any]) -> Found | None:
    """Return what an engine's State says."""
    if state["Status"] == "created":
        return None
    started_at = _instant(state["StartedAt"])
    if state["Status"] not in {"exited", "dead", "stopped"}:
        return Running(started_at=started_at)
    end = Ended.by_code(
        state["ExitCode"],
        started_at=started_at,
        ended_at=Instant(max(started_at, _instant(state["FinishedAt"]))),
    )
    if state["OOMKilled"] and end.reason is not Reason.NONE:
        return replace(end, reason=Reason.OOM_KILLED, message="killed for want of memory")
    if end.exit_code in _NOT_EXECUTED:
        # The init in the container starts the command, so the engine has seen no failure.
        return replace(end, message=f"{end.message} (it ran {state['Path']})")
    return end


def _instant(text: str) -> Instant:
    """Read RFC 3339 with nanoseconds, which datetime does not."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    moment = datetime.fromisoformat(match["moment"] + match["zone"].replace("Z", "+00:00"))
    fraction = (match["fraction"] or "").ljust(9, "0")
    return Instant(int(moment.timestamp()) * NANOSECONDS_PER_S + int(fraction))


def _log_config(version: Mapping[str, Any], log_bytes_max: int) -> Mapping[str, Any]:
    """Return how an engine of this `version` is told to keep a log; Podman has its own way."""
    components = version.get("Components") or ()
    if any(it.get("Name", "").startswith("Podman") for it in components):
        return {"Type": "k8s-file"}
    files = 4
    size = {"max-size": str(log_bytes_max // files), "max-file": str(files)}
    return {"Type": "local", "Config": size}
