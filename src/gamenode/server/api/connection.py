"""One HTTP connection, within bounds that the HTTP library does not have of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Bounds of HTTP connections."""

    connections_max: int = 4_000
    """Connections at once; one more is answered 503 and closed."""
    head_bytes_max: int = 64 * 1024
    """How long a request's line and headers may be, give or take one read of the socket."""
    request_s_max: float = 30.0
    """How long a request may take to arrive, and a new connection to send its first."""
    idle_s_max: float = 75.0
    """How long a connection may stay open between two requests."""


class BoundedConnection(HttpToolsProtocol):
    """Closes a connection whose request never ends, in length or in time (P14).

    The library's parser keeps a head in memory however long it gets, and its only clock runs
    between two requests.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Take what the library gives a connection, and its bounds."""
        super().__init__(config, server_state, app_state, _loop)
        self._settings = settings
        self._head_bytes = 0
        """What came since the last byte of a body or the end of a head or request."""
        self._arrival: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # the library's own
        """Wait for a request, where there is room for one more connection."""
        super().connection_made(transport)
        if len(self.connections) > self._settings.connections_max:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; end the connection if it is too much."""
        if self._arrival is None:
            self._expect()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self._settings.head_bytes_max and not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a piece of a body; what comes between pieces counts as a head, as trailers do."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a request is here as a whole."""
        self._head_bytes = 0
        self._arrived()
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client that offers HTTP/2 is answered in HTTP/1.1, as it expects."""

    def _expect(self) -> None:
        self._arrival = self.loop.call_later(self._settings.request_s_max, self.transport.close)

    def _arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _refuse(self, status: HTTPStatus) -> None:
        self.transport.write(_REFUSAL % (status.value, status.phrase.encode()))
        self.transport.close()


_REFUSAL: Final = b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
