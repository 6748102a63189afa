"""Who acts, and what a role may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gamenode.lib.clock import Instant


class Role(StrEnum):
    """What somebody may do. `NODE` is for agents; the others are for people and services."""

    PUBLIC = "public"  # nobody in particular: health checks
    NODE = "node"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


_INCLUDES: Final = {
    Role.PUBLIC: frozenset({Role.PUBLIC}),
    Role.NODE: frozenset({Role.PUBLIC, Role.NODE}),
    Role.VIEWER: frozenset({Role.PUBLIC, Role.VIEWER}),
    Role.OPERATOR: frozenset({Role.PUBLIC, Role.VIEWER, Role.OPERATOR}),
    Role.ADMIN: frozenset(Role),
}


TOKEN_ROLES: Final = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
"""The roles that a token can have, each including those before it."""


class ActorKind(StrEnum):
    """What kind of somebody."""

    LOCAL = "local"  # whoever reaches a server that listens on loopback alone
    TOKEN = "token"  # noqa: S105 - a kind, not a secret
    NODE = "node"
    SYSTEM = "system"  # the server itself, such as a timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asks for something; made at the edge and carried by every command."""

    kind: ActorKind
    name: str
    role: Role
    source: str = ""
    """Where the request came from, such as an address."""

    def may(self, needed: Role) -> bool:
        """Return whether this actor's role includes `needed`."""
        return needed in _INCLUDES[self.role]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiToken:
    """What people and services sign in with; its secret is nowhere but with its holder."""

    id: str
    name: str
    role: Role
    created_at: Instant
    created_by: str
    expires_at: Instant | None
    last_used_at: Instant | None
    revoked_at: Instant | None

    def works(self, now: Instant) -> bool:
        """Return whether somebody can sign in with it at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


SYSTEM: Final = Actor(kind=ActorKind.SYSTEM, name="gamenode", role=Role.ADMIN)
"""The server itself."""
