"""The routes of API tokens."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from gamenode.domain.access import TOKEN_ROLES
from gamenode.domain.errors import invalid
from gamenode.domain.quantity import parse_duration
from gamenode.server.access.manager import AccessManager
from gamenode.server.api import page
from gamenode.server.api.decode import BodyReader, NoQuery, QueryReader
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.wire import http

_ROLE_NAMES: Final = ", ".join(TOKEN_ROLES)
_TTL_S_MAX: Final = 100 * 365 * 24 * 3600.0


class TokensQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which tokens."""

    q: Annotated[str, Meta(max_length=256, description="Only those with this in id or name.")] = ""
    limit: page.Limit = 100
    cursor: page.Cursor = ""


class TokenRoutes:
    """Makes, lists and revokes tokens."""

    def __init__(self, tokens: AccessManager) -> None:
        """Speak for `tokens`."""
        self._tokens = tokens

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="GET",
                path="/api/v1/tokens",
                summary="List tokens, newest first, revoked and expired ones too",
                handler=self._list,
                query=QueryReader(TokensQuery),
                answer=http.TokenList,
            ),
            Operation(
                method="POST",
                path="/api/v1/tokens",
                summary="Make a token; no other answer shows it again",
                handler=self._create,
                query=QueryReader(NoQuery),
                body=BodyReader(http.TokenRequest),
                answer=http.NewToken,
                status=HTTPStatus.CREATED,
            ),
            Operation(
                method="DELETE",
                path="/api/v1/tokens/{token}",
                summary="Revoke a token at once",
                handler=self._revoke,
                query=QueryReader(NoQuery),
                answer=http.Token,
            ),
        )

    async def _list(self, call: Call[TokensQuery, None]) -> ASGIApp:
        query = call.query
        found = await self._tokens.list(
            q=query.q, limit=query.limit + 1, before=page.read_token_cursor(query.cursor)
        )
        tokens, last = page.split(found, query.limit)
        return answer(
            http.TokenList(
                items=[http.encode_token(token) for token in tokens],
                next_cursor=page.token_cursor(last.id) if last else None,
            )
        )

    async def _create(self, call: Call[NoQuery, http.TokenRequest]) -> ASGIApp:
        body = call.body
        if body.role not in TOKEN_ROLES:
            raise invalid(
                "role", f"{body.role} is no role of a token", advice=f"one of {_ROLE_NAMES}"
            )
        if not body.name.isprintable():
            raise invalid("name", "must be printable")
        ttl_s = parse_duration(body.ttl, field="ttl") if body.ttl else None
        if ttl_s is not None and not 0 < ttl_s <= _TTL_S_MAX:
            raise invalid(
                "ttl", "must be more than nothing and at most 100 years", advice="write 90d"
            )
        token, text = await self._tokens.create(
            name=body.name, role=body.role, ttl_s=ttl_s, by=call.actor
        )
        return answer(http.encode_new_token(token, text), status=HTTPStatus.CREATED)

    async def _revoke(self, call: Call[NoQuery, None]) -> ASGIApp:
        token = await self._tokens.revoke(call.path["token"], by=call.actor)
        return answer(http.encode_token(token))
