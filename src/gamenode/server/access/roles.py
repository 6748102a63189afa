"""The tables of who may do what: every gRPC method and HTTP route, the role it needs, its act.

What has no row is refused, and a server that would serve something without one does not start
(promise P15).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from gamenode.domain.access import Actor, Role
from gamenode.domain.errors import ErrorCode, GameNodeError

_SERVICE: Final = "/gamenode.v1.GameNodeService/"

ROLES: Final[Mapping[str, Role]] = MappingProxyType(
    {
        # What agents call.
        _SERVICE + "Register": Role.NODE,
        _SERVICE + "Heartbeat": Role.NODE,
        _SERVICE + "ReportMetrics": Role.NODE,
        _SERVICE + "UpdateResourceInfo": Role.NODE,
        _SERVICE + "UpdatePipelineStatus": Role.NODE,
        _SERVICE + "UpdateStepStatus": Role.NODE,
        _SERVICE + "Connect": Role.NODE,
        _SERVICE + "AppendLogs": Role.NODE,
        # What people and other services call.
        _SERVICE + "Execute": Role.OPERATOR,
        _SERVICE + "Cancel": Role.OPERATOR,
        _SERVICE + "StreamLogs": Role.VIEWER,
        _SERVICE + "WatchEvents": Role.VIEWER,
        "/grpc.health.v1.Health/Check": Role.PUBLIC,
        "/grpc.health.v1.Health/List": Role.PUBLIC,
        "/grpc.health.v1.Health/Watch": Role.PUBLIC,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Role.VIEWER,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.VIEWER,
        "GET /api/v1/nodes": Role.VIEWER,
        "GET /api/v1/nodes/{node}": Role.VIEWER,
        "PATCH /api/v1/nodes/{node}": Role.OPERATOR,
        "DELETE /api/v1/nodes/{node}": Role.ADMIN,
        "PUT /api/v1/nodes/{node}/state": Role.ADMIN,
        "POST /api/v1/nodes:state": Role.ADMIN,
        "POST /api/v1/nodes/{node}:fence": Role.ADMIN,
        "GET /api/v1/nodes/{node}/state-changes": Role.VIEWER,
        "GET /api/v1/nodes/{node}/inventory": Role.VIEWER,
        "GET /api/v1/nodes/{node}/inventory/versions": Role.VIEWER,
        "GET /api/v1/nodes/{node}/inventory/diff": Role.VIEWER,
        "POST /api/v1/nodes/{node}/inventory:collect": Role.OPERATOR,
        "GET /api/v1/inventory": Role.VIEWER,
        "GET /api/v1/pipelines": Role.VIEWER,
        "POST /api/v1/pipelines": Role.OPERATOR,
        "POST /api/v1/pipelines:validate": Role.VIEWER,
        "POST /api/v1/pipelines:plan": Role.VIEWER,
        "GET /api/v1/pipelines/{pipeline}": Role.VIEWER,
        "GET /api/v1/pipelines/{pipeline}/explain": Role.VIEWER,
        "POST /api/v1/pipelines/{pipeline}:cancel": Role.OPERATOR,
        "POST /api/v1/pipelines/{pipeline}:retry": Role.OPERATOR,
        "POST /api/v1/pipelines/{pipeline}:extend": Role.OPERATOR,
        "GET /api/v1/pipelines/{pipeline}/steps/{step}/logs": Role.VIEWER,
        "GET /api/v1/attempts:verify": Role.OPERATOR,
        "GET /api/v1/events": Role.VIEWER,
        "GET /api/v1/tokens": Role.ADMIN,
        "POST /api/v1/tokens": Role.ADMIN,
        "DELETE /api/v1/tokens/{token}": Role.ADMIN,
        "GET /api/v1/audit": Role.ADMIN,
        "GET /api/v1/audit:verify": Role.ADMIN,
        "GET /api/v1/version": Role.VIEWER,
        "GET /": Role.VIEWER,
        "GET /openapi.json": Role.PUBLIC,
        "GET /healthz": Role.PUBLIC,
        "GET /readyz": Role.PUBLIC,
    }
)
"""gRPC methods by their full name, HTTP routes by method and path template."""


ACTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        _SERVICE + "Execute": "pipeline.create",
        _SERVICE + "Cancel": "pipeline.cancel",
        "PATCH /api/v1/nodes/{node}": "node.update",
        "DELETE /api/v1/nodes/{node}": "node.remove",
        "PUT /api/v1/nodes/{node}/state": "node.state",
        "POST /api/v1/nodes:state": "node.state",
        "POST /api/v1/nodes/{node}:fence": "node.fence",
        "POST /api/v1/nodes/{node}/inventory:collect": "node.collect",
        "POST /api/v1/pipelines": "pipeline.create",
        "POST /api/v1/pipelines/{pipeline}:cancel": "pipeline.cancel",
        "POST /api/v1/pipelines/{pipeline}:retry": "pipeline.retry",
        "POST /api/v1/pipelines/{pipeline}:extend": "pipeline.extend",
        "POST /api/v1/tokens": "token.create",
        "DELETE /api/v1/tokens/{token}": "token.revoke",
    }
)
"""What changes something for people, and its name in the audit log, accepted or refused."""


def require(actor: Actor, needed: Role) -> None:
    """Check that `actor` has the role `needed`, or one that includes it.

    Raises:
        GameNodeError: PERMISSION_DENIED, naming both roles.
    """
    if not actor.may(needed):
        raise GameNodeError(
            ErrorCode.PERMISSION_DENIED,
            f"{actor.name} has the role {actor.role}, and this needs {needed}",
            hint=f"sign in with a token of the role {needed}",
        )


def check_complete(operations: Iterable[str], *, roles: Mapping[str, Role] = ROLES) -> None:
    """Check that each of `operations`, named as in the table, needs some role.

    Raises:
        RuntimeError: Some have no row; the message names them. Not a refusal but a fault of the
            program, so nothing catches it.

    Source: architecture.md section 10, promise P15.
    """
    missing = sorted(set(operations) - roles.keys())
    if missing:
        raise RuntimeError(f"no role is set for {', '.join(missing)}")
