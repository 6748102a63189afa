from __future__ import annotations

import pytest

from gamenode.domain.args import FILLED_CHARACTERS_MAX, VALUE_BYTES_MAX, resolve, value_problem
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.domain.pipeline import ArgSpec, ArgType, ContainerSpec, PipelineSpec, StepSpec


def pipeline(container: ContainerSpec, *args: ArgSpec) -> PipelineSpec:
    return PipelineSpec(name="p", args=args, steps=(StepSpec(name="s", container=container),))


def refusal(spec: PipelineSpec, args: dict[str, str]) -> tuple[Violation, ...]:
    with pytest.raises(GameNodeError) as caught:
        resolve(spec, args)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    return caught.value.violations


def test_args_are_filled_and_defaults_added() -> None:
    spec = pipeline(
        ContainerSpec(image="${{ args.IMAGE }}", ports=("${{ args.PORT }}:80",)),
        ArgSpec(name="IMAGE"),
        ArgSpec(name="PORT", type=ArgType.INTEGER, default="8080"),
    )
    resolved = resolve(spec, {"IMAGE": "alpine"})
    assert resolved.args == {"IMAGE": "alpine", "PORT": "8080"}
    assert resolved.steps[0].container == ContainerSpec(image="alpine", ports=("8080:80",))


def test_envs_stay_for_the_node() -> None:
    container = ContainerSpec(command=("${{ envs.ROOT }}/${{ args.A }}",))
    resolved = resolve(pipeline(container, ArgSpec(name="A")), {"A": "x"})
    assert resolved.steps[0].container.command == ("${{ envs.ROOT }}/x",)


def test_every_wrong_arg_is_named_at_once() -> None:
    spec = pipeline(
        ContainerSpec(image="alpine"),
        ArgSpec(name="IMAGE"),
        ArgSpec(name="PORT", type=ArgType.INTEGER),
        ArgSpec(name="FULL", type=ArgType.BOOLEAN),
        ArgSpec(name="MODE", type=ArgType.CHOICE, choices=("fast", "slow")),
        ArgSpec(name="ZONE", pattern="[a-z]+", description="a zone such as a"),
    )
    given = {"PORT": "eighty", "FULL": "yes", "MODE": "medium", "ZONE": "A1", "IMGE": "x", "Q": ""}
    assert [(v.field, v.reason, v.advice) for v in refusal(spec, given)] == [
        ("args.IMGE", "is not declared by the pipeline file", "did you mean IMAGE?"),
        (
            "args.Q",
            "is not declared by the pipeline file",
            "declared are: IMAGE, PORT, FULL, MODE, ZONE",
        ),
        ("args.IMAGE", "is missing", "pass -a IMAGE=…"),
        ("args.PORT", "'eighty' is not an integer", "give digits"),
        ("args.FULL", "'yes' is not a boolean", "give true or false"),
        ("args.MODE", "'medium' is not one of the choices", "give fast or slow"),
        ("args.ZONE", "'A1' does not match [a-z]+", "a zone such as a"),
    ]


@pytest.mark.parametrize(
    ("type_", "value", "right"),
    [
        (ArgType.INTEGER, "0", True),
        (ArgType.INTEGER, "-5", True),
        (ArgType.INTEGER, "0123", False),
        (ArgType.INTEGER, "1.0", False),
        (ArgType.INTEGER, "", False),
        (ArgType.INTEGER, "٣", False),
        (ArgType.INTEGER, "5\n", False),
        (ArgType.INTEGER, "9" * 19, False),
        (ArgType.BOOLEAN, "true", True),
        (ArgType.BOOLEAN, "True", False),
        (ArgType.STRING, "", True),
        (ArgType.STRING, "$(x) ' \n", True),
        (ArgType.STRING, "a\0b", False),
        (ArgType.STRING, "é" * VALUE_BYTES_MAX, False),
    ],
)
def test_a_value_must_be_of_its_args_type(type_: ArgType, value: str, right: bool) -> None:
    assert (value_problem(ArgSpec(name="A", type=type_), value) is None) is right


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("${{ args.A }}", {"A": "${{ envs.SECRET }}", "B": ""}),
        ("$${{ args.A }}", {"A": "{{ envs.SECRET }}", "B": ""}),
        ("${{ args.A }}${{ args.B }}", {"A": "$", "B": "{{ envs.SECRET }}"}),
        ("${{ args.A }} ${{ envs.OK }}", {"A": "${{ envs.SECRET }}", "B": ""}),
    ],
)
def test_no_value_becomes_a_template_that_the_node_fills(text: str, args: dict[str, str]) -> None:
    spec = pipeline(ContainerSpec(command=(text,)), ArgSpec(name="A"), ArgSpec(name="B"))
    (violation,) = refusal(spec, args)
    assert violation.field == "steps[0].container.command[0]"
    assert "make up a template" in violation.reason


def test_what_a_value_makes_of_a_text_is_checked() -> None:
    spec = pipeline(ContainerSpec(ports=("${{ args.A }}:80",)), ArgSpec(name="A"))
    (violation,) = refusal(spec, {"A": "70000"})
    assert violation == Violation(
        field="steps[0].container.ports[0]",
        reason="'70000:80' is not a port",
        advice="write a port such as 8080:80",
    )


def test_filled_steps_are_bounded() -> None:
    uses = FILLED_CHARACTERS_MAX // VALUE_BYTES_MAX + 1
    spec = pipeline(ContainerSpec(command=("${{ args.A }}",) * uses), ArgSpec(name="A"))
    (violation,) = refusal(spec, {"A": "x" * VALUE_BYTES_MAX})
    assert "longer than" in violation.reason


TOKEN = ArgSpec(name="TOKEN", type=ArgType.SECRET)


def test_the_value_of_a_secret_is_not_filled_in_but_handed_over_apart() -> None:
    container = ContainerSpec(environment={"AUTH": "${{args.KIND}} ${{args.TOKEN}} ${{ envs.E }}"})
    resolved = resolve(
        pipeline(container, TOKEN, ArgSpec(name="KIND")), {"TOKEN": "hunter22", "KIND": "Bearer"}
    )
    assert resolved.steps[0].container.environment == {
        "AUTH": "Bearer ${{ args.TOKEN }} ${{ envs.E }}"
    }
    assert resolved.args == {"TOKEN": "***", "KIND": "Bearer"}
    assert resolved.secrets == {"TOKEN": "hunter22"}
    assert "hunter22" not in repr(resolved)


@pytest.mark.parametrize(
    "container",
    [
        ContainerSpec(command=("login", "${{ args.TOKEN }}")),
        ContainerSpec(labels={"token": "${{ args.TOKEN }}"}),
        ContainerSpec(hostname="${{ args.TOKEN }}"),
        ContainerSpec(volumes=("/data/${{ args.TOKEN }}:/data",)),
    ],
)
def test_a_secret_cannot_stand_where_others_read(container: ContainerSpec) -> None:
    (violation,) = refusal(pipeline(container, TOKEN), {"TOKEN": "hunter22"})
    assert violation.reason == "holds a secret, and others could read it here"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("abc", "is shorter than 4 bytes, so it could not be masked in logs"),
        ("hunter2!", "the value does not match [a-z0-9]+"),
        ("nul\0nul", f"holds a NUL or more than {VALUE_BYTES_MAX} bytes"),
        (None, "is missing"),
    ],
)
def test_why_a_secret_is_refused_is_said_without_it(value: str | None, reason: str) -> None:
    arg = ArgSpec(name="TOKEN", type=ArgType.SECRET, pattern="[a-z0-9]+")
    given = {} if value is None else {"TOKEN": value}
    with pytest.raises(GameNodeError) as caught:
        resolve(pipeline(ContainerSpec(image="alpine"), arg), given)
    assert [v.reason for v in caught.value.violations] == [reason]
    assert value is None or value not in f"{caught.value!r} {caught.value.violations}"


def test_other_args_cannot_write_the_template_of_a_secret() -> None:
    container = ContainerSpec(environment={"X": "${{ args.A }}"})
    spec = pipeline(container, TOKEN, ArgSpec(name="A"))
    (violation,) = refusal(spec, {"TOKEN": "hunter22", "A": "${{ args.TOKEN }}"})
    assert violation.reason == "the args filled in here make up a template"
