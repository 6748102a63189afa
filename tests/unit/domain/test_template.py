from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.pipeline import ContainerSpec, DeviceReservation, Healthcheck
from gamenode.domain.template import (
    Mistake,
    Namespace,
    Template,
    fill,
    fill_container,
    find,
    map_texts,
)


def test_templates_are_found_in_order_with_their_places() -> None:
    text = "a ${{ args.ONE }}b${{envs.TWO}}"
    first, second = find(text)
    assert first == Template(Namespace.ARGS, "ONE", 2, 17)
    assert second == Template(Namespace.ENVS, "TWO", 18, 31)


@pytest.mark.parametrize(
    "text",
    [
        "${{ args.A",
        "${{ args.A }",
        "${{",
        "${{ arg.A }}",
        "${{ A }}",
        "${{ args.1A }}",
        "${{ args.A.B }}",
        "${{ args. }}",
        "${{}}",
        "${{ args.A || 'x' }}",
        "${{ args.É }}",
        "${{ args." + "A" * 65 + " }}",
    ],
)
def test_what_only_begins_like_a_template_is_a_mistake(text: str) -> None:
    assert [type(found) for found in find(text)] == [Mistake]


@pytest.mark.parametrize(
    "text", ["", "$HOME", "${HOME}", "{{ x }}", "$ {{ args.A }}", "$$", "{{{}}}"]
)
def test_other_dollars_and_braces_are_plain_text(text: str) -> None:
    assert not list(find(text))


def test_only_the_given_namespaces_are_filled() -> None:
    text = "${{ args.A }}/${{ envs.A }}"
    assert fill(text, {Namespace.ARGS: {"A": "x"}}) == "x/${{ envs.A }}"
    assert fill(text, {Namespace.ENVS: {"A": "x"}}) == "${{ args.A }}/x"


def test_a_value_is_never_filled_again() -> None:
    values = {Namespace.ARGS: {"A": "${{ args.B }}", "B": "no"}}
    assert fill("${{ args.A }}", values) == "${{ args.B }}"


@given(st.text(), st.text())
def test_filling_puts_the_value_there_and_changes_nothing_else(before: str, value: str) -> None:
    before = before.replace("$", "")
    assert fill(before + "${{ args.A }}", {Namespace.ARGS: {"A": value}}) == before + value


def test_every_text_of_a_container_is_filled() -> None:
    hole = "${{ envs.X }}"
    spec = ContainerSpec(
        image=hole,
        command=(hole, "b"),
        environment={"A": hole},
        healthcheck=Healthcheck(test=("CMD", hole)),
        devices_reserved=(DeviceReservation(device_ids=(hole,)),),
        memory_bytes=5,
    )
    assert fill_container(spec, {"X": "v"}) == ContainerSpec(
        image="v",
        command=("v", "b"),
        environment={"A": "v"},
        healthcheck=Healthcheck(test=("CMD", "v")),
        devices_reserved=(DeviceReservation(device_ids=("v",)),),
        memory_bytes=5,
    )


def test_paths_name_the_texts() -> None:
    paths: list[str] = []

    def note(path: str, text: str) -> str:
        if text:
            paths.append(path)
        return text

    spec = ContainerSpec(
        image="a",
        ports=("1:1", "2:2"),
        environment={"K": "v"},
        healthcheck=Healthcheck(test=("CMD",)),
    )
    assert map_texts(spec, note) == spec
    assert paths == ["image", "environment.K", "ports[0]", "ports[1]", "healthcheck.test[0]"]


def test_every_env_that_the_node_lacks_is_named() -> None:
    spec = ContainerSpec(image="${{ envs.A }}", working_dir="/${{ envs.B }}/${{ envs.A }}")
    with pytest.raises(GameNodeError) as refusal:
        fill_container(spec, {"C": "x"})
    assert refusal.value.code is ErrorCode.INVALID_REQUEST
    assert [v.field for v in refusal.value.violations] == [
        "container.image",
        "container.working_dir",
    ]
    assert "-e A=" in refusal.value.hint


def test_what_an_env_makes_of_a_text_is_checked() -> None:
    with pytest.raises(GameNodeError) as refusal:
        fill_container(ContainerSpec(volumes=("${{ envs.ROOT }}:/data",)), {"ROOT": "../up"})
    (violation,) = refusal.value.violations
    assert violation.field == "container.volumes[0]"
    assert violation.reason == "'../up:/data' is not a volume"
