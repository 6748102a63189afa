"""Whatever a request says, it is read or refused; it never breaks the server."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message
from tests.support.asgi import scope_of

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Instant
from gamenode.server.api import page
from gamenode.server.api.decode import BodyReader, QueryReader
from gamenode.server.api.events import EventsQuery
from gamenode.server.api.logs import LogQuery
from gamenode.server.api.nodes import NodesQuery
from gamenode.server.api.pipelines import PipelinesQuery
from gamenode.wire import http

READERS = [QueryReader(model) for model in (EventsQuery, LogQuery, NodesQuery, PipelinesQuery)]
NAMES = sorted({name for reader in READERS for name in reader.model.__struct_fields__})
BODY = BodyReader(http.PipelineRequest)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def assert_names_a_field(error: GameNodeError) -> None:
    assert error.code is ErrorCode.INVALID_REQUEST
    assert error.violations[0].field


def json_request(body: bytes) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(scope_of("POST", "/", {"content-type": "application/json"}), receive)


@given(
    reader=st.sampled_from(READERS),
    query=st.text()
    | st.builds("{}={}".format, st.sampled_from(NAMES), st.text())
    | st.builds("{0}={1}&{0}={1}".format, st.sampled_from(NAMES), st.integers()),
)
def test_any_query_is_read_or_refused(reader: QueryReader[object], query: str) -> None:
    try:
        reader.read(query)
    except GameNodeError as error:
        assert_names_a_field(error)


@given(
    body=st.binary()
    | st.builds(lambda value: json.dumps(value).encode(), json_values)
    | st.builds(
        lambda name, value: json.dumps({"file": "", name: value}).encode(),
        st.sampled_from(["file", "args", "envs", "node", "selector", "priority", "x"]),
        json_values,
    )
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        asyncio.run(BODY.read(json_request(body), bytes_max=1_000_000))
    except GameNodeError as error:
        assert_names_a_field(error)


@pytest.mark.parametrize(
    ("model", "body", "words"),
    [
        (http.FenceRequest, b'{"reason": ""}', "reason: must not be empty"),
        (http.FenceRequest, b'{"reason": "%s"}' % (b"a" * 5000), "at most 4096 characters"),
        (http.ExtendRequest, b'{"by_s": 0}', "by_s: must be more than 0"),
        (http.ExtendRequest, b'{"by_s": 1e15}', "by_s: must be at most 2592000"),
        (http.ExtendRequest, b'{"by_s": true}', "by_s: must be a number, not true or false"),
        (http.ExtendRequest, b'{"by_s": NaN}', "body: is not JSON: invalid character"),
        (http.ExtendRequest, b"", "body: is missing"),
        (http.ExtendRequest, b"{", "body: is not JSON: it ends too soon"),
    ],
)
async def test_what_is_wrong_with_a_body_is_said_in_words_for_people(
    model: type[object], body: bytes, words: str
) -> None:
    with pytest.raises(GameNodeError, match=words):
        await BodyReader(model).read(json_request(body), bytes_max=10_000)


@given(st.text(max_size=40))
def test_any_cursor_is_read_or_refused(text: str) -> None:
    for read in (page.read_node_cursor, page.read_pipeline_cursor):
        try:
            read(text)
        except GameNodeError as error:
            assert_names_a_field(error)


@given(st.integers(0, 2**63 - 1), st.text("abcdef0123456789-", min_size=1, max_size=36))
def test_a_cursor_leads_back_to_where_it_stands(created_at: int, pipeline_id: str) -> None:
    cursor = page.pipeline_cursor(Instant(created_at), pipeline_id)
    assert page.read_pipeline_cursor(cursor) == (created_at, pipeline_id)
    assert page.read_node_cursor(page.node_cursor(pipeline_id)) == pipeline_id
