"""Where a pipeline could run, and why one is where it is, over HTTP."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.support.api_fakes import Api, pipeline_id, viewer
from tests.support.asgi import Answer, ask

from gamenode.domain.explanation import Because, Explanation, survey
from gamenode.domain.node import Maintenance
from gamenode.domain.pipeline import NewPipeline, Status
from gamenode.domain.placement import Candidate, Demand, decide
from gamenode.domain.selector import parse_selector

PLAN = "/api/v1/pipelines:plan"
FILE = "name: hello\n"
NODE = Candidate(
    node_id="n1",
    online=True,
    connected=True,
    simple=False,
    maintenance=Maintenance.NORMAL,
    conditions=(),
    values={"zone": ["a"]},
    env_names=frozenset(),
    runtimes=frozenset(),
    load_max=2,
)


async def post(api: Api, target: str, body: object) -> Answer:
    headers = {"content-type": "application/json"}
    return await ask(api.app, "POST", target, headers=headers, body=json.dumps(body).encode())


async def test_a_plan_takes_what_a_creation_takes() -> None:
    api = Api(authenticate=viewer)
    body = {"file": FILE, "args": {"PORT": 8080}, "envs": {"X": "y"}, "node": "n1", "priority": 3}
    assert (await post(api, PLAN, body)).status == 200
    assert api.planner.asked == [
        NewPipeline(file=FILE, args={"PORT": "8080"}, envs={"X": "y"}, node="n1", priority=3)
    ]


async def test_a_plan_judges_some_nodes_and_counts_all() -> None:
    api = Api()
    api.planner.demand = Demand(selector=parse_selector("zone=a"))
    api.planner.nodes = [
        *(replace(NODE, node_id=f"b{n:04}", values={}) for n in range(2000)),
        replace(NODE, node_id="m1", online=False),
        NODE,
    ]
    body = (await post(api, f"{PLAN}?limit=3", {"file": FILE})).json()
    assert (body["fits"], body["never"], body["node_id"], body["gpu_id"]) == (
        True,
        False,
        "n1",
        None,
    )
    assert body["nodes"] == [
        {"node_id": "n1", "fits": True, "never": False, "reasons": []},
        {
            "node_id": "m1",
            "fits": False,
            "never": False,
            "reasons": [{"reason": "OFFLINE", "detail": "offline"}],
        },
        {
            "node_id": "b0000",
            "fits": False,
            "never": True,
            "reasons": [{"reason": "SELECTOR", "detail": "does not match zone=a"}],
        },
    ]
    counts = {name: body[f"nodes_{name}"] for name in ("total", "fitting", "waiting", "never")}
    assert counts == {"total": 2002, "fitting": 1, "waiting": 1, "never": 2000}
    assert [(each["reason"], each["nodes_total"]) for each in body["reasons"]] == [
        ("SELECTOR", 2000),
        ("OFFLINE", 1),
    ]


async def test_an_explanation_is_one_structure() -> None:
    api = Api(authenticate=viewer)
    demand = Demand()
    api.planner.explanations[pipeline_id(1)] = Explanation(
        pipeline_id=pipeline_id(1),
        status=Status.PENDING,
        summary="must wait",
        next_step="wait",
        reasons=(Because(reason="OFFLINE", message="offline", nodes=("n1",), nodes_total=1),),
        survey=survey(decide(demand, [replace(NODE, online=False)]), demand),
    )
    answer = await ask(api.app, "GET", f"/api/v1/pipelines/{pipeline_id(1)}/explain")
    assert answer.json() == {
        "pipeline_id": pipeline_id(1),
        "status": "PENDING",
        "summary": "must wait",
        "reasons": [{"reason": "OFFLINE", "message": "offline", "nodes": ["n1"], "nodes_total": 1}],
        "nodes": [
            {
                "node_id": "n1",
                "fits": False,
                "never": False,
                "reasons": [{"reason": "OFFLINE", "detail": "offline"}],
            }
        ],
        "nodes_total": 1,
        "nodes_fitting": 0,
        "nodes_waiting": 1,
        "nodes_never": 0,
        "next_step": "wait",
    }


async def test_an_unknown_pipeline_is_not_found() -> None:
    answer = await ask(Api().app, "GET", f"/api/v1/pipelines/{pipeline_id(9)}/explain")
    assert answer.status == 404
