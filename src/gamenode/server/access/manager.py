"""Who calls: API tokens against a cache of their rows, and what dies with the process."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from gamenode.domain.access import Actor, ActorKind, ApiToken, Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock, Instant, after
from gamenode.lib.durable import write_private
from gamenode.lib.ids import Ids
from gamenode.lib.tasks import every
from gamenode.server.access import tokens
from gamenode.server.access.service import AccessService
from gamenode.server.access.tokens import Known, Token

_log = logging.getLogger(__name__)

_SCHEME: Final = "bearer"
_SIGN_IN: Final = (
    "send a token in the header Authorization: Bearer gn_…, or give the commands GAMENODE_TOKEN or "
    "--token-file; the first one is in the server's data folder, in the file admin-token"
)


class AuthMode(StrEnum):
    """Whether people and services must sign in."""

    TOKENS = "tokens"
    NONE = "none"  # whoever reaches the loopback address is an administrator: `gamenode dev`


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSettings:
    """Who must sign in, and the bounds of checking it."""

    auth: AuthMode = AuthMode.TOKENS
    """`tokens`, or `none`: whoever reaches the server is an administrator; on loopback only."""
    cached_max: int = 10_000
    """Tokens whose rows are kept in memory."""
    cached_s: float = 5.0
    """How long a row is believed: so late a revocation on another server is obeyed here."""
    used_flush_s: float = 60.0
    """How often it is written down when tokens were used."""
    failures_max: int = 100
    """Attempts of one source that may fail in a window of `failures_s`. For the rest of it, only
    tokens that were in use before let it in."""
    failures_s: float = 60.0
    """How long such a window is."""
    sources_max: int = 10_000
    """Sources whose failures are counted; the one that failed longest ago is forgotten first."""


@dataclass(frozen=True, slots=True)
class _Cached:
    known: Known
    until_s: float


class AccessManager:
    """Says who calls, and hands out and takes back what they sign in with."""

    def __init__(
        self, service: AccessService, *, clock: Clock, ids: Ids, settings: AccessSettings
    ) -> None:
        """Know no token yet."""
        self._service = service
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._cache: OrderedDict[str, _Cached] = OrderedDict()
        self._revocations = 0
        self._used: dict[str, Instant] = {}
        self._failures = _Failures(settings, clock)

    async def authenticate(
        self, authorization: str | None, *, source: str, as_agent: bool = False
    ) -> Actor:
        """Return who sent this header `Authorization` (None: it sent none) from address `source`.

        With `as_agent`, who sends none from this very host counts as an agent, and nothing more:
        agents have no credentials yet.

        Raises:
            GameNodeError: UNAUTHENTICATED; RESOURCE_EXHAUSTED, too many attempts of this source
                have failed; what reading the database raises.
        """
        if self._settings.auth is AuthMode.NONE:
            return Actor(kind=ActorKind.LOCAL, name="local", role=Role.ADMIN, source=source)
        if authorization is None:
            if as_agent and is_loopback(source):
                return Actor(kind=ActorKind.NODE, name="anonymous", role=Role.NODE, source=source)
            raise GameNodeError(ErrorCode.UNAUTHENTICATED, "nobody is signed in", hint=_SIGN_IN)
        token = await self._check(authorization, source)
        self._used[token.id] = self._clock.now()
        return Actor(kind=ActorKind.TOKEN, name=token.name, role=token.role, source=source)

    async def ensure_admin(self, path: Path) -> None:
        """Let somebody in: if no administrator can sign in, put a token into the file `path`.

        Only the server's own user can read the file.
        """
        now = self._clock.now()
        if self._settings.auth is AuthMode.NONE or await self._service.has_admin(now):
            return
        secret = tokens.mint(self._ids.new())
        # The file first: a token whose text was lost in between would keep everybody out.
        await asyncio.to_thread(write_private, path, f"{secret.text}\n".encode())
        if await self._service.create_first(secret, name=f"first-{secret.id[-8:]}", now=now):
            _log.warning(
                "an administrator's token is in %s", path, extra={"event": "access.first_token"}
            )
        else:  # another server on the same database was faster
            await asyncio.to_thread(path.unlink)

    async def create(
        self, *, name: str, role: Role, ttl_s: float | None, by: Actor
    ) -> tuple[ApiToken, str]:
        """Make a token; return it, and its text, which nobody can ask for again.

        Raises:
            GameNodeError: CONFLICT, a token has this name and was not revoked.
        """
        now = self._clock.now()
        secret = tokens.mint(self._ids.new())
        expires_at = None if ttl_s is None else after(now, ttl_s)
        token = await self._service.create(
            secret, name=name, role=role, expires_at=expires_at, by=by, now=now
        )
        return token, secret.text

    async def list(self, *, q: str, limit: int, before: str) -> Sequence[ApiToken]:
        """Return tokens, newest first, revoked and expired ones too, from below `before` on."""
        return await self._service.list(q=q, limit=limit, before=before)

    async def revoke(self, token_id: str, *, by: Actor) -> ApiToken:
        """Let nobody sign in with a token from now on; once more changes nothing.

        Raises:
            GameNodeError: NOT_FOUND.
        """
        try:
            return await self._service.revoke(token_id, by=by, now=self._clock.now())
        finally:
            # Also where the outcome is not known. A row that is being read meanwhile is not kept.
            self._revocations += 1
            self._cache.pop(token_id, None)

    async def flush(self) -> None:
        """Write down when tokens were used, every now and then, until cancelled."""
        await every(self._settings.used_flush_s, self.flush_now)

    async def flush_now(self) -> None:
        """Write down when tokens were used since the last time."""
        if self._used:
            used, self._used = self._used, {}
            await self._service.set_last_used(used)

    async def _check(self, authorization: str, source: str) -> ApiToken:
        scheme, _, text = authorization.partition(" ")
        presented = tokens.read(text.strip()) if scheme.lower() == _SCHEME else None
        if presented is None:
            self._failures.check(source)
            raise self._failed(source, "this is no token", hint=_SIGN_IN)
        cached = self._cache.get(presented.id)
        proven = cached is not None and presented.proves(cached.known.hash)
        if not proven:
            self._failures.check(source)
        if cached is not None and proven and self._clock.monotonic_s() < cached.until_s:
            self._cache.move_to_end(presented.id)
            known: Known | None = cached.known
        else:
            known = await self._find(presented)
        if known is None or not presented.proves(known.hash):
            raise self._failed(source, "this token is not known")
        token = known.token
        if token.revoked_at is not None:
            raise self._failed(source, f"the token {token.name!r} was revoked")
        if not token.works(self._clock.now()):
            raise self._failed(source, f"the token {token.name!r} has expired")
        return token

    async def _find(self, presented: Token) -> Known | None:
        revocations = self._revocations
        known = await self._service.find(presented.id)
        # Only who has the secret gets a place, so that nobody else can crowd tokens out.
        if known and presented.proves(known.hash) and revocations == self._revocations:
            until_s = self._clock.monotonic_s() + self._settings.cached_s
            self._cache[presented.id] = _Cached(known, until_s)
            self._cache.move_to_end(presented.id)
            while len(self._cache) > self._settings.cached_max:
                self._cache.popitem(last=False)
        return known

    def _failed(self, source: str, message: str, *, hint: str = "") -> GameNodeError:
        if self._failures.count(source):
            _log.warning(
                "signing in failed %s times from %s; the next attempts are put off",
                self._settings.failures_max,
                source,
                extra={"event": "access.failing", "source": source},
            )
        return GameNodeError(
            ErrorCode.UNAUTHENTICATED,
            message,
            hint=hint or "ask an administrator for a token: gamenode tokens create",
        )


@dataclass(slots=True)
class _Attempts:
    began_s: float
    count: int = 0


class _Failures:
    """Counts failed attempts by source, in windows, for a bounded number of sources.

    Nobody guesses 256 bits; this keeps who tries from using the database up.
    """

    def __init__(self, settings: AccessSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._sources: OrderedDict[str, _Attempts] = OrderedDict()

    def check(self, source: str) -> None:
        """Raise RESOURCE_EXHAUSTED if `source` has failed too often just now."""
        attempts = self._sources.get(source)
        if attempts is None or attempts.count < self._settings.failures_max:
            return
        left_s = attempts.began_s + self._settings.failures_s - self._clock.monotonic_s()
        if left_s > 0:
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                "too many attempts to sign in from this address have failed",
                hint="check the token before the next attempt",
                retry_after_s=left_s,
            )

    def count(self, source: str) -> bool:
        """Count a failure; return whether it is the one that fills the window."""
        now_s = self._clock.monotonic_s()
        attempts = self._sources.get(source)
        if attempts is None or attempts.began_s + self._settings.failures_s <= now_s:
            attempts = self._sources[source] = _Attempts(now_s)
        attempts.count += 1
        self._sources.move_to_end(source)
        while len(self._sources) > self._settings.sources_max:
            self._sources.popitem(last=False)
        return attempts.count == self._settings.failures_max


def is_loopback(host: str) -> bool:
    """Return whether only this very host is reached at, or calls from, `host`."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
