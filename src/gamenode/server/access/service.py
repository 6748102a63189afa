"""The only writer of API tokens: one call, one transaction, with its audit row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from gamenode.domain.access import SYSTEM, Actor, ApiToken, Role
from gamenode.domain.audit import AuditEntry
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Instant
from gamenode.server.access import store
from gamenode.server.access.tokens import Known, Token
from gamenode.server.db.database import Database
from gamenode.server.events import audit


class AccessService:
    """Keeps API tokens."""

    def __init__(self, database: Database) -> None:
        """Keep them in `database`."""
        self._db = database

    async def create(
        self,
        secret: Token,
        *,
        name: str,
        role: Role,
        expires_at: Instant | None,
        by: Actor,
        now: Instant,
    ) -> ApiToken:
        """Record a token whose text the caller has; of its secret only the hash is kept.

        Raises:
            GameNodeError: CONFLICT, a token has this name and was not revoked.
        """
        token = _new(secret, name=name, role=role, expires_at=expires_at, by=by, now=now)

        def record(conn: Connection) -> None:
            if store.has_name(conn, name):
                raise GameNodeError(
                    ErrorCode.CONFLICT,
                    f"there is a token with the name {name!r} already",
                    hint="choose another name, or revoke that token first",
                )
            _add(conn, token, secret, by=by)

        await self._db.write(record)
        return token

    async def create_first(self, secret: Token, *, name: str, now: Instant) -> bool:
        """Record an administrator's token, if nobody can sign in as one; return whether it was."""
        token = _new(secret, name=name, role=Role.ADMIN, expires_at=None, by=SYSTEM, now=now)

        def record(conn: Connection) -> bool:
            if store.has_admin(conn, now):
                return False
            _add(conn, token, secret, by=SYSTEM)
            return True

        return await self._db.write(record)

    async def has_admin(self, now: Instant) -> bool:
        """Return whether somebody can sign in as an administrator at `now`."""
        return await self._db.read(lambda conn: store.has_admin(conn, now))

    async def find(self, token_id: str) -> Known | None:
        """Return a token with its hash, or None."""
        return await self._db.read(lambda conn: store.get(conn, token_id))

    async def list(self, *, q: str, limit: int, before: str) -> Sequence[ApiToken]:
        """Return tokens, newest first, revoked and expired ones too, from below `before` on."""
        return await self._db.read(
            lambda conn: store.newest_first(conn, q=q, before=before, limit=limit)
        )

    async def revoke(self, token_id: str, *, by: Actor, now: Instant) -> ApiToken:
        """Let nobody sign in with a token any more; once more changes nothing.

        Raises:
            GameNodeError: NOT_FOUND.
        """

        def record(conn: Connection) -> ApiToken:
            revoked = store.revoke(conn, token_id, now=now)
            known = store.get(conn, token_id)
            if known is None:
                raise GameNodeError(ErrorCode.NOT_FOUND, f"there is no token {token_id}")
            if revoked:
                _audit(conn, "token.revoke", known.token, by=by, now=now)
            return known.token

        return await self._db.write(record)

    async def set_last_used(self, used: Mapping[str, Instant]) -> None:
        """Write down when tokens were last used."""
        await self._db.write(lambda conn: store.set_last_used(conn, used))


def _new(
    secret: Token,
    *,
    name: str,
    role: Role,
    expires_at: Instant | None,
    by: Actor,
    now: Instant,
) -> ApiToken:
    return ApiToken(
        id=secret.id,
        name=name,
        role=role,
        created_at=now,
        created_by=by.name,
        expires_at=expires_at,
        last_used_at=None,
        revoked_at=None,
    )


def _add(conn: Connection, token: ApiToken, secret: Token, *, by: Actor) -> None:
    store.add(conn, token, secret.hash)
    _audit(conn, "token.create", token, by=by, now=token.created_at)


def _audit(conn: Connection, action: str, token: ApiToken, *, by: Actor, now: Instant) -> None:
    entry = AuditEntry(
        at=now,
        actor=by,
        action=action,
        target=token.id,
        before=f"{token.role} {token.name}" if action == "token.revoke" else "",
        after=f"{token.role} {token.name}" if action == "token.create" else "",
    )
    audit.append(conn, entry)
