"""What a host's rules refuse of a container, key by key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gamenode.domain.pipeline import ContainerSpec, DeviceReservation
from gamenode.domain.policy import ContainerRules, full_image, refusals

DEFAULTS = ContainerRules()
PLAIN = ContainerSpec(image="alpine")


def refused(rules: ContainerRules = DEFAULTS, **fields: object) -> list[str]:
    """Return the keys that are refused."""
    container = replace(PLAIN, **fields)  # type: ignore[arg-type]  # any of its fields
    return [refusal.key for refusal in refusals(container, rules)]


def gpu(driver: str = "", *ids: str, capability: str = "gpu") -> DeviceReservation:
    return DeviceReservation(capabilities=(capability,), driver=driver, device_ids=ids)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"user": "root", "labels": {"team": "a"}, "container_name": "game"},
        {"volumes": ("/srv/x:/data", "saves:/saves:ro,nocopy", "/scratch")},
        {"tmpfs": ("/run", "/tmp:size=64m,mode=1777,exec")},
        {"cap_add": ("CHOWN", "CAP_NET_RAW", "cap_kill")},
        {"security_opt": ("no-new-privileges",)},
        {"security_opt": ("no-new-privileges:true", "no-new-privileges=true")},
        {"network_mode": "bridge"},
        {"network_mode": "none"},
        {"devices_reserved": (gpu(), gpu("nvidia", "0", "GPU-8a", "MIG-8a"))},
        {"image": "cafe"},
    ],
)
def test_what_a_usual_game_needs_is_allowed_by_default(fields: dict[str, Any]) -> None:
    # Where host paths lead is judged elsewhere.
    assert refused(**fields) == []


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("privileged", {"privileged": True}),
        ("cap_add[0]", {"cap_add": ("SYS_ADMIN",)}),
        ("cap_add[0]", {"cap_add": ("ALL",)}),
        ("cap_add[0]", {"cap_add": ("all",)}),
        ("cap_add[0]", {"cap_add": ("CAP_CAP_CHOWN",)}),
        ("cap_add[1]", {"cap_add": ("CHOWN", "cap_sys_admin")}),
        ("security_opt[0]", {"security_opt": ("apparmor=unconfined",)}),
        ("security_opt[0]", {"security_opt": ("apparmor:unconfined",)}),
        ("security_opt[0]", {"security_opt": ("seccomp=unconfined",)}),
        ("security_opt[0]", {"security_opt": ("no-new-privileges:false",)}),
        ("security_opt[0]", {"security_opt": ("label:disable",)}),
        ("security_opt[0]", {"security_opt": ("unmask=ALL",)}),
        ("network_mode", {"network_mode": "host"}),
        ("network_mode", {"network_mode": "container:db"}),
        ("network_mode", {"network_mode": "ns:/proc/1/ns/net"}),
        ("network_mode", {"network_mode": "lan"}),
        ("labels.gamenode.step", {"labels": {"gamenode.step": "other"}}),
        ("labels.gamenode.x", {"labels": {"gamenode.x": ""}}),
        ("volumes[0]", {"volumes": ("/srv:/data:shared",)}),
        ("volumes[0]", {"volumes": ("/srv:/data:ro,rshared",)}),
        ("volumes[0]", {"volumes": ("/srv:/data:U",)}),
        ("volumes[0]", {"volumes": ("/srv:/data:O,upperdir=/etc,workdir=/x",)}),
        ("volumes[0]", {"volumes": ("/srv:/data:",)}),
        ("volumes[0]", {"volumes": ("/srv:/data:ro:/etc",)}),
        ("volumes[0]", {"volumes": ("/etc:ro",)}),
        ("volumes[0]", {"volumes": (":/data",)}),
        ("volumes[0]", {"volumes": ("./here:/data",)}),
        ("volumes[0]", {"volumes": ("../etc:/data",)}),
        ("volumes[0]", {"volumes": ("~/x:/data",)}),
        ("volumes[0]", {"volumes": ("a/b:/data",)}),
        ("volumes[0]", {"volumes": ("type=bind,src=/etc,dst=/x",)}),
        ("volumes[0]", {"volumes": ("/srv\0/etc:/data",)}),
        ("tmpfs[0]", {"tmpfs": ("/x:bind",)}),
        ("tmpfs[0]", {"tmpfs": ("/x:size=1m,dev",)}),
        ("tmpfs[0]", {"tmpfs": ("/x:upperdir=/etc",)}),
        (
            "deploy.resources.reservations.devices[0]",
            {"devices_reserved": (gpu("cdi", "vendor.com/any=all", capability="cdi"),)},
        ),
        (
            "deploy.resources.reservations.devices[0]",
            {"devices_reserved": (gpu("cdi", "0"),)},
        ),
        (
            "deploy.resources.reservations.devices[0]",
            {"devices_reserved": (gpu("", "vendor.com/any=all"),)},
        ),
        (
            "deploy.resources.reservations.devices[0]",
            {"devices_reserved": (gpu(capability="tpu"),)},
        ),
    ],
)
def test_what_reaches_the_host_is_refused_by_default(key: str, fields: dict[str, Any]) -> None:
    assert set(refused(**fields)) == {key}


@pytest.mark.parametrize(
    ("rules", "fields"),
    [
        (ContainerRules(privileged=True), {"privileged": True, "volumes": ("/a:/b:rshared",)}),
        (ContainerRules(capabilities=("cap_sys_admin",)), {"cap_add": ("SYS_ADMIN",)}),
        (ContainerRules(capabilities=("ALL",)), {"cap_add": ("SYS_PTRACE", "ALL")}),
        (ContainerRules(security_opt=("seccomp:*",)), {"security_opt": ("seccomp=unconfined",)}),
        (ContainerRules(networks=("host", "lan-*")), {"network_mode": "lan-7"}),
        (ContainerRules(networks=("*",)), {"network_mode": "container:db"}),
        (ContainerRules(root=False), {"user": "1000"}),
        (ContainerRules(root=False), {"user": "1000:1000"}),
        (ContainerRules(images=("docker.io/library/alpine:*",)), {"image": "alpine:3.20"}),
        (ContainerRules(volumes=("game-*",)), {"volumes": ("game-1:/data",)}),
    ],
)
def test_an_owner_can_allow_more(rules: ContainerRules, fields: dict[str, Any]) -> None:
    assert refused(rules, **fields) == []


@pytest.mark.parametrize(
    ("key", "rules", "fields"),
    [
        ("network_mode", ContainerRules(networks=("none",)), {}),
        ("user", ContainerRules(root=False), {}),
        ("user", ContainerRules(root=False), {"user": "game"}),
        ("user", ContainerRules(root=False), {"user": "0"}),
        ("user", ContainerRules(root=False), {"user": "00:1000"}),
        ("user", ContainerRules(root=False), {"user": "1000:0"}),
        ("user", ContainerRules(root=False), {"user": "+0"}),
        ("user", ContainerRules(root=False), {"user": "0" * 5000}),
        ("user", ContainerRules(root=False), {"user": "\N{ARABIC-INDIC DIGIT ONE}"}),
        ("volumes[0]", ContainerRules(volumes=("game-*",)), {"volumes": ("db:/data",)}),
        (
            "deploy.resources.reservations.devices[0]",
            ContainerRules(gpus=False),
            {"devices_reserved": (gpu(),)},
        ),
    ],
)
def test_an_owner_can_allow_less(key: str, rules: ContainerRules, fields: dict[str, Any]) -> None:
    assert refused(rules, **fields) == [key]


@pytest.mark.parametrize(
    "image",
    [
        "evil",
        "docker.io/evil/game:1",
        "ghcr.io.evil.com/ours/game",
        "ghcr.io/ours/../theirs/game",
        "ghcr.io/ours/Game",
        "cafe",  # an id, or the beginning of one: any image that is on the host
        "sha256:" + "0a" * 32,
        "ghcr.io/ours/game:1@nonsense",
        "ghcr.io/ours/game:1 evil",
        "",
    ],
)
def test_an_image_that_no_pattern_names_is_refused(image: str) -> None:
    rules = ContainerRules(images=("ghcr.io/ours/*", "docker.io/library/cafe:*"))
    assert refused(rules, image=image) == ["image"]


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("me/game", "docker.io/me/game:latest"),
        ("index.docker.io/me/game:1", "docker.io/me/game:1"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("localhost/game", "localhost/game:latest"),
        ("host:5000/game", "host:5000/game:latest"),
        ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
        ("alpine@sha256:00", "docker.io/library/alpine@sha256:00"),
        ("alpine:3@sha256:00", "docker.io/library/alpine:3@sha256:00"),
    ],
)
def test_an_image_is_judged_by_its_full_reference(text: str, full: str) -> None:
    assert full_image(text) == full


def test_a_refusal_names_key_value_and_rule() -> None:
    container = replace(PLAIN, network_mode="host")
    assert [str(refusal) for refusal in refusals(container, DEFAULTS)] == [
        "network_mode: 'host' is not among (default, bridge, none) (networks)"
    ]
