"""Which node a pipeline goes to, and why not the others: F7, F10, RL4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gamenode.domain.node import Maintenance
from gamenode.domain.placement import WORDS, Candidate, Demand, Misfit, misfit, place
from gamenode.domain.selector import parse_selector

NODE = Candidate(
    node_id="n1",
    online=True,
    connected=True,
    simple=False,
    maintenance=Maintenance.NORMAL,
    blocked=False,
    values={"zone": ["a"]},
    env_names=frozenset({"ROOT"}),
    load=0,
    load_max=2,
)


def demand(**wanted: Any) -> Demand:
    if "selector" in wanted:
        wanted["selector"] = parse_selector(wanted["selector"])
    return Demand(**wanted)


@pytest.mark.parametrize(
    ("wanted", "node", "why"),
    [
        ({}, {}, None),
        ({"node_id": "n1"}, {}, None),
        ({"node_id": "n2"}, {}, Misfit.OTHER_NODE),
        ({"selector": "zone=a"}, {}, None),
        ({"selector": "zone=b"}, {}, Misfit.SELECTOR),
        ({"envs_needed": frozenset({"ROOT"})}, {}, None),
        ({"envs_needed": frozenset({"OTHER"})}, {}, Misfit.ENV_MISSING),
        ({}, {"maintenance": Maintenance.MAINTENANCE}, Misfit.MAINTENANCE),
        ({}, {"maintenance": Maintenance.DISABLED}, Misfit.DISABLED),
        ({}, {"online": False}, Misfit.OFFLINE),
        ({}, {"connected": False}, Misfit.OFFLINE),
        ({}, {"simple": True, "connected": False}, Misfit.SIMPLE_CLIENT),
        ({"node_id": "n1"}, {"simple": True, "connected": False}, None),
        ({"node_id": "n1"}, {"simple": True, "online": False}, Misfit.OFFLINE),
        ({}, {"blocked": True}, Misfit.CONDITION),
        ({}, {"load": 1}, None),
        ({}, {"load": 2}, Misfit.BUSY),
        # What never passes comes before what passes by itself.
        ({"selector": "zone=b"}, {"online": False}, Misfit.SELECTOR),
    ],
)
def test_why_a_node_does_not_fit(
    wanted: dict[str, Any], node: dict[str, Any], why: Misfit | None
) -> None:
    assert misfit(demand(**wanted), replace(NODE, **node)) is why


def test_the_least_loaded_node_is_taken_and_among_equals_the_first_by_id() -> None:
    nodes = [
        replace(NODE, node_id="n3", load=0),
        replace(NODE, node_id="n2", load=0),
        replace(NODE, node_id="n1", load=1),
    ]
    assert place(Demand(), nodes).node_id == "n2"
    assert place(Demand(), reversed(nodes)).node_id == "n2"


def test_a_decision_counts_the_reasons() -> None:
    nodes = [
        replace(NODE, node_id="n1", online=False),
        replace(NODE, node_id="n2", online=False),
        replace(NODE, node_id="n3", load=2),
    ]
    decision = place(Demand(), nodes)
    assert decision.node_id is None
    assert decision.explain() == "3 nodes: 2 offline, 1 at their limit of pipelines"


def test_no_node_at_all_is_said() -> None:
    assert place(Demand(), []).explain() == "no node is registered"


def test_every_reason_has_words() -> None:
    assert set(WORDS) == set(Misfit)
