from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random
from typing import Any, cast

import pytest

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.server.rpc.agent_link import AgentLink, AgentLinkSettings
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb


async def _silence() -> AsyncIterator[pb.AgentMessage]:
    await asyncio.Event().wait()
    yield pb.AgentMessage()


async def test_a_stream_that_never_says_what_it_holds_is_ended() -> None:
    nobody = cast("Any", None)
    link = AgentLink(
        nodes=nobody,
        pipelines=nobody,
        random=Random(1),
        settings=AgentLinkSettings(statement_s_max=0.01),
    )
    with pytest.raises(GameNodeError, match="no statement within") as refused:
        await link.serve(_silence(), nobody)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
