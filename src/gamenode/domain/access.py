"""Who acts, and what a role may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


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


SYSTEM: Final = Actor(kind=ActorKind.SYSTEM, name="gamenode", role=Role.ADMIN)
"""The server itself."""
