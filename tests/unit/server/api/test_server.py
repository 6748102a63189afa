"""The edge behind the real HTTP server."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from tests.support.api_fakes import Api, make_event, make_pipeline, pipeline_id
from tests.support.asgi import until

from gamenode.domain.pipeline import Status
from gamenode.server.api.app import ApiSettings

TIMEOUT_S = 5.0


@asynccontextmanager
async def served(api: Api) -> AsyncIterator[int]:
    """Serve `api` on loopback; yield its port."""
    server = uvicorn.Server(
        uvicorn.Config(api.app, port=0, lifespan="off", log_config=None, http="httptools")
    )
    task = asyncio.ensure_future(server.serve())
    try:
        await until(lambda: server.started or task.done())
        yield int(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


def fetch(
    port: int, method: str, target: str, *, body: bytes | None = None, content_type: str = ""
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(method, target, body, {"content-type": content_type})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


async def test_a_pipeline_is_posted_and_waited_for() -> None:
    api = Api()
    async with served(api) as port:
        status, body = await asyncio.to_thread(
            fetch,
            port,
            "POST",
            "/api/v1/pipelines",
            body=b'{"file": "name: x"}',
            content_type="application/json",
        )
        assert (status, json.loads(body)["id"]) == (201, pipeline_id(1))
        waiting = asyncio.ensure_future(
            asyncio.to_thread(fetch, port, "GET", f"/api/v1/pipelines/{pipeline_id(1)}?wait=30s")
        )
        await until(lambda: api.pipelines.waiters == 1)
        await api.pipelines.end(pipeline_id(1), Status.COMPLETED)
        status, body = await waiting
        assert json.loads(body)["status"] == "COMPLETED"


async def test_a_body_that_is_too_large_is_refused_while_it_comes() -> None:
    async with served(Api(ApiSettings(body_bytes_max=1000))) as port:
        status, body = await asyncio.to_thread(
            fetch,
            port,
            "POST",
            "/api/v1/pipelines",
            body=b" " * 100_000,
            content_type="application/json",
        )
    assert status == 400
    assert json.loads(body)["details"][0]["field"] == "body"


async def test_followers_get_events_and_hold_nothing_once_they_left() -> None:
    api = Api()
    api.pipelines.add(make_pipeline(1))
    async with served(api) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"GET /api/v1/events HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n"
        )
        await until(lambda: api.events.readers == 1)
        await api.events.append(make_event(1))
        async with asyncio.timeout(TIMEOUT_S):
            await reader.readuntil(b"id: 1\n")
        writer.close()
        await writer.wait_closed()
        await until(lambda: api.events.readers == 0)
        # Who waits for a pipeline and leaves holds nothing either.
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"GET /api/v1/pipelines/%b?wait=30s HTTP/1.1\r\nhost: localhost\r\n\r\n"
            % pipeline_id(1).encode()
        )
        await until(lambda: api.pipelines.waiters == 1)
        writer.close()
        await writer.wait_closed()
        await until(lambda: api.pipelines.waiters == 0)


async def test_a_head_has_no_body() -> None:
    async with served(Api()) as port:
        assert await asyncio.to_thread(fetch, port, "HEAD", "/api/v1/nodes") == (200, b"")
