"""How server and agent agree again: RL1, RL3, RA1."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.command import (
    BoundPipeline,
    Dispatch,
    HeldPipeline,
    NumberedReport,
    reconcile,
)
from gamenode.domain.pipeline import PipelineReport, Status

DISPATCH = Dispatch("p", 2)
STATUSES = st.sampled_from(Status)


def held(dispatch: Dispatch = DISPATCH, *, ended: bool = False) -> HeldPipeline:
    status = Status.COMPLETED if ended else Status.RUNNING
    report = PipelineReport(pipeline_id=dispatch.pipeline_id, status=status)
    return HeldPipeline(
        dispatch=dispatch, reports=(NumberedReport(sequence=1, report=report),) if ended else ()
    )


def bound(
    dispatch: Dispatch = DISPATCH,
    *,
    status: Status = Status.RUNNING,
    acknowledged: bool = True,
    resendable: bool = True,
) -> BoundPipeline:
    return BoundPipeline(
        dispatch=dispatch, status=status, acknowledged=acknowledged, resendable=resendable
    )


def test_every_combination_of_one_dispatch() -> None:
    for status, acknowledged, resendable, holds, ended in itertools.product(
        [None, *Status], [False, True], [False, True], [False, True], [False, True]
    ):
        mine = []
        if status is not None:
            mine = [bound(status=status, acknowledged=acknowledged, resendable=resendable)]
        actions = reconcile(mine, [held(ended=ended)] if holds else [])
        wanted = status is not None and not status.terminal
        assert bool(actions.unwanted) is (holds and not wanted and not ended)
        assert bool(actions.resend) is (wanted and not holds and resendable and not acknowledged)
        assert bool(actions.lost) is (
            wanted and not holds and not (resendable and not acknowledged)
        )


def test_another_attempt_of_the_same_pipeline_is_another_dispatch() -> None:
    actions = reconcile([bound(acknowledged=False)], [held(Dispatch("p", 1))])
    assert actions.unwanted == (Dispatch("p", 1),)
    assert actions.resend == (DISPATCH,)


DISPATCHES = st.builds(Dispatch, st.sampled_from("abc"), st.integers(1, 3))


@given(
    st.lists(
        st.builds(
            BoundPipeline,
            dispatch=DISPATCHES,
            status=STATUSES,
            acknowledged=st.booleans(),
            resendable=st.booleans(),
        ),
        unique_by=lambda pipeline: pipeline.dispatch,
    ),
    st.lists(
        st.builds(held, DISPATCHES, ended=st.booleans()),
        unique_by=lambda pipeline: pipeline.dispatch,
    ),
)
def test_afterwards_nothing_runs_unwanted_and_nothing_wanted_is_forgotten(
    mine: list[BoundPipeline], theirs: list[HeldPipeline]
) -> None:
    actions = reconcile(mine, theirs)
    wanted = {pipeline.dispatch for pipeline in mine if not pipeline.status.terminal}
    holds = {pipeline.dispatch for pipeline in theirs}
    assert set(actions.unwanted) | wanted >= {p.dispatch for p in theirs if not p.ended}
    assert not set(actions.unwanted) & wanted
    assert wanted == (wanted & holds) | set(actions.resend) | set(actions.lost)
    assert not set(actions.resend) & set(actions.lost)
    assert not (set(actions.resend) | set(actions.lost)) & holds
