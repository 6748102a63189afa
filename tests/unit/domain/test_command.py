"""How server and agent agree again: RL1, RL3, RA1."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.command import (
    BoundPipeline,
    Dispatch,
    HeldPipeline,
    NumberedReport,
    Reconciliation,
    reconcile,
)
from gamenode.domain.pipeline import TERMINAL, PipelineReport, Status

DISPATCH = Dispatch("p", 2)
STATUSES = st.sampled_from(Status)
Says = tuple[str, str, str]
Flags = Sequence[bool]


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
    starts_over: bool = False,
) -> BoundPipeline:
    return BoundPipeline(
        dispatch=dispatch,
        status=status,
        acknowledged=acknowledged,
        resendable=resendable,
        starts_over=starts_over,
    )


ANY = (False, True)
# The server's view (None: it knows of no such dispatch on this node; it is bound elsewhere, or its
# node was fenced), whether it was acknowledged, may be sent again and starts over; then for an
# agent that does not hold it, holds it running, holds its end: the one action that follows.
TABLE: list[
    tuple[Sequence[Status | None], Sequence[bool], Sequence[bool], Sequence[bool], Says]
] = [
    ([None], ANY, ANY, ANY, ("", "unwanted", "")),
    (list(TERMINAL), ANY, ANY, ANY, ("gone", "unwanted", "")),
    ([Status.PENDING, Status.RUNNING], [False], [True], ANY, ("resend", "", "")),
    ([Status.PENDING, Status.RUNNING], [False], [False], [False], ("lost", "", "")),
    ([Status.PENDING, Status.RUNNING], [False], [False], [True], ("restart", "", "")),
    ([Status.PENDING, Status.RUNNING], [True], ANY, [False], ("lost", "", "")),
    ([Status.PENDING, Status.RUNNING], [True], ANY, [True], ("restart", "", "")),
]


def combinations() -> Iterator[tuple[BoundPipeline | None, HeldPipeline | None, str]]:
    for statuses, acknowledged, resendable, starts_over, says in TABLE:
        for status, *flags in itertools.product(statuses, acknowledged, resendable, starts_over):
            mine = None
            if status is not None:
                mine = bound(
                    status=status,
                    acknowledged=flags[0],
                    resendable=flags[1],
                    starts_over=flags[2],
                )
            for theirs, action in zip((None, held(), held(ended=True)), says, strict=True):
                yield mine, theirs, action


def taken(actions: Reconciliation) -> dict[str, tuple[Dispatch, ...]]:
    """Return the actions that are taken at all, by name."""
    named = {field.name: getattr(actions, field.name) for field in fields(actions)}
    return {name: dispatches for name, dispatches in named.items() if dispatches}


def test_every_combination_of_one_dispatch() -> None:
    seen = list(combinations())
    for mine, theirs, action in seen:
        actions = reconcile([mine] if mine else [], [theirs] if theirs else [])
        assert taken(actions) == ({action: (DISPATCH,)} if action else {}), (mine, theirs)
    # Each combination has its one line.
    server_views = 2 * 2 * 2 * (len(Status) + 1)
    assert len(seen) == server_views * 3


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
            starts_over=st.booleans(),
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
    missing = [*actions.resend, *actions.lost, *actions.restart]
    assert wanted == (wanted & holds) | set(missing)
    assert not set(missing) & holds
    # What has ended here alone is listed for as long as the agent holds it, and no longer (RA3).
    ended_here = {pipeline.dispatch for pipeline in mine if pipeline.status.terminal}
    assert set(actions.gone) == ended_here - holds
    # One dispatch, one action: nothing is sent again that begins anew elsewhere (P2).
    every = [*actions.unwanted, *missing, *actions.gone]
    assert len(set(every)) == len(every)


@given(
    st.lists(
        st.tuples(DISPATCHES, STATUSES, st.booleans(), st.booleans(), st.booleans()),
        unique_by=lambda row: row[0],
    ),
    st.lists(st.tuples(DISPATCHES, st.booleans()), unique_by=lambda row: row[0]),
)
def test_once_its_actions_are_carried_out_there_is_nothing_left_to_do(
    rows: list[tuple[Dispatch, Status, bool, bool, bool]], holding: list[tuple[Dispatch, bool]]
) -> None:
    mine = [
        bound(d, status=status, acknowledged=ack, resendable=resend, starts_over=over)
        for d, status, ack, resend, over in rows
    ]
    theirs = [held(dispatch, ended=ended) for dispatch, ended in holding]
    actions = reconcile(mine, theirs)
    dropped = {*actions.lost, *actions.restart, *actions.gone}
    sent = [held(dispatch) for dispatch in actions.resend]
    kept = [one for one in theirs if one.dispatch not in actions.unwanted]
    again = reconcile([one for one in mine if one.dispatch not in dropped], kept + sent)
    # What was ended is gone with the next statement.
    ended_here = {one.dispatch for one in mine if one.status.terminal}
    assert taken(again).keys() <= {"gone"}
    assert set(again.gone) == set(actions.unwanted) & ended_here
