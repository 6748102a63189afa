"""An engine that dies in the middle of a create or a start: one container, started once (P1)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from tests.support.engine import DockerRuntimeHost, Engine
from tests.support.runtimes import new_run

from gamenode.agent.runtime import StartError
from gamenode.domain.pipeline import ContainerSpec, Reason

STEP = ContainerSpec(image="game:1", command=("x",), pull_policy="never")


@dataclass(slots=True)
class DyingEngine:
    """Hangs up over its first requests: before it does anything, or after."""

    dies_before: dict[str, int] = field(default_factory=dict)
    dies_after: dict[str, int] = field(default_factory=dict)
    status: str = ""
    creates: int = 0
    starts: int = 0

    async def create(self, request: web.Request) -> web.StreamResponse:
        self._die(self.dies_before, "create", request)
        self.creates += 1
        self.status = "created"
        self._die(self.dies_after, "create", request)
        return web.json_response({"Id": "1"}, status=201)

    async def start(self, request: web.Request) -> web.StreamResponse:
        self._die(self.dies_before, "start", request)
        self.starts += 1
        self.status = "running"
        self._die(self.dies_after, "start", request)
        return web.Response(status=204)

    async def show(self, _: web.Request) -> web.StreamResponse:
        if not self.status:
            return web.json_response({"message": "no such container"}, status=404)
        state = {"Status": self.status, "StartedAt": "2026-01-01T00:00:00Z"}
        return web.json_response({"Id": "1", "State": state, "Path": "x", "Args": []})

    async def delete(self, _: web.Request) -> web.StreamResponse:
        self.status = ""
        return web.Response(status=204)

    def _die(self, when: dict[str, int], what: str, request: web.Request) -> None:
        if when.get(what, 0) > 0:
            when[what] -= 1
            assert request.transport is not None
            request.transport.abort()
            raise web.HTTPServiceUnavailable  # heard by nobody


@asynccontextmanager
async def served(folder: Path, engine: DyingEngine) -> AsyncIterator[DockerRuntimeHost]:
    async def version(_: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.41", "Components": []})

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"Plugins": {"Log": ["local"]}, "DockerRootDir": "/"})

    app = web.Application()
    app.router.add_get("/version", version)
    app.router.add_get("/{api}/version", version)
    app.router.add_get("/{api}/info", info)
    app.router.add_post("/{api}/containers/create", engine.create)
    app.router.add_post("/{api}/containers/{name}/start", engine.start)
    app.router.add_get("/{api}/containers/{name}/json", engine.show)
    app.router.add_delete("/{api}/containers/{name}", engine.delete)
    app.router.add_delete("/{api}/containers/1", engine.delete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(folder / "e.sock")).start()
        yield Engine(socket=folder / "e.sock", folder=folder).host("fra-41")
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("what", ["create", "start"])
@pytest.mark.parametrize("before", [True, False])
async def test_a_start_goes_through_an_engine_that_dies_over_it(
    tmp_path: Path, what: str, before: bool
) -> None:
    deaths = {what: 1}
    engine = DyingEngine(dies_before=deaths) if before else DyingEngine(dies_after=deaths)
    async with served(tmp_path, engine) as host:
        runtime = host.runtime()
        try:
            await runtime.start(new_run(), STEP, service=False)
        finally:
            await runtime.close()
    assert (engine.creates, engine.starts, engine.status) == (1, 1, "running")


@pytest.mark.parametrize("what", ["create", "start"])
async def test_a_start_that_always_kills_the_engine_is_given_up(tmp_path: Path, what: str) -> None:
    engine = DyingEngine(dies_before={what: 1000})
    async with served(tmp_path, engine) as host:
        runtime = host.runtime()
        try:
            with pytest.raises(StartError) as caught:
                await runtime.start(new_run(), STEP, service=False)
        finally:
            await runtime.close()
    assert caught.value.reason is Reason.START_FAILED
    assert (engine.starts, engine.status) == (0, "")
