"""Follows the server's events, across its restarts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.event import Event
from gamenode.wire import codec
from gamenode.wire.errors import code_of
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)
_OF_NODES: Final = "node."


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """Bounds of following."""

    retry_s: float = 0.2
    connect_backoff_most_s: float = 1.0


class EventWatch:
    """The server's events about nodes, each once, in order."""

    def __init__(
        self,
        address: str,
        *,
        heard: Callable[[Event], None],
        lost: Callable[[], None],
        gap: Callable[[], None],
        token: str,
        settings: WatchSettings,
    ) -> None:
        """Show `token`, where there is one. Hand events to `heard`.

        Say with `lost` when they break off, with `gap` when some may have gone unseen.
        """
        self._address = address
        self._heard = heard
        self._lost = lost
        self._gap = gap
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._settings = settings
        self._cursor: int | None = None

    async def run(self) -> None:
        """Follow from now on, until cancelled.

        Raises:
            GameNodeError: UNAUTHENTICATED, PERMISSION_DENIED.
        """
        most_ms = round(self._settings.connect_backoff_most_s * 1000)
        async with grpc.aio.insecure_channel(
            self._address,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", most_ms),
                ("grpc.min_reconnect_backoff_ms", most_ms),
                ("grpc.max_reconnect_backoff_ms", most_ms),
            ],
        ) as channel:
            stub = pb_grpc.GameNodeServiceStub(channel)
            while True:
                try:
                    await self._follow(stub)
                except grpc.aio.AioRpcError as error:
                    self._broken(error)
                await asyncio.sleep(self._settings.retry_s)

    async def _follow(self, stub: pb_grpc.GameNodeServiceAsyncStub) -> None:
        request = pb.WatchEventsRequest(after=self._cursor, type=_OF_NODES)
        async for message in stub.WatchEvents(
            request, metadata=self._metadata, wait_for_ready=True
        ):
            self._cursor = message.id
            self._heard(codec.decode_event(message))

    def _broken(self, error: grpc.aio.AioRpcError) -> None:
        name, _, message = (error.details() or "").partition(": ")
        code = code_of(name, grpc_status=error.code().name)
        if code in (ErrorCode.UNAUTHENTICATED, ErrorCode.PERMISSION_DENIED):
            raise GameNodeError(
                code,
                f"the server does not show its events: {message}",
                hint="name a file that holds a token with --token-file",
            ) from error
        if error.code() is grpc.StatusCode.OUT_OF_RANGE:
            self._cursor = None
            self._gap()
            return
        if self._cursor is None:
            self._gap()
        self._lost()
        _log.info("the events broke off: %s", error.details(), extra={"event": "watch.broken"})
