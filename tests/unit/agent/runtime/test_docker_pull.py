"""An image on its way: what is told, when it is given up, who may have it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.engine import IMAGE, Engine
from tests.support.registry import PASSWORD, Registry
from tests.support.runtimes import new_run, opened
from tests.support.scripted_engine import Answer, ScriptedEngine, Word, scripted_engine

from gamenode.agent.runtime import Pull, StartError
from gamenode.agent.runtime.docker_engine import Engine as EngineClient
from gamenode.agent.runtime.docker_pull import ImagePuller
from gamenode.agent.runtime.docker_settings import DockerSettings
from gamenode.domain.pipeline import ContainerSpec, Reason

SETTINGS = DockerSettings(pull_backoff_s=0.01, pull_stall_s=0.3, retry_s=0.01)


def layer(name: str, status: str, current: int = 0, total: int = 0) -> Word:
    return {
        "id": name,
        "status": status,
        "progressDetail": {"current": current, "total": total} if total else {},
    }


DONE = Answer([{"status": "Status: Downloaded newer image for game:1"}])


@asynccontextmanager
async def puller_at(
    folder: Path, *answers: Answer
) -> AsyncIterator[tuple[ScriptedEngine, ImagePuller, list[Pull]]]:
    async with scripted_engine(folder / "e.sock", *answers) as scripted:
        engine = EngineClient(folder / "e.sock", call_s=5.0, retry_s=0.01)
        try:
            yield scripted, ImagePuller(engine, SETTINGS, folder / "auth.json"), []
        finally:
            await engine.close()


async def test_progress_is_the_sum_over_the_layers(tmp_path: Path) -> None:
    words: list[Word] = [
        layer("a", "Pulling fs layer"),
        layer("b", "Already exists"),
        layer("a", "Downloading", 100, 1000),
        layer("c", "Downloading", 5, 50),
        layer("a", "Verifying Checksum"),
        layer("a", "Extracting", 300, 1000),
        layer("c", "Download complete"),
        {"status": "Digest: sha256:1"},
    ]
    async with puller_at(tmp_path, Answer(words)) as (_, puller, told):
        await puller.pull("game:1", told.append)
    sizes = [(it.done_bytes, it.total_bytes) for it in told]
    assert sizes[0] == (0, 0)
    assert sizes[-1] == (1050, 1050)
    assert (105, 1050) in sizes
    assert (1005, 1050) in sizes
    assert {it.image for it in told} == {"game:1"}


@pytest.mark.parametrize(
    ("image", "query"),
    [
        ("alpine", {"fromImage": "alpine", "tag": "latest"}),
        ("a.b:5000/c", {"fromImage": "a.b:5000/c", "tag": "latest"}),
        ("a.b:5000/c:1", {"fromImage": "a.b:5000/c:1"}),
        ("c@sha256:00", {"fromImage": "c@sha256:00"}),
    ],
)
async def test_one_tag_is_asked_for(tmp_path: Path, image: str, query: dict[str, str]) -> None:
    async with puller_at(tmp_path, DONE) as (scripted, puller, told):
        await puller.pull(image, told.append)
    assert dict(scripted.pulls[0].query) == query


@pytest.mark.parametrize(
    "trouble",
    [
        Answer([{"message": "received unexpected HTTP status: 502 Bad Gateway"}], status=500),
        Answer([layer("a", "Downloading", 1, 9), {"error": "read: connection reset by peer"}]),
        Answer([layer("a", "Downloading", 1, 9)], hangs=True),
    ],
)
async def test_trouble_that_may_pass_is_tried_again(tmp_path: Path, trouble: Answer) -> None:
    async with puller_at(tmp_path, trouble, trouble, DONE) as (scripted, puller, told):
        await puller.pull("game:1", told.append)
    assert len(scripted.pulls) == 3


@pytest.mark.parametrize(
    "refusal",
    [
        Answer([{"message": "manifest for game:1 not found: manifest unknown"}], status=404),
        Answer([{"message": "Head ...: unauthorized: authentication required"}], status=500),
        Answer([{"error": "pull access denied for game"}]),
        Answer([{"error": "write /var/lib: no space left on device"}]),
    ],
)
async def test_a_refusal_is_final(tmp_path: Path, refusal: Answer) -> None:
    async with puller_at(tmp_path, refusal) as (scripted, puller, told):
        with pytest.raises(StartError, match="game:1 cannot be pulled") as caught:
            await puller.pull("game:1", told.append)
    assert caught.value.reason is Reason.IMAGE_PULL
    assert len(scripted.pulls) == 1


async def test_a_pull_without_progress_is_given_up_after_its_tries(tmp_path: Path) -> None:
    # The engine counts down to its own next try: words, but no progress.
    stuck = Answer([layer("a", f"Retrying in {n} seconds") for n in range(9)], hangs=True)
    async with puller_at(tmp_path, stuck) as (scripted, puller, told):
        async with asyncio.timeout(5.0):
            with pytest.raises(StartError, match=r"no progress for 0.3 s \(tried 3 times\)"):
                await puller.pull("game:1", told.append)
    assert len(scripted.pulls) == 3


async def test_a_cancel_ends_a_pull_at_once(tmp_path: Path) -> None:
    slow = Answer([layer("a", "Downloading", 1, 9)], hangs=True)
    async with puller_at(tmp_path, slow) as (scripted, puller, told):
        pulling = asyncio.ensure_future(puller.pull("game:1", told.append))
        async with asyncio.timeout(5.0):
            while not any(it.done_bytes for it in told):  # noqa: ASYNC110 - told from below
                await asyncio.sleep(0.005)
            pulling.cancel()
            await asyncio.wait([pulling])
            await scripted.given_up.wait()
    assert pulling.cancelled()


async def test_credentials_go_to_the_engine_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {"r.example": {"username": "u", "password": "hush"}}}))
    file.chmod(0o600)
    denied = Answer([{"message": "unauthorized"}], status=401)
    async with puller_at(tmp_path, denied) as (scripted, puller, told):
        with pytest.raises(StartError) as caught:
            await puller.pull("r.example/game:1", told.append)
    header = scripted.pulls[0].headers["X-Registry-Auth"]
    assert json.loads(base64.urlsafe_b64decode(header)) == {
        "username": "u",
        "password": "hush",
        "serveraddress": "r.example",
    }
    assert str(file) in caught.value.message  # where to mend it
    assert "r.example" in caught.value.message
    for text in (caught.value.message, caplog.text):
        assert "hush" not in text
        assert header not in text


@pytest.mark.docker
async def test_a_private_image_comes_with_the_nodes_credentials_alone(
    engine: Engine, registry: Registry
) -> None:
    image = registry.publish(engine, "private/game:1", size_bytes=6_000_000)
    host = engine.host("fra-21")
    step = ContainerSpec(image=image, command=("true",))
    told: list[Pull] = []
    async with opened(host) as runtime:
        with pytest.raises(StartError, match=registry.address) as caught:
            await runtime.prepare(step, progress=told.append)
        assert str(host.auth_file) in caught.value.message
        host.auth_file.write_text(json.dumps(registry.auths()))
        host.auth_file.chmod(0o600)
        await runtime.prepare(step, progress=told.append)
        assert told[-1].image == image
        assert told[-1].done_bytes == told[-1].total_bytes > 6_000_000
        assert PASSWORD not in str(told)

        told.clear()
        await runtime.prepare(step, progress=told.append)
        assert told == []  # it is here
        run = new_run()
        await runtime.start(run, step, service=False)
        assert (await runtime.wait(run)).exit_code == 0


@pytest.mark.docker
async def test_nothing_is_told_of_an_image_that_is_here(engine: Engine) -> None:
    told: list[Pull] = []
    async with opened(engine.host("fra-22")) as runtime:
        await runtime.prepare(ContainerSpec(image=IMAGE), progress=told.append)
    assert told == []
