"""The words of `plan` and `explain`, one row a reason (F10, F2b)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.support.api_fakes import NOW, make_node, make_pipeline

from gamenode.domain.container import HostPort, PortRange
from gamenode.domain.explanation import (
    ADVICE,
    HOW,
    NAMED_MAX,
    REMEDY,
    Cause,
    Explanation,
    Standing,
    Survey,
    detail,
    explain,
    how,
    survey,
)
from gamenode.domain.node import ConditionType, Link, Maintenance, Node
from gamenode.domain.pipeline import GpuDemand, Group, OnLost, Pipeline, Reason, Status, StepType
from gamenode.domain.placement import (
    Candidate,
    Capacity,
    Demand,
    GpuCapacity,
    GpuReserved,
    Misfit,
    Reserved,
    decide,
)
from gamenode.domain.selector import parse_selector
from gamenode.lib.clock import Instant, after

GIB = 1024**3
NODE = Candidate(
    node_id="n1",
    online=True,
    connected=True,
    simple=False,
    maintenance=Maintenance.NORMAL,
    conditions=(),
    values={"zone": ["a"]},
    env_names=frozenset(),
    runtimes=frozenset({"docker"}),
    load_max=2,
    capacity=Capacity(
        cpu_millis=4000,
        memory_bytes=8 * GIB,
        gpus=(GpuCapacity(id="GPU-1", slots=2, memory_bytes=8 * GIB),),
        ports=PortRange(20000, 20001),
    ),
)
PERMANENT: dict[Misfit, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    Misfit.OTHER_NODE: (
        {"node_id": "n9"},
        {},
        "is not the node asked for",
        "the node that is asked for is not registered: gamenode nodes list",
    ),
    Misfit.SELECTOR: (
        {"selector": parse_selector("zone=b")},
        {},
        "does not match zone=b",
        (
            "label a node so that it matches (gamenode nodes label n1 KEY=VALUE),"
            " or ask for less in the selector"
        ),
    ),
    Misfit.ENV_MISSING: (
        {"envs_needed": frozenset({"ROOT"})},
        {},
        "does not define the env ROOT",
        "define the env in the configuration of a node's agent, section [envs], or pass it with -e",
    ),
    Misfit.SIMPLE_CLIENT: (
        {},
        {"simple": True},
        "takes only work that names it",
        "name the node to use it: --node n1",
    ),
    Misfit.UNSUPPORTED: (
        {"keys": frozenset({"volumes"})},
        {"runtimes": frozenset({"process"})},
        "cannot honour volumes",
        "leave these keys out, or run the agent of a node with a container engine",
    ),
    Misfit.CPU_TOTAL: (
        {"cpu_millis": 9000},
        {},
        "has fewer than 9 CPUs (4)",
        "ask for fewer CPUs in `placement`, or add a larger node",
    ),
    Misfit.MEMORY_TOTAL: (
        {"memory_bytes": 9 * GIB},
        {},
        "has less than 9GiB of memory (8GiB)",
        "ask for less memory in `placement`, or add a larger node",
    ),
    Misfit.GPU_TOTAL: (
        {"gpu": GpuDemand(slots=1, memory_bytes=9 * GIB)},
        {},
        "has no GPU with 1 slot and 9GiB",
        "ask for less of one GPU in `placement`, or add a node with such a GPU",
    ),
    Misfit.PORTS_TOTAL: (
        {"dynamic_ports": ("tcp",) * 3},
        {},
        "does not give out 3 host ports (2 host ports)",
        (
            "name the host ports, or widen the node's range, section [capacity] of its agent's"
            " configuration"
        ),
    ),
}
LIST = "gamenode pipelines list --node n1"
PASSING: dict[Misfit, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    Misfit.MAINTENANCE: (
        {},
        {"maintenance": Maintenance.MAINTENANCE},
        "in maintenance",
        "gamenode nodes enable n1 ends the maintenance",
    ),
    Misfit.DISABLED: (
        {},
        {"maintenance": Maintenance.DISABLED},
        "disabled",
        "gamenode nodes enable n1 lets it work again",
    ),
    Misfit.OFFLINE: (
        {},
        {"online": False},
        "offline",
        "see to the host and its agent: gamenode nodes show n1",
    ),
    Misfit.CONDITION: (
        {},
        {"conditions": (ConditionType.ENGINE_DOWN,)},
        "has the condition ENGINE_DOWN",
        "gamenode nodes show n1 says what the condition is about",
    ),
    Misfit.BUSY: (
        {},
        {"reserved": Reserved(pipelines=2)},
        "at its limit of pipelines (2 of 2)",
        f"it goes on when a pipeline there has ended: {LIST}",
    ),
    Misfit.CPU: (
        {"cpu_millis": 2000},
        {"reserved": Reserved(cpu_millis=2500)},
        "has fewer than 2 CPUs free (1.5 free)",
        f"it goes on when enough is free: {LIST}",
    ),
    Misfit.MEMORY: (
        {"memory_bytes": 2 * GIB},
        {"reserved": Reserved(memory_bytes=7 * GIB)},
        "has less than 2GiB of memory free (1GiB free)",
        f"it goes on when enough is free: {LIST}",
    ),
    Misfit.GPU_SLOTS: (
        {"gpu": GpuDemand()},
        {"reserved": Reserved(gpus={"GPU-1": GpuReserved(slots=2)})},
        "has no free GPU slot",
        f"it goes on when a slot is free: {LIST}",
    ),
    Misfit.GPU_MEMORY: (
        {"gpu": GpuDemand(memory_bytes=6 * GIB)},
        {"reserved": Reserved(gpus={"GPU-1": GpuReserved(1, 4 * GIB)})},
        "has no GPU with 1 slot and 6GiB free",
        f"it goes on when enough is free: {LIST}",
    ),
    Misfit.PORT: (
        {"ports": (HostPort(8080),)},
        {"reserved": Reserved(ports=frozenset({HostPort(8080)}))},
        "has port 8080/tcp in use",
        f"it goes on when the port is free: {LIST}",
    ),
    Misfit.PORTS: (
        {"dynamic_ports": ("tcp",)},
        {"reserved": Reserved(ports=frozenset({HostPort(20000), HostPort(20001)}))},
        "has fewer than 1 host port free",
        f"it goes on when enough are free: {LIST}",
    ),
}
WORDING = PERMANENT | PASSING


def surveyed(demand: Demand, *nodes: Candidate, running: Mapping[str, int] | None = None) -> Survey:
    return survey(decide(demand, nodes, running), demand)


@pytest.mark.parametrize("misfit", WORDING)
def test_the_words_for_each_reason_against_a_node(misfit: Misfit) -> None:
    wanted, has, words, advice = WORDING[misfit]
    found = surveyed(Demand(**wanted), replace(NODE, **has))
    (objection,) = found.verdicts[0].objections
    assert (objection.misfit, detail(objection)) == (misfit, words)
    bare = words.partition(" (")[0]
    begin = "can never fit as things are" if misfit in PERMANENT else "must wait"
    assert found.summary == f"{begin}: 1 node: 1 {bare}"
    assert found.never is (misfit in PERMANENT)
    (because,) = found.reasons
    assert (because.reason, because.message) == (misfit, f"1 node {bare}")
    assert (because.nodes, because.nodes_total) == (("n1",), 1)
    assert found.next_step == advice


def test_the_words_for_a_full_group() -> None:
    found = surveyed(Demand(group=Group(name="deploy-a", limit=1)), NODE, running={"deploy-a": 1})
    assert found.summary == "must wait: concurrency group deploy-a: 1 of 1 running"
    assert [(each.reason, each.nodes_total) for each in found.reasons] == [(Misfit.GROUP, 0)]
    assert found.next_step == ADVICE[Misfit.GROUP]


def test_every_reason_against_a_node_has_words_and_advice() -> None:
    assert {*WORDING, Misfit.GROUP} == set(Misfit) == set(ADVICE)


def test_the_words_without_any_node() -> None:
    found = surveyed(Demand())
    assert found.summary == "must wait: no node is registered"
    assert found.next_step == "run gamenode agent on a host: gamenode agent --server ADDRESS"


def test_a_plan_tells_who_fits_from_who_must_wait_and_who_never_can() -> None:
    gpu = Demand(gpu=GpuDemand(), selector=parse_selector("zone=a"), dynamic_ports=("tcp",))
    full = Reserved(gpus={"GPU-1": GpuReserved(slots=2)})
    nodes = [
        *(replace(NODE, node_id=f"b{n:02}", values={"zone": ["b"]}) for n in range(12)),
        *(replace(NODE, node_id=f"f{n}", reserved=full) for n in range(3)),
        replace(NODE, node_id="m1", maintenance=Maintenance.MAINTENANCE),
        replace(NODE, node_id="z1"),
    ]
    found = surveyed(gpu, *nodes)
    assert found.summary == "fits 1 of 17 nodes now; it would go to z1"
    assert (found.node_id, found.gpu_id, found.ports) == ("z1", "GPU-1", (20000,))
    assert (found.fitting, found.waiting, len(found.verdicts)) == (1, 4, 17)
    order = [verdict.node_id for verdict in found.verdicts]
    assert order[:5] == ["z1", "f0", "f1", "f2", "m1"]
    assert [each.message for each in found.reasons] == [
        "12 nodes do not match zone=a",
        "3 nodes have no free GPU slot",
        "1 node in maintenance",
    ]
    assert len(found.reasons[0].nodes) == NAMED_MAX
    assert found.next_step == ""
    waits = surveyed(gpu, *nodes[:-1])
    assert waits.summary == (
        "must wait: 16 nodes: 12 do not match zone=a, 3 have no free GPU slot, 1 in maintenance"
    )
    # About those that come nearest, and not about the many that never can.
    assert waits.next_step == "it goes on when a slot is free: gamenode pipelines list --node f0"


def test_advice_is_about_the_node_that_was_asked_for() -> None:
    nodes = [replace(NODE, node_id=f"n{n}") for n in range(1, 4)]
    found = surveyed(Demand(node_id="n2", cpu_millis=9000), *nodes)
    assert found.next_step == ADVICE[Misfit.CPU_TOTAL]


def test_a_node_is_told_everything_that_speaks_against_it() -> None:
    demand = Demand(selector=parse_selector("zone=b,rack"), cpu_millis=9000)
    found = surveyed(demand, replace(NODE, online=False))
    assert [detail(each) for each in found.verdicts[0].objections] == [
        "does not match zone=b",
        "does not match rack",
        "has fewer than 9 CPUs (4)",
        "offline",
    ]


# Why a pipeline is where it is

P = make_pipeline(1).id


def ago(seconds: float) -> Instant:
    return after(NOW, -seconds)


def pipeline(status: Status, *, node: str = "fra-07", **changes: Any) -> Pipeline:
    return replace(make_pipeline(1, status=status), node_id=node, attempt=1, **changes)


def with_step(base: Pipeline, **changes: Any) -> Pipeline:
    return replace(base, steps=(replace(base.steps[0], attempt=1, **changes),))


def explained(
    it: Pipeline,
    *,
    node: Node | None = None,
    found: Survey | None = None,
    acknowledged: bool = True,
    cancel_acknowledged: bool = False,
    place: tuple[int, int] = (0, 0),
) -> Explanation:
    standing = Standing(
        pipeline=it,
        dispatched_at=ago(3),
        acknowledged_at=ago(2) if acknowledged else None,
        cancel_acknowledged_at=ago(1) if cancel_acknowledged else None,
        cancel_by="ann",
        demand=None,
        ahead=place[0],
        queued=place[1],
    )
    return explain(standing, node=node or make_node("fra-07"), survey=found, now=NOW)


def causes(explanation: Explanation) -> list[str]:
    return [each.reason for each in explanation.reasons]


def test_one_that_waits_says_why_and_where_in_the_queue() -> None:
    found = surveyed(Demand(), replace(NODE, online=False))
    waits = explained(pipeline(Status.PENDING, node=""), found=found, place=(3, 10))
    assert waits.summary == "must wait: 1 node: 1 offline; 4 of 10 in the queue"
    assert causes(waits) == [Misfit.OFFLINE, Cause.QUEUE]
    assert waits.next_step == "see to the host and its agent: gamenode nodes show n1"
    assert waits.survey is found


def test_one_that_fits_is_about_to_go() -> None:
    found = surveyed(Demand(), NODE)
    fits = explained(pipeline(Status.PENDING, node=""), found=found, place=(0, 1))
    assert fits.summary == "fits 1 of 1 node now; it would go to n1; 1 of 1 in the queue"
    assert fits.next_step == ""


RUNNING = with_step(pipeline(Status.RUNNING), status=Status.RUNNING, started_at=ago(180))
AWAY = replace(
    make_node("fra-07", online=False), link_since=ago(240), link_cause="no heartbeat for 45.2 s"
)
WANTED = replace(RUNNING, cancel_requested_at=ago(90), cancel_reason="wrong image")


def test_one_that_was_sent_and_not_taken() -> None:
    sent = with_step(pipeline(Status.PENDING), status=Status.PENDING)
    found = explained(sent, acknowledged=False)
    assert found.summary == "sent to node fra-07 3.0s ago, which has not taken it yet"
    assert causes(found) == [Cause.DISPATCHED]
    taken = explained(sent)
    assert taken.summary == "node fra-07 prepares step greet"


def test_one_that_runs() -> None:
    found = explained(RUNNING)
    assert found.summary == "step greet, try 1, has been running for 3m"
    assert found.next_step == f"gamenode logs -f {P} follows it"


def test_one_whose_steps_have_ended() -> None:
    found = explained(with_step(RUNNING, status=Status.COMPLETED))
    assert found.summary == "every step has ended, and node fra-07 is about to say so"


def test_one_between_two_tries() -> None:
    retrying = with_step(
        RUNNING, status=Status.RUNNING, reason=Reason.RETRYING, message="exit code 3"
    )
    found = explained(retrying)
    assert found.summary == ("try 1 of step greet failed (exit code 3); the next one follows")
    assert causes(found) == [Reason.RETRYING]


def test_one_whose_image_comes() -> None:
    pulling = with_step(
        RUNNING, status=Status.RUNNING, reason=Reason.PULLING, message="pulling a: 1.0 of 2.0 MB"
    )
    found = explained(pulling)
    words = "the image of step greet is being fetched: pulling a: 1.0 of 2.0 MB"
    assert (found.summary, causes(found)) == (words, [Reason.PULLING])


def test_one_whose_end_is_wanted() -> None:
    unheard = explained(WANTED)
    assert unheard.reasons[0].message == (
        "ann wanted its end (wrong image) 90s ago, and its node has not heard of it yet"
    )
    heard = explained(WANTED, cancel_acknowledged=True)
    assert heard.reasons[0].message == (
        "ann wanted its end (wrong image) 90s ago, and its node sees to it"
    )
    assert causes(heard) == [Cause.CANCEL_WANTED, Cause.RUNNING]
    assert f"gamenode pipelines cancel {P} --force" in heard.next_step


def test_one_whose_node_is_away() -> None:
    found = explained(RUNNING, node=AWAY)
    assert found.reasons[0].message == (
        "node fra-07 has been unreachable for 4m (no heartbeat for 45.2 s):"
        " it waits for its node, and what runs there goes on"
    )
    assert causes(found) == [Cause.UNREACHABLE, Cause.RUNNING]
    assert "gamenode nodes fence fra-07" in found.next_step


@pytest.mark.parametrize(
    ("on_lost", "words"),
    [
        (OnLost.WAIT, "it waits for its node, and what runs there goes on"),
        (OnLost.FAIL, "it fails if its node stays away for too long, and may run on there"),
        (
            OnLost.RESTART,
            "it starts anew elsewhere once its node says that it has ended, or is fenced",
        ),
    ],
)
def test_the_words_for_each_policy_while_a_node_is_away(on_lost: OnLost, words: str) -> None:
    found = explained(replace(RUNNING, on_lost=on_lost), node=AWAY)
    assert found.reasons[0].message.endswith(f": {words}")


def test_one_that_ended_without_its_node_s_word_may_still_run() -> None:
    lost = pipeline(Status.FAILED, reason=Reason.NODE_LOST, may_still_run=True)
    found = explained(with_step(lost, status=Status.CANCELLED))
    assert found.summary == (
        "FAILED: its node was lost; node fra-07 has not said that it ended, and may still run it"
    )
    assert causes(found) == [Reason.NODE_LOST, Cause.MAY_STILL_RUN]


def test_a_try_is_one_of_those_that_were_granted() -> None:
    second = replace(RUNNING.steps[0], attempt=2, granted_to=4)
    found = explained(replace(RUNNING, steps=(second,)))
    assert found.summary == "step greet, try 2 of 4, has been running for 3m"


def test_one_whose_end_is_wanted_while_its_node_is_away() -> None:
    found = explained(WANTED, node=AWAY)
    assert causes(found) == [Cause.CANCEL_WANTED, Cause.UNREACHABLE, Cause.RUNNING]
    assert "--force ends it here" in found.next_step


def test_a_simple_client_needs_no_link_to_be_reached() -> None:
    simple = replace(make_node("fra-07"), boot_id="", link=Link.LOST)
    assert causes(explained(RUNNING, node=simple)) == [Cause.RUNNING]


ENDS: dict[Reason, tuple[dict[str, Any], str]] = {
    Reason.NONE: ({}, "it did not say why"),
    Reason.SKIPPED: ({}, "it was skipped"),
    Reason.EXIT_CODE: (
        {"exit_code": 127, "message": "exit code 127: a command was not found"},
        "exit code 127: a command was not found",
    ),
    Reason.SIGNAL: ({"signal": 9}, "ended by signal 9 (SIGKILL)"),
    Reason.TIMEOUT: ({}, "its time was up"),
    Reason.OOM_KILLED: ({"exit_code": 137}, "it needed more memory than it may have"),
    Reason.IMAGE_PULL: (
        {"message": "no such image"},
        "its image could not be fetched: no such image",
    ),
    Reason.START_FAILED: ({}, "it could not be started"),
    Reason.UNSUPPORTED: ({}, "its node cannot honour what it asks for"),
    Reason.UNHEALTHY: ({}, "it did not become healthy"),
    Reason.RETRYING: ({}, "it is to be tried again"),
    Reason.PULLING: ({}, "its image is being fetched"),
    Reason.SECRET_MISSING: ({}, "a secret that it needs is gone from its node"),
    Reason.NODE_LOST: ({}, "its node was lost"),
    Reason.NODE_DISABLED: ({}, "its node was disabled"),
    Reason.DRAINED: ({}, "its node was drained"),
    Reason.OUTCOME_UNKNOWN: ({}, "how it ended is not known"),
    Reason.POLICY: (
        {"message": "privileged is not allowed"},
        "its node's policy does not allow it: privileged is not allowed",
    ),
    Reason.REFUSED: ({}, "its node refused it"),
    Reason.CANCELLED_BY_USER: ({}, "its end was wanted"),
    Reason.AGENT_STOPPED: ({}, "its node's agent was stopped for good"),
}


@pytest.mark.parametrize("reason", ENDS)
def test_the_words_for_each_end_of_a_step(reason: Reason) -> None:
    ended, words = ENDS[reason]
    failed = with_step(
        pipeline(Status.FAILED, reason=reason), status=Status.FAILED, reason=reason, **ended
    )
    assert how(failed.steps[0]) == words
    found = explained(failed)
    assert found.summary == f"FAILED: step greet failed at try 1: {words}"
    assert causes(found) == [reason or Status.FAILED]
    again = f"gamenode pipelines retry {P} runs it again"
    remedy = REMEDY.get(reason, "").format(pipeline=P, where=f"{P}/greet", node="fra-07")
    assert found.next_step == (f"{remedy}; {again}" if remedy else again)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [(Reason.EXIT_CODE, True), (Reason.POLICY, False), (Reason.NODE_LOST, False)],
)
def test_a_retry_keeps_what_went_well_only_where_the_same_node_will_do(
    reason: Reason, *, kept: bool
) -> None:
    failed = with_step(pipeline(Status.FAILED, reason=reason), status=Status.FAILED, reason=reason)
    first = replace(failed.steps[0], name="first", status=Status.COMPLETED, reason=Reason.NONE)
    found = explained(replace(failed, steps=(first, *failed.steps)))
    assert ("--from-failed" in found.next_step) is kept


def test_every_reason_has_words() -> None:
    assert set(ENDS) == set(HOW) == set(Reason)
    assert set(REMEDY) < set(Reason)


def test_the_words_for_an_end_that_is_no_step_s() -> None:
    lost = pipeline(Status.FAILED, reason=Reason.NODE_LOST, message="its node was removed")
    assert explained(with_step(lost, status=Status.CANCELLED)).summary == (
        "FAILED: its node was lost: its node was removed"
    )
    cancelled = pipeline(Status.CANCELLED, reason=Reason.CANCELLED_BY_USER, message="wrong image")
    assert explained(cancelled).summary == "CANCELLED: its end was wanted: wrong image"


def test_one_that_completed_says_what_lives_on() -> None:
    done = with_step(pipeline(Status.COMPLETED), status=Status.COMPLETED)
    assert (explained(done).summary, explained(done).next_step) == ("COMPLETED", "")
    service = with_step(done, status=Status.COMPLETED, type=StepType.SERVICE)
    assert explained(service).summary == "COMPLETED: greet was started, and lives on"


def test_a_node_that_is_gone_is_said_to_be() -> None:
    standing = Standing(
        pipeline=RUNNING,
        dispatched_at=None,
        acknowledged_at=NOW,
        cancel_acknowledged_at=None,
        cancel_by="",
        demand=None,
        ahead=0,
        queued=0,
    )
    found = explain(standing, node=None, survey=None, now=NOW)
    assert found.reasons[0].message.startswith("node fra-07 is not registered any more")
