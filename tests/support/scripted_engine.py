"""An engine whose every answer to a pull is scripted, on a socket of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

Word = dict[str, object]


@dataclass(slots=True)
class Answer:
    """What one pull meets: words, then an end, or nothing more ever."""

    words: Sequence[Word] = ()
    status: int = 200
    hangs: bool = False


@dataclass(slots=True)
class ScriptedEngine:
    """Answers one pull after the other as it is told."""

    answers: list[Answer]
    pulls: list[web.BaseRequest] = field(default_factory=list)
    given_up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a pull that hangs is given up."""

    async def pull(self, request: web.Request) -> web.StreamResponse:
        self.pulls.append(request)
        answer = self.answers[min(len(self.pulls), len(self.answers)) - 1]
        if answer.status != 200:
            return web.json_response(answer.words[0], status=answer.status)
        stream = web.StreamResponse()
        await stream.prepare(request)
        for word in answer.words:
            await stream.write(json.dumps(word).encode() + b"\r\n")
        try:
            while answer.hangs:
                await asyncio.sleep(0.01)
                await stream.write(b"\r\n")
        except (asyncio.CancelledError, ConnectionError):
            self.given_up.set()
            raise
        return stream


async def _version(_: web.Request) -> web.Response:
    return web.json_response({"ApiVersion": "1.41", "Components": []})


async def _info(_: web.Request) -> web.Response:
    return web.json_response({"Plugins": {"Log": ["local"]}, "DockerRootDir": "/"})


@asynccontextmanager
async def scripted_engine(socket: Path, *answers: Answer) -> AsyncIterator[ScriptedEngine]:
    """Serve `answers` at `socket`; the last one again and again."""
    engine = ScriptedEngine(list(answers))
    app = web.Application()
    app.router.add_get("/{version:v?[^/]*}/version", _version)
    app.router.add_get("/version", _version)
    app.router.add_get("/v1.41/info", _info)
    app.router.add_post("/v1.41/images/create", engine.pull)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(socket)).start()
        yield engine
    finally:
        await runner.cleanup()
