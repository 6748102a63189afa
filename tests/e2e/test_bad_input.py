"""Bad input at every entry: a clear error, nothing stored, the server alive."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from tests.support.cluster import Cluster, pipeline, step
from tests.support.signed import signed

from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2_grpc as pb_grpc

HUGE_BYTES = 100_000_000
SECONDS = 1_700_000_000
CLIENT_ERRORS = range(400, 500)
FILE = pipeline(step("a", "true"))
LEVELS = "abcdefghij"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise(LEVELS)
)
CYCLE = "name: x\nsteps: &steps\n  - name: a\n    container: {command: [echo]}\n    more: *steps\n"
UNKNOWN_KEY = "name: x\nstepps: []\n"
BAD_FILES = {
    "bomb": (BOMB, "values, aliases included"),
    "cycle": (CYCLE, ""),
    "unknown key": (UNKNOWN_KEY, "did you mean steps?"),
    "deep": ("[" * 10_000, "nesting"),
    "object": ("name: !!python/object/apply:os.system [id]\nsteps: []\n", ""),
    "empty": ("", ""),
    "control character": ("name: a\x07b\nsteps: []\n", ""),
}
BAD_IDS = ("..%2f..%2fetc%2fpasswd", "%2e%2e", "x", "%00", "a%0ab", "%ff", "a" * 5000)


@pytest.fixture(autouse=True)
def _nothing_stored(shared: Cluster) -> Iterator[None]:
    """Check around each test that nothing was stored and that the server serves on."""

    def stored() -> list[Any]:
        return [
            shared.get("/pipelines")["items"],
            [node["id"] for node in shared.get("/nodes")["items"]],
            [event["id"] for event in shared.get("/events?limit=1000")["items"]],
        ]

    before = stored()
    yield
    assert stored() == before
    assert shared.started[0].alive
    assert "error.internal" not in shared.started[0].stderr


@pytest.fixture(scope="module")
def stub(shared: Cluster) -> Iterator[pb_grpc.GameNodeServiceStub]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(shared.grpc, options) as channel:
        yield pb_grpc.GameNodeServiceStub(signed(channel, shared.bearer))


def _refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return the code, the text, and the fields that a refused call names."""
    with pytest.raises(grpc.RpcError) as refused:
        answer = call()
        for _ in answer if isinstance(answer, Iterator) else ():
            pass
    error: Any = refused.value
    status: status_pb2.Status | None = rpc_status.from_call(error)
    fields: dict[str, str] = {}
    for detail in status.details if status is not None else ():
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields |= {each.field: each.description for each in bad.field_violations}
    return error.code(), error.details(), fields


# HTTP


@pytest.mark.parametrize("what", BAD_FILES)
def test_http_refuses_a_bad_file(shared: Cluster, what: str) -> None:
    file, says = BAD_FILES[what]
    for path in ("/api/v1/pipelines", "/api/v1/pipelines:validate"):
        answer = shared.request("POST", path, {"file": file}, within_s=5.0)
        assert (answer.status, answer.json["code"]) == (400, "INVALID_REQUEST")
        assert answer.json["details"], answer
        assert says in str(answer.json["details"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", ""),
        (b"[]", ""),
        (b'{"fil": "x"}', "fil"),
        (b'{"file": 7}', "file"),
        (b'{"file": "\xff\xfe"}', ""),
        (json.dumps({"file": FILE, "priority": 10**30}).encode(), "priority"),
        (json.dumps({"file": FILE, "node": "../../etc"}).encode(), "node"),
        (json.dumps({"file": FILE, "selector": "((("}).encode(), "selector"),
        (json.dumps({"file": FILE, "args": {"NOT_DECLARED": "1"}}).encode(), "NOT_DECLARED"),
    ],
)
def test_http_refuses_a_bad_body(shared: Cluster, body: bytes, field: str) -> None:
    answer = shared.request("POST", "/api/v1/pipelines", body)
    assert answer.status in (400, 404), answer
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert field in answer.body.decode()


def test_http_refuses_a_bare_file_that_is_no_utf_8(shared: Cluster) -> None:
    answer = shared.request(
        "POST",
        "/api/v1/pipelines",
        b"name: \xff\xfe\nsteps: []\n",
        headers={"content-type": "application/yaml"},
    )
    assert (answer.status, answer.json["code"]) == (400, "INVALID_REQUEST")


def test_http_refuses_a_huge_body_without_reading_it(shared: Cluster) -> None:
    begun_s = time.monotonic()
    try:
        answer = shared.request("POST", "/api/v1/pipelines", b"x" * HUGE_BYTES)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was told before it had sent everything
    else:
        assert answer.status in CLIENT_ERRORS
        assert "bytes" in answer.json["detail"]
    assert time.monotonic() - begun_s < 5.0


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize(
    "path",
    ["/pipelines/{}", "/nodes/{}", "/pipelines/{}/steps/a/logs", "/pipelines/x/steps/{}/logs"],
)
def test_http_finds_nothing_under_a_bad_id(shared: Cluster, path: str, bad: str) -> None:
    answer = shared.request("GET", "/api/v1" + path.format(bad))
    assert answer.status in CLIENT_ERRORS, answer
    assert b"root:" not in answer.body
    assert answer.json["code"]


@pytest.mark.parametrize(
    "path",
    [
        "/pipelines?limit=0",
        "/pipelines?limit=1001",
        "/pipelines?status=NONSENSE",
        "/pipelines?cursor=nonsense",
        "/pipelines?statsu=RUNNING",
        "/nodes?online=perhaps",
        "/events?after=-1",
        "/events?type=nonsense",
    ],
)
def test_http_refuses_a_bad_query(shared: Cluster, path: str) -> None:
    answer = shared.request("GET", f"/api/v1{path}")
    assert (answer.status, answer.json["code"]) == (400, "INVALID_REQUEST")
    assert answer.json["details"]


def test_http_refuses_a_request_that_another_site_may_have_made(shared: Cluster) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        answer = shared.request("POST", "/api/v1/pipelines", {"file": FILE}, headers=headers)
        assert answer.status in CLIENT_ERRORS, answer


# gRPC


def _registration(**changes: Any) -> pb.RegisterRequest:
    request = pb.RegisterRequest(
        node_id="intruder",
        node_type=pb.NODE_TYPE_PHYSICAL,
        hardware=pb.HardwareInfo(
            cpu=[pb.CPUInfo(cores=1, architecture="x86_64")],
            memory=pb.MemoryInfo(total_bytes=2**30),
        ),
        software=pb.SoftwareInfo(
            os=pb.OSInfo(distribution="debian", version="12"), kernel=pb.KernelInfo(major=6)
        ),
    )
    for name, value in changes.items():
        request.ClearField(name)  # type: ignore[arg-type] # names of its fields
        request.MergeFrom(pb.RegisterRequest(**{name: value}))
    return request


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (_registration(node_type=0), "node_type"),
        (_registration(node_type=99), "node_type"),
        (_registration(node_id=""), "node_id"),
        (_registration(node_id="../../etc"), "node_id"),
        (_registration(node_id="a" * 64), "node_id"),
        (_registration(hardware=pb.HardwareInfo()), "hardware"),
        (_registration(software=pb.SoftwareInfo()), "software"),
    ],
)
def test_grpc_refuses_a_bad_registration(
    stub: pb_grpc.GameNodeServiceStub, request_: pb.RegisterRequest, field: str
) -> None:
    code, _, fields = _refused(lambda: stub.Register(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert any(name.startswith(field) for name in fields), fields


@pytest.mark.parametrize(
    ("status", "pipeline_id", "field"),
    [(0, "x", "status"), (77, "x", "status"), (2, "", "pipeline_id")],
)
def test_grpc_refuses_a_report_without_a_status_or_an_id(
    stub: pb_grpc.GameNodeServiceStub, status: Any, pipeline_id: str, field: str
) -> None:
    step_update = pb.StepStatusUpdate(pipeline_id=pipeline_id, step_id="a", status=status)
    update = pb.PipelineStatusUpdate(pipeline_id=pipeline_id, status=status)
    for call in (
        lambda: stub.UpdateStepStatus(step_update),
        lambda: stub.UpdatePipelineStatus(update),
    ):
        code, _, fields = _refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert field in fields


def test_grpc_refuses_seconds_and_names_the_unit(stub: pb_grpc.GameNodeServiceStub) -> None:
    for call in (
        lambda: stub.Heartbeat(pb.HeartbeatRequest(node_id="n1", timestamp=SECONDS)),
        lambda: stub.ReportMetrics(pb.MetricsReport(node_id="n1", timestamp=SECONDS)),
        lambda: stub.UpdateResourceInfo(pb.ResourceInfo(node_id="n1", timestamp=SECONDS)),
        lambda: stub.UpdateStepStatus(
            pb.StepStatusUpdate(pipeline_id="x", step_id="a", status=pb.RUNNING, start_time=SECONDS)
        ),
    ):
        code, _, fields = _refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert any("nanoseconds" in description for description in fields.values()), fields


@pytest.mark.parametrize("what", BAD_FILES)
def test_grpc_refuses_a_bad_file(stub: pb_grpc.GameNodeServiceStub, what: str) -> None:
    file, says = BAD_FILES[what]
    code, _, fields = _refused(lambda: stub.Execute(pb.ExecuteRequest(file=file)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in str(fields)


def test_grpc_refuses_a_huge_message(stub: pb_grpc.GameNodeServiceStub) -> None:
    request = pb.ExecuteRequest(file="x" * HUGE_BYTES)
    code, text, _ = _refused(lambda: stub.Execute(request))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text


@pytest.mark.parametrize("message", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff", b"\x12\x7fshort"])
def test_grpc_refuses_bytes_that_are_no_message(shared: Cluster, message: bytes) -> None:
    with grpc.insecure_channel(shared.grpc) as channel:
        call: Any = signed(channel, shared.bearer).unary_unary(
            "/gamenode.v1.GameNodeService/Execute"
        )
        with pytest.raises(grpc.RpcError) as refused:
            call(message, timeout=10.0)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("bad", ["..", "../../etc/passwd", "x", "\0", "a\nb"])
def test_grpc_finds_nothing_under_a_bad_id(stub: pb_grpc.GameNodeServiceStub, bad: str) -> None:
    for call in (
        lambda: stub.Cancel(pb.PipelineCancelRequest(pipeline_id=bad)),
        lambda: stub.StreamLogs(pb.LogRequest(pipeline_id=bad, step_id="a")),
        lambda: stub.StreamLogs(pb.LogRequest(pipeline_id="x", step_id=bad)),
        lambda: stub.Execute(pb.ExecuteRequest(file=FILE, node_id=bad)),
        lambda: stub.AppendLogs(
            pb.AppendLogsRequest(
                node_id="n1",
                session_id="x",
                log=pb.LogKey(pipeline_id=bad, step_id=bad, attempt=1, run=1),
            )
        ),
    ):
        code, text, _ = _refused(call)
        assert code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.ABORTED,  # the session is looked at first
        ), text


def test_grpc_ends_a_stream_that_does_not_open_with_a_statement(
    stub: pb_grpc.GameNodeServiceStub,
) -> None:
    words = [
        pb.AgentMessage(),
        pb.AgentMessage(heartbeat=pb.HeartbeatRequest(node_id="n1")),
        pb.AgentMessage(statement=pb.Statement()),
    ]
    for word in words:
        code, _, _ = _refused(partial(stub.Connect, iter([word]), timeout=10.0))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


# The command line


@pytest.mark.parametrize("what", BAD_FILES)
def test_the_command_line_refuses_a_bad_file(shared: Cluster, what: str) -> None:
    done = shared.run(BAD_FILES[what][0])
    assert done.exit_code == 2, done
    assert done.stderr.startswith("error: INVALID_REQUEST")
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("content", [b"name: \xff\xfe\n", b"x" * 2_000_000])
def test_the_command_line_refuses_a_file_that_is_no_text_of_a_bearable_length(
    shared: Cluster, content: bytes
) -> None:
    path = shared.folder / "bad.yaml"
    path.write_bytes(content)
    done = shared.command("run", str(path))
    assert done.exit_code == 2, done
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("run",), 2),
        (("run", "/does/not/exist.yaml"), 2),
        (("pipelines", "show", "../../etc/passwd"), 5),
        (("pipelines", "show", ""), 2),
        (("pipelines", "list", "--limit", "0"), 2),
        (("logs", "../../etc/passwd"), 5),
        (("nodes", "show", "nobody"), 5),
        (("events", "--after", "-1"), 2),
        (("nonsense",), 2),
    ],
)
def test_the_command_line_says_what_is_wrong(
    shared: Cluster, arguments: tuple[str, ...], exit_code: int
) -> None:
    done = shared.command(*arguments)
    assert done.exit_code == exit_code, done
    assert "error" in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert not done.stdout
