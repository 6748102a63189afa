"""Which images go, and when: those that this agent pulled, and no others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import CalledProcessError
from typing import cast

import pytest
from tests.support.engine import IMAGE, SETTINGS, DockerRuntimeHost, Engine
from tests.support.registry import Registry
from tests.support.runtimes import new_run, opened
from tests.support.time import FakeClock

from gamenode.agent.runtime import Runtime
from gamenode.domain.pipeline import ContainerSpec

pytestmark = pytest.mark.docker
DAY_S = 86400.0


@pytest.fixture(scope="module")
def image(engine: Engine, registry: Registry) -> str:
    return registry.publish(engine, "images/game:1", size_bytes=1000)


@pytest.fixture
def host(
    engine: Engine, registry: Registry, image: str, tmp_path: Path
) -> Iterator[DockerRuntimeHost]:
    yield host_of(engine, registry, tmp_path)
    for name in (image, "kept:1"):
        with suppress(CalledProcessError):
            engine.docker("rmi", name)


def host_of(
    engine: Engine, registry: Registry, folder: Path, **settings: float
) -> DockerRuntimeHost:
    made = engine.host(f"node-{folder.name}", replace(SETTINGS, **settings))  # type: ignore[arg-type] # floats all
    made.clock = FakeClock()
    made.auth_file.write_text(json.dumps(registry.auths()))
    made.auth_file.chmod(0o600)
    return made


def clock_of(host: DockerRuntimeHost) -> FakeClock:
    return cast("FakeClock", host.clock)


def has(engine: Engine, image: str) -> bool:
    return bool(engine.docker("images", "-q", image))


async def fetch(runtime: Runtime, image: str) -> None:
    await runtime.prepare(ContainerSpec(image=image), progress=lambda _: None)


async def test_a_pulled_image_goes_when_nothing_has_used_it_for_its_age(
    engine: Engine, host: DockerRuntimeHost, image: str
) -> None:
    async with opened(host) as runtime:
        await fetch(runtime, image)
        clock_of(host).advance(6 * DAY_S)
        await fetch(runtime, image)  # it is used
        clock_of(host).advance(6 * DAY_S)
        await runtime.tidy()
        assert has(engine, image)
        clock_of(host).advance(1.5 * DAY_S)
    async with opened(host) as runtime:  # another agent remembers
        await runtime.tidy()
        assert not has(engine, image)
        await runtime.tidy()


async def test_an_image_under_a_container_stays(
    engine: Engine, host: DockerRuntimeHost, image: str
) -> None:
    async with opened(host) as runtime:
        run = new_run()
        await fetch(runtime, image)
        await runtime.start(run, ContainerSpec(image=image, command=("true",)), service=False)
        await runtime.wait(run)
        clock_of(host).advance(30 * DAY_S)
        await runtime.tidy()
        assert has(engine, image)
        await runtime.remove(run)
        await runtime.tidy()
        assert has(engine, image)  # in use until a moment ago
        clock_of(host).advance(8 * DAY_S)
        await runtime.tidy()
        assert not has(engine, image)


async def test_what_we_did_not_pull_stays(
    engine: Engine, host: DockerRuntimeHost, registry: Registry, image: str
) -> None:
    engine.docker("pull", "-q", image, DOCKER_CONFIG=str(registry.folder))
    async with opened(host) as runtime:
        await fetch(runtime, image)
        always = ContainerSpec(image=image, pull_policy="always")
        await runtime.prepare(always, progress=lambda _: None)
        await fetch(runtime, IMAGE)
        clock_of(host).advance(400 * DAY_S)
        await runtime.tidy()
    assert has(engine, image)
    assert has(engine, IMAGE)


async def test_what_somebody_gave_a_name_of_their_own_loses_only_ours(
    engine: Engine, host: DockerRuntimeHost, image: str
) -> None:
    async with opened(host) as runtime:
        await fetch(runtime, image)
        engine.docker("tag", image, "kept:1")
        clock_of(host).advance(400 * DAY_S)
        await runtime.tidy()
    assert not has(engine, image)
    assert has(engine, "kept:1")


async def test_a_full_disk_takes_images_sooner_but_none_that_was_just_used(
    engine: Engine, registry: Registry, image: str, tmp_path: Path
) -> None:
    host = host_of(engine, registry, tmp_path, images_disk_used_ratio_max=0.0)
    async with opened(host) as runtime:
        await fetch(runtime, image)
        clock_of(host).advance(SETTINGS.images_unused_s_min - 1.0)
        await runtime.tidy()
        assert has(engine, image)
        clock_of(host).advance(2.0)
        await runtime.tidy()
        assert not has(engine, image)


async def test_a_damaged_list_removes_nothing(
    engine: Engine, host: DockerRuntimeHost, image: str
) -> None:
    async with opened(host) as runtime:
        await fetch(runtime, image)
    for damage in ("{", "[]", '{"images": {"sha256:1": {"used_at": 1, "names": 5}}}'):
        await asyncio.to_thread((host.data / "pulled-images.json").write_text, damage)
        async with opened(host) as runtime:
            clock_of(host).advance(400 * DAY_S)
            await runtime.tidy()
        assert has(engine, image)


async def test_a_container_that_never_started_goes_with_age(engine: Engine, tmp_path: Path) -> None:
    host = engine.host(f"node-{tmp_path.name}", replace(SETTINGS, created_age_s=0.0))
    run = {"node": f"node-{tmp_path.name}", "pipeline": "p", "step": "s", "attempt": 1, "run": 1}
    labels = [f"--label=gamenode.{name}={value}" for name, value in run.items()]
    engine.docker("create", "--name", "gamenode-p-s-1-1", *labels, IMAGE, "true")
    engine.docker("create", "--name", "of-another-node", IMAGE, "true")
    async with opened(host) as runtime:
        await runtime.tidy()
    names = engine.docker("ps", "-a", "--format", "{{.Names}}").split()
    engine.docker("rm", "of-another-node")
    assert "of-another-node" in names
    assert "gamenode-p-s-1-1" not in names
