"""Secret args on the server: sealed, sent to their node, forgotten; in no record (F11, RG3)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import Connection, select
from tests.support.fake_agent import FakeAgent, acknowledged, step, whole
from tests.support.plane import USER, ControlPlane
from tests.support.time import FakeClock

from gamenode.domain.command import Dispatch, ExecuteOrder
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import NewPipeline, Status
from gamenode.lib.clock import after
from gamenode.server.db import schema
from gamenode.server.pipelines.manager import PipelineSettings
from gamenode.server.pipelines.secrets import SecretBox
from gamenode.wire.codec import pack_order

VALUE = "correct-horse-battery"
FILE = """
name: w
args: [{name: T, type: secret}, {name: A, default: plain}]
steps:
- name: one
  container: {image: a, environment: {AUTH: "${{ args.A }} ${{ args.T }}"}}
"""


@pytest_asyncio.fixture
async def plane(tmp_path: Path, database_url: str) -> AsyncIterator[ControlPlane]:
    opened = ControlPlane(tmp_path, clock=FakeClock(), url=database_url)
    await opened.feed.start()
    yield opened
    await opened.stop()


async def everything(plane: ControlPlane) -> str:
    """Return every value of every row."""

    def read(conn: Connection) -> str:
        tables = schema.metadata.sorted_tables
        return repr([tuple(row) for table in tables for row in conn.execute(select(table))])

    return await plane.database.read(read)


async def sealed(plane: ControlPlane, pipeline_id: str) -> bytes | None:
    column = schema.pipelines.c
    query = select(column.sealed).where(column.id == pipeline_id)
    found: bytes | None = await plane.database.read(lambda conn: conn.scalar(query))
    return found


async def dispatched(plane: ControlPlane, agent: FakeAgent) -> str:
    created = await plane.create(FILE, args={"T": VALUE})
    await plane.dispatcher.sweep()
    order = await agent.take()
    assert isinstance(order, ExecuteOrder)
    assert order.secrets == {"T": VALUE}
    assert order.steps[0].container.environment == {"AUTH": "plain ${{ args.T }}"}
    await acknowledged(plane, created.id)
    return created.id


async def test_a_secret_is_sent_to_its_node_and_stands_in_no_row(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    resent = await plane.service.order(Dispatch(pipeline_id, 1))
    assert resent is not None
    assert resent.secrets == {"T": VALUE}
    assert (await plane.service.get(pipeline_id)).args == {"T": "***", "A": "plain"}
    rows = await everything(plane)
    assert "${{ args.T }}" in rows
    assert VALUE not in rows
    assert VALUE.encode() not in pack_order(resent)
    assert VALUE not in repr(resent)


async def test_nothing_that_is_logged_or_refused_shows_a_value(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    agent = await FakeAgent.join(plane)
    await dispatched(plane, agent)
    for wrong in ({"T": f"{VALUE}\0"}, {"T": VALUE * 2000}, {"T": VALUE, "X": ""}):
        with pytest.raises(GameNodeError) as caught:
            await plane.create(FILE, args=wrong)
        assert VALUE not in f"{caught.value!r} {caught.value.violations} {caught.value.hint}"
    request = NewPipeline(file=FILE, args={"T": VALUE})
    prepared = plane.pipelines.prepare(request)
    assert prepared.work.secrets == {"T": VALUE}
    assert VALUE not in f"{request!r} {prepared!r}"
    assert VALUE not in str([vars(record) for record in caplog.records])


async def test_a_completed_pipelines_secrets_are_forgotten_at_once(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await agent.report(step(pipeline_id, Status.COMPLETED))
    assert await sealed(plane, pipeline_id) is not None
    await agent.report(whole(pipeline_id, Status.COMPLETED))
    assert await sealed(plane, pipeline_id) is None


async def test_a_failed_pipelines_secrets_go_to_its_retry_for_a_day(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await agent.report(whole(pipeline_id, Status.FAILED))
    keep_s = PipelineSettings().secrets_keep_s
    await plane.service.forget_secrets(after(plane.clock.now(), -keep_s))
    again = await plane.pipelines.retry(pipeline_id, from_failed=False, key="", by=USER)
    copied = await sealed(plane, again.id)
    assert copied is not None
    box = SecretBox(bytes(32))
    assert box.unseal(again.id, copied) == {"T": VALUE}
    assert box.unseal(pipeline_id, copied) == {}
    assert VALUE not in repr(again)
    await plane.service.forget_secrets(after(plane.clock.now(), 1.0))
    assert await sealed(plane, pipeline_id) is None
    with pytest.raises(GameNodeError, match="forgotten: T") as caught:
        await plane.pipelines.retry(pipeline_id, from_failed=False, key="", by=USER)
    assert caught.value.code is ErrorCode.CONFLICT


async def test_what_runs_keeps_its_secrets_however_long(plane: ControlPlane) -> None:
    agent = await FakeAgent.join(plane)
    pipeline_id = await dispatched(plane, agent)
    await plane.service.forget_secrets(after(plane.clock.now(), 1e6))
    assert await sealed(plane, pipeline_id) is not None


async def test_the_same_key_with_another_secret_is_a_conflict(plane: ControlPlane) -> None:
    first = await plane.create(FILE, args={"T": VALUE}, idempotency_key="k")
    again = await plane.create(FILE, args={"T": VALUE}, idempotency_key="k")
    assert again.id == first.id
    with pytest.raises(GameNodeError) as caught:
        await plane.create(FILE, args={"T": "another-one"}, idempotency_key="k")
    assert caught.value.code is ErrorCode.CONFLICT
    assert "another-one" not in f"{caught.value!r}"


def test_a_requests_fingerprint_tells_nothing_without_the_key() -> None:
    one, other = SecretBox(bytes(32)), SecretBox(bytes(31) + b"\1")
    assert one.fingerprint(b"1234") == one.fingerprint(b"1234")
    assert one.fingerprint(b"1234") != one.fingerprint(b"1235")
    assert one.fingerprint(b"1234") != other.fingerprint(b"1234")


def test_what_is_sealed_differs_each_time_and_opens_with_its_key_and_pipeline_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    box, other = SecretBox(bytes(32)), SecretBox(bytes(31) + b"\1")
    first, second = box.seal("p", {"T": VALUE}), box.seal("p", {"T": VALUE})
    assert first is not None
    assert second is not None
    assert first != second
    assert box.unseal("p", first) == {"T": VALUE}
    assert box.unseal("q", first) == {}
    assert other.unseal("p", first) == {}
    assert box.unseal("p", first[:-1] + bytes([first[-1] ^ 1])) == {}
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
    assert box.seal("p", {}) is None
    assert box.unseal("p", None) == {}
