"""What goes over the wire comes out as it went in; what is no value of ours is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from protovalidate import ValidationError, validate

from gamenode.domain.command import (
    Acknowledged,
    CancelOrder,
    Closed,
    CloseReason,
    Dispatch,
    ExecuteOrder,
    FencedOrder,
    FollowLog,
    GrantedStep,
    HeldPipeline,
    NumberedReport,
    OrderAnswer,
    OrderOutcome,
    Statement,
    VerifyOrder,
    Welcome,
)
from gamenode.domain.inventory import Inventory
from gamenode.domain.log import LogKey
from gamenode.domain.node import HeartbeatResult, Maintenance, NodeType, Registration
from gamenode.domain.pipeline import (
    Condition,
    ContainerSpec,
    PipelineReport,
    Reason,
    ReportOutcome,
    ReportResult,
    Status,
    StepReport,
    StepType,
)
from gamenode.domain.verification import HostAttempt, RunState
from gamenode.lib.clock import Instant
from gamenode.wire import codec
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2 as pb

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAME = st.text("abc-", min_size=1, max_size=5)
COUNT = st.integers(0, 2**31 - 1)
NUMBER = st.integers(1, 2**31 - 1)
LONG = st.integers(0, 2**62)
SEQUENCE = st.integers(1, 2**62)
SECONDS = st.floats(0, 1e9)
BYTES = st.binary(max_size=32)
INSTANT = st.none() | st.integers(10**17, 2 * 10**18).map(Instant)
REPORTED = st.sampled_from([status for status in Status if status is not Status.PENDING])
DISPATCH = st.builds(Dispatch, NAME, NUMBER)

STEP_REPORT = st.builds(
    StepReport,
    pipeline_id=NAME,
    step=NAME,
    status=REPORTED,
    session_id=TEXT,
    pipeline_attempt=COUNT,
    attempt=COUNT,
    run=COUNT,
    started_at=INSTANT,
    ended_at=INSTANT,
    reason=st.sampled_from(Reason),
    message=TEXT,
    exit_code=st.none() | st.integers(-(2**31), 2**31 - 1),
    signal=st.none() | COUNT,
    log_length_bytes=st.none() | LONG,
    log_hash=BYTES,
    instance_id=TEXT,
    log=BYTES,
)
PIPELINE_REPORT = st.builds(
    PipelineReport,
    pipeline_id=NAME,
    status=REPORTED,
    session_id=TEXT,
    attempt=COUNT,
    reason=st.sampled_from(Reason),
    message=TEXT,
)
NUMBERED = st.builds(NumberedReport, sequence=SEQUENCE, report=STEP_REPORT | PIPELINE_REPORT)
STATEMENT = st.builds(
    Statement,
    node_id=NAME,
    session_id=NAME,
    stream_number=SEQUENCE,
    state_version=LONG,
    maintenance=st.sampled_from(Maintenance),
    held=st.lists(
        st.builds(
            HeldPipeline,
            dispatch=DISPATCH,
            reports=st.lists(NUMBERED, max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    boot_id=TEXT,
)
CONTAINER = st.builds(
    ContainerSpec,
    image=TEXT,
    command=st.lists(TEXT, max_size=2).map(tuple),
    environment=st.dictionaries(TEXT, TEXT, max_size=2),
    stop_grace_period_s=SECONDS,
    memory_bytes=LONG,
    init=st.none() | st.booleans(),
    privileged=st.booleans(),
)
EXECUTE = st.builds(
    ExecuteOrder,
    dispatch=DISPATCH,
    name=TEXT,
    steps=st.lists(
        st.builds(
            GrantedStep,
            name=NAME,
            type=st.sampled_from(StepType),
            condition=st.sampled_from(Condition),
            timeout_s=st.none() | SECONDS,
            first_attempt=COUNT,
            attempts=COUNT,
            backoff_s=SECONDS,
            container=CONTAINER,
            instance_id=TEXT,
        ),
        max_size=2,
    ).map(tuple),
    timeout_s=st.none() | SECONDS,
    envs=st.dictionaries(TEXT, TEXT, max_size=2),
    secrets=st.dictionaries(TEXT, TEXT, max_size=2),
    state_version=LONG,
)
CANCEL = st.builds(
    CancelOrder,
    dispatch=DISPATCH,
    reason=st.sampled_from(Reason),
    message=TEXT,
    force=st.booleans(),
)
HOST_ATTEMPT = st.builds(
    HostAttempt,
    key=st.builds(LogKey, NAME, NAME, COUNT, COUNT),
    in_journal=st.booleans(),
    state=st.sampled_from(RunState),
    started_at=INSTANT,
    ended_at=INSTANT,
    ending=st.booleans(),
)
WORD = st.one_of(
    st.builds(Welcome, unwanted=st.lists(DISPATCH, max_size=2).map(tuple)),
    st.builds(
        HeartbeatResult,
        counted=st.booleans(),
        message=TEXT,
        maintenance=st.sampled_from(Maintenance),
        state_version=LONG,
    ),
    st.builds(
        Acknowledged,
        results=st.lists(
            st.tuples(
                SEQUENCE,
                st.builds(ReportResult, outcome=st.sampled_from(ReportOutcome), stop=st.booleans()),
            ),
            max_size=3,
        ).map(tuple),
    ),
    st.builds(
        FencedOrder,
        session_epoch=LONG,
        stream_number=LONG,
        sequence=LONG,
        order=st.none() | EXECUTE | CANCEL | st.just(VerifyOrder()),
    ),
    st.builds(FollowLog, pipeline_id=TEXT, step=TEXT, live=st.booleans()),
    st.builds(Closed, reason=st.sampled_from(CloseReason), message=TEXT, retry_after_s=SECONDS),
)


def sent(message: Any) -> Any:
    """Return what the other side reads."""
    return type(message).FromString(message.SerializeToString())


@given(NUMBERED)
def test_a_report(numbered: NumberedReport) -> None:
    message = sent(codec.encode_report(numbered))
    validate(message)
    assert codec.decode_report(message) == numbered


@given(STATEMENT)
def test_a_statement(statement: Statement) -> None:
    message = sent(codec.encode_statement(statement))
    validate(message)
    assert codec.decode_statement(message) == statement


@given(WORD)
def test_a_word_of_the_server(word: Any) -> None:
    assert codec.decode_server_word(sent(codec.encode_server_word(word))) == word


@given(EXECUTE)
def test_an_order_is_kept_without_its_secrets(order: ExecuteOrder) -> None:
    assert codec.unpack_order(codec.pack_order(order)) == replace(order, secrets={})


@given(
    st.integers(1, 2**62),
    st.builds(
        OrderAnswer,
        outcome=st.sampled_from(OrderOutcome),
        reason=TEXT,
        message=TEXT,
        attempts=st.lists(HOST_ATTEMPT, max_size=2).map(tuple),
    ),
)
def test_an_answer_to_an_order(sequence: int, answer: OrderAnswer) -> None:
    message = sent(codec.encode_answer(sequence, answer))
    validate(message)
    assert (message.sequence, codec.decode_answer(message)) == (sequence, answer)


@given(
    st.builds(
        Registration,
        node_id=NAME,
        type=st.sampled_from(NodeType),
        inventory=st.just(Inventory()),
        last_session_epoch=st.none() | LONG,
        boot_id=TEXT,
        agent_version=TEXT,
        env_names=st.frozensets(NAME, max_size=2),
        labels=st.dictionaries(TEXT, TEXT, max_size=2),
        step_runtimes=st.frozensets(NAME, max_size=2),
    )
)
def test_a_registration(registration: Registration) -> None:
    decoded = codec.decode_registration(sent(codec.encode_registration(registration)))
    for field in ("node_id", "type", "last_session_epoch", "boot_id", "env_names", "labels"):
        assert getattr(decoded, field) == getattr(registration, field)


# Every value of every enum that a client may send


def report(status: int) -> pb.StatusReport:
    update = pb.PipelineStatusUpdate(pipeline_id="p", status=status)  # type: ignore[arg-type]
    return pb.StatusReport(sequence=1, pipeline=update)


def statement(state: int) -> pb.Statement:
    return pb.Statement(
        node_id="n",
        session_id="s",
        stream_number=1,
        maintenance_state=state,  # type: ignore[arg-type]
    )


def answer(outcome: int) -> pb.CommandAnswer:
    return pb.CommandAnswer(sequence=1, outcome=outcome)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "decode", "values"),
    [
        (report, codec.decode_report, pb.StepStatus.DESCRIPTOR),
        (statement, codec.decode_statement, pb.MaintenanceState.DESCRIPTOR),
        (answer, codec.decode_answer, pb.CommandOutcome.DESCRIPTOR),
    ],
)
def test_each_value_of_an_enum_is_refused_by_its_rules_or_understood(
    make: Any, decode: Any, values: EnumDescriptor
) -> None:
    refused = 0
    for number in [*(value.number for value in values.values), 77]:
        message: Message = make(number)
        try:
            validate(message)
        except ValidationError:
            refused += 1
        else:
            decode(message)
    assert refused < len(values.values)


def test_an_unset_status_is_not_pending() -> None:
    with pytest.raises(ValidationError):
        validate(pb.StatusReport(sequence=1, pipeline=pb.PipelineStatusUpdate(pipeline_id="p")))


def test_what_this_agent_does_not_know_is_nothing() -> None:
    assert codec.decode_server_word(pb.ServerMessage()) is None


def test_a_state_that_this_agent_does_not_know_is_an_order_that_it_does_not_know() -> None:
    # Refused, and not taken for one that ends every game.
    change = pb.StateChangeRequest(version=2, target_state=77)  # type: ignore[arg-type]  # a newer one
    word = codec.decode_server_word(pb.ServerMessage(command=pb.Command(change_state=change)))
    assert isinstance(word, FencedOrder)
    assert word.order is None
