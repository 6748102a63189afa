"""Nothing is reachable without a role (promise P15)."""

from __future__ import annotations

import pytest

from gamenode.domain.access import Actor, ActorKind, Role
from gamenode.server.access.roles import ROLES, check_complete
from gamenode.wire.gen.gamenode.v1 import gamenode_pb2

SERVICE = gamenode_pb2.DESCRIPTOR.services_by_name["GameNodeService"]
METHODS = {f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods}


def test_every_grpc_method_has_a_role_and_no_row_is_left_over() -> None:
    check_complete(METHODS)
    assert {name for name in ROLES if name.startswith("/gamenode.")} == METHODS


def test_what_has_no_role_stops_the_start_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"/gamenode\.v1\.GameNodeService/Paint"):
        check_complete([*METHODS, "/gamenode.v1.GameNodeService/Paint"])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_agent_reaches_what_agents_call_and_nothing_that_people_do(method: str) -> None:
    agent = Actor(kind=ActorKind.NODE, name="fra-07", role=Role.NODE)
    people = {"Execute", "Cancel", "StreamLogs", "WatchEvents"}
    assert agent.may(ROLES[method]) is (method.rpartition("/")[2] not in people)


def test_a_viewer_changes_nothing() -> None:
    viewer = Actor(kind=ActorKind.TOKEN, name="grafana", role=Role.VIEWER)
    for name, role in ROLES.items():
        if name.startswith("POST ") and not name.endswith((":validate", ":plan")):
            assert not viewer.may(role), name
