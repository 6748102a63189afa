"""REST bodies, as the server gives them."""

from __future__ import annotations

from typing import Any

PIPELINE_ID = "0193a5c2-7b1e-7c3d-8e4f-5f3a91c2d7e8"


def step(name: str = "fetch", status: str = "PENDING", **members: Any) -> dict[str, Any]:
    return {
        "name": name,
        "type": "task",
        "status": status,
        "reason": "",
        "message": "",
        "exit_code": None,
        "signal": None,
        "attempt": 0 if status == "PENDING" else 1,
        "started_at": None,
        "ended_at": None,
        "instance_id": None,
        "attempts_max": 1,
        **members,
    }


def pipeline(status: str = "RUNNING", *steps: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {
        "id": PIPELINE_ID,
        "name": "start-game",
        "status": status,
        "reason": "",
        "message": "",
        "node_id": "fra-07",
        "attempt": 1,
        "args": {"IMAGE": "alpine:3.20"},
        "priority": 0,
        "steps": list(steps),
        "waiting": [],
        "cancel_requested_at": None,
        "cancel_reason": "",
        "created_at": "2026-11-24T21:58:21.000Z",
        "created_by": "ann",
        "started_at": None,
        "ended_at": None,
        "retry_of": None,
        "reservation": None,
        "on_lost": "wait",
        "extended_s": 0.0,
        "may_still_run": False,
        **members,
    }


def node_verdict(node_id: str = "fra-07", *reasons: tuple[str, str], never: bool = False) -> Any:
    return {
        "node_id": node_id,
        "fits": not reasons,
        "never": never,
        "reasons": [{"reason": reason, "detail": detail} for reason, detail in reasons],
    }


def _survey(nodes: tuple[Any, ...]) -> dict[str, Any]:
    fitting, never = sum(each["fits"] for each in nodes), sum(each["never"] for each in nodes)
    return {
        "nodes": list(nodes),
        "nodes_total": len(nodes),
        "nodes_fitting": fitting,
        "nodes_waiting": len(nodes) - fitting - never,
        "nodes_never": never,
    }


def plan(*nodes: Any, **members: Any) -> dict[str, Any]:
    nodes = nodes or (node_verdict(),)
    return {
        "name": "start-game",
        "fits": True,
        "never": False,
        "node_id": "fra-07",
        "gpu_id": None,
        "ports": [],
        "summary": "fits 1 of 1 node now; it would go to fra-07",
        "reasons": [],
        "next_step": "",
        **_survey(nodes),
        **members,
    }


def explanation(status: str = "RUNNING", *nodes: Any, **members: Any) -> dict[str, Any]:
    message = "step fetch, try 1, has been running for 3m"
    return {
        "pipeline_id": PIPELINE_ID,
        "status": status,
        "summary": message,
        "reasons": [{"reason": status, "message": message, "nodes": [], "nodes_total": 0}],
        "next_step": "",
        **_survey(nodes),
        **members,
    }


def node(node_id: str = "fra-07", **members: Any) -> dict[str, Any]:
    return {
        "id": node_id,
        "display_name": "",
        "type": "physical",
        "online": True,
        "online_since": "2026-11-24T21:00:00.000Z",
        "last_heartbeat_at": "2026-11-24T21:58:21.000Z",
        "heartbeat_latency_s": None,
        "clock_skew_s": None,
        "link": {"state": "connected", "since": None, "cause": ""},
        "state": "normal",
        "state_change": None,
        "session_epoch": 3,
        "agent_version": "0.1.0",
        "labels": {"zone": "a"},
        "note": "",
        "conditions": [],
        "inventory_version": 1,
        "registered_at": "2026-11-20T08:00:00.000Z",
        "may_still_run": [],
        **members,
    }


def inventory(version: int = 1, **members: Any) -> dict[str, Any]:
    return {
        "node_id": "fra-07",
        "version": version,
        "collected_at": "2026-11-24T21:00:00.000Z",
        "seen_at": "2026-11-24T21:58:00.000Z",
        "hash": "5f" * 32,
        "hardware": {
            "cpu": [
                {
                    "model": "EPYC 7302",
                    "cores": 16,
                    "threads": None,
                    "frequency_hertz": 3.3e9,
                    "cache_bytes": None,
                    "architecture": "x86_64",
                    "socket": 0,
                }
            ],
            "memory": {
                "total_bytes": 64 * 2**30,
                "type": None,
                "frequency_hertz": None,
                "channels": None,
                "modules": [],
            },
            "gpu": [],
            "disk": [
                {
                    "model": "S980",
                    "capacity_bytes": None,
                    "type": "ssd",
                    "interface": "nvme",
                    "path": "/dev/nvme0n1",
                    "serial": "S1",
                    "mounts": ["/", "/srv"],
                }
            ],
        },
        "software": {
            "os": {"distribution": "debian", "version": "12", "architecture": None},
            "kernel": {"major": 6, "minor": 1, "patch": 0, "release": "6.1.0-18-amd64"},
            "gpu_driver": {"driver_version": None, "compute_version": None},
            "runtimes": {"docker": "26.1.0", "containerd": None, "runc": None},
        },
        "network": {"interfaces": []},
        "failed": [{"part": "gpu", "reason": "NVML did not answer"}],
        **members,
    }


def inventory_version(version: int = 1, summary: str = "") -> dict[str, Any]:
    return {
        "version": version,
        "collected_at": "2026-11-24T21:00:00.000Z",
        "seen_at": "2026-11-24T21:58:00.000Z",
        "hash": "5f" * 32,
        "summary": summary,
        "failed": [],
    }


def inventory_diff(*changes: dict[str, Any]) -> dict[str, Any]:
    return {"node_id": "fra-07", "from": 1, "to": 2, "changes": list(changes)}


def event(event_id: int, type_: str = "pipeline.created", **members: Any) -> dict[str, Any]:
    return {
        "id": event_id,
        "type": type_,
        "node_id": "",
        "entity_id": PIPELINE_ID,
        "status": "PENDING",
        "message": "",
        "timestamp": "2026-11-24T21:58:21.000Z",
        "data": {},
        **members,
    }


def token(**members: Any) -> dict[str, Any]:
    return {
        "id": PIPELINE_ID,
        "name": "grafana",
        "role": "viewer",
        "created_at": "2026-11-24T21:58:21.000Z",
        "created_by": "ann",
        "expires_at": None,
        "last_used_at": None,
        "revoked_at": None,
        **members,
    }


def audit_entry(**members: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "at": "2026-11-24T21:58:21.000Z",
        "actor": {"kind": "token", "name": "ann", "role": "admin"},
        "action": "node.state",
        "target": "fra-07",
        "reason": "fans",
        "source": "127.0.0.1",
        "outcome": "accepted",
        "code": "",
        "before": "normal",
        "after": "maintenance",
        "request_id": "",
        **members,
    }


def page(*items: dict[str, Any], next_cursor: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "next_cursor": next_cursor}
