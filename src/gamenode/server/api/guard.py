"""What a browser may be tricked into: requests under a foreign name, and from foreign pages."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers

from gamenode.domain.errors import ErrorCode, GameNodeError

ANY_HOST: Final = "*"

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """Refuses what only a browser under somebody else's influence would send.

    A server that trusts whoever reaches its loopback address must not trust a page that made its
    own name point there (DNS rebinding), nor one that posts a form across origins.
    """

    def __init__(self, *, bound_host: str, hosts: Collection[str]) -> None:
        """Take requests for loopback, for `bound_host` and for `hosts` (`*`: for any)."""
        self._any = ANY_HOST in hosts
        self._hosts = frozenset({"localhost", bound_host.lower(), *(h.lower() for h in hosts)})

    def check(self, method: str, headers: Headers) -> None:
        """Check the headers of one request.

        Raises:
            GameNodeError: PERMISSION_DENIED.
        """
        named = headers.getlist("host")
        # No browser leaves the header out, so its absence is no attack.
        if named and not self._any and not (len(named) == 1 and self._is_ours(named[0])):
            raise GameNodeError(
                ErrorCode.PERMISSION_DENIED,
                f"this server does not go by the name {named[0][:255]!r}",
                hint="use its address, or add the name to the server's setting api.hosts",
            )
        if method not in _SAFE_METHODS and not _is_own_origin(headers):
            raise GameNodeError(
                ErrorCode.PERMISSION_DENIED, "a page of another origin may change nothing here"
            )

    def _is_ours(self, host: str) -> bool:
        name = _without_port(host.lower())
        if name in self._hosts:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _is_own_origin(headers: Headers) -> bool:
    origin = headers.get("origin")
    if origin is None:
        # Old browsers send none; new ones say at least this.
        return headers.get("sec-fetch-site", "none") in {"none", "same-origin"}
    # The scheme does not count: a proxy in front may have ended TLS.
    return origin.lower().partition("://")[2] == headers.get("host", "").lower()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
