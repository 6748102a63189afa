"""API tokens, on both databases: what they are good for, how long, and what is kept of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.support.api_fakes import CountingIds
from tests.support.databases import OpenDatabase
from tests.support.time import FakeClock

from gamenode.domain.access import SYSTEM, ActorKind, Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.access import tokens
from gamenode.server.access.manager import AccessManager, AccessSettings, AuthMode
from gamenode.server.access.service import AccessService
from gamenode.server.db import schema
from gamenode.server.db.database import Database
from gamenode.server.events import audit
from gamenode.server.events.feed import EventFeed, EventFeedSettings

HERE = "127.0.0.1"


class Access:
    """A manager of tokens over a real database, with a clock that a test moves."""

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self.clock = FakeClock()
        self.ids = CountingIds()
        self.service = AccessService(database)
        self.manager = self.another(**settings)

    def another(self, **settings: Any) -> AccessManager:
        """Return the manager of another server on the same database."""
        return AccessManager(
            self.service, clock=self.clock, ids=self.ids, settings=AccessSettings(**settings)
        )

    async def create(
        self, name: str = "ci", role: Role = Role.OPERATOR, *, ttl_s: float | None = None
    ) -> tuple[str, str]:
        """Return the id and the text of a new token."""
        token, text = await self.manager.create(name=name, role=role, ttl_s=ttl_s, by=SYSTEM)
        return token.id, text

    async def refusal(self, authorization: str | None, *, source: str = HERE) -> GameNodeError:
        with pytest.raises(GameNodeError) as refused:
            await self.manager.authenticate(authorization, source=source)
        return refused.value

    async def acts(self) -> list[tuple[str, str]]:
        """Return action and target of every audit row, newest first."""
        found = await self.database.read(lambda conn: audit.newest_first(conn, limit=100))
        return [(record.entry.action, record.entry.target) for record in found]


async def opened(url: str, open_database: OpenDatabase, **settings: Any) -> Access:
    database = await open_database(url)
    database.on_commit(EventFeed(database, settings=EventFeedSettings(), audit_key=b"key"))
    return Access(database, **settings)


async def test_a_token_signs_its_holder_in_with_its_role(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    token_id, text = await access.create()
    for scheme in ("Bearer", "bearer"):
        actor = await access.manager.authenticate(f"{scheme} {text}", source="192.0.2.7")
        assert (actor.kind, actor.name, actor.role, actor.source) == (
            ActorKind.TOKEN,
            "ci",
            Role.OPERATOR,
            "192.0.2.7",
        )
    assert await access.acts() == [("token.create", token_id)]


async def test_of_a_secret_only_its_hash_is_kept(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    _, text = await access.create()
    token = tokens.read(text)
    assert token is not None
    assert len(bytes.fromhex(token.secret)) == 32
    assert token.secret not in repr(token)
    for table in (schema.tokens, schema.audit):
        query = select(table)
        rows = await access.database.read(
            lambda conn, query=query: [tuple(row) for row in conn.execute(query)]  # type: ignore[misc] # of this turn
        )
        assert rows
        assert token.secret not in repr(rows)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer x",
        "Basic YTpi",
        "Bearer gn_019ab000-0000-7000-8000-000000000001_" + "0" * 63,
        "Bearer gn_019ab000-0000-7000-8000-000000000001_" + "0" * 64,
        "Bearer gn_019ab000-0000-7000-8000-00000000ffff_" + "0" * 64,
        "Bearer " + "gn_" * 10_000,
    ],
)
async def test_what_is_no_token_lets_nobody_in(
    sqlite_url: str, open_database: OpenDatabase, authorization: str | None
) -> None:
    access = await opened(sqlite_url, open_database)
    await access.create()
    refusal = await access.refusal(authorization)
    assert refusal.code is ErrorCode.UNAUTHENTICATED
    assert refusal.hint


async def test_two_credentials_are_none(sqlite_url: str, open_database: OpenDatabase) -> None:
    access = await opened(sqlite_url, open_database)
    _, text = await access.create()
    refusal = await access.refusal(f"Bearer {text}, Bearer {text}")
    assert refusal.code is ErrorCode.UNAUTHENTICATED


async def test_a_token_works_until_the_instant_at_which_it_expires(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    _, text = await access.create(ttl_s=60.0)
    for _ in range(2):  # from the database, then from memory
        await access.manager.authenticate(f"Bearer {text}", source=HERE)
    access.clock.advance(59.999)
    await access.manager.authenticate(f"Bearer {text}", source=HERE)
    access.clock.advance(0.001)
    assert "has expired" in (await access.refusal(f"Bearer {text}")).message


async def test_a_revoked_token_is_refused_by_the_next_request(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    token_id, text = await access.create()
    await access.manager.authenticate(f"Bearer {text}", source=HERE)
    revoked = await access.manager.revoke(token_id, by=SYSTEM)
    assert revoked.revoked_at is not None
    assert "was revoked" in (await access.refusal(f"Bearer {text}")).message
    # Once more changes nothing, and is not written down as if it did.
    assert await access.manager.revoke(token_id, by=SYSTEM) == revoked
    assert await access.acts() == [("token.revoke", token_id), ("token.create", token_id)]
    with pytest.raises(GameNodeError, match="there is no token"):
        await access.manager.revoke("019ab000-0000-7000-8000-00000000ffff", by=SYSTEM)


async def test_another_server_obeys_a_revocation_within_the_bound(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database, cached_s=5.0)
    other = access.another(cached_s=5.0)
    token_id, text = await access.create()
    await access.manager.authenticate(f"Bearer {text}", source=HERE)
    await other.revoke(token_id, by=SYSTEM)
    await access.manager.authenticate(f"Bearer {text}", source=HERE)
    access.clock.advance(5.0)
    assert "was revoked" in (await access.refusal(f"Bearer {text}")).message


async def test_a_name_means_one_token_at_a_time(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    token_id, _ = await access.create("ci")
    with pytest.raises(GameNodeError) as refused:
        await access.create("ci")
    assert refused.value.code is ErrorCode.CONFLICT
    await access.manager.revoke(token_id, by=SYSTEM)
    await access.create("ci")


async def test_tokens_are_listed_newest_first_page_by_page(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    for name in ("a", "b_1", "b%2"):
        await access.create(name)
    first = await access.manager.list(q="", limit=2, before="")
    rest = await access.manager.list(q="", limit=2, before=first[-1].id)
    assert [token.name for token in (*first, *rest)] == ["b%2", "b_1", "a"]
    found = await access.manager.list(q="b_", limit=9, before="")
    assert [token.name for token in found] == ["b_1"]


async def test_uses_are_written_down_together_and_never_turned_back(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    other = access.another()
    token_id, text = await access.create()
    await other.authenticate(f"Bearer {text}", source=HERE)
    access.clock.advance(10.0)
    for _ in range(5):
        await access.manager.authenticate(f"Bearer {text}", source=HERE)
    now = access.clock.now()

    async def last_used() -> int | None:
        known = await access.service.find(token_id)
        assert known is not None
        return known.token.last_used_at

    assert await last_used() is None
    await access.manager.flush_now()
    assert await last_used() == now
    await other.flush_now()
    assert await last_used() == now


async def test_who_guesses_is_put_off_and_keeps_nobody_out_that_was_in(
    sqlite_url: str, open_database: OpenDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    access = await opened(sqlite_url, open_database, failures_max=3, failures_s=60.0)
    _, text = await access.create()
    await access.manager.authenticate(f"Bearer {text}", source=HERE)
    guess = "Bearer gn_019ab000-0000-7000-8000-000000000001_" + "0" * 64
    codes = [(await access.refusal(guess)).code for _ in range(5)]
    assert codes == [ErrorCode.UNAUTHENTICATED] * 3 + [ErrorCode.RESOURCE_EXHAUSTED] * 2
    assert [record.message for record in caplog.records if HERE in record.message] == [
        f"signing in failed 3 times from {HERE}; the next attempts are put off"
    ]
    # Who was in stays in, also when the row has to be read again; other sources are others.
    access.clock.advance(30.0)
    await access.manager.authenticate(f"Bearer {text}", source=HERE)
    assert (await access.refusal(guess, source="::1")).code is ErrorCode.UNAUTHENTICATED
    refusal = await access.refusal(guess)
    assert refusal.retry_after_s == pytest.approx(30.0)
    access.clock.advance(30.0)
    assert (await access.refusal(guess)).code is ErrorCode.UNAUTHENTICATED


async def test_guessing_uses_no_memory_up(sqlite_url: str, open_database: OpenDatabase) -> None:
    access = await opened(sqlite_url, open_database, sources_max=10, cached_max=2)
    texts = [(await access.create(name))[1] for name in "abcd"]
    guess = "Bearer gn_019ab000-0000-7000-8000-000000000001_" + "0" * 64
    for number in range(100):
        await access.refusal(guess, source=f"192.0.2.{number}")
    for text in texts * 2:
        await access.manager.authenticate(f"Bearer {text}", source=HERE)
    assert len(access.manager._failures._sources) == 10
    assert len(access.manager._cache) == 2


async def test_without_credentials_only_this_host_counts_as_an_agent(
    sqlite_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(sqlite_url, open_database)
    for source in (HERE, "::1", "::ffff:127.0.0.1"):
        agent = await access.manager.authenticate(None, source=source, as_agent=True)
        assert (agent.kind, agent.role) == (ActorKind.NODE, Role.NODE)
    for source in ("192.0.2.7", "::ffff:192.0.2.7", "", "unix"):
        with pytest.raises(GameNodeError) as refused:
            await access.manager.authenticate(None, source=source, as_agent=True)
        assert refused.value.code is ErrorCode.UNAUTHENTICATED
    # A wrong token is worse than none.
    with pytest.raises(GameNodeError):
        await access.manager.authenticate("Bearer x", source=HERE, as_agent=True)


async def test_the_first_start_puts_a_token_into_a_file_of_its_own_and_tells_where(
    sqlite_url: str,
    open_database: OpenDatabase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    access = await opened(sqlite_url, open_database)
    path = tmp_path / "admin-token"
    await access.manager.ensure_admin(path)
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    actor = await access.manager.authenticate(f"Bearer {text.strip()}", source=HERE)
    assert actor.role is Role.ADMIN
    assert str(path) in caplog.text
    token = tokens.read(text.strip())
    assert token is not None
    assert token.secret not in caplog.text
    # Later starts leave it, as long as somebody can sign in as an administrator.
    await access.another().ensure_admin(path)
    assert path.read_text() == text
    await access.manager.revoke(token.id, by=SYSTEM)
    await access.create("viewer", Role.VIEWER)
    await access.another().ensure_admin(path)
    again = path.read_text().strip()
    assert again != text.strip()
    assert (await access.manager.authenticate(f"Bearer {again}", source=HERE)).role is Role.ADMIN


async def test_of_two_servers_that_start_together_one_makes_the_first_token(
    database_url: str, open_database: OpenDatabase
) -> None:
    access = await opened(database_url, open_database)
    now = access.clock.now()
    assert await access.service.create_first(tokens.mint(access.ids.new()), name="a", now=now)
    assert not await access.service.create_first(tokens.mint(access.ids.new()), name="b", now=now)
    assert len(await access.acts()) == 1


async def test_where_nobody_signs_in_everybody_is_the_local_administrator(
    sqlite_url: str, open_database: OpenDatabase, tmp_path: Path
) -> None:
    access = await opened(sqlite_url, open_database, auth=AuthMode.NONE)
    actor = await access.manager.authenticate(None, source=HERE)
    assert (actor.kind, actor.role) == (ActorKind.LOCAL, Role.ADMIN)
    await access.manager.ensure_admin(tmp_path / "admin-token")
    assert not (tmp_path / "admin-token").exists()
