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
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from aiodocker import DockerError
from aiodocker.containers import DockerContainer
from aiohttp import ClientError

from gamenode.agent.runtime import (
    Ended,
    Found,
    LogBlock,
    Progress,
    RunKey,
    Running,
    StartError,
)
from gamenode.agent.runtime import docker_spec as spec
from gamenode.agent.runtime.docker_engine import BROKEN, Engine, EngineFacts, is_unreachable
from gamenode.agent.runtime.docker_images import PulledImages
from gamenode.agent.runtime.docker_log import Frames, Skip, log_config
from gamenode.agent.runtime.docker_pull import ImagePuller
from gamenode.agent.runtime.docker_settings import DockerSettings
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogPosition, LogStream
from gamenode.domain.pipeline import ContainerSpec, Reason
from gamenode.lib.clock import NANOSECONDS_PER_S, Clock, Instant

_log = logging.getLogger(__name__)

_RFC3339: Final = re.compile(
    r"(?P<moment>[0-9-]{10}T[0-9:]{8})(?:\.(?P<fraction>[0-9]{1,9}))?(?P<zone>Z|[+-][0-9:]{5})"
)
_BUSY_BYTES: Final = 16 * 1024
"""A read of so much says that more is there: no pause is made."""

_NAME_TAKEN: Final = re.compile(r"name .* is already in use")
"""What Podman says, with another status, where two requests for a name meet."""

_ENDED: Final = frozenset({"exited", "dead", "stopped"})
"""The words for a container of which nothing lives."""

_ASKED_MAX: Final = 3
"""How often an engine that dies over it is asked to create or to start one container."""

_PODMAN_INIT: Final = "/run/podman-init"

_NOT_EXECUTED: Final = frozenset({126, 127})
"""The shells' exit codes for a command that is not executable, or not there."""


class DockerRuntime:
    """Runs steps as containers."""

    name = "docker"

    def __init__(
        self,
        settings: DockerSettings,
        *,
        socket: Path,
        node_id: str,
        data: Path,
        auth_file: Path,
        log_bytes_max: int,
        clock: Clock,
    ) -> None:
        """Talk to the engine at `socket`, from the first call on.

        `node_id` says whose the containers are, since several agents may share an engine; `data`
        is the agent's folder, `auth_file` holds its credentials for registries. The engine keeps
        at most `log_bytes_max` of what one container prints; older output goes first.
        """
        self._settings = settings
        self._node_id = node_id
        self._log_bytes_max = log_bytes_max
        self._clock = clock
        self._engine = Engine(socket, call_s=settings.call_s, retry_s=settings.retry_s)
        self._puller = ImagePuller(self._engine, settings, auth_file)
        self._images = PulledImages(
            self._engine, settings, file=data / "pulled-images.json", clock=clock
        )
        self._starting: WeakValueDictionary[RunKey, asyncio.Lock] = WeakValueDictionary()

    def unsupported(self, container: ContainerSpec) -> tuple[str, ...]:  # noqa: ARG002 - the Protocol's
        """Return nothing: a container spec is what an engine takes."""
        return ()

    async def prepare(self, container: ContainerSpec, *, progress: Progress) -> None:
        """Have the image here, as `pull_policy` says: missing (default), always, or never."""
        always = container.pull_policy == "always"
        await self._fetch(container, always=always, progress=progress)

    async def start(self, run: RunKey, container: ContainerSpec, *, service: bool) -> Instant:
        """Pull what is missing, create the container under the run's name, start it."""
        async with self._starting.setdefault(run, asyncio.Lock()):
            state = await self._known_state(run)
            if state is None:
                await self._fetch(container, always=False, progress=lambda _: None)
            for _ in range(_ASKED_MAX):
                if state is not None:
                    break
                await self._create(run, container, service=service)
                state = await self._known_state(run)
            if state is None:
                message = "the engine gives no answer when it is asked for the container"
                raise StartError(Reason.START_FAILED, message)
            if state["Status"] != "created":
                return _instant(state["StartedAt"])
            return await self._start(run)

    async def _create(self, run: RunKey, container: ContainerSpec, *, service: bool) -> None:
        """Ask for the container, once; an engine that gave no answer may have made it."""
        client = await self._engine.until_answered(self._engine.client)
        facts = await self._engine.until_answered(self._engine.facts)
        body = spec.create_body(
            run,
            container,
            service=service,
            node_id=self._node_id,
            log_config=log_config(facts, self._log_bytes_max),
            podman=facts.podman,
        )
        try:
            await client.containers.create(body, name=spec.container_name(run))
        except BROKEN:
            return
        except DockerError as error:
            if is_unreachable(error):
                return
            if error.status == HTTPStatus.CONFLICT or _NAME_TAKEN.search(error.message):
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
                while await self._known_state(run) is None:  # noqa: ASYNC110 - the engine does not tell
                    await asyncio.sleep(self._settings.retry_s)
        except TimeoutError as error:
            message = f"the engine has no {spec.container_name(run)}, but does not give its name"
            raise StartError(Reason.START_FAILED, message) from error

    async def _start(self, run: RunKey) -> Instant:
        refusal = ""
        for _ in range(_ASKED_MAX):
            refusal = await self._ask_start(run)
            state = await self._known_state(run)
            if state is not None and state["Status"] != "created":
                return _instant(state["StartedAt"])
            if refusal or state is None:
                break
        await self._engine.until_answered(lambda: self._delete(run))
        message = f"the engine cannot start it: {refusal or 'it gave no answer'}"
        raise StartError(Reason.START_FAILED, message)

    async def _ask_start(self, run: RunKey) -> str:
        """Ask for the start; return the refusal, empty where there is none, or no answer.

        Without an answer only the container's state says whether it was started: one that is not
        `created` any more must not be started again.
        """
        client = await self._engine.until_answered(self._engine.client)
        try:
            await client.containers.container(spec.container_name(run)).start()
        except DockerError as error:
            return "" if is_unreachable(error) else error.message
        except BROKEN:
            await asyncio.sleep(self._settings.retry_s)  # it may be starting this moment
        return ""

    async def _fetch(self, container: ContainerSpec, *, always: bool, progress: Progress) -> None:
        image = container.image
        self._images.used(image)
        if container.pull_policy == "never":
            return
        before = await self._engine.until_answered(lambda: self._image_id(image))
        if before is None or always:
            await self._puller.pull(image, progress)
            with suppress(DockerError, *BROKEN):  # not noted, it stays: that costs only room
                await self._images.pulled(image, before=before)

    async def _image_id(self, image: str) -> str | None:
        client = await self._engine.client()
        try:
            shown = await client.images.inspect(image)
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        return str(shown["Id"])

    async def find(self, run: RunKey) -> Found | None:
        """Return what the engine says of the run's container.

        Waits for an engine that does not answer. One that was created and not started counts as
        not there: a start takes it up.
        """
        state = await self._known_state(run)
        return None if state is None else _found(state)

    async def wait(self, run: RunKey) -> Ended:
        """Wait for the end of the container, also across restarts of the engine."""
        while True:
            with suppress(DockerError, *BROKEN):
                client = await self._engine.client()
                it = client.containers.container(spec.container_name(run))
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
                client = await self._engine.client()
                async with asyncio.timeout(grace_s + self._settings.call_s):
                    # First, or the engine starts again what ends by the signal (RI2).
                    await self._keep_down(name)
                    await client.containers.container(name).stop(t=math.ceil(grace_s))
            except (DockerError, *BROKEN):
                await asyncio.sleep(self._settings.retry_s)

    async def read_log(
        self, run: RunKey, position: LogPosition, *, live: asyncio.Event
    ) -> AsyncIterator[LogBlock]:
        """Yield what the engine keeps, counted from the start of the container.

        The engine's own log ends when it restarts a container: then it is asked again from where
        it was.
        """
        read = {
            LogStream.STDOUT: Skip(position.stdout_lines, position.stdout_bytes),
            LogStream.STDERR: Skip(position.stderr_lines, position.stderr_bytes),
        }
        if await self.find(run) is None:
            raise KeyError(run)
        if position == LogPosition() and (why := await self._inexact()):
            yield LogBlock(stream=LogStream.GAMENODE, data=why.encode(), at=self._clock.now())
        follow = True
        while True:
            with suppress(DockerError, *BROKEN):
                async for stream, data in self._printed(run, live, follow=follow):
                    if rest := read[stream].rest(data):
                        yield LogBlock(stream=stream, data=rest, at=self._clock.now())
                # Asked once: an engine that has to be waited for may have cut the log short.
                state = await self._state(run)
                if state is None or not isinstance(_found(state), Running):
                    if not follow or (await self._engine.facts()).podman is None:
                        break
                    follow = False  # Podman may end what it follows before its last bytes
                    for skip in read.values():
                        skip.again()
                    continue
            await asyncio.sleep(self._settings.retry_s)
            if await self.find(run) is None:
                break
            for skip in read.values():
                skip.again()
        for gap in self._gaps(read):
            yield gap

    async def _inexact(self) -> str:
        """Return why a log may differ from what was printed; empty where it does not."""
        facts: EngineFacts = await self._engine.until_answered(self._engine.facts)
        if log_config(facts, self._log_bytes_max) is not None:
            return ""
        return "inexact: this engine has no log driver that keeps every byte\n"

    def _gaps(self, read: Mapping[LogStream, Skip]) -> list[LogBlock]:
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
        self, run: RunKey, live: asyncio.Event, *, follow: bool
    ) -> AsyncIterator[tuple[LogStream, bytes]]:
        """Yield all that the engine keeps of a log; with `follow` also what is added to it."""
        async with self._engine.request(
            "GET",
            f"containers/{spec.container_name(run)}/logs",
            params={"stdout": "1", "stderr": "1", "follow": str(int(follow))},
            endless=True,  # as long as the container lives
        ) as answer:
            frames = Frames()
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
        await self._engine.until_answered(lambda: self._delete(run))

    async def _delete(self, run: RunKey) -> None:
        client = await self._engine.client()
        try:
            await client.containers.container(spec.container_name(run)).delete(v=True)
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def runs(self) -> Mapping[RunKey, Found]:
        """Return every container with this node's label."""
        found: dict[RunKey, Found] = {}
        for run, _ in await self._engine.until_answered(self._labelled):
            if (state := await self.find(run)) is not None:
                found[run] = state
        return found

    async def _labelled(self, **filters: str) -> list[tuple[RunKey, DockerContainer]]:
        """Return this node's runs, and what the engine lists of their containers."""
        client = await self._engine.client()
        wanted = {"label": [f"{spec.LABEL_NODE}={self._node_id}"]}
        wanted.update((name, [value]) for name, value in filters.items())
        listed = await client.containers.list(all=1, filters=json.dumps(wanted))
        return [(spec.run_of(it["Labels"]), it) for it in listed]

    async def tidy(self) -> None:
        """Remove containers that never started, and images that this agent pulled."""
        await self._engine.until_answered(self._remove_created)
        await self._engine.until_answered(self._images.tidy)

    async def _remove_created(self) -> None:
        """Remove what a crash left between create and start; a start would make it anew."""
        for run, container in await self._labelled(status="created"):
            age_s = self._clock.now() / NANOSECONDS_PER_S - container["Created"]
            if age_s < self._settings.created_age_s:
                continue
            async with self._starting.setdefault(run, asyncio.Lock()):
                state = await self._state(run)
                if state is not None and state["Status"] == "created":
                    await self._delete(run)

    async def problem(self) -> str:
        """Return why the engine cannot be used now; empty when it answers."""
        try:
            await self._engine.look()
        except (DockerError, ClientError, OSError) as error:
            return f"no engine answers at {self._engine.socket}: {error}"
        return ""

    async def close(self) -> None:
        """Hang up."""
        await self._engine.close()

    async def _known_state(self, run: RunKey) -> dict[str, Any] | None:
        """Return the same from an engine that may have to be waited for."""
        return await self._engine.until_answered(lambda: self._state(run))

    async def _state(self, run: RunKey) -> dict[str, Any] | None:
        """Return the engine's State of the run's container, and its Program; None without one."""
        client = await self._engine.client()
        try:
            shown = await client.containers.container(spec.container_name(run)).show()
        except DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return None
        words = [shown["Path"], *(shown.get("Args") or ())]
        if words[0] == _PODMAN_INIT:  # Docker's does not show
            words = words[words.index("--") + 1 :]
        state = {**shown["State"], "Program": words[0]}
        if (await self._engine.facts()).podman is not None and self._restarts(shown):
            state["Status"] = "restarting"  # what Docker calls it
        return state

    def _restarts(self, shown: Mapping[str, Any]) -> bool:
        """Return whether Podman is about to start an ended container again by its policy."""
        state, policy = shown["State"], shown["HostConfig"]["RestartPolicy"]
        if state["Status"] not in _ENDED or policy["Name"] in {"", "no"}:
            return False
        if policy["Name"] == "on-failure":
            most = policy["MaximumRetryCount"]
            if not state["ExitCode"] or (most and shown["RestartCount"] >= most):
                return False
        since_s = (self._clock.now() - _instant(state["FinishedAt"])) / NANOSECONDS_PER_S
        return since_s < self._settings.podman_restart_s

    async def _keep_down(self, name: str) -> None:
        """Switch the restart policy off, where a stop does not do that by itself."""
        if (await self._engine.facts()).podman is None:
            change = {"RestartPolicy": {"Name": "no"}}
            async with self._engine.request("POST", f"containers/{name}/update", json=change):
                pass


def _found(state: Mapping[str, Any]) -> Found | None:
    """Return what an engine's State says."""
    if state["Status"] == "created":
        return None
    started_at = _instant(state["StartedAt"])
    if state["Status"] not in _ENDED:
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
        return replace(end, message=f"{end.message} (it ran {state['Program']})")
    return end


def _instant(text: str) -> Instant:
    """Read RFC 3339 with nanoseconds, which datetime does not."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    moment = datetime.fromisoformat(match["moment"] + match["zone"].replace("Z", "+00:00"))
    fraction = (match["fraction"] or "").ljust(9, "0")
    return Instant(int(moment.timestamp()) * NANOSECONDS_PER_S + int(fraction))
