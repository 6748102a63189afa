"""Logs over HTTP."""

from __future__ import annotations

import base64
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.api_fakes import NOW, Api, pipeline_id
from tests.support.asgi import ask, opened

from gamenode.domain.errors import ErrorCode
from gamenode.domain.log import LogStream
from gamenode.wire import cri

LOGS = f"/api/v1/pipelines/{pipeline_id(1)}/steps/greet/logs"
SSE = {"accept": "text/event-stream"}

STORED = (
    cri.frame(LogStream.STDOUT, NOW, b"hello\nworld\n")
    + cri.frame(LogStream.STDERR, NOW, b"oh\n")
    + cri.frame(LogStream.GAMENODE, NOW, b"12 bytes dropped\n")
    + cri.frame(LogStream.STDOUT, NOW, b"half ")
    + cri.frame(LogStream.STDOUT, NOW, b"line\n")
)


def with_log(*blocks: bytes) -> Api:
    api = Api()
    api.logs.add(pipeline_id(1), "greet", *(blocks or (STORED,)))
    return api


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", b"hello\nworld\noh\n12 bytes dropped\nhalf line\n"),
        ("?format=text", b"hello\nworld\noh\n12 bytes dropped\nhalf line\n"),
        ("?format=raw", b"hello\nworld\noh\nhalf line\n"),
        ("?format=raw&stream=stderr", b"oh\n"),
        ("?stream=stdout", b"hello\nworld\nhalf line\n"),
        ("?format=cri", STORED),
        ("?format=cri&stream=stderr", STORED),
        ("?tail=1", b"line\n"),
        ("?tail=0", b""),
    ],
)
async def test_a_log_is_read_in_each_form(query: str, body: bytes) -> None:
    answer = await ask(with_log().app, "GET", LOGS + query)
    assert (answer.status, answer.body) == (200, body)


@given(cuts=st.sets(st.integers(1, 5)))
async def test_a_log_reads_the_same_wherever_its_blocks_end(cuts: set[int]) -> None:
    lines = STORED.splitlines(keepends=True)
    edges = [0, *sorted(cuts), len(lines)]
    api = with_log(*(b"".join(lines[a:b]) for a, b in pairwise(edges)))
    raw = await ask(api.app, "GET", LOGS + "?format=raw")
    assert raw.body == b"hello\nworld\noh\nhalf line\n"
    bodies = [
        json.loads(line)
        for line in (await ask(api.app, "GET", LOGS + "?format=json")).body.splitlines()
    ]
    ends = [body["next_offset"] for body in bodies]
    assert [body["offset"] for body in bodies] == [0, *ends[:-1]]
    assert ends[-1] == len(STORED)


async def test_json_lines_have_nine_digits_offsets_and_text() -> None:
    answer = await ask(with_log().app, "GET", LOGS + "?format=json&stream=stderr")
    assert answer.headers["content-type"] == "application/x-ndjson"
    line = json.loads(answer.body)
    offset = STORED.index(b"oh\n") - 40
    assert line == {
        "offset": offset,
        "next_offset": offset + 43,
        "time": "2026-11-24T22:00:00.123456789Z",
        "stream": "stderr",
        "partial": False,
        "text": "oh",
    }


async def test_what_is_not_utf8_stands_in_base64_and_comes_back_raw() -> None:
    api = with_log(cri.frame(LogStream.STDOUT, NOW, b"\xff\xfe\n"))
    line = json.loads((await ask(api.app, "GET", LOGS + "?format=json")).body)
    assert base64.b64decode(line["base64"]) == b"\xff\xfe"
    assert "text" not in line
    assert (await ask(api.app, "GET", LOGS + "?format=raw")).body == b"\xff\xfe\n"
    assert (await ask(api.app, "GET", LOGS)).body == "��\n".encode()


async def test_a_character_that_was_parted_is_whole_in_text() -> None:
    letter = "é".encode()
    api = with_log(
        cri.frame(LogStream.STDOUT, NOW, letter[:1]),
        cri.frame(LogStream.STDOUT, NOW, letter[1:] + b"\n"),
    )
    assert (await ask(api.app, "GET", LOGS)).body == letter + b"\n"


async def test_a_reading_says_where_it_begins_so_that_it_can_be_resumed() -> None:
    api = with_log()
    first = await ask(api.app, "GET", LOGS + "?format=cri&tail=2")
    start = int(first.headers["log-offset"])
    assert STORED[start:] == first.body
    middle = start + first.body.index(b"\n") + 1
    rest = await ask(api.app, "GET", f"{LOGS}?format=cri&offset={middle}")
    assert STORED[middle:] == rest.body


async def test_a_follower_sees_lines_as_they_come_and_ends_with_the_log() -> None:
    api = with_log(STORED)
    async with opened(api.app, "GET", LOGS + "?follow=1&format=raw") as stream:
        await stream.until(b"half line\n")
        line = cri.frame(LogStream.STDOUT, NOW, b"more\n")
        await api.logs.grow(pipeline_id(1), "greet", line)
        assert await stream.next() == b"more\n"
        await api.logs.end()
        assert await stream.next() is None


async def test_server_sent_lines_resume_at_the_next_offset() -> None:
    api = with_log()
    async with opened(api.app, "GET", LOGS, headers=SSE) as stream:
        seen = (await stream.rest()).decode().replace(": here\n\n", "")
    messages = [message.split("\n") for message in seen.strip().split("\n\n")]
    ids = [int(message[0].removeprefix("id: ")) for message in messages]
    lines = [json.loads(message[1].removeprefix("data: ")) for message in messages]
    assert ids == [line["next_offset"] for line in lines]
    headers = {**SSE, "last-event-id": str(ids[2])}
    async with opened(api.app, "GET", LOGS, headers=headers) as stream:
        again = (await stream.rest()).decode()
    assert json.loads(again.partition("data: ")[2].partition("\n")[0]) == lines[3]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("offset=100000", "offset"),
        ("format=xml", "format"),
        ("stream=stdin", "stream"),
        ("since=yesterday", "since"),
        ("offset=-1", "offset"),
        ("tail=x", "tail"),
        ("attempt=99999999999", "attempt"),
    ],
)
async def test_a_bad_reading_is_refused(query: str, field: str) -> None:
    answer = await ask(with_log().app, "GET", f"{LOGS}?{query}")
    assert answer.status == 400
    assert answer.json()["details"][0]["field"] == field


@pytest.mark.parametrize("since", ["10m", "-10m", "2026-11-24T22:00:00Z"])
async def test_since_takes_an_age_or_a_time(since: str) -> None:
    answer = await ask(with_log().app, "GET", f"{LOGS}?since={since}")
    assert answer.status == 200


async def test_a_log_that_is_not_there_is_not_found() -> None:
    answer = await ask(Api().app, "GET", LOGS + "?follow=1")
    assert (answer.status, answer.json()["code"]) == (404, ErrorCode.LOG_NOT_FOUND)


async def test_a_reader_that_left_holds_nothing() -> None:
    api = with_log()
    async with opened(api.app, "GET", LOGS + "?follow=1") as stream:
        await stream.next()
        assert api.logs.readers == 1
    assert api.logs.readers == 0


async def test_a_big_block_is_translated_exactly() -> None:
    text = b"".join(b"line %d\n" % number for number in range(50_000))
    api = with_log(cri.frame(LogStream.STDOUT, NOW, text))
    assert (await ask(api.app, "GET", LOGS + "?format=raw")).body == text
