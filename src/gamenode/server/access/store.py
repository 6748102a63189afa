"""Rows of API tokens: functions of a connection, without rules or commits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, bindparam, exists, func, insert, or_, select, update

from gamenode.domain.access import ApiToken, Role
from gamenode.lib.clock import Instant
from gamenode.server.access.tokens import Known
from gamenode.server.db import schema

_tokens: Final = schema.tokens.c


def add(conn: Connection, token: ApiToken, secret_hash: bytes) -> None:
    """Add a token."""
    conn.execute(
        insert(schema.tokens).values(
            id=token.id,
            name=token.name,
            role=token.role.value,
            hash=secret_hash,
            created_at=token.created_at,
            created_by=token.created_by,
            expires_at=token.expires_at,
        )
    )


def get(conn: Connection, token_id: str) -> Known | None:
    """Return a token, or None."""
    row = conn.execute(select(schema.tokens).where(_tokens.id == token_id)).mappings().first()
    return Known(_token(row), row["hash"]) if row is not None else None


def has_name(conn: Connection, name: str) -> bool:
    """Return whether a token that was not revoked has this name."""
    named = exists().where(_tokens.name == name, _tokens.revoked_at.is_(None))
    return bool(conn.scalar(select(named)))


def has_admin(conn: Connection, now: Instant) -> bool:
    """Return whether somebody can sign in as an administrator at `now`."""
    working = exists().where(
        _tokens.role == Role.ADMIN.value,
        _tokens.revoked_at.is_(None),
        or_(_tokens.expires_at.is_(None), _tokens.expires_at > now),
    )
    return bool(conn.scalar(select(working)))


def newest_first(conn: Connection, *, q: str, before: str, limit: int) -> list[ApiToken]:
    """Return tokens, newest first: with ids below `before`, and with `q` in id or name."""
    page = select(schema.tokens).order_by(_tokens.id.desc()).limit(limit)
    if before:
        page = page.where(_tokens.id < before)
    if q:
        page = page.where(
            or_(_tokens.name.contains(q, autoescape=True), _tokens.id.contains(q, autoescape=True))
        )
    return [_token(row) for row in conn.execute(page).mappings()]


def revoke(conn: Connection, token_id: str, *, now: Instant) -> bool:
    """Revoke a token; False if that was done before, or there is none."""
    revoked = (
        update(schema.tokens)
        .where(_tokens.id == token_id, _tokens.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    return conn.execute(revoked).rowcount == 1


def set_last_used(conn: Connection, used: Mapping[str, Instant]) -> None:
    """Write down when tokens were last used; an earlier use than the one known changes nothing."""
    later = (
        update(schema.tokens)
        .where(
            _tokens.id == bindparam("token_id"),
            func.coalesce(_tokens.last_used_at, 0) < bindparam("at"),
        )
        .values(last_used_at=bindparam("at"))
    )
    conn.execute(later, [{"token_id": token_id, "at": at} for token_id, at in used.items()])


def _token(row: RowMapping) -> ApiToken:
    values: dict[str, Any] = {name: value for name, value in row.items() if name != "hash"}
    return ApiToken(**values | {"role": Role(row["role"])})
