"""Args: what a caller fills into a pipeline file, checked before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Final

from gamenode.domain.container import shown, text_problem
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.domain.pipeline import ArgSpec, ArgType, ContainerSpec, PipelineSpec, StepSpec
from gamenode.domain.regular import VALUE_LENGTH_MAX, read_pattern
from gamenode.domain.secret import ADVICE, SHOWN, length_problem, may_hold_secrets
from gamenode.domain.template import (
    NAME_LENGTH_MAX,
    OPENING,
    Namespace,
    Template,
    fill,
    find,
    map_texts,
)

VALUE_BYTES_MAX: Final = 16_384
FILLED_CHARACTERS_MAX: Final = 1_048_576
"""What all texts of a pipeline may hold once they are filled; it must fit a message to an agent."""

INTEGER_MAX: Final = 10**18 - 1
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,17}", re.ASCII)


def value_problem(arg: ArgSpec, value: str) -> tuple[str, str] | None:
    """Return why `value` cannot be given to `arg`, and what to give, or None.

    The words never show a secret value.
    """
    match arg.type:
        case ArgType.STRING:
            return _text_problem(arg, value)
        case ArgType.SECRET:
            return length_problem(value) or _text_problem(arg, value)
        case ArgType.INTEGER if not _INTEGER.fullmatch(value):
            return f"{shown(value)} is not an integer", "give digits"
        case ArgType.BOOLEAN if value not in {"true", "false"}:
            return f"{shown(value)} is not a boolean", "give true or false"
        case ArgType.CHOICE if value not in arg.choices:
            return f"{shown(value)} is not one of the choices", f"give {' or '.join(arg.choices)}"
        case ArgType.INTEGER | ArgType.BOOLEAN | ArgType.CHOICE:
            return None


def _text_problem(arg: ArgSpec, value: str) -> tuple[str, str] | None:
    if "\0" in value or len(value.encode(errors="replace")) > VALUE_BYTES_MAX:
        return f"holds a NUL or more than {VALUE_BYTES_MAX} bytes", "put large content into a file"
    if not arg.pattern:
        return None
    if len(value) > VALUE_LENGTH_MAX:
        return f"is longer than {VALUE_LENGTH_MAX} characters", "a value with a pattern is short"
    if not read_pattern(arg.pattern).matches(value):
        given = "the value" if arg.type is ArgType.SECRET else shown(value)
        return f"{given} does not match {arg.pattern}", arg.description
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A pipeline file with the values of its args."""

    steps: tuple[StepSpec, ...]
    """What is to run. `${{ envs.NAME }}` and secret args stay: the node fills them."""
    args: Mapping[str, str]
    """All args, with the defaults of those not given; secret ones as they are shown."""
    secrets: Mapping[str, str] = field(repr=False)
    """The values of the secret args."""


def resolve(spec: PipelineSpec, args: Mapping[str, str]) -> Resolved:
    """Return what becomes of a pipeline file with `args`.

    Raises:
        GameNodeError: INVALID_REQUEST with every violation: an unknown or missing arg, a value that
            its arg refuses, a text that is wrong once it is filled.
    """
    problems = [*_unknown(spec.args, args)]
    values: dict[str, str] = {}
    for arg in spec.args:
        value = args.get(arg.name, arg.default)
        field = f"args.{arg.name}"
        if value is None:
            # On a command line a secret would stay in the shell's history.
            given = "@FILE" if arg.type is ArgType.SECRET else "…"
            problems.append(
                Violation(field=field, reason="is missing", advice=f"pass -a {arg.name}={given}")
            )
        elif problem := value_problem(arg, value):
            problems.append(Violation(field=field, reason=problem[0], advice=problem[1]))
        else:
            values[arg.name] = value
    if not problems:
        secret = {arg.name for arg in spec.args if arg.type is ArgType.SECRET}
        filling = _Filling(values, secret)
        steps = tuple(filling.step(i, step) for i, step in enumerate(spec.steps))
        problems += filling.problems()
        if not problems:
            return Resolved(
                steps=steps,
                args={name: SHOWN if name in secret else v for name, v in values.items()},
                secrets={name: values[name] for name in values if name in secret},
            )
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise GameNodeError(
        ErrorCode.INVALID_REQUEST,
        f"{first.field} {first.reason}{more}",
        violations=problems,
        hint=first.advice,
    )


class _Filling:
    """Fills args into the texts of containers and looks at what they became."""

    def __init__(self, values: Mapping[str, str], secret: Collection[str]) -> None:
        # A secret's template stays, in the one form that is written here.
        left = {name: f"${{{{ {Namespace.ARGS}.{name} }}}}" for name in secret}
        self._values = {Namespace.ARGS: {**values, **left}}
        self._secret = secret
        self._problems: list[Violation] = []
        self._characters = sum(len(values[name]) for name in secret)

    def step(self, index: int, step: StepSpec) -> StepSpec:
        def filled(path: str, text: str) -> str:
            result = fill(text, self._values)
            self._characters += len(result)
            if result is not text:
                self._check(f"steps[{index}].container.{path}", path, text, result)
            return result

        container: ContainerSpec = map_texts(step.container, filled)
        return step if container == step.container else replace(step, container=container)

    def problems(self) -> Sequence[Violation]:
        if self._characters > FILLED_CHARACTERS_MAX:
            reason = f"the filled steps are longer than {FILLED_CHARACTERS_MAX} characters"
            return [*self._problems, Violation(field="args", reason=reason)]
        return self._problems

    def _check(self, field: str, path: str, text: str, result: str) -> None:
        # A value, or two side by side, must not become a template that the node would then fill
        # with its own envs: that would hand them to any caller.
        stay = 0
        for found in find(text):
            secret = isinstance(found, Template) and self._is_secret(found)
            stay += secret or (isinstance(found, Template) and found.namespace is Namespace.ENVS)
            if secret and not may_hold_secrets(path):
                reason = "holds a secret, and others could read it here"
                self._problems.append(Violation(field=field, reason=reason, advice=ADVICE))
        if result.count(OPENING) != stay:
            reason = "the args filled in here make up a template"
            self._problems.append(Violation(field=field, reason=reason))
        elif not stay and (problem := text_problem(path, result)):
            self._problems.append(Violation(field=field, reason=problem[0], advice=problem[1]))

    def _is_secret(self, template: Template) -> bool:
        return template.namespace is Namespace.ARGS and template.name in self._secret


def _unknown(declared: Sequence[ArgSpec], given: Iterable[str]) -> Iterator[Violation]:
    names = [arg.name for arg in declared]
    for name in given:
        if name not in names:
            near = get_close_matches(name[:NAME_LENGTH_MAX], names, n=1)
            yield Violation(
                field=f"args.{name[:NAME_LENGTH_MAX]}",
                reason="is not declared by the pipeline file",
                advice=f"did you mean {near[0]}?"
                if near
                else f"declared are: {', '.join(names) or 'none'}",
            )
