"""The audit chain shows what was changed afterwards, on both databases (rule RC4)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, RowMapping, delete, insert, select, update
from tests.support.databases import OpenDatabase
from tests.support.groups import write_together

from gamenode.domain.access import Actor, ActorKind, Role
from gamenode.domain.audit import AuditEntry, AuditOutcome
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Instant
from gamenode.server.db.database import Database
from gamenode.server.db.schema import audit as table
from gamenode.server.events import audit
from gamenode.server.events.audit import AuditVerdict
from gamenode.server.events.audit_log import AuditLog
from gamenode.server.events.feed import EventFeed, EventFeedSettings

KEY = b"a test's key"


def entry(target: str, *, at: int = 0) -> AuditEntry:
    return AuditEntry(
        at=Instant(at),
        actor=Actor(kind=ActorKind.TOKEN, name="é", role=Role.ADMIN, source="::1"),
        action="nodes.state",
        target=target,
        outcome=AuditOutcome.REFUSED,
        code="CONFLICT",
        before='{"a": 1}',
        after="\n",
        request_id="r",
    )


def act(target: str, *, at: int = 0) -> Callable[[Connection], None]:
    return lambda conn: audit.append(conn, entry(target, at=at))


async def opened(url: str, open_database: OpenDatabase) -> Database:
    database = await open_database(url)
    database.on_commit(EventFeed(database, settings=EventFeedSettings(), audit_key=KEY))
    return database


async def filled(url: str, open_database: OpenDatabase) -> tuple[Database, list[int]]:
    """Return a log of three groups, of three rows each, and its ids."""
    database = await opened(url, open_database)
    for group in range(3):
        await write_together(
            database, *(act(f"{group}-{row}", at=10 * group + row) for row in range(3))
        )
    return database, await database.read(
        lambda conn: list(conn.scalars(select(table.c.id).order_by(table.c.id)))
    )


async def verified(database: Database, *, key: bytes = KEY, head: str = "") -> AuditVerdict:
    return await database.read(
        lambda conn: audit.verify(conn, key, known_heads=[head] if head else [])
    )


async def test_what_nobody_touched_is_sound(database_url: str, open_database: OpenDatabase) -> None:
    database = await opened(database_url, open_database)
    assert await verified(database) == AuditVerdict(ok=True, rows=0, head="", first_bad=None)
    database, ids = await filled(database_url, open_database)
    whole = await verified(database)
    assert (whole.ok, whole.rows, whole.first_bad) == (True, 9, None)
    assert len(set(await links(database))) == 3, "one link a group"
    assert await verified(database, head=whole.head) == whole
    newest = await database.read(lambda conn: audit.newest_first(conn, limit=2))
    assert [(record.id, record.entry) for record in newest] == [
        (ids[8], entry("2-2", at=22)),
        (ids[7], entry("2-1", at=21)),
    ]
    page = await database.read(lambda conn: audit.newest_first(conn, before=ids[1], limit=9))
    assert [record.entry.target for record in page] == ["0-0"]


async def links(database: Database) -> list[bytes]:
    return await database.read(lambda conn: list(conn.scalars(select(table.c.link))))


@pytest.mark.parametrize("column", [column.name for column in table.columns if column.name != "id"])
async def test_an_altered_row_is_found(
    sqlite_url: str, open_database: OpenDatabase, column: str
) -> None:
    database, ids = await filled(sqlite_url, open_database)
    other = {"at": 99, "link": bytes(32)}.get(column, "other")
    await database.write(
        lambda conn: conn.execute(
            update(table).where(table.c.id == ids[4]).values({column: other})
        ).close()
    )
    verdict = await verified(database)
    assert not verdict.ok
    assert verdict.rows == 3
    # The first row of the group that no longer fits its link.
    assert verdict.first_bad == ids[3]


@pytest.mark.parametrize("row", range(9))
async def test_a_removed_row_is_found(
    database_url: str, open_database: OpenDatabase, row: int
) -> None:
    database, ids = await filled(database_url, open_database)
    await database.write(
        lambda conn: conn.execute(delete(table).where(table.c.id == ids[row])).close()
    )
    assert not (await verified(database)).ok


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (0, 8)])
async def test_reordered_rows_are_found(
    database_url: str, open_database: OpenDatabase, one: int, other: int
) -> None:
    database, ids = await filled(database_url, open_database)

    def swap(conn: Connection) -> None:
        for old, new in ((ids[one], -1), (ids[other], ids[one]), (-1, ids[other])):
            conn.execute(update(table).where(table.c.id == old).values(id=new))

    await database.write(swap)
    assert not (await verified(database)).ok


async def test_an_added_row_is_found(database_url: str, open_database: OpenDatabase) -> None:
    database, ids = await filled(database_url, open_database)

    def forge(conn: Connection) -> None:
        row = dict(conn.execute(select(table).where(table.c.id == ids[8])).mappings().one())
        conn.execute(insert(table), [row | {"id": ids[8] + 1, "target": "forged"}])

    await database.write(forge)
    verdict = await verified(database)
    assert not verdict.ok
    assert verdict.first_bad == ids[6]


@pytest.mark.parametrize("kept", [0, 3, 6])
async def test_a_cut_tail_is_found_by_the_head_that_was_logged(
    database_url: str, open_database: OpenDatabase, kept: int
) -> None:
    database, ids = await filled(database_url, open_database)
    head = (await verified(database)).head
    await database.write(
        lambda conn: conn.execute(delete(table).where(table.c.id.in_(ids[kept:]))).close()
    )
    verdict = await verified(database, head=head)
    assert not verdict.ok
    assert verdict.rows == kept


async def test_each_commit_logs_the_head(
    database_url: str, open_database: OpenDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    database, _ = await filled(database_url, open_database)
    heads = [vars(record).get("head") for record in caplog.records]
    assert [head for head in heads if head][-1] == (await verified(database)).head


async def test_nobody_makes_a_sound_chain_without_the_key(
    database_url: str, open_database: OpenDatabase
) -> None:
    database, ids = await filled(database_url, open_database)
    assert (await verified(database, key=b"other")).first_bad == ids[0]


async def test_a_refused_act_is_recorded_though_its_work_was_rolled_back(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await opened(database_url, open_database)

    def refused(conn: Connection) -> None:
        audit.append(conn, entry("accepted, it seemed"))
        raise GameNodeError(ErrorCode.CONFLICT, "no")

    try:
        await database.write(refused)
    except GameNodeError:
        await database.write(act("refused"))
    found = await database.read(lambda conn: audit.newest_first(conn, limit=9))
    assert [record.entry.target for record in found] == ["refused"]
    assert (await verified(database)).ok


async def test_retention_leaves_a_checkpoint_that_nobody_can_forge(
    database_url: str, open_database: OpenDatabase
) -> None:
    database, _ = await filled(database_url, open_database)

    async def purged(before: int) -> int:
        return await database.write(
            lambda conn: audit.purge(conn, Instant(before), now=Instant(100))
        )

    assert await purged(0) == 0
    assert await purged(11) == 3, "a group goes as a whole, or stays"
    assert await verified(database) == AuditVerdict(
        ok=True, rows=7, head=(await verified(database)).head, first_bad=None
    )
    assert await purged(11) == 0
    assert await purged(50) == 6, "the newest group, the checkpoint's, stays"
    whole = await verified(database)
    assert whole.ok
    await database.write(act("later"))
    assert (await verified(database)).ok

    # Who removes more, and alters the checkpoint to hide it, breaks the checkpoint's own link.
    first = await database.read(lambda conn: conn.scalar(select(table.c.id).order_by(table.c.id)))
    await database.write(
        lambda conn: conn.execute(delete(table).where(table.c.id == first)).close()
    )
    assert not (await verified(database)).ok


async def test_a_cut_tail_is_found_without_a_head_by_the_server_that_saw_it(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    feed = EventFeed(database, settings=EventFeedSettings(), audit_key=KEY)
    database.on_commit(feed)
    log = AuditLog(database, key=KEY, head=lambda: feed.audit_head)
    for target in "abcd":
        await database.write(act(target))
    assert (await log.verify()).ok
    newest = (await log.list(limit=1, before=None))[0].id
    await database.write(
        lambda conn: conn.execute(delete(table).where(table.c.id >= newest - 1)).close()
    )
    cut = await log.verify()
    assert (cut.ok, cut.rows, cut.first_bad) == (False, 2, newest - 1)
    # What is appended later does not cover it, not for a server that starts afterwards either.
    await database.write(act("e"))
    for verdict in (await log.verify(), await verified(database)):
        assert (verdict.ok, verdict.rows) == (False, 2)
        assert verdict.first_bad is not None
        assert verdict.first_bad > newest


async def test_a_long_walk_blocks_no_writer_and_no_second_walk_joins_it(
    database_url: str, open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, ids = await filled(database_url, open_database)
    log = AuditLog(database, key=KEY, head=lambda: None)
    walk, go_on = audit._walk, threading.Event()

    def slow_walk(conn: Connection) -> Iterator[RowMapping]:
        for row in walk(conn):
            yield row
            assert go_on.wait(20.0)

    monkeypatch.setattr(audit, "_walk", slow_walk)
    walking = asyncio.ensure_future(log.verify())
    try:
        await asyncio.sleep(0)
        with pytest.raises(GameNodeError) as refused:
            await log.verify()
        assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
        async with asyncio.timeout(10.0):
            await database.write(act("meanwhile"))
        assert not walking.done()
    finally:
        go_on.set()
    assert (await walking).ok
    assert (await log.verify()).rows == len(ids) + 1
