from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from gamenode.agent.journal import Journal
from gamenode.domain.command import CancelOrder, Dispatch
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import Reason


async def test_what_was_written_is_there_at_the_next_start(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    assert journal.last_session_epoch() is None
    await journal.open_session(7, continued=True)
    await journal.close()
    journal = Journal(tmp_path / "journal.db")
    assert journal.last_session_epoch() == 7
    await journal.close()


@pytest.mark.parametrize(
    ("opened_on", "found_on", "epoch"),
    [("a", "a", 7), ("a", "b", None), ("", "b", 7), ("a", "", 7)],
)
async def test_a_journal_of_another_host_continues_no_session(
    tmp_path: Path, opened_on: str, found_on: str, epoch: int | None
) -> None:
    journal = Journal(tmp_path / "journal.db", host_id=opened_on)
    await journal.open_session(7, continued=True)
    await journal.close()
    journal = Journal(tmp_path / "journal.db", host_id=found_on)
    assert journal.last_session_epoch() == epoch
    await journal.close()


async def test_what_a_session_does_not_continue_stays_abandoned(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    cancel = CancelOrder(dispatch=Dispatch("p", 1), reason=Reason.CANCELLED_BY_USER)
    await journal.cancel(cancel)
    assert [held.abandoned for held in journal.held()] == [False]
    await journal.open_session(8, continued=False)
    await journal.open_session(9, continued=True)
    await journal.cancel(replace(cancel, dispatch=Dispatch("p", 2)))
    await journal.close()
    journal = Journal(tmp_path / "journal.db")
    assert [held.abandoned for held in journal.held()] == [True, False]
    await journal.close()


def test_the_journal_is_its_owners_alone(tmp_path: Path) -> None:
    held = Journal(tmp_path / "journal.db")
    held.state()
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    asyncio.run(held.close())


async def test_the_journal_of_another_build_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE held (pipeline_id TEXT)")
    other.close()
    with pytest.raises(GameNodeError, match="another build") as refused:
        Journal(path)
    assert refused.value.code is ErrorCode.CONFLICT
    assert "nothing runs here" in refused.value.hint
    after = sqlite3.connect(path)
    assert after.execute("SELECT name FROM sqlite_schema").fetchall() == [("held",)]
    after.close()


def test_a_journal_that_cannot_be_used_says_which_and_why(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"no database at all, and longer than a header" * 100)
    with pytest.raises(GameNodeError, match=r"journal\.db.*not a database") as refused:
        Journal(path)
    assert refused.value.code is ErrorCode.UNAVAILABLE
