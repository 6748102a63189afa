"""API tokens as text: `gn_<id>_<secret>`. The id finds the row, the secret proves the holder."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from gamenode.domain.access import ApiToken

_SECRET_BYTES: Final = 32
_TOKEN: Final = re.compile(
    r"gn_([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_([0-9a-f]{64})", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as its holder has it."""

    id: str
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        """What the holder keeps and sends."""
        return f"gn_{self.id}_{self.secret}"

    @property
    def hash(self) -> bytes:
        """What the server keeps.

        A plain SHA-256: a password needs a slow hash because it can be guessed, 256 random bits
        cannot.
        """
        return hashlib.sha256(self.secret.encode()).digest()

    def proves(self, known: bytes) -> bool:
        """Return whether this is the token whose hash is `known`, in a time that tells nothing."""
        return hmac.compare_digest(self.hash, known)


@dataclass(frozen=True, slots=True)
class Known:
    """A token as the server has it."""

    token: ApiToken
    hash: bytes


def mint(token_id: str) -> Token:
    """Return a new token with a secret from the host's random source."""
    return Token(token_id, secrets.token_hex(_SECRET_BYTES))


def read(text: str) -> Token | None:
    """Return the token that `text` writes, or None if it writes none."""
    match = _TOKEN.fullmatch(text)
    return Token(match[1], match[2]) if match else None
