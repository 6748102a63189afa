"""Calls that carry a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import grpc


class _SignedChannel:
    """A channel for stubs: each call that it makes has the same metadata."""

    def __init__(self, channel: grpc.Channel, authorization: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", authorization),)

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        make = getattr(self._channel, kind)  # unary_unary and its like

        def made(*arguments: Any, **options: Any) -> Any:
            return partial(make(*arguments, **options), metadata=self._metadata)

        return made


def signed(channel: grpc.Channel, authorization: str) -> grpc.Channel:
    """Return `channel` so that each call says who makes it."""
    return cast("grpc.Channel", _SignedChannel(channel, authorization))
