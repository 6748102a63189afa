"""What `Database` promises, on both databases (rules RC1 to RC3)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import uvloop
from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import IntegrityError
from tests.support.databases import OpenDatabase, PostgresServer
from tests.support.groups import HeldWriter, write_together

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import SystemClock
from gamenode.server.db import group_commit
from gamenode.server.db.database import Database, DatabaseSettings, collect
from gamenode.server.db.group_commit import Work
from gamenode.server.db.schema import idempotency_keys


def put(key: str) -> Callable[[Connection], str]:
    """Return a function that writes one row and returns its key."""

    def write(conn: Connection) -> str:
        conn.execute(
            insert(idempotency_keys).values(
                caller="test", key=key, body_hash="", pipeline_id="", created_at=0
            )
        )
        return key

    return write


def keys(conn: Connection) -> list[str]:
    return list(conn.scalars(select(idempotency_keys.c.key).order_by(idempotency_keys.c.key)))


def raw_of(conn: Connection) -> Any:
    return conn.connection.dbapi_connection


class Recorder:
    """A commit hook that remembers, and fails at what it is told to."""

    def __init__(self, *, poison: object = None) -> None:
        self.poison = poison
        self.committed: list[object] = []

    def before_commit(self, conn: Connection, collected: Sequence[object]) -> object:
        put(f"hook-{len(keys(conn))}")(conn)
        if self.poison in collected:
            raise ValueError("poison")
        return collected

    def after_commit(self, outcome: object) -> None:
        assert isinstance(outcome, tuple)
        self.committed.extend(outcome)


async def test_a_read_sees_every_write_that_was_answered(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    for number in range(20):
        assert await database.write(put(f"{number:02}")) == f"{number:02}"
        assert len(await database.read(keys)) == number + 1


async def test_a_commit_waits_for_the_disk(database_url: str, open_database: OpenDatabase) -> None:
    database = await open_database(database_url)
    setting, safe = (
        ("PRAGMA synchronous", 2)
        if database_url.startswith("sqlite")
        else ("SHOW synchronous_commit", "on")
    )
    assert await database.write(lambda conn: conn.exec_driver_sql(setting).scalar()) == safe


async def test_servers_that_start_together_make_one_schema(postgres_url: str) -> None:
    settings = DatabaseSettings(url=postgres_url)
    opened = await asyncio.gather(
        *(asyncio.to_thread(Database.open, settings, clock=SystemClock()) for _ in range(4))
    )
    assert [database.generation for database in opened] == [1] * 4
    for database in opened:
        await database.aclose()


async def test_a_write_outlives_its_database(
    database_url: str, open_database: OpenDatabase
) -> None:
    first = await open_database(database_url)
    await first.write(put("a"))
    await first.aclose()
    second = await open_database(database_url)
    assert await second.read(keys) == ["a"]
    assert second.generation == first.generation == 1


async def test_closing_carries_out_what_waits_and_then_refuses(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    async with HeldWriter(database):
        waiting = asyncio.create_task(database.write(put("a")))
        await asyncio.sleep(0)
        closing = asyncio.create_task(database.aclose())
    await closing
    assert await waiting == "a"
    with pytest.raises(GameNodeError) as refused:
        await database.write(put("b"))
    assert refused.value.code is ErrorCode.UNAVAILABLE


async def test_a_read_sees_one_moment(database_url: str, open_database: OpenDatabase) -> None:
    database = await open_database(database_url)
    begun, go_on = threading.Event(), threading.Event()

    def read_twice(conn: Connection) -> tuple[list[str], list[str]]:
        before = keys(conn)
        begun.set()
        assert go_on.wait(10)
        return before, keys(conn)

    reading = asyncio.create_task(database.read(read_twice))
    await asyncio.to_thread(begun.wait, 10)
    await database.write(put("a"))
    go_on.set()
    assert await reading == ([], [])


async def test_a_read_cannot_write(database_url: str, open_database: OpenDatabase) -> None:
    database = await open_database(database_url)
    with pytest.raises(Exception, match=r"readonly|read-only"):
        await database.read(put("a"))
    assert await database.read(keys) == []


@pytest.mark.parametrize("together", [True, False])
async def test_a_failed_write_undoes_its_own_work_alone(
    database_url: str, open_database: OpenDatabase, together: bool
) -> None:
    database = await open_database(database_url)

    def refused(conn: Connection) -> None:
        put("refused")(conn)
        raise GameNodeError(ErrorCode.CONFLICT, "no")

    works: list[Work] = [put("a"), refused, put("b"), put("a"), put("c")]
    if together:
        answers = await write_together(database, *works)
    else:
        answers = [
            (await asyncio.gather(database.write(work), return_exceptions=True))[0]
            for work in works
        ]
    assert answers[0] == "a"
    assert isinstance(answers[1], GameNodeError)
    assert isinstance(answers[3], IntegrityError)
    assert (answers[2], answers[4]) == ("b", "c")
    assert await database.read(keys) == ["a", "b", "c"]


async def test_an_exception_that_no_future_can_carry_still_answers_everybody(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    answers = await write_together(database, put("a"), lambda _: next(iter(())), put("b"))
    assert isinstance(answers[1], RuntimeError)
    assert (answers[0], answers[2]) == ("a", "b")


@pytest.mark.parametrize("hidden", [True, False])
async def test_who_loses_the_groups_transaction_takes_nobody_along(
    database_url: str, open_database: OpenDatabase, hidden: bool
) -> None:
    database = await open_database(database_url)
    calls: list[str] = []

    def counted(key: str) -> Callable[[Connection], str]:
        def write(conn: Connection) -> str:
            calls.append(key)
            return put(key)(conn)

        return write

    def lose(conn: Connection) -> None:
        raw_of(conn).rollback()
        if not hidden:
            raise ValueError("lost")

    answers = await write_together(database, counted("a"), lose, counted("b"))
    assert (answers[0], answers[2]) == ("a", "b")
    assert isinstance(answers[1], Exception)
    assert await database.read(keys) == ["a", "b"]
    assert calls == ["a", "a", "b"], "what was rolled back ran again; what had not run, ran once"


async def test_nobody_is_answered_ok_while_everybody_loses_the_transaction(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)

    def lose(conn: Connection) -> None:
        put("lost")(conn)
        raw_of(conn).rollback()

    answers = await write_together(database, lose, lose, put("a"), lose)
    assert answers[2] == "a"
    assert all(isinstance(answers[index], Exception) for index in (0, 1, 3))
    assert await database.read(keys) == ["a"]


@pytest.mark.parametrize("together", [True, False])
async def test_what_a_failed_write_collected_is_dropped_with_it(
    database_url: str, open_database: OpenDatabase, together: bool
) -> None:
    database = await open_database(database_url)
    recorder = Recorder()
    database.on_commit(recorder)

    def collected(item: str, *, fails: bool = False) -> Work:
        def write(conn: Connection) -> None:
            collect(conn, item)
            if fails:
                raise ValueError(item)

        return write

    works = [collected("a"), collected("b", fails=True), collected("c")]
    if together:
        await write_together(database, *works)
    else:
        for work in works:
            await asyncio.gather(database.write(work), return_exceptions=True)
    assert recorder.committed == ["a", "c"]


async def test_a_hook_that_refuses_one_write_lets_the_others_commit(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    recorder = Recorder(poison="poison")
    database.on_commit(recorder)
    answers = await write_together(
        database, put("a"), lambda conn: collect(conn, "poison"), put("b")
    )
    assert (answers[0], answers[2]) == ("a", "b")
    assert isinstance(answers[1], ValueError)
    assert recorder.committed == []
    written = await database.read(keys)
    assert [key for key in written if not key.startswith("hook")] == ["a", "b"]


async def test_hooks_learn_of_a_commit_before_its_callers_are_answered(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    recorder = Recorder()
    database.on_commit(recorder)
    for number in range(5):

        def write(conn: Connection, number: int = number) -> None:
            collect(conn, number)

        await database.write(write)
        assert recorder.committed == list(range(number + 1))


async def test_a_hook_that_fails_after_the_commit_does_not_fail_the_write(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)

    class Failing(Recorder):
        def after_commit(self, outcome: object) -> None:
            raise ValueError(outcome)

    database.on_commit(Failing())
    assert await database.write(put("a")) == "a"


async def test_a_cancelled_caller_keeps_its_write_and_its_group(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    async with HeldWriter(database):
        cancelled = asyncio.create_task(database.write(put("a")))
        other = asyncio.create_task(database.write(put("b")))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert cancelled.cancelled()
    assert await other == "b"
    assert await database.read(keys) == ["a", "b"]


async def test_more_than_the_bound_is_refused_with_advice(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url, queue_max=2)
    async with HeldWriter(database):
        waiting = [asyncio.create_task(database.write(put(key))) for key in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(GameNodeError) as refused:
            await database.write(put("c"))
    assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
    assert refused.value.retry_after_s is not None
    assert await asyncio.gather(*waiting) == ["a", "b"]
    assert await database.read(keys) == ["a", "b"]


async def test_more_reads_than_the_bound_are_refused(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url, reads_max=1)
    gate = threading.Event()
    reading = asyncio.create_task(database.read(lambda _: gate.wait(10)))
    await asyncio.sleep(0)
    with pytest.raises(GameNodeError) as refused:
        await database.read(keys)
    assert refused.value.code is ErrorCode.RESOURCE_EXHAUSTED
    gate.set()
    assert await reading


async def test_many_writers_at_once_all_land(
    database_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(database_url)
    wanted = [f"{number:04}" for number in range(500)]
    assert await asyncio.gather(*(database.write(put(key)) for key in wanted)) == wanted
    assert await database.read(keys) == wanted


def test_it_works_under_uvloop(database_url: str) -> None:
    database = Database.open(DatabaseSettings(url=database_url), clock=SystemClock())

    async def main() -> list[str]:
        answers = await write_together(database, put("a"), put("b"))
        assert answers == ["a", "b"]
        found = await database.read(keys)
        await database.aclose()
        return found

    assert uvloop.run(main()) == ["a", "b"]


class LosesCommit:
    """A driver's connection that is lost at the commit of the group that arms it."""

    armed = False

    def __init__(self, raw: Any, *, lands: bool) -> None:
        self._raw = raw
        self._lands = lands

    def arm(self, _: Connection) -> None:
        self.armed = True

    def execute(self, statement: str) -> None:
        if self.armed and statement == "COMMIT":
            if self._lands:
                self._raw.execute(statement)
            self._raw.close()
        self._raw.execute(statement)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


@pytest.mark.parametrize("lands", [True, False])
async def test_a_commit_of_unknown_outcome_says_so_and_costs_the_connection(
    database_url: str, open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    connections: list[LosesCommit] = []

    def losing(conn: Connection) -> LosesCommit:
        connections.append(LosesCommit(raw_of(conn), lands=lands))
        return connections[-1]

    monkeypatch.setattr(group_commit, "raw_of", losing)
    database = await open_database(database_url)
    await database.write(put("a"))
    answers = await write_together(database, put("b"), connections[0].arm, put("c"))
    for answer in answers:
        assert isinstance(answer, GameNodeError)
        assert answer.code is ErrorCode.UNAVAILABLE
        assert "may have landed" in answer.message
        assert answer.retry_after_s is not None
    assert await database.write(put("d")) == "d"
    assert len(connections) == 2
    assert await database.read(keys) == (["a", "b", "c", "d"] if lands else ["a", "d"])


async def test_postgresql_ending_the_session_at_the_commit_answers_nobody_ok(
    postgres_url: str, postgres_server: PostgresServer, open_database: OpenDatabase
) -> None:
    database = await open_database(postgres_url)

    class Terminator(Recorder):
        def before_commit(self, conn: Connection, collected: Sequence[object]) -> object:
            if "end" in collected:
                postgres_server.terminate(raw_of(conn).info.backend_pid)
            return collected

    def last(conn: Connection) -> None:
        collect(conn, "end")

    recorder = Terminator()
    database.on_commit(recorder)
    for answer in await write_together(database, put("a"), last):
        assert isinstance(answer, GameNodeError)
        assert answer.code is ErrorCode.UNAVAILABLE
    assert recorder.committed == []
    assert await database.write(put("b")) == "b"
    assert await database.read(keys) == ["b"]


async def test_postgresql_away_is_unavailable_and_back_is_found_again(
    postgres_server: PostgresServer, postgres_url: str, open_database: OpenDatabase
) -> None:
    database = await open_database(postgres_url)
    await database.write(put("a"))
    await asyncio.gather(*(database.read(keys) for _ in range(4)))
    await asyncio.to_thread(postgres_server.stop)
    try:
        for refused in (database.write(put("b")), database.read(keys)):
            with pytest.raises(GameNodeError) as failure:
                await refused
            assert failure.value.code is ErrorCode.UNAVAILABLE
            assert failure.value.retry_after_s is not None
    finally:
        await asyncio.to_thread(postgres_server.start)
    assert await database.read(keys) == ["a"]
    assert await database.write(put("c")) == "c"
    await asyncio.to_thread(postgres_server.stop)
    await asyncio.to_thread(postgres_server.start)
    assert await database.write(put("d")) == "d"
    assert await asyncio.gather(*(database.read(keys) for _ in range(4))) == [["a", "c", "d"]] * 4
