"""The comparison of all records, over HTTP."""

from __future__ import annotations

from tests.support.api_fakes import Api, viewer
from tests.support.asgi import ask

from gamenode.domain.log import LogKey
from gamenode.domain.verification import AttemptVerdict, AttemptViolation, ViolationKind

VERIFY = "/api/v1/attempts:verify"


async def test_a_verdict_names_every_violation_and_every_absent_node() -> None:
    api = Api()
    violation = AttemptViolation(
        kind=ViolationKind.OVERLAP, key=LogKey("p", "s", 2), node_id="n2", message="so it is"
    )
    api.verifier.verdict = AttemptVerdict(
        attempts=3, nodes_asked=2, nodes_absent=("n3",), violations=(violation,)
    )
    answer = await ask(api.app, "GET", VERIFY)
    assert answer.json() == {
        "ok": False,
        "attempts": 3,
        "nodes_asked": 2,
        "nodes_absent": ["n3"],
        "violations": [
            {
                "kind": "OVERLAP",
                "pipeline_id": "p",
                "step": "s",
                "attempt": 2,
                "run": 1,
                "node_id": "n2",
                "message": "so it is",
            }
        ],
    }


async def test_asking_every_agent_is_not_for_viewers() -> None:
    assert (await ask(Api(authenticate=viewer).app, "GET", VERIFY)).status == 403
