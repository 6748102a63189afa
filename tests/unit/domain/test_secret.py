from __future__ import annotations

import pytest

from gamenode.domain.errors import GameNodeError
from gamenode.domain.pipeline import ContainerSpec
from gamenode.domain.secret import masked_texts
from gamenode.domain.template import Namespace, fill_container, names_used


def test_a_secret_and_each_of_its_lines_are_to_be_masked_longest_first() -> None:
    assert masked_texts(["-----KEY-----\nMIIB\n  ab\n-----END-----\n", "MIIB", "pass\r\n"]) == (
        b"-----KEY-----\nMIIB\n  ab\n-----END-----",
        b"-----END-----",
        b"-----KEY-----",
        b"MIIB",
        b"pass",
    )


def test_the_node_fills_secrets_into_the_environment_once() -> None:
    spec = ContainerSpec(environment={"A": "x ${{ args.T }} ${{ envs.E }}", "B": "plain"})
    filled = fill_container(spec, {"E": "${{ args.T }}"}, secrets={"T": "${{ envs.E }}"})
    assert filled.environment == {"A": "x ${{ envs.E }} ${{ args.T }}", "B": "plain"}
    assert names_used(spec, Namespace.ARGS) == {"T"}
    assert names_used(spec, Namespace.ENVS) == {"E"}


def test_a_secret_whose_value_is_missing_is_named() -> None:
    spec = ContainerSpec(environment={"A": "${{ args.T }}"})
    with pytest.raises(GameNodeError, match="the value of the secret T is missing"):
        fill_container(spec, {})


@pytest.mark.parametrize(
    ("container", "place"),
    [
        (ContainerSpec(command=("${{ args.T }}",)), "container.command[0]"),
        (ContainerSpec(labels={"l": "${{ envs.T }}"}), "container.labels.l"),
    ],
)
def test_the_node_fills_secrets_in_nowhere_else(container: ContainerSpec, place: str) -> None:
    with pytest.raises(GameNodeError, match="others could read it here") as caught:
        fill_container(container, {"T": "hunter22"}, secrets={"T": "hunter22"}, secret_envs={"T"})
    assert caught.value.violations[0].field == place
    assert "hunter22" not in f"{caught.value!r}{caught.value.violations}"
