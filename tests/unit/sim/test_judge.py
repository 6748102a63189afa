"""The judge names every broken promise, and none that was kept."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from tests.support.time import START_AT, FakeClock

from gamenode.agent.runtime import RunKey
from gamenode.domain.event import Event, EventType
from gamenode.domain.node import ConditionType, Maintenance, RegistrationAnswer
from gamenode.sim.judge import Judge, JudgeSettings, Latencies, Verdict

NODE = "sim-1"
TIMEOUT_S, LATE_S = 45.0, 45.0 + 1.0 + 1.5


class Trial:
    """A judge, and one node that has registered and was answered."""

    def __init__(self, *, skewed: bool = False) -> None:
        self.clock = FakeClock()
        self.judge = Judge(self.clock, JudgeSettings())
        self.judge.add(NODE, skewed=skewed)
        self.register()
        self.beat()

    def register(self, *, continuation: bool = False) -> None:
        self.judge.registered(
            NODE,
            RegistrationAnswer(
                accepted=True,
                message="",
                maintenance=Maintenance.NORMAL,
                session_id="s",
                session_epoch=1,
                continuation=continuation,
                state_version=0,
                heartbeat_interval_s=15.0,
                heartbeat_timeout_s=TIMEOUT_S,
                log_chunk_bytes_max=1,
            ),
        )

    def beat(self) -> None:
        self.judge.beat(NODE)
        self.judge.answered(NODE, 0.001, counted=True)

    def says(self, type_: EventType, status: str = "", **data: str) -> None:
        self.judge.heard(
            Event(
                id=1,
                type=type_,
                at=START_AT,
                node_id=NODE,
                entity_id="",
                status=status,
                message="",
                data=data,
            )
        )

    def verdict(self, promise: str, starts: Iterable[RunKey] = ()) -> Verdict:
        return next(f.verdict for f in self.judge.findings(starts) if f.promise == promise)


def test_a_node_that_can_reach_the_server_may_not_be_taken_for_offline() -> None:
    trial = Trial()
    assert trial.verdict("P8") is Verdict.KEPT
    trial.says(EventType.NODE_OFFLINE)
    assert trial.verdict("P8") is Verdict.BROKEN


def test_a_node_whose_connection_broke_may_be_offline_at_any_time() -> None:
    trial = Trial()
    trial.judge.cut(NODE, "partition", silent=False)
    trial.clock.advance(6.0)
    trial.says(EventType.NODE_OFFLINE)
    trial.clock.advance(LATE_S)
    trial.judge.check()
    assert (trial.verdict("P8"), trial.verdict("P7")) == (Verdict.KEPT, Verdict.KEPT)


def test_a_node_whose_connection_stands_may_not_be_offline_before_the_timeout() -> None:
    for after_s, verdict in ((TIMEOUT_S - 0.1, Verdict.BROKEN), (TIMEOUT_S, Verdict.KEPT)):
        trial = Trial()
        trial.judge.cut(NODE, "silence", silent=True)
        trial.clock.advance(after_s)
        trial.says(EventType.NODE_OFFLINE)
        assert trial.verdict("P8") is verdict


@pytest.mark.parametrize(
    ("after_s", "verdict"), [(LATE_S - 0.1, Verdict.UNTRIED), (LATE_S + 0.1, Verdict.BROKEN)]
)
def test_a_node_that_is_cut_off_must_be_offline_in_time(after_s: float, verdict: Verdict) -> None:
    trial = Trial()
    trial.judge.cut(NODE, "partition", silent=False)
    trial.clock.advance(after_s)
    trial.judge.healed(NODE)
    assert trial.verdict("P7") is verdict


def test_a_server_that_was_away_has_the_whole_timeout_again() -> None:
    trial = Trial()
    trial.judge.cut(NODE, "kill", silent=False)
    trial.judge.server_lost()
    trial.clock.advance(LATE_S + 10.0)
    trial.judge.check()
    trial.judge.add("sim-2", skewed=False)
    trial.judge.beat("sim-2")
    trial.judge.answered("sim-2", 0.001, counted=True)
    trial.clock.advance(LATE_S - 0.1)
    trial.judge.check()
    assert trial.verdict("P7") is Verdict.UNTRIED
    trial.clock.advance(0.2)
    trial.judge.check()
    assert trial.verdict("P7") is Verdict.BROKEN


def test_what_was_done_to_a_node_excuses_until_it_is_heard_again() -> None:
    trial = Trial()
    trial.judge.cut(NODE, "partition", silent=False)
    trial.judge.healed(NODE)
    trial.clock.advance(3.0)
    trial.says(EventType.NODE_OFFLINE)
    assert trial.verdict("P8") is Verdict.KEPT
    trial.beat()
    trial.clock.advance(1.6)
    trial.says(EventType.NODE_OFFLINE)
    assert trial.verdict("P8") is Verdict.BROKEN


def test_a_node_that_registers_again_must_go_on_with_its_session() -> None:
    trial = Trial()
    assert trial.verdict("RL3") is Verdict.UNTRIED
    trial.register(continuation=True)
    assert trial.verdict("RL3") is Verdict.KEPT
    trial.register(continuation=False)
    assert trial.verdict("RL3") is Verdict.BROKEN


@pytest.mark.parametrize(("skewed", "verdict"), [(True, Verdict.KEPT), (False, Verdict.BROKEN)])
def test_only_clocks_that_are_off_may_be_named(skewed: bool, verdict: Verdict) -> None:
    trial = Trial(skewed=skewed)
    trial.says(EventType.NODE_CONDITION, "holds", type=ConditionType.CLOCK_SKEW)
    assert trial.verdict("N3") is verdict


def test_a_run_that_started_twice_anywhere_is_found() -> None:
    trial = Trial()
    once, twice = RunKey("p", "a", 1, 1), RunKey("p", "a", 2, 1)
    assert trial.verdict("P1") is Verdict.UNTRIED
    assert trial.verdict("P1", [once, twice]) is Verdict.KEPT
    assert trial.verdict("P1", [twice, once, twice]) is Verdict.BROKEN


def test_an_agent_that_ends_by_itself_is_found() -> None:
    trial = Trial()
    trial.judge.died(NODE, ValueError("x"))
    assert trial.verdict("RL5") is Verdict.BROKEN
    assert trial.judge.broken == 1


def test_quantiles_are_right_to_the_step_of_the_scale() -> None:
    latencies = Latencies()
    assert latencies.quantile_s(0.5) is None
    for milliseconds in range(1, 101):
        latencies.add(milliseconds / 1000)
    assert latencies.quantile_s(0.5) == pytest.approx(0.050, rel=0.03)
    assert latencies.quantile_s(0.99) == pytest.approx(0.099, rel=0.03)
