"""Ended pipelines go by age and count, with everything that is theirs: G4, RC5, RA6."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import func, select
from tests.support.plane import USER, ControlPlane, registration
from tests.support.time import FakeClock

from gamenode.domain.command import Dispatch
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.log import LogKey, LogPosition
from gamenode.domain.node import Session
from gamenode.domain.pipeline import PipelineReport, Report, Status, StepReport
from gamenode.server.db import schema
from gamenode.server.pipelines.retention import Retention, RetentionSettings
from gamenode.wire.cri import checksum

FILE = "name: w\nsteps: [{name: one, container: {image: a}}]"
SERVICE = "name: w\nsteps: [{name: one, type: service, container: {image: a}}]"
DAY_S = 24 * 3600.0
TABLES = (schema.pipelines, schema.steps, schema.logs, schema.idempotency_keys)


class Fleet:
    """A server whose pipelines all ran on one node."""

    def __init__(
        self, plane: ControlPlane, clock: FakeClock, folder: Path, session: Session
    ) -> None:
        self.plane = plane
        self.clock = clock
        self.logs = folder / "logs"
        self.session = session
        self.retention = self.new_retention()

    def new_retention(self, **bounds: Any) -> Retention:
        """Return what a server that starts now would remove pipelines with."""
        self.retention = Retention(
            service=self.plane.service,
            logs=self.plane.log_service,
            removed=self.plane.pipelines.forget,
            clock=self.clock,
            clock_watch=self.plane.clock_watch,
            settings=RetentionSettings(removal_pause_s=0.0, **bounds),
        )
        return self.retention

    async def dispatched(self, file: str = FILE, key: str = "") -> str:
        created = await self.plane.create(file, idempotency_key=key)
        order = await self.plane.bind(created.id)
        assert order is not None
        await self.say(self._step(created.id, Status.RUNNING))
        return created.id

    async def ended(self, file: str = FILE, key: str = "") -> str:
        """Run a pipeline to its end, log and all; the next one ends a second later."""
        pipeline_id = await self.dispatched(file, key)
        await self.log(pipeline_id)
        await self.say(
            self._step(pipeline_id, Status.COMPLETED),
            PipelineReport(pipeline_id=pipeline_id, status=Status.COMPLETED, attempt=1),
        )
        self.clock.advance(1.0)
        return pipeline_id

    async def let_go(self, pipeline_id: str) -> None:
        """Have the node say that nothing of a pipeline runs any more."""
        await self.say(PipelineReport(pipeline_id=pipeline_id, status=Status.CANCELLED, attempt=1))

    async def log(self, pipeline_id: str) -> None:
        """Have the node send a chunk of a step's log."""
        key, chunk = LogKey(pipeline_id, "one", 1), b"2026-11-25T00:00:00.000000000Z stdout F hi\n"
        await self.plane.pipelines.check_log_owner(key, "n1")
        await self.plane.log_service.append(
            key,
            node_id="n1",
            offset=0,
            chunk=chunk,
            checksum=checksum(chunk),
            position=LogPosition(stdout_bytes=3, stdout_lines=1),
            now=self.clock.now(),
        )

    async def left(self) -> set[str]:
        """Return the pipelines that are left."""
        return {pipeline.id for pipeline in await self.plane.service.list(limit=1000)}

    async def rows(self) -> list[int]:
        """Return how many pipelines, steps, logs and keys there are."""
        return await self.plane.database.read(
            lambda conn: [
                conn.execute(select(func.count()).select_from(table)).scalar_one()
                for table in TABLES
            ]
        )

    def with_bytes(self) -> set[str]:
        """Return the pipelines that have logs on the disk."""
        return {folder.name for folder in self.logs.glob("*/*")}

    @staticmethod
    def _step(pipeline_id: str, status: Status) -> StepReport:
        return StepReport(
            pipeline_id=pipeline_id,
            step="one",
            status=status,
            pipeline_attempt=1,
            attempt=1,
            run=1,
        )

    async def say(self, *reports: Report) -> None:
        """Have the node report."""
        now = self.clock.now()
        taken = await self.plane.service.apply(reports, node_id="n1", session=self.session, now=now)
        assert taken is not None


@pytest_asyncio.fixture
async def fleet(tmp_path: Path, database_url: str) -> AsyncIterator[Fleet]:
    clock = FakeClock()
    plane = ControlPlane(tmp_path, clock=clock, url=database_url)
    await plane.feed.start()
    answer = await plane.nodes.register(registration())
    session = Session(node_id="n1", session_id=answer.session_id, epoch=answer.session_epoch)
    yield Fleet(plane, clock, tmp_path, session)
    await plane.stop()


async def test_what_ended_long_ago_goes_with_all_that_is_its_own(fleet: Fleet) -> None:
    old = await fleet.ended(key="old")
    running = await fleet.dispatched(key="running")
    waiting = (await fleet.plane.create(FILE)).id
    fleet.clock.advance(29 * DAY_S)
    young = await fleet.ended(key="young")
    await fleet.retention.remove()
    assert await fleet.left() == {old, running, waiting, young}
    fleet.clock.advance(DAY_S)
    await fleet.retention.remove()
    assert await fleet.left() == {running, waiting, young}
    assert fleet.with_bytes() == {young}
    await fleet.retention.remove()
    assert await fleet.rows() == [3, 3, 1, 2]


async def test_the_newest_stay_where_there_are_too_many(fleet: Fleet) -> None:
    ended = [await fleet.ended() for _ in range(5)]
    running = await fleet.dispatched()
    await fleet.new_retention(ended_max=2).remove()
    assert await fleet.left() == {*ended[3:], running}
    assert fleet.with_bytes() == set(ended[3:])


async def test_many_go_in_small_transactions(fleet: Fleet) -> None:
    ended = [await fleet.ended() for _ in range(7)]
    await fleet.new_retention(ended_max=1, removals_per_write_max=2).remove()
    assert await fleet.left() == {ended[-1]}


async def test_what_its_node_may_still_run_stays(fleet: Fleet) -> None:
    forced = await fleet.dispatched()
    await fleet.plane.pipelines.cancel(forced, reason="", force=True, by=USER)
    fleet.clock.advance(100 * DAY_S)
    await fleet.retention.remove()
    assert await fleet.left() == {forced}
    now = fleet.clock.now()
    await fleet.plane.service.acknowledge_cancel(Dispatch(forced, 1), forced=True, now=now)
    await fleet.retention.remove()
    assert await fleet.left() == {forced}  # it knows, and has not said that nothing runs
    await fleet.say(PipelineReport(pipeline_id=forced, status=Status.CANCELLED, attempt=1))
    await fleet.retention.remove()
    assert await fleet.left() == set()


async def test_what_left_a_service_running_stays(fleet: Fleet) -> None:
    lives = await fleet.ended(SERVICE)
    await fleet.ended()
    fleet.clock.advance(100 * DAY_S)
    await fleet.new_retention(ended_max=1).remove()
    assert await fleet.left() == {lives}
    await fleet.plane.service.settle_instances(  # it has ended
        (), session=fleet.session, stream_number=1
    )
    await fleet.retention.remove()
    assert await fleet.left() == set()


async def test_a_key_outlives_its_pipeline_for_a_week(fleet: Fleet) -> None:
    first = await fleet.ended(key="k")
    await fleet.ended()
    await fleet.new_retention(ended_max=1).remove()
    fleet.clock.advance(6.9 * DAY_S)
    await fleet.retention.remove()
    with pytest.raises(GameNodeError) as caught:
        await fleet.plane.create(FILE, idempotency_key="k")
    assert caught.value.code is ErrorCode.PIPELINE_NOT_FOUND
    assert f"made pipeline {first}, which was removed" in caught.value.message
    fleet.clock.advance(0.2 * DAY_S)
    await fleet.retention.remove()
    assert (await fleet.plane.create(FILE, idempotency_key="k")).id != first


async def test_a_key_is_kept_as_long_as_its_pipeline(fleet: Fleet) -> None:
    first = await fleet.ended(key="k")
    fleet.clock.advance(29 * DAY_S)
    await fleet.retention.remove()
    assert (await fleet.plane.create(FILE, idempotency_key="k")).id == first


async def test_nothing_goes_by_a_clock_that_jumped(fleet: Fleet) -> None:
    ended = await fleet.ended()
    fleet.clock.jump(1000 * DAY_S)
    await fleet.retention.remove()
    fleet.clock.advance(30.0)
    await fleet.retention.remove()
    assert await fleet.left() == {ended}


async def test_files_that_a_crash_left_behind_go_after_the_next_start(fleet: Fleet) -> None:
    old = await fleet.ended()
    kept = await fleet.ended()
    removed = await fleet.plane.service.remove_ended(
        before=fleet.clock.now(), ended_max=1, key_keep_s=0.0, limit=1
    )
    assert list(removed) == [old]  # and the server ends here
    assert fleet.with_bytes() == {old, kept}
    await fleet.new_retention().remove()
    assert fleet.with_bytes() == {kept}


async def test_files_that_another_database_knows_stay(fleet: Fleet) -> None:
    kept = await fleet.ended()
    other = fleet.logs / "7c" / "0198-7c"
    other.mkdir(parents=True)
    await fleet.new_retention().remove()
    assert fleet.with_bytes() == {kept, "0198-7c"}


async def test_files_that_cannot_be_removed_are_tried_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = await fleet.ended()
    fleet.clock.advance(31 * DAY_S)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", _read_only)
        await fleet.retention.remove()
    assert "still there" in caplog.text
    assert await fleet.left() == set()
    assert fleet.with_bytes() == {old}
    await fleet.retention.remove()
    assert fleet.with_bytes() == set()


async def test_a_removed_pipeline_takes_no_log_and_has_none(fleet: Fleet) -> None:
    old = await fleet.ended()
    fleet.clock.advance(31 * DAY_S)
    await fleet.retention.remove()
    with pytest.raises(GameNodeError) as caught:
        await fleet.log(old)
    assert caught.value.code is ErrorCode.PERMISSION_DENIED
    with pytest.raises(GameNodeError) as caught:
        await fleet.plane.service.log_key(old, "one", 0)
    assert caught.value.code is ErrorCode.PIPELINE_NOT_FOUND
    assert await fleet.rows() == [0, 0, 0, 0]
    assert fleet.with_bytes() == set()


def _read_only(path: Path) -> None:
    raise OSError(30, "Read-only file system", str(path))
