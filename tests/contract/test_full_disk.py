"""A disk that fills in the middle of a group (rule RC1, promise P13)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select
from tests.support.databases import OpenDatabase
from tests.support.full_disk import fill, small_disk
from tests.support.groups import write_together

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.db.database import Database
from gamenode.server.db.group_commit import Work
from gamenode.server.db.schema import idempotency_keys

BIG_BYTES = 2_000_000


def put(key: str, *, size_bytes: int = 0) -> Work:
    def write(conn: Connection) -> str:
        conn.execute(
            insert(idempotency_keys).values(
                caller="test", key=key, body_hash="", pipeline_id="x" * size_bytes, created_at=0
            )
        )
        return key

    return write


def keys(conn: Connection) -> list[str]:
    return list(conn.scalars(select(idempotency_keys.c.key).order_by(idempotency_keys.c.key)))


def assert_full(answer: object) -> None:
    assert isinstance(answer, GameNodeError)
    assert answer.code is ErrorCode.STORAGE_FULL
    assert answer.retry_after_s is not None


async def limit_pages(database: Database, more: int | None) -> None:
    """Let the file grow by `more` pages; None lifts the limit. It is the writing connection's."""

    def limit(conn: Connection) -> None:
        pages = conn.exec_driver_sql("PRAGMA page_count").scalar_one()
        most = 2**30 if more is None else pages + more
        conn.exec_driver_sql(f"PRAGMA max_page_count = {most}")

    await database.write(limit)


@pytest.mark.parametrize("order", [("a", "BIG", "b"), ("BIG", "a", "b"), ("a", "b", "BIG")])
async def test_who_fills_the_file_is_refused_and_the_others_commit(
    sqlite_url: str, open_database: OpenDatabase, order: Sequence[str]
) -> None:
    database = await open_database(sqlite_url)
    await limit_pages(database, 20)
    works = [put(key, size_bytes=BIG_BYTES if key == "BIG" else 0) for key in order]
    for key, answer in zip(order, await write_together(database, *works), strict=True):
        if key == "BIG":
            assert_full(answer)
        else:
            assert answer == key
    assert await database.read(keys) == ["a", "b"]
    await limit_pages(database, None)
    assert await database.write(put("BIG", size_bytes=BIG_BYTES)) == "BIG"


async def test_a_full_disk_is_logged_once_and_so_is_its_end(
    sqlite_url: str, open_database: OpenDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gamenode")
    database = await open_database(sqlite_url)
    await limit_pages(database, 20)
    for _ in range(3):
        with pytest.raises(GameNodeError) as refused:
            await database.write(put("BIG", size_bytes=BIG_BYTES))
        assert_full(refused.value)
    assert await database.write(put("small")) == "small"
    assert [getattr(record, "event", "") for record in caplog.records] == [
        "database.full",
        "database.writable",
    ]


async def test_two_that_fill_the_file_do_not_take_the_third_along(
    sqlite_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(sqlite_url)
    await limit_pages(database, 20)
    big = [put(f"BIG{number}", size_bytes=BIG_BYTES) for number in range(3)]
    answers = await write_together(database, big[0], put("a"), big[1], put("b"), big[2])
    for index in (0, 2, 4):
        assert_full(answers[index])
    assert (answers[1], answers[3]) == ("a", "b")
    assert await database.read(keys) == ["a", "b"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with 2 MB of room."""
    with small_disk(tmp_path / "disk", size_bytes=2 * 1024 * 1024) as made:
        yield made


async def test_a_real_full_disk_answers_ok_for_what_is_on_it_and_for_nothing_else(
    disk: Path, open_database: OpenDatabase
) -> None:
    url = f"sqlite:///{disk / 'gamenode.db'}"
    database = await open_database(url)
    written = ["start"]
    await database.write(put("start"))
    ballast = disk / "ballast"
    fill(ballast, leave_bytes=200_000)  # room for some groups, not for all

    refused = 0
    for group in range(40):
        names = [f"{group:02}-{number}" for number in range(8)]
        works = [put(name, size_bytes=3_000) for name in names]
        for name, answer in zip(names, await write_together(database, *works), strict=True):
            if answer == name:
                written.append(name)
            else:
                assert_full(answer)
                refused += 1
    assert refused > 0
    assert len(written) > 8
    assert await database.read(keys) == sorted(written)

    ballast.unlink()
    assert await database.write(put("after")) == "after"
    await database.aclose()
    again = await open_database(url)
    assert await again.read(keys) == sorted([*written, "after"])


async def test_a_write_too_big_for_the_disk_fails_alone_even_at_the_commit(
    disk: Path, open_database: OpenDatabase
) -> None:
    database = await open_database(f"sqlite:///{disk / 'gamenode.db'}")
    await database.write(put("start"))
    (disk / "ballast").write_bytes(bytes(1_000_000))
    # It fits the page cache, so the disk is asked for room at the commit and not before.
    big = put("BIG", size_bytes=1_500_000)
    answers = await write_together(database, put("a"), big, put("b"))
    assert_full(answers[1])
    assert (answers[0], answers[2]) == ("a", "b")
    assert (
        await asyncio.gather(*(database.read(keys) for _ in range(3))) == [["a", "b", "start"]] * 3
    )
