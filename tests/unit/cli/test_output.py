"""What people see, and what a pipe gets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

import pytest
from tests.support.bodies import PIPELINE_ID, event, node, page, pipeline, step
from tests.support.fake_api import Cut, FakeApi, Reply, Seen, fake_api, problem
from tests.support.program import Program

from gamenode.cli.output import age
from gamenode.domain.quantity import parse_time, span
from gamenode.lib.clock import Instant


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as served:
        served.on("GET", "/nodes", Reply(page(node(), node("ber-1", online=False))))
        yield served


def _stop(_seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_table_is_aligned_and_plain_in_a_pipe(api: FakeApi) -> None:
    lines = Program(api.url)("nodes", "list", "--columns", "id,liveness,state").text.splitlines()
    assert lines == [
        "ID      LIVENESS  STATE",
        "fra-07  online    normal",
        "ber-1   offline   normal",
    ]


def test_headings_can_be_left_out(api: FakeApi) -> None:
    result = Program(api.url)("nodes", "list", "--columns", "ID", "--no-headers")
    assert result.text == "fra-07\nber-1\n"


def test_an_unknown_column_suggests_one(api: FakeApi) -> None:
    result = Program(api.url)("nodes", "list", "--columns", "stat")
    assert result.exit_code == 2
    assert "did you mean state?" in result.stderr


def test_wide_characters_keep_the_columns_in_line(api: FakeApi) -> None:
    api.on("GET", "/nodes", Reply(page(node(display_name="节点"), node(display_name="node"))))
    lines = Program(api.url)("nodes", "list", "--columns", "name,state").text.splitlines()
    assert lines[1:] == ["节点  normal", "node  normal"]


def test_texts_from_elsewhere_control_no_terminal_through_a_table(api: FakeApi) -> None:
    api.on("GET", "/nodes", Reply(page(node(note="\x1b[2Jgone\nnext\u202e"))))
    result = Program(api.url)("nodes", "list", "--columns", "note", "--no-headers")
    assert result.text == "^[[2Jgone^Jnext\\u202e\n"


def test_texts_from_elsewhere_control_no_terminal_through_an_error(api: FakeApi) -> None:
    api.on("GET", "/nodes", problem("CONFLICT", 409, "\x1b]0;x\x07"))
    assert "\x1b" not in Program(api.url)("nodes", "list").stderr


@pytest.mark.parametrize(
    ("terminal", "environ", "args", "coloured"),
    [
        (False, {}, [], False),
        (True, {}, [], True),
        (True, {"NO_COLOR": "1"}, [], False),
        (True, {}, ["--no-color"], False),
        (True, {"TERM": "dumb"}, [], False),
        (False, {"CLICOLOR_FORCE": "1"}, [], True),
        (False, {"CLICOLOR_FORCE": "0"}, [], False),
        (False, {"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, [], False),
    ],
)
def test_colours_are_for_terminals_unless_somebody_says_otherwise(
    api: FakeApi, terminal: bool, environ: Mapping[str, str], args: list[str], coloured: bool
) -> None:
    result = Program(api.url, terminal=terminal, environ=environ)("nodes", "list", *args)
    assert (b"\x1b[32monline\x1b[0m" in result.stdout) is coloured


def test_a_terminal_s_edge_cuts_and_a_pipe_does_not(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    api.on("GET", "/nodes", Reply(page(node(note="a note that is longer than that"))))
    args = ("nodes", "list", "--columns", "id,note", "--no-headers", "--no-color")
    assert Program(api.url, terminal=True)(*args).text == "fra-07  a note that…\n"
    assert Program(api.url)(*args).text == "fra-07  a note that is longer than that\n"


def test_tables_show_the_end_of_an_id_and_programs_get_it_whole(api: FakeApi) -> None:
    api.on("GET", "/pipelines", Reply(page(pipeline("RUNNING", step()))))
    program = Program(api.url)
    assert program("pipelines", "list").text.splitlines()[1].split()[:3] == [
        PIPELINE_ID[-8:],
        "start-game",
        "RUNNING",
    ]
    rows = list(csv.DictReader(io.StringIO(program("pipelines", "list", "-o", "csv").text)))
    assert rows[0]["id"] == PIPELINE_ID
    assert rows[0]["age"] == "2026-11-24T21:58:21.000Z"


def test_a_pipeline_is_shown_with_its_steps(api: FakeApi) -> None:
    ended = {"started_at": "2026-11-24T21:58:00.000Z", "ended_at": "2026-11-24T21:58:01.500Z"}
    shown = pipeline("FAILED", step("fetch", "FAILED", reason="EXIT_CODE", exit_code=3, **ended))
    api.on("GET", f"/pipelines/{PIPELINE_ID}", Reply(shown))
    text = Program(api.url)("pipelines", "show", PIPELINE_ID).text
    assert text.splitlines()[0].split() == ["ID", PIPELINE_ID]
    assert "CANCEL_REASON" not in text
    fetch = next(line for line in text.splitlines() if line.startswith("fetch"))
    assert fetch.split()[:5] == ["fetch", "task", "FAILED", "EXIT_CODE", "3"]
    assert "1.5s" in fetch


def test_a_list_says_how_to_get_its_next_page(api: FakeApi) -> None:
    api.on("GET", "/nodes", Reply(page(node(), next_cursor="abc")))
    result = Program(api.url)("nodes", "list", "--limit", "1", "-l", "zone=a", "--offline")
    assert "--cursor abc" in result.stderr
    [seen] = api.requests("GET", "/nodes")
    assert seen.query == {"limit": "1", "selector": "zone=a", "online": "false"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.9, "9.9s"), (59, "59s"), (180, "3m"), (7200, "2h"), (9 * 86400, "9d")],
)
def test_lengths_of_time_have_one_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_an_age_is_never_negative() -> None:
    now = parse_time("2026-11-24T22:00:00Z", Instant(0))
    assert age("2026-11-24T21:57:00.000Z", now) == "3m"
    assert age("2026-11-24T22:00:09.000Z", now) == "0.0s"
    assert age(None, now) == ""


def test_watch_redraws_on_a_terminal_and_ends_with_130(api: FakeApi) -> None:
    result = Program(api.url, terminal=True, sleep=_stop)("nodes", "list", "--watch")
    assert result.exit_code == 130
    assert result.stdout.startswith(b"\x1b[H")
    assert result.stdout.endswith(b"\x1b[J")


def test_watch_appends_changed_rows_elsewhere_and_bears_an_absence(api: FakeApi) -> None:
    pages = iter(
        [
            Reply(page(node("a"), node("b"))),
            problem("UNAVAILABLE", 503),
            Reply(page(node("a"), node("b", state="disabled"))),
            Reply(page(node("a"), node("b", state="disabled"))),
        ]
    )

    def list_nodes(_seen: Seen) -> Reply:
        return next(pages, problem("NOT_FOUND", 404))

    api.on("GET", "/nodes", list_nodes)
    result = Program(api.url)("nodes", "list", "--watch", "--columns", "id,state", "-o", "csv")
    assert result.exit_code == 5
    assert result.text == "id,state\nb,normal\na,normal\nb,disabled\n"


def test_events_are_followed_behind_the_last_one_after_a_break(api: FakeApi) -> None:
    def stream(after: int) -> Iterator[bytes]:
        yield b": here\n\n"
        yield b"id: %d\nevent: pipeline.created\ndata: {" % (after + 1)
        body = event(after + 1)
        yield (str(body).replace("'", '"').replace("{", "", 1) + "\n\n").encode()
        raise Cut

    def follow(seen: Seen) -> Reply:
        after = int(seen.query["after"])
        return Reply(stream(after)) if after < 3 else problem("CURSOR_EXPIRED", 410)

    api.on("GET", "/events", follow)
    result = Program(api.url)("events", "-f", "--after", "0", "-o", "name")
    assert (result.exit_code, result.text) == (6, "1\n2\n3\n")
    assert api.seen[0].headers["accept"] == "text/event-stream"


def test_events_are_asked_for_with_every_filter(api: FakeApi) -> None:
    api.on("GET", "/events", Reply(page(event(7), next_cursor="7")))
    result = Program(api.url)(
        *("events", "--after", "6", "--type", "node.", "--node", "fra-07", "--entity", "e"),
        *("--limit", "1"),
    )
    assert "--after 7" in result.stderr
    assert api.seen[0].query == {
        "type": "node.",
        "node": "fra-07",
        "entity": "e",
        "after": "6",
        "limit": "1",
    }


def test_a_problem_inside_a_stream_of_events_ends_it(api: FakeApi) -> None:
    lines = b'event: problem\ndata: {"code": "CURSOR_EXPIRED", "detail": "too slow"}\n\n'
    api.on("GET", "/events", Reply(iter([lines])))
    assert Program(api.url)("events", "-f").exit_code == 6


def test_api_prints_the_answer_as_it_is(api: FakeApi) -> None:
    api.on("POST", "/things", lambda _seen: Reply(b'{"a":1}\n', 201, {"X-Body": "1"}))
    result = Program(api.url)("api", "post", "things?x=1", "-d", "{}", "-H", "If-Match=e")
    assert (result.exit_code, result.stdout) == (0, b'{"a":1}\n')
    [seen] = api.requests("POST", "/things")
    assert (seen.query, seen.body, seen.headers["if-match"]) == ({"x": "1"}, b"{}", "e")


def test_verbose_says_each_request_and_debug_http_hides_the_token(api: FakeApi) -> None:
    program = Program(api.url, environ={"GAMENODE_TOKEN": "s3cret"})
    result = program("nodes", "list", "--debug-http")
    assert "GET /api/v1/nodes?limit=100 -> 200 in " in result.stderr
    assert "> Authorization: (redacted)" in result.stderr
    assert "s3cret" not in result.stderr
    assert api.seen[0].headers["authorization"] == "Bearer s3cret"
