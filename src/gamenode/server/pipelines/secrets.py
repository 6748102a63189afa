"""Secret args at rest: sealed with a key that the database never sees (RG3)."""

from __future__ import annotations

import hmac
import json
import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_log = logging.getLogger(__name__)
_NONCE_BYTES: Final = 12
KEY_BYTES: Final = 32


class SecretBox:
    """Seals the secret args of pipelines, and tells requests that hold such apart."""

    def __init__(self, key: bytes) -> None:
        """Derive what is needed from `key`, 32 random bytes."""
        self._cipher = AESGCM(_derived(key, b"gamenode pipeline secrets"))
        self._fingerprint_key = _derived(key, b"gamenode request fingerprints")

    def seal(self, pipeline_id: str, secrets: Mapping[str, str]) -> bytes | None:
        """Return what the row of `pipeline_id` keeps of its secrets; None where it has none.

        It can be unsealed for no other pipeline.
        """
        if not secrets:
            return None
        nonce = os.urandom(_NONCE_BYTES)
        content = json.dumps(dict(secrets)).encode()
        return nonce + self._cipher.encrypt(nonce, content, _bound_to(pipeline_id))

    def unseal(self, pipeline_id: str, sealed: bytes | None) -> Mapping[str, str]:
        """Return the secrets of a pipeline; none where another key sealed them.

        Such a pipeline fails on its node with SECRET_MISSING, instead of waiting without end.
        """
        if sealed is None:
            return {}
        nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            opened = self._cipher.decrypt(nonce, content, _bound_to(pipeline_id))
        except InvalidTag:
            _log.error(
                "the secrets of a pipeline cannot be opened: is secrets.key another one?",
                extra={"event": "secrets.unopened", "pipeline_id": pipeline_id},
            )
            return {}
        secrets: dict[str, str] = json.loads(opened)
        return secrets

    def fingerprint(self, content: bytes) -> str:
        """Return a digest of `content` that nobody without the key can try values against."""
        return hmac.digest(self._fingerprint_key, content, sha256).hex()


def _bound_to(pipeline_id: str) -> bytes:
    return b"pipeline\0" + pipeline_id.encode()


def _derived(key: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(key)
