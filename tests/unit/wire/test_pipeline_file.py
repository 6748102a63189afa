# ruff: noqa: E501  (the tables of cases read best with one case a line)
from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gamenode.domain.args import resolve
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.domain.pipeline import (
    ArgSpec,
    ArgType,
    Condition,
    ContainerSpec,
    DeviceReservation,
    GpuDemand,
    Group,
    Healthcheck,
    PipelineSpec,
    Placement,
    Retries,
    StepSpec,
    StepType,
    Ulimit,
)
from gamenode.wire.pipeline_file import parse_pipeline, pipeline_json_schema
from gamenode.wire.yaml_document import NODES_MAX, TEXT_LENGTH_MAX, VIOLATIONS_MAX

EXAMPLES = Path(__file__).parents[3] / "examples"
SCHEMA: Any = pipeline_json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


class CoreLoader(yaml.SafeLoader):
    """Reads scalars by YAML 1.2's core schema, as editors do."""


CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+$", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
    ("merge", r"<<$", ["<"]),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def with_container(text: str) -> str:
    """Return a file whose only step has this container, a flow mapping's inside."""
    return f"name: p\nargs: [A, B]\nenvs: [E]\nsteps:\n- name: s\n  container: {{{text}}}\n"


def container(text: str) -> ContainerSpec:
    return parse_pipeline(with_container(text)).steps[0].container


def refusal(text: str | bytes) -> GameNodeError:
    with pytest.raises(GameNodeError) as caught:
        parse_pipeline(text)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.violations
    return caught.value


def described(violation: Violation) -> tuple[str, int | None, int | None, str, str]:
    v = violation
    return (v.field, v.line, v.column, v.reason, v.advice)


FULL = """\
name: start-game
description: Fetch, unpack and start one game
args: [IMAGE, {name: PORT, type: integer, default: 8080, description: host port}]
envs: [WIND_ROOT]
timeout: 30m
on_lost: wait
placement: {node: fra-07, selector: "zone=a,gpu.model~4090", cpu: 0.5, memory: 4GiB, gpu: {slots: 2, memory: 6GiB}}
concurrency: {group: deploy-a, limit: 3}
steps:
  - name: fetch
    container:
      image: alpine:3.20
      volumes: ["${{ envs.WIND_ROOT }}:/data"]
      commands: ["mkdir -p /data/games", "cp a b"]
    timeout: 10m
    retries: {max: 3, backoff: 5s}
  - name: game
    type: service
    container: {image: "${{ args.IMAGE }}", ports: ["${{ args.PORT }}:8080"], restart: on-failure}
  - name: tidy
    when: always
    container: {image: alpine:3.20, command: ["rm", "-rf", "/data/tmp"]}
"""


def test_a_whole_file_is_read() -> None:
    assert parse_pipeline(FULL) == PipelineSpec(
        name="start-game",
        description="Fetch, unpack and start one game",
        args=(
            ArgSpec(name="IMAGE"),
            ArgSpec(name="PORT", type=ArgType.INTEGER, default="8080", description="host port"),
        ),
        envs=("WIND_ROOT",),
        timeout_s=1800.0,
        placement=Placement(
            node="fra-07",
            selector="zone=a,gpu.model~4090",
            cpus=0.5,
            memory_bytes=4 * 1024**3,
            gpu=GpuDemand(slots=2, memory_bytes=6 * 1024**3),
        ),
        concurrency=Group(name="deploy-a", limit=3),
        steps=(
            StepSpec(
                name="fetch",
                timeout_s=600.0,
                retries=Retries(max=3, backoff_s=5.0),
                container=ContainerSpec(
                    image="alpine:3.20",
                    volumes=("${{ envs.WIND_ROOT }}:/data",),
                    commands=("mkdir -p /data/games", "cp a b"),
                ),
            ),
            StepSpec(
                name="game",
                type=StepType.SERVICE,
                container=ContainerSpec(
                    image="${{ args.IMAGE }}",
                    ports=("${{ args.PORT }}:8080",),
                    restart="on-failure",
                ),
            ),
            StepSpec(
                name="tidy",
                condition=Condition.ALWAYS,
                container=ContainerSpec(image="alpine:3.20", command=("rm", "-rf", "/data/tmp")),
            ),
        ),
    )


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("image: a, command: 'echo \"a b\" c'", {"image": "a", "command": ("echo", "a b", "c")}),
    ("command: [echo, 0123, on, 22:22, 1.0]", {"command": ("echo", "0123", "on", "22:22", "1.0")}),
    ("command: 'x --a=${{ args.A }} ${{args.B}}'", {"command": ("x", "--a=${{ args.A }}", "${{args.B}}")}),
    ("command: \"x '${{ args.A }} b'\"", {"command": ("x", "${{ args.A }} b")}),
    ("image: a, entrypoint: /bin/x -y", {"image": "a", "entrypoint": ("/bin/x", "-y")}),
    (
        "image: a, environment: {A: 1, B: on, C: '', D: x=y}",
        {"image": "a", "environment": {"A": "1", "B": "on", "C": "", "D": "x=y"}},
    ),
    (
        "image: a, environment: [A=1, 'B=', 'C=x=y']",
        {"image": "a", "environment": {"A": "1", "B": "", "C": "x=y"}},
    ),
    ("image: a, ports: [8080]", {"image": "a", "ports": ("0:8080",)}),
    ("image: a, ports: [22:22]", {"image": "a", "ports": ("22:22",)}),
    (
        "image: a, ports: ['127.0.0.1::80/udp', '[::1]:81:80', '53/udp']",
        {"image": "a", "ports": ("127.0.0.1:0:80/udp", "[::1]:81:80", "0:53/udp")},
    ),
    ("image: a, ports: ['${{ args.A }}']", {"image": "a", "ports": ("0:${{ args.A }}",)}),
    (
        "image: a, ports: [{target: 80, published: 8080, protocol: udp, host_ip: '::1'}, {target: 1}]",
        {"image": "a", "ports": ("[::1]:8080:80/udp", "0:1")},
    ),
    (
        "image: a, volumes: [/a:/b, 'v:/c:ro', {type: bind, source: /s, target: /t, read_only: true}]",
        {"image": "a", "volumes": ("/a:/b", "v:/c:ro", "/s:/t:ro")},
    ),
    ("image: a, tmpfs: /run", {"image": "a", "tmpfs": ("/run",)}),
    ("image: a, tmpfs: ['/run:size=1m', /x]", {"image": "a", "tmpfs": ("/run:size=1m", "/x")}),
    (
        "image: a, ulimits: {nofile: 1024, nproc: {soft: 1, hard: -1}}",
        {
            "image": "a",
            "ulimits": (
                Ulimit(name="nofile", soft=1024, hard=1024),
                Ulimit(name="nproc", soft=1, hard=-1),
            ),
        },
    ),
    (
        "image: a, healthcheck: {test: curl -f x, interval: 10s, timeout: 1m30s, retries: 3, start_period: 0s}",
        {
            "image": "a",
            "healthcheck": Healthcheck(
                test=("CMD-SHELL", "curl -f x"), interval_s=10, timeout_s=90, retries=3
            ),
        },
    ),
    (
        "image: a, healthcheck: {test: [CMD, curl, x]}",
        {"image": "a", "healthcheck": Healthcheck(test=("CMD", "curl", "x"))},
    ),
    ("image: a, healthcheck: {disable: true}", {"image": "a", "healthcheck": Healthcheck(disable=True)}),
    (
        "image: a, deploy: {resources: {limits: {cpus: '0.5', memory: 512m}, reservations: {memory: 1.5G, devices: [{capabilities: [gpu], count: all}, {capabilities: [gpu], device_ids: ['0'], driver: nvidia}, {capabilities: [gpu], count: 2}]}}}",
        {
            "image": "a",
            "cpus": 0.5,
            "memory_bytes": 512 * 1024**2,
            "memory_reservation_bytes": 3 * 1024**3 // 2,
            "devices_reserved": (
                DeviceReservation(capabilities=("gpu",)),
                DeviceReservation(capabilities=("gpu",), device_ids=("0",), driver="nvidia"),
                DeviceReservation(capabilities=("gpu",), count=2),
            ),
        },
    ),
    ("image: a, deploy: {resources: {limits: {cpus: 2}}}", {"image": "a", "cpus": 2.0}),
    ("image: a, extra_hosts: {db: 10.0.0.5}", {"image": "a", "extra_hosts": ("db:10.0.0.5",)}),
    (
        "image: a, extra_hosts: ['db:10.0.0.5', 'b=::1']",
        {"image": "a", "extra_hosts": ("db:10.0.0.5", "b:::1")},
    ),
    ("image: a, labels: [a=b]", {"image": "a", "labels": {"a": "b"}}),
    ("image: a, labels: {a.b/c: 5}", {"image": "a", "labels": {"a.b/c": "5"}}),
    ("image: a, restart: no", {"image": "a", "restart": "no"}),
    ("image: a, restart: 'on-failure:3'", {"image": "a", "restart": "on-failure:3"}),
    ("image: a, init: false, privileged: true, read_only: true", {"image": "a", "init": False, "privileged": True, "read_only": True}),
    ("image: a, shm_size: 64m, stop_grace_period: 1m", {"image": "a", "shm_size_bytes": 64 * 1024**2, "stop_grace_period_s": 60.0}),
    ("image: a, devices: ['/dev/dri:/dev/dri:rwm', /dev/kvm]", {"image": "a", "devices": ("/dev/dri:/dev/dri:rwm", "/dev/kvm")}),
    (
        "image: a, cap_add: [SYS_NICE], cap_drop: [ALL], security_opt: ['no-new-privileges:true'], network_mode: host, user: 1000:1000, working_dir: /x, hostname: h, container_name: c, stop_signal: SIGINT, pull_policy: never",
        {
            "image": "a",
            "cap_add": ("SYS_NICE",),
            "cap_drop": ("ALL",),
            "security_opt": ("no-new-privileges:true",),
            "network_mode": "host",
            "user": "1000:1000",
            "working_dir": "/x",
            "hostname": "h",
            "container_name": "c",
            "stop_signal": "SIGINT",
            "pull_policy": "never",
        },
    ),
    (
        "commands: ['echo ${{ args.A }} \"${{ envs.E }}\"']",
        {
            "commands": ('echo "${GAMENODE_ARG_A}" "${GAMENODE_ENV_E}"',),
            "environment": {"GAMENODE_ARG_A": "${{ args.A }}", "GAMENODE_ENV_E": "${{ envs.E }}"},
        },
    ),
    (
        "command: [sh, -c, 'echo ${{ args.A }}']",
        {
            "command": ("sh", "-c", 'echo "${GAMENODE_ARG_A}"'),
            "environment": {"GAMENODE_ARG_A": "${{ args.A }}"},
        },
    ),
    (
        "entrypoint: [sh, -c], command: ['echo ${{ args.A }}']",
        {
            "entrypoint": ("sh", "-c"),
            "command": ('echo "${GAMENODE_ARG_A}"',),
            "environment": {"GAMENODE_ARG_A": "${{ args.A }}"},
        },
    ),
    (
        "image: a, healthcheck: {test: 'test ${{ args.A }}'}",
        {
            "image": "a",
            "environment": {"GAMENODE_ARG_A": "${{ args.A }}"},
            "healthcheck": Healthcheck(test=("CMD-SHELL", 'test "${GAMENODE_ARG_A}"')),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ACCEPTED)
def test_a_container_is_read_in_composes_forms(text: str, expected: dict[str, Any]) -> None:
    assert container(text) == ContainerSpec(**expected)


@pytest.mark.parametrize("text", [*(with_container(text) for text, _ in ACCEPTED), FULL])
def test_the_schema_takes_what_the_parser_takes(text: str) -> None:
    parse_pipeline(text)
    VALIDATOR.validate(yaml.load(text, CoreLoader))


C = "steps[0].container"  # line 6; the first key is in column 15
REFUSED: list[tuple[str, list[tuple[str, int, str, str]]]] = [
    ("imag: a", [(f"{C}.imag", 15, "is not a key of a container", "did you mean image?")]),
    ("", [(C, 14, "names nothing to run", "add image:, command: or commands:")]),
    ("image: [a]", [(f"{C}.image", 22, "must be an image, not a list", "")]),
    ("image: ", [(f"{C}.image", 22, "has no value", "write an image")]),
    ("image: a b", [(f"{C}.image", 22, "'a b' is not an image", "write an image such as alpine:3.20")]),
    ("command: x, commands: [y]", [(f"{C}.command", 15, "cannot stand beside commands", "keep one of them")]),
    ("commands: echo", [(f"{C}.commands", 25, "must be a list, not a text", "write a list: [ … ]")]),
    ("commands: [a, \"echo '${{ args.A }}'\"]", [(f"{C}.commands[1]", 29, "a template cannot stand in single quotes, where the shell looks at nothing", "use double quotes")]),
    ("command: \"echo 'a\"", [(f"{C}.command", 24, "cannot be split into words: no closing quotation", 'write a list: ["word", "word"]')]),
    ("image: a, privileged: yes", [(f"{C}.privileged", 37, "'yes' is not true or false", "")]),
    ("image: a, privileged: 'true'", [(f"{C}.privileged", 37, "'true' is not true or false", "")]),
    ("image: a, ports: ['80:x']", [(f"{C}.ports[0]", 33, "'80:x' is not a port", "write a port such as 8080:80")]),
    ("image: a, ports: [70000]", [(f"{C}.ports[0]", 33, "'70000' is not a port", "write a port such as 8080:80")]),
    ("image: a, ports: ['999.0.0.1:80:80']", [(f"{C}.ports[0]", 33, "'999.0.0.1:80:80' is not a port", "write a port such as 8080:80")]),
    ("image: a, ports: [{published: 80}]", [(f"{C}.ports[0].target", 33, "is missing", "add target:")]),
    ("image: a, ports: [{target: x}]", [(f"{C}.ports[0]", 33, "'0:x' is not a port", "write a port such as 8080:80")]),
    ("image: a, volumes: ['./a:/b']", [(f"{C}.volumes[0]", 35, "'./a:/b' is not a volume", "write a volume such as /srv/data:/data:ro")]),
    ("image: a, volumes: [{type: tmpfs, source: a, target: /b}]", [(f"{C}.volumes[0].type", 42, "'tmpfs' is not supported yet", "")]),
    ("image: a, volumes: [{source: 'a:b', target: /b}]", [(f"{C}.volumes[0].source", 36, "cannot hold a colon", "rename it")]),
    ("image: a, ulimits: {nofile: '5'}", [(f"{C}.ulimits.nofile", 43, "must be a whole number from -1 to 9223372036854775807, not a text", "remove the quotes")]),
    ("image: a, ulimits: {nofile: 010}", [(f"{C}.ulimits.nofile", 43, "'010' is not a whole number from -1 to 9223372036854775807", "")]),
    ("image: a, ulimits: {nofile: {soft: 2, hard: 1}}", [(f"{C}.ulimits.nofile.soft", 44, "is above the hard limit", "")]),
    ("image: a, stop_grace_period: 10", [(f"{C}.stop_grace_period", 44, "'10' is not a duration", "write 10s")]),
    ("image: a, shm_size: lots", [(f"{C}.shm_size", 35, "'lots' is not a size", "write a size such as 512m, 2g or 6GiB")]),
    ("image: a, shm_size: '${{ args.A }}'", [(f"{C}.shm_size", 35, "'${{ args.A }}' is not a size", "write the value itself: no template can stand here")]),
    ("image: a, healthcheck: {test: [curl]}", [(f"{C}.healthcheck.test[0]", 46, "must begin with CMD, CMD-SHELL or NONE", "write CMD first")]),
    ("image: a, healthcheck: {interval: 5s}", [(f"{C}.healthcheck", 38, "has no test", "add test:, or disable: true")]),
    ("image: a, deploy: {resources: {limits: {pids: 5}}}", [(f"{C}.deploy.resources.limits.pids", 55, "is not supported yet", "leave it out")]),
    ("image: a, deploy: {resources: {reservations: {devices: [{capabilities: [gpu], count: 1, device_ids: ['0']}]}}}", [(f"{C}.deploy.resources.reservations.devices[0].count", 93, "cannot stand beside device_ids", "keep one of them")]),
    ("image: a, environment: {A: }", [(f"{C}.environment.A", 42, "has no value", "write a text")]),
    ("image: a, environment: [A]", [(f"{C}.environment[0]", 39, "'A' has no value", "write NAME=value")]),
    ("image: a, environment: [A=1, A=2]", [(f"{C}.environment[1]", 44, "'A' stands here twice", "")]),
    ("image: a, environment: {GAMENODE_ARG_X: 1}", [(f"{C}.environment.GAMENODE_ARG_X", 39, "is a variable of GameNode's own", "give it another name")]),
    ("image: a, labels: {gamenode.step: x}", [(f"{C}.labels.gamenode.step", 34, "'gamenode.step' is not the name of a label", "write the name of a label such as owner")]),
    ("image: '${{ args.C }}'", [(f"{C}.image", 22, "uses args.C, which is not declared", "add C to args:")]),
    ("image: '${{ envs.A }}'", [(f"{C}.image", 22, "uses envs.A, which is not declared", "add A to envs:")]),
    ("image: '${{ arg.A }}'", [(f"{C}.image", 22, "${{ arg.A }}: there is no 'arg'", "write ${{ args.A }} or ${{ envs.A }}")]),
    ("image: '${{ args.A'", [(f"{C}.image", 22, "the template '${{ args.A' is not closed", "end it with }}")]),
    ("image: a, pull_policy: sometimes", [(f"{C}.pull_policy", 38, "'sometimes' is not a pull policy", "write a pull policy such as missing")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_a_wrong_container_is_refused_at_its_place(
    text: str, expected: list[tuple[str, int, str, str]]
) -> None:
    error = refusal(with_container(text))
    assert [described(v) for v in error.violations] == [
        (field, 6, column, reason, advice) for field, column, reason, advice in expected
    ]


STEP = "steps: [{name: s, container: {image: a}}]\n"
WRONG_FILES: list[tuple[str | bytes, list[tuple[str, int | None, int | None, str, str]]]] = [
    ("", [("file", None, None, "is empty", "begin with name: and steps:")]),
    ("# only a comment\n", [("file", None, None, "is empty", "begin with name: and steps:")]),
    ("~", [("file", 1, 1, "has no value", "write a pipeline")]),
    ("hello", [("file", 1, 1, "must be a mapping, not a text", "write a pipeline")]),
    ("- a", [("file", 1, 1, "must be a mapping, not a list", "write a pipeline")]),
    (b"name: p\nsteps: \xff", [("file", 2, 8, "is not valid UTF-8", "save the file as UTF-8")]),
    ("é: \0", [("file", 1, 4, "holds the character U+0000", "remove it")]),
    ("name: \ud800", [("file", 1, 7, "holds the character U+D800", "remove it")]),
    ("a\n\ufeff\x07", [("file", 2, 2, "holds the character U+0007", "remove it")]),
    ("name: p\nsteps:\n\t- a", [("file", 3, 1, "is not YAML: found character that cannot start any token while scanning for the next token", "indent with spaces, not tabs")]),
    ("name: [p", [("file", 2, 1, "is not YAML: did not find expected ',' or ']' while parsing a flow sequence", "")]),
    ("a: b: c", [("file", 1, 5, "is not YAML: mapping values are not allowed in this context", "")]),
    (STEP + "name: p\n---\nname: q", [("file", 3, 1, "holds a second document", "remove what follows ---")]),
    (STEP + "name: p\nname: q", [("name", 3, 1, "stands here twice, first on line 2", "remove one of them")]),
    (STEP + "name: !!python/object:os.system p", [("name", 2, 7, "has the tag !!python/object:os.system", "remove the tag")]),
    (STEP + "name: &n [*n]", [("name[0]", 2, 11, "*n holds itself", "")]),
    (STEP + "name: *n", [("name", 2, 7, "*n has no anchor before it", "")]),
    (STEP + "[a]: b", [("file", 2, 1, "a key must be a text", "")]),
    (STEP + 'name: "a\\0b"', [("name", 2, 7, "holds a NUL or half a character", "")]),
    (STEP + "<<: p\nname: p", [("file", 2, 1, "<< takes a mapping or a list of them", "")]),
    (STEP + "name: p\nargs: " + "[" * 33 + "]" * 33, [("file", 3, 38, "is deeper than 32 levels", "")]),
    ("name: p", [("steps", 1, 1, "is missing", "add steps:")]),
    ("name: p\nsteps: []", [("steps", 2, 8, "holds 0 items: 1 to 200 are possible", "")]),
    ("name: p\nsteps:", [("steps", 2, 7, "has no value", "write a list: [ … ]")]),
    (STEP + "name: ' '", [("name", 2, 7, "' ' is not a name of 1 to 128 printable characters", "write a name of 1 to 128 printable characters such as start-game")]),
    (STEP + "name: p\non_lost: restart_it", [("on_lost", 3, 10, "'restart_it' is not one of wait, fail, restart", "did you mean restart?")]),
    (STEP + "name: p\nconcurrency: {group: a b, limit: 0}", [("concurrency.group", 3, 22, "'a b' is not a group", "write a group such as deploy-a"), ("concurrency.limit", 3, 34, "'0' is not a whole number from 1 to 2147483647", "")]),
    (STEP + "name: p\nplacement: {cpu: 0, gpu: {slots: 65}}", [("placement.cpu", 3, 18, "'0' is not a number above 0", ""), ("placement.gpu.slots", 3, 34, "'65' is not a whole number from 1 to 64", "")]),
    (STEP + "name: p\nplacement: {selector: 'a b'}", [("placement.selector", 3, 13, "cannot read the term 'a b'", "write key, !key, key=v, key!=v, key~part, key!~part or key in (a|b)")]),
    (STEP + "name: p\nplacement: {node: ../x}", [("placement.node", 3, 19, "'../x' is not a node's id", "write a node's id such as fra-07")]),
    (STEP + "name: p\nplacement: {node: '${{ args.A }}'}", [("placement.node", 3, 19, "cannot hold a template", "write the value itself")]),
    (STEP + "name: p\ntimeout: 0s", [("timeout", 3, 10, "must be longer than 0s", "")]),
    (STEP + "name: p\nargs: [A, {name: A}]", [("args[1]", 3, 11, "'A' stands here twice, first on line 3", "give it another name")]),
    (STEP + "name: p\nargs: [{name: A, type: secret, default: hunter22}]", [("args[0].default", 3, 32, "would show a secret to whoever reads the file", "remove it")]),
    (STEP + "name: p\nargs: [{name: A, type: integer, pattern: a}]", [("args[0].pattern", 3, 33, "is only for strings and secrets", "remove it, or the type")]),
    (STEP + "name: p\nargs: [{name: A, type: int}]", [("args[0].type", 3, 24, "'int' is not one of string, integer, boolean, choice, secret", "did you mean integer?")]),
    (STEP + "name: p\nargs: [{name: A, type: integer, default: x}]", [("args[0].default", 3, 33, "'x' is not an integer", "give digits")]),
    (STEP + "name: p\nargs: [{name: A, type: choice}]", [("args[0].choices", 3, 8, "is missing", "add choices: [ … ]")]),
    (STEP + "name: p\nargs: [{name: A, choices: [a]}]", [("args[0].choices", 3, 18, "are only for the type choice", "add type: choice")]),
    (STEP + "name: p\nargs: [{name: A, pattern: '(?=a)'}]", [("args[0].pattern", 3, 18, "cannot be read at '?=a)'", "simple patterns only: no look-around, no references")]),
    (STEP + "name: p\nargs: [a-b]", [("args[0]", 3, 8, "'a-b' is not a name", "write a name such as IMAGE")]),
    (STEP + "name: p\nenvs: [E, E]", [("envs[1]", 3, 11, "'E' stands here twice, first on line 3", "give it another name")]),
    ("name: p\nsteps:\n- {name: ../x, container: {image: a}}", [("steps[0].name", 3, 10, "'../x' is not a step's name", "write a step's name such as fetch")]),
    ("name: p\nsteps:\n- {name: s, container: {image: a}}\n- {name: s, container: {image: a}}", [("steps[1]", 4, 3, "'s' stands here twice, first on line 3", "give it another name")]),
    ("name: p\nsteps:\n- {name: s, when: never, retries: {backoff: 1s}, container: {image: a}}", [("steps[0].when", 3, 19, "'never' is not one of success, failure, always", ""), ("steps[0].retries.max", 3, 35, "is missing", "add max:")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG_FILES)
def test_a_wrong_file_is_refused_at_its_place(
    text: str | bytes, expected: list[tuple[str, int | None, int | None, str, str]]
) -> None:
    assert [described(v) for v in refusal(text).violations] == expected


def test_every_mistake_is_named_at_once_in_the_order_of_the_file() -> None:
    error = refusal(
        "nme: p\n"
        "timeout: soon\n"
        "steps:\n"
        "- name: One\n"
        "  container: {image: '${{ args.X }}', ports: [x]}\n"
        "- container: {comand: x}\n"
    )
    assert [(v.field, v.line) for v in error.violations] == [
        ("nme", 1),
        ("name", 1),
        ("timeout", 2),
        ("steps[0].name", 4),
        ("steps[0].container.image", 5),
        ("steps[0].container.ports[0]", 5),
        ("steps[1].name", 6),
        ("steps[1].container.comand", 6),
    ]
    assert (
        str(error) == "INVALID_REQUEST: pipeline:1:1: nme is not a key of a pipeline (and 7 more)"
    )
    assert error.hint == "did you mean name?"


def test_the_message_names_the_file() -> None:
    with pytest.raises(GameNodeError, match=r"hello\.yaml:1:1: steps is missing"):
        parse_pipeline("name: p", file="hello.yaml")


def test_anchors_and_merge_keys_are_expanded() -> None:
    spec = parse_pipeline(
        "name: p\n"
        "steps:\n"
        "- name: a\n"
        "  container: &box {image: a, user: root, labels: {x: y}}\n"
        "- name: b\n"
        "  container: {<<: *box, user: me}\n"
        "- name: c\n"
        "  container: {<<: [{image: c}, *box]}\n"
    )
    assert [step.container for step in spec.steps] == [
        ContainerSpec(image="a", user="root", labels={"x": "y"}),
        ContainerSpec(image="a", user="me", labels={"x": "y"}),
        ContainerSpec(image="c", user="root", labels={"x": "y"}),
    ]


def test_a_byte_order_mark_is_skipped_and_text_equals_bytes() -> None:
    assert parse_pipeline(b"\xef\xbb\xbf" + FULL.encode()) == parse_pipeline(FULL)


def _laughs(levels: int) -> str:
    above = (f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels))
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *above])


LARGE: list[str | bytes] = [
    _laughs(9),
    "name: &n " + "x" * 100_000 + "\na: [" + "*n, " * 9000 + "]",
    "[" * 200_000,
    "{a: " * 60_000,
    "- " * 100_000,
    "? " * 100_000,
    "!" * 200_000,
    "&a " * 80_000,
    "x: [" + "a, " * 60_000 + "]",
    "\n".join(f"k{n}: v" for n in range(9_000)),
    "\n".join(f"{'nam' * 20}{n}: v" for n in range(4_000)),
    "name: p\nsteps: [" + "{nme: s}, " * 3_000 + "]",
    "x" * 200_000 + ": 1",
    "x: " + "9" * 200_000,
    "timeout: " + "9" * 200_000 + "s",
    with_container("command: '" + "a " * 100_000 + "'"),
    with_container("command: '" + "\\" * 200_000 + "'"),
    with_container("commands: ['" + "$(( " * 50_000 + "${{ args.A }}']"),
    with_container("image: '" + "${{ " * 50_000 + "'"),
    with_container("image: '" + "${{ args.Z }} " * 18_000 + "'"),
    "name: p\nargs: [{name: A, pattern: '((((a{99}){99}){99}){99})'}]\n" + STEP,
    "name: p\nplacement: {selector: '" + "a in (" * 40_000 + "'}\n" + STEP,
    "x" * (TEXT_LENGTH_MAX + 1),
    b"\xff" * TEXT_LENGTH_MAX,
    '"' + "\\x00" * 60_000 + '"',
    "a\n" * 120_000,
    "'" + "\n" * 200_000,
]


@pytest.mark.parametrize("text", LARGE, ids=range(len(LARGE)))
def test_no_file_takes_long_or_breaks_the_parser(text: str | bytes) -> None:
    started_s = time.perf_counter()
    error = refusal(text)
    assert time.perf_counter() - started_s < 1.0
    assert len(error.violations) <= VIOLATIONS_MAX
    assert all(len(v.field) + len(v.reason) + len(v.advice) < 2000 for v in error.violations)


def test_a_bomb_of_aliases_is_refused_by_its_expanded_size() -> None:
    (violation,) = refusal(_laughs(9)).violations
    assert violation.reason == f"holds more than {NODES_MAX} values, aliases included"


@given(st.text() | st.binary())
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    refusal(text)


_SCALARS = st.sampled_from(
    [
        "a",
        "1",
        "true",
        "null",
        "90s",
        "512m",
        "x: y",
        "${{ args.A }}",
        "${{ x",
        "no",
        "[",
        "'",
        '"',
        "*a",
    ]
) | st.text(max_size=6)
_KEYS = st.sampled_from(
    [
        *("name", "steps", "args", "envs", "container", "image", "commands", "command", "ports"),
        *("type", "default", "environment", "healthcheck", "test", "placement", "selector", "<<"),
        *("ulimits", "deploy"),
    ]
)
_TREES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4)
)
_CONTAINER_KEYS = SCHEMA["properties"]["steps"]["items"]["properties"]["container"]["properties"]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_KEYS, _TREES, max_size=5))
def test_any_tree_is_read_or_refused(tree: object) -> None:
    _read_or_refused(yaml.safe_dump(tree))
    _read_or_refused(json.dumps(tree))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(_CONTAINER_KEYS)), _TREES, max_size=3))
def test_any_container_is_read_or_refused(tree: dict[str, object]) -> None:
    steps = [{"name": "s", "container": {"image": "a", **tree}}]
    _read_or_refused(json.dumps({"name": "p", "args": ["A"], "steps": steps}))


def _read_or_refused(text: str) -> None:
    try:
        parse_pipeline(text)
    except GameNodeError:
        return
    VALIDATOR.validate(yaml.load(text, CoreLoader))


def test_the_schema_is_one_that_validators_take() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert VALIDATOR.is_valid(yaml.load(FULL, CoreLoader))


@pytest.mark.parametrize(
    "text",
    [
        "name: p",
        STEP + "name: p\nnme: q",
        STEP + "name: p\nconcurrency: {group: a}",
        STEP + "name: p\nplacement: {cpu: two}",
        STEP + "name: p\non_lost: never",
        STEP + "name: p\ntimeout: soon",
        STEP + "name: p\nargs: [a-b]",
        STEP + "name: p\nargs: [{name: A, type: int}]",
        with_container("image: a, imag: b"),
        with_container("image: a, privileged: 1"),
        with_container("image: a, shm_size: lots"),
        with_container("image: a, ulimits: {nofile: x}"),
        with_container("image: a, restart: sometimes"),
        with_container("image: a, healthcheck: {retries: 0}"),
        with_container("image: a, environment: {A: [b]}"),
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(text: str) -> None:
    refusal(text)
    assert not VALIDATOR.is_valid(yaml.load(text, CoreLoader))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid_and_need_no_args(path: Path) -> None:
    text = path.read_text()
    steps = resolve(parse_pipeline(text, file=path.name), {}).steps
    assert steps
    VALIDATOR.validate(yaml.load(text, CoreLoader))


def test_the_first_example_greets_whom_it_is_told_to(tmp_path: Path) -> None:
    spec = parse_pipeline((EXAMPLES / "hello.yaml").read_text())
    steps = resolve(spec, {"WHO": 'Ada "$(id)"', "ROUNDS": "2"}).steps
    printed = b""
    started_s = time.perf_counter()
    for step in steps:
        printed += subprocess.run(
            ["sh", "-e", "-c", "\n".join(step.container.commands)],
            env={"PATH": os.environ["PATH"], **step.container.environment},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            timeout=10,
        ).stdout
    assert b'Hello, Ada "$(id)"!' in printed
    assert b"round 2\nWell played" in printed
    assert steps[-1].condition is Condition.ALWAYS
    assert time.perf_counter() - started_s < 3.0


def with_secret(container: str) -> str:
    return (
        "name: p\nargs: [{name: T, type: secret, pattern: '[a-z0-9]+'}]\n"
        f"steps:\n- name: s\n  container: {{{container}}}\n"
    )


@pytest.mark.parametrize(
    "container",
    [
        "image: a, environment: {AUTH: 'Bearer ${{ args.T }}'}",
        "image: a, environment: ['AUTH=Bearer ${{ args.T }}']",
        "image: a, commands: ['curl -H \"X: ${{ args.T }}\" -- ${{ args.T }}']",
    ],
)
def test_a_secret_may_stand_in_environment_and_commands(container: str) -> None:
    spec = parse_pipeline(with_secret(container))
    assert spec.args == (ArgSpec(name="T", type=ArgType.SECRET, pattern="[a-z0-9]+"),)
    assert "args.T" not in f"{replace(spec.steps[0].container, environment={})}"


@pytest.mark.parametrize(
    ("container", "place"),
    [
        ("image: 'a:${{ args.T }}'", "image"),
        ("image: a, command: [login, '${{ args.T }}']", "command[1]"),
        ("image: a, command: 'login ${{ args.T }}'", "command"),
        ("image: a, command: [sh, -c, 'login ${{ args.T }}']", "command[2]"),
        ("image: a, entrypoint: ['${{ args.T }}']", "entrypoint[0]"),
        ("image: a, labels: {l: '${{ args.T }}'}", "labels.l"),
        ("image: a, labels: ['l=${{ args.T }}']", "labels[0]"),
        ("image: a, hostname: '${{ args.T }}'", "hostname"),
        ("image: a, container_name: '${{ args.T }}'", "container_name"),
        ("image: a, user: '${{ args.T }}'", "user"),
        ("image: a, working_dir: '/${{ args.T }}'", "working_dir"),
        ("image: a, volumes: ['/${{ args.T }}:/b']", "volumes[0]"),
        ("image: a, volumes: [{source: '/${{ args.T }}', target: /b}]", "volumes[0].source"),
        ("image: a, extra_hosts: {h: '${{ args.T }}'}", "extra_hosts.h"),
        ("image: a, healthcheck: {test: 'login ${{ args.T }}'}", "healthcheck.test"),
        ("image: a, security_opt: ['${{ args.T }}']", "security_opt[0]"),
    ],
)
def test_a_secret_may_stand_nowhere_else(container: str, place: str) -> None:
    assert [
        v.reason for v in refusal(with_secret(container)).violations if v.field == f"{C}.{place}"
    ] == ["holds the secret T, and others could read it here"]
