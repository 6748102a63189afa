"""`run` and `logs`: every byte once and in order, through breaks, to the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.bodies import PIPELINE_ID, page, pipeline, step
from tests.support.fake_api import Cut, FakeApi, Reply, Seen, fake_api, problem
from tests.support.program import FAST, Program

from gamenode.domain.log import LogStream
from gamenode.lib.clock import Instant
from gamenode.wire import cri

SRC = Path(__file__).parents[3] / "src"
AT = Instant(1_795_557_501_123_456_789)


def framed(text: bytes, stream: LogStream = LogStream.STDOUT) -> bytes:
    return cri.frame(stream, AT, text)


class Server:
    """A pipeline whose steps' logs and states a test sets; logs are served as the server does."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.pipeline = pipeline("RUNNING", step(status="RUNNING"))
        self.logs: dict[tuple[str, str], bytes] = {}
        self.between: Callable[[Seen], None] = lambda _seen: None
        """Called before each answer about the pipeline."""
        self.cut_after: list[int] = []
        """How many bytes of a log each of the next readings brings before it breaks off."""
        self.piece_bytes = 1 << 20
        api.on("GET", f"/pipelines/{PIPELINE_ID}", self._show)
        api.on("POST", "/pipelines", lambda _seen: Reply(self.pipeline, 201))
        api.on("GET", f"/pipelines/{PIPELINE_ID}/steps/.*/logs", self._log)

    def end(self, status: str, *steps: dict[str, Any], **members: Any) -> None:
        self.pipeline = pipeline(status, *steps, **members)

    def _show(self, seen: Seen) -> Reply:
        self.between(seen)
        return Reply(self.pipeline)

    def _log(self, seen: Seen) -> Reply:
        name = seen.path.split("/")[-2]
        newest = str(max((int(at) for of, at in self.logs if of == name), default=0))
        attempt = seen.query.get("attempt", newest)
        if (name, attempt) not in self.logs:
            return problem("LOG_NOT_FOUND", 404)
        stored = self.logs[name, attempt]
        offset = int(seen.query.get("offset", "0"))
        if "tail" in seen.query:
            tail = stored.splitlines(keepends=True)[-int(seen.query["tail"]) :]
            offset = len(stored) - sum(len(line) for line in tail)
        return Reply(self._pieces(stored[offset:]), headers={"log-offset": str(offset)})

    def _pieces(self, content: bytes) -> Iterator[bytes]:
        cut_after = self.cut_after.pop(0) if self.cut_after else None
        if cut_after is not None:
            content = content[:cut_after]
        for start in range(0, len(content), self.piece_bytes):
            yield content[start : start + self.piece_bytes]
        if cut_after is not None:
            raise Cut


@pytest.fixture
def server() -> Iterator[Server]:
    with fake_api() as api:
        yield Server(api)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\n")
    return str(path)


def test_run_writes_each_step_s_log_in_order_and_exits_0_when_completed(
    server: Server, file: str
) -> None:
    server.logs = {("fetch", "1"): framed(b"one\ntwo\n"), ("game", "1"): framed(b"three\n")}
    server.end("COMPLETED", step("fetch", "COMPLETED"), step("game", "COMPLETED"))
    result = Program(server.api.url)("run", file)
    assert (result.exit_code, result.stdout) == (0, b"one\ntwo\nthree\n")
    assert result.stderr.splitlines()[0] == f"pipeline {PIPELINE_ID}"
    assert "step 2/2 game" in result.stderr


def test_run_follows_a_step_from_its_start_to_the_pipeline_s_end(server: Server, file: str) -> None:
    states: Iterator[Callable[[], None]] = iter(
        [
            lambda: server.end(
                "PENDING", step(), message="no node", waiting=[{"reason": "X", "passes": True}]
            ),
            lambda: server.end(
                "PENDING", step(), message="no gpu", waiting=[{"reason": "X", "passes": False}]
            ),
            lambda: server.end("RUNNING", step(status="RUNNING")),
            lambda: server.logs.update({("fetch", "1"): framed(b"a\n")}),
            lambda: server.logs.update({("fetch", "1"): framed(b"a\n") + framed(b"b\n")}),
            lambda: server.end("COMPLETED", step(status="COMPLETED")),
        ]
    )
    server.end("PENDING", step())
    server.between = lambda _seen: next(states, lambda: None)()
    result = Program(server.api.url)("run", file)
    assert (result.exit_code, result.stdout) == (0, b"a\nb\n")
    assert "waiting: no node" in result.stderr
    assert "waiting, though it can never fit as things are: no gpu" in result.stderr
    assert f"gamenode pipelines explain {PIPELINE_ID} says what to do" in result.stderr


def test_run_says_that_an_image_is_on_its_way_and_not_at_every_step_of_it(
    server: Server, file: str
) -> None:
    def pulling(megabytes: int) -> Callable[[], None]:
        word = f"pulling game:1: {megabytes}.0 of 9.0 MB"
        fetching = {**step(status="RUNNING"), "reason": "PULLING", "message": word}
        return lambda: server.end("RUNNING", fetching)

    states: Iterator[Callable[[], None]] = iter(
        [
            *(pulling(megabytes) for megabytes in range(1, 9)),
            lambda: server.end("COMPLETED", step(status="COMPLETED")),
        ]
    )
    server.end("PENDING", step())
    server.between = lambda _seen: next(states, lambda: None)()
    result = Program(server.api.url)("run", file)
    assert result.exit_code == 0
    said = [line for line in result.stderr.splitlines() if "pulling" in line]
    assert len(said) == 1
    assert said[0].startswith("step 1/1 fetch: pulling game:1: ")


def test_run_shows_every_try_of_a_step(server: Server, file: str) -> None:
    server.logs = {("fetch", "1"): framed(b"first\n"), ("fetch", "3"): framed(b"third\n")}
    server.end("COMPLETED", step(status="COMPLETED", attempt=3))
    result = Program(server.api.url)("run", file)
    assert result.stdout == b"first\nthird\n"
    assert "step 1/1 fetch, attempt 3" in result.stderr


def test_a_failure_exits_3_and_names_step_cause_and_last_lines(server: Server, file: str) -> None:
    lines = b"".join(b"line %d\n" % number for number in range(30))
    server.logs = {("game", "1"): framed(lines)}
    failed = step("game", "FAILED", reason="EXIT_CODE", exit_code=42)
    server.end("FAILED", step("fetch", "COMPLETED"), failed, reason="EXIT_CODE")
    result = Program(server.api.url)("run", file)
    assert (result.exit_code, result.stdout) == (3, lines)
    assert "step game: FAILED (exit code 42)" in result.stderr
    assert "line 20\n" in result.stderr
    assert "line 19\n" not in result.stderr


def test_a_cancelled_pipeline_exits_3(server: Server, file: str) -> None:
    server.end("CANCELLED", step(status="CANCELLED"), reason="CANCELLED_BY_USER")
    result = Program(server.api.url)("run", file)
    assert result.exit_code == 3
    assert "CANCELLED (CANCELLED_BY_USER)" in result.stderr


def test_with_json_the_pipeline_alone_stands_on_standard_output(server: Server, file: str) -> None:
    server.logs = {("fetch", "1"): framed(b"text\n")}
    server.end("COMPLETED", step(status="COMPLETED"))
    result = Program(server.api.url)("run", file, "-o", "json")
    assert json.loads(result.stdout) == server.pipeline
    assert "text\n" in result.stderr


def test_detach_prints_the_id_and_leaves(server: Server, file: str) -> None:
    result = Program(server.api.url)("run", file, "--detach")
    assert (result.exit_code, result.text, result.stderr) == (0, f"{PIPELINE_ID}\n", "")


def test_run_sends_what_it_was_given(server: Server, tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("from file\n")
    result = Program(server.api.url)(
        *("run", "-", "--detach", "--node", "fra-07", "-l", "zone=a", "--priority", "3"),
        *("-a", "A=1=2", "-a", f"B=@{value}", "-a", "C=@@x", "-e", "D=", "--key", "k"),
        stdin=b"name: x\n",
    )
    assert result.exit_code == 0
    [seen] = server.api.requests("POST", "/pipelines")
    assert seen.headers["idempotency-key"] == "k"
    assert seen.json() == {
        "file": "name: x\n",
        "args": {"A": "1=2", "B": "from file", "C": "@x"},
        "envs": {"D": ""},
        "node": "fra-07",
        "selector": "zone=a",
        "priority": 3,
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-", "-a", "A=-"], "standard input is read for FILE already"),
        (["-", "-a", "A"], "is no pair"),
        (["-", "-a", "A=1", "-a", "A=2"], "A is given twice"),
        (["no-such-file"], "No such file"),
    ],
)
def test_inputs_that_cannot_be_read_exit_2(server: Server, args: list[str], message: str) -> None:
    result = Program(server.api.url)("run", *args, stdin=b"name: x\n")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not server.api.requests("POST", "/pipelines")


def test_a_file_that_is_not_utf_8_is_refused_at_its_place(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"name: x\nsteps: \xff\n")
    result = Program(server.api.url)("run", str(file))
    assert result.exit_code == 2
    assert f"{file}:2:8: FILE: is not UTF-8 text" in result.stderr


def test_a_request_whose_fate_is_unknown_is_sent_again_under_one_key(
    server: Server, file: str
) -> None:
    replies = iter([Cut, Cut, None])

    def create(_seen: Seen) -> Reply:
        if (cut := next(replies)) is not None:
            raise cut
        return Reply(server.pipeline, 201)

    server.api.on("POST", "/pipelines", create)
    result = Program(server.api.url)("run", file, "--detach")
    assert result.exit_code == 0
    keys = {seen.headers["idempotency-key"] for seen in server.api.requests("POST", "/pipelines")}
    assert len(server.api.requests("POST", "/pipelines")) == 3
    assert len(keys) == 1


def test_a_server_that_is_not_ready_yet_is_asked_again(server: Server, file: str) -> None:
    replies = iter([problem("UNAVAILABLE", 503), Reply(server.pipeline, 201)])
    server.api.on("POST", "/pipelines", lambda _seen: next(replies))
    assert Program(server.api.url)("run", file, "--detach").exit_code == 0


def test_a_refusal_is_not_repeated(server: Server, file: str) -> None:
    server.api.on("POST", "/pipelines", problem("NODE_OFFLINE", 503))
    assert Program(server.api.url)("run", file).exit_code == 7
    assert len(server.api.requests("POST", "/pipelines")) == 1


def test_who_gives_up_says_that_it_may_have_started_and_with_which_key(
    server: Server, file: str
) -> None:
    def cut(_seen: Seen) -> Reply:
        raise Cut

    server.api.on("POST", "/pipelines", cut)
    settings = replace(FAST, away_s_max=0.05)
    result = Program(server.api.url, settings=settings)("run", file, "--key", "k-1")
    assert result.exit_code == 7
    assert "may have started" in result.stderr
    assert "--key k-1" in result.stderr


@pytest.mark.parametrize("cut_after", [0, 1, 39, 40, 45, 46, 47, 100])
def test_a_log_that_breaks_off_anywhere_goes_on_exactly(server: Server, cut_after: int) -> None:
    text = b"first\nsecond\nthird\n"
    server.logs = {("fetch", "1"): framed(text)}
    server.end("COMPLETED", step(status="COMPLETED"))
    server.cut_after = [cut_after, cut_after]
    server.piece_bytes = 7
    followed = Program(server.api.url)("logs", "-f", f"{PIPELINE_ID}/fetch")
    server.cut_after = [cut_after, cut_after]
    stored = Program(server.api.url)("logs", f"{PIPELINE_ID}/fetch", "--raw")
    assert (followed.exit_code, followed.stdout) == (0, text)
    assert (stored.exit_code, stored.stdout) == (0, text)


def test_a_server_that_restarts_in_the_middle_costs_no_byte_and_one_message(
    server: Server, file: str
) -> None:
    server.logs = {("fetch", "1"): framed(b"before\n")}
    missed = threading.Event()

    def sleep(seconds: float) -> None:
        missed.set()
        time.sleep(seconds)

    program = Program(server.api.url, settings=replace(FAST, away_s_max=10.0), sleep=sleep)
    results = []
    running = threading.Thread(target=lambda: results.append(program("run", file)))
    running.start()
    _wait_for(lambda: bool(server.api.requests("GET", ".*/logs")))
    server.api.stop()
    assert missed.wait(5)
    server.logs["fetch", "1"] += framed(b"behind\n")
    server.end("COMPLETED", step(status="COMPLETED"))
    server.api.start_again()
    running.join(10)
    [result] = results
    assert (result.exit_code, result.stdout) == (0, b"before\nbehind\n")
    assert result.stderr.count("trying again") == 1
    assert result.stderr.count("the server is back") == 1


def test_a_server_that_stays_away_ends_the_wait_with_7_and_says_how_to_attach(
    server: Server, file: str
) -> None:
    server.between = lambda _seen: server.api.stop()
    settings = replace(FAST, away_s_max=0.1)
    result = Program(server.api.url, settings=settings)("run", file)
    server.api.start_again()
    assert result.exit_code == 7
    assert f"gamenode logs -f {PIPELINE_ID}" in result.stderr


def test_a_wait_that_times_out_exits_8_and_the_work_goes_on(server: Server, file: str) -> None:
    result = Program(server.api.url)("run", file, "--timeout", "50ms")
    assert result.exit_code == 8
    assert "it goes on" in result.stderr
    assert not server.api.requests("POST", ".*:cancel")


def test_a_silent_stream_of_a_step_that_has_ended_is_left_with_a_word(
    server: Server, file: str
) -> None:
    stop = threading.Event()

    def silent(_seen: Seen) -> Reply:
        def pieces() -> Iterator[bytes]:
            yield framed(b"here\n")
            stop.wait(10)

        offset = int(_seen.query.get("offset", "0"))
        body = pieces() if not offset else _silence(stop)
        return Reply(body, headers={"log-offset": str(offset)})

    server.api.on("GET", ".*/logs", silent)
    server.end("COMPLETED", step(status="COMPLETED"))
    result = Program(server.api.url)("run", file)
    stop.set()
    assert (result.exit_code, result.stdout) == (0, b"here\n")
    assert "is not complete" in result.stderr


def _silence(stop: threading.Event) -> Iterator[bytes]:
    stop.wait(10)
    yield from ()


@pytest.mark.parametrize("command", [["run", "FILE"], ["logs", "-f", PIPELINE_ID]])
def test_ctrl_c_detaches_says_how_to_attach_and_cancels_nothing(
    server: Server, file: str, command: list[str]
) -> None:
    server.logs = {("fetch", "1"): framed(b"text\n")}
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from gamenode.cli.main import cli; cli()",
            *(file if word == "FILE" else word for word in command),
        ],
        env={"PYTHONPATH": str(SRC), "GAMENODE_URL": server.api.url, "HOME": os.devnull},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "text\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert f"gamenode logs -f {PIPELINE_ID}" in stderr
    assert not server.api.requests("POST", ".*:cancel")


MIXED = framed(b"out\npar") + framed(b"err\n", LogStream.STDERR) + framed(b"tial\n")
MIXED += framed(b"3 bytes dropped\n", LogStream.GAMENODE)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], b"out\nparerr\ntial\n3 bytes dropped\n"),
        (["--raw"], b"out\nparerr\ntial\n"),
        (["--stream", "stderr"], b"err\n"),
        (["--stream", "stdout"], b"out\npartial\n"),
        (["--tail", "1"], b"3 bytes dropped\n"),
        (
            ["--timestamps", "--stream", "stdout"],
            b"2026-11-24T22:38:21.123456789Z out\n2026-11-24T22:38:21.123456789Z partial\n",
        ),
    ],
)
def test_logs_come_in_the_form_that_was_asked_for(
    server: Server, options: list[str], expected: bytes
) -> None:
    server.logs = {("fetch", "1"): MIXED}
    result = Program(server.api.url)("logs", f"{PIPELINE_ID}/fetch", *options)
    expected = expected.replace(b"2026-11-24T22:38:21.123456789Z", cri.stamp(AT))
    assert (result.exit_code, result.stdout) == (0, expected)


def test_lines_as_objects_have_their_offsets(server: Server) -> None:
    server.logs = {("fetch", "1"): framed(b"a\n\xff\n")}
    result = Program(server.api.url)("logs", f"{PIPELINE_ID}/fetch", "-o", "json")
    first, second = (json.loads(line) for line in result.text.splitlines())
    assert (first["offset"], first["next_offset"], first["text"]) == (0, 42, "a")
    assert (second["offset"], second["base64"]) == (42, "/w==")


def test_a_terminal_gets_colours_but_no_other_control_sequence(server: Server) -> None:
    hostile = b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J \xc2\x9b2J a\rb\r\n"
    server.logs = {("fetch", "1"): framed(hostile)}
    shown = Program(server.api.url, terminal=True)("logs", f"{PIPELINE_ID}/fetch").stdout
    piped = Program(server.api.url)("logs", f"{PIPELINE_ID}/fetch").stdout
    raw = Program(server.api.url, terminal=True)("logs", f"{PIPELINE_ID}/fetch", "--raw").stdout
    assert b"\x1b[31mred\x1b[0m ^[]0;title^G ^[[2J \\x9b2J a^Mb\r\n" in shown
    assert piped == raw == hostile


def test_logs_of_a_step_that_is_not_there_suggest_one(server: Server) -> None:
    result = Program(server.api.url)("logs", f"{PIPELINE_ID}/fetsh")
    assert result.exit_code == 5
    assert "did you mean fetch?" in result.stderr


def test_a_step_that_printed_nothing_is_no_error_and_one_that_never_ran_is(
    server: Server,
) -> None:
    server.end("RUNNING", step("fetch", "COMPLETED"), step("game"))
    silent = Program(server.api.url)("logs", f"{PIPELINE_ID}/fetch")
    never = Program(server.api.url)("logs", f"{PIPELINE_ID}/game")
    assert (silent.exit_code, silent.stdout, never.exit_code) == (0, b"", 5)


def test_a_part_of_an_id_or_name_is_enough_where_it_means_one(server: Server) -> None:
    other = {**pipeline("FAILED", name="start-game-2"), "id": PIPELINE_ID[:-1] + "9"}
    found = page(pipeline("COMPLETED", step(status="COMPLETED")), other)
    server.api.on("GET", "/pipelines", Reply(found))
    program = Program(server.api.url)
    for text in ("c2d7e8", "start-game", PIPELINE_ID.upper()):
        assert program("pipelines", "show", text, "-o", "name").text == f"{PIPELINE_ID}\n"
    ambiguous = program("pipelines", "show", "star")
    assert ambiguous.exit_code == 2
    assert f"{PIPELINE_ID}: start-game COMPLETED" in ambiguous.stderr
    assert program("pipelines", "show", "d7e").exit_code == 5
    assert program("pipelines", "show", "7e8").exit_code == 2
    assert program("pipelines", "show", "nothing").exit_code == 5


def _wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)
