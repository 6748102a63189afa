"""Calls that carry a token."""

from __future__ import annotations

from functools import partial

import grpc

from gamenode.wire.gen.gamenode.v1.gamenode_pb2_grpc import GameNodeServiceStub

Metadata = tuple[tuple[str, str], ...]


def credentials(authorization: str) -> Metadata:
    """Return the metadata that says who calls; none for an empty header."""
    return (("authorization", authorization),) if authorization else ()


def signed_stub(channel: grpc.Channel, authorization: str) -> GameNodeServiceStub:
    """Return a stub whose every call says who makes it."""
    stub = GameNodeServiceStub(channel)
    for name, call in vars(stub).items():
        setattr(stub, name, partial(call, metadata=credentials(authorization)))
    return stub
