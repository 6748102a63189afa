"""`${{ args.NAME }}` and `${{ envs.NAME }}`: the holes in a pipeline file's texts.

Filling is textual and happens once: a value is never read as a template again. Shell text is the
exception that `gamenode.domain.shell` deals with before anything is filled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Final, cast

from gamenode.domain.container import text_problem
from gamenode.domain.errors import ErrorCode, GameNodeError, Violation
from gamenode.domain.pipeline import ContainerSpec
from gamenode.domain.secret import ADVICE, may_hold_secrets

OPENING: Final = "${{"
NAME_LENGTH_MAX: Final = 64
NAME_PATTERN: Final = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
"""The name of an arg or an env: an identifier, so that it can be a variable of a shell too."""

_TEMPLATE: Final = re.compile(r"\$\{\{(?P<inside>[^{}]{0,200})\}\}")
_FIELD: Final = "container."
_INSIDE: Final = re.compile(rf"\s*(?P<namespace>\w+)\.(?P<name>{NAME_PATTERN})\s*", re.ASCII)


class Namespace(StrEnum):
    """Who fills a template."""

    ARGS = "args"  # the caller
    ENVS = "envs"  # the node


@dataclass(frozen=True, slots=True)
class Template:
    """One template in a text, from `start` up to `end`."""

    namespace: Namespace
    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something that begins like a template at `start` and is none."""

    start: int
    reason: str
    advice: str


Found = Template | Mistake


def find(text: str) -> Iterator[Found]:
    """Yield each template of `text`, and each mistake in place of one, in order."""
    start = text.find(OPENING)
    while start >= 0:
        match = _TEMPLATE.match(text, start)
        yield _read(match) if match else _unclosed(text, start)
        start = text.find(OPENING, match.end() if match else start + len(OPENING))


def fill(text: str, values: Mapping[Namespace, Mapping[str, str]]) -> str:
    """Return `text` with every template filled whose namespace is in `values`.

    Templates of other namespaces stay as they are.

    Raises:
        KeyError: `values` has the namespace, but not the name.
    """
    if OPENING not in text:
        return text
    parts: list[str] = []
    end = 0
    for found in find(text):
        if isinstance(found, Template) and found.namespace in values:
            parts += text[end : found.start], values[found.namespace][found.name]
            end = found.end
    return "".join([*parts, text[end:]])


def map_texts(container: ContainerSpec, change: Callable[[str, str], str]) -> ContainerSpec:
    """Return `container` with every text replaced by `change(path, text)`.

    A path is such as `environment.HOME` or `ports[0]`. Keys of mappings are not texts.
    """
    return cast("ContainerSpec", _map(container, "", change))


def names_used(container: ContainerSpec, namespace: Namespace) -> frozenset[str]:
    """Return the names in `namespace` that the texts of `container` hold templates of."""
    names: set[str] = set()

    def noted(_: str, text: str) -> str:
        names.update(_names(text, namespace))
        return text

    map_texts(container, noted)
    return frozenset(names)


def fill_container(
    container: ContainerSpec,
    envs: Mapping[str, str],
    *,
    secrets: Mapping[str, str] | None = None,
    secret_envs: Collection[str] = (),
) -> ContainerSpec:
    """Return `container` with what the server left open: its envs, and its secret args.

    `${{ envs.NAME }}` is filled from `envs`, `${{ args.NAME }}` from `secrets`; other args were
    filled before. Shell text needs no care here: it holds variables, whose values stand in
    `environment`.

    Raises:
        GameNodeError: INVALID_REQUEST, with a violation for each name that has no value, for each
            secret that stands where others could read it, and for each text that is wrong once it
            is filled.
    """
    missing: dict[tuple[Namespace, str], Violation] = {}
    wrong: list[Violation] = []
    values = {Namespace.ENVS: envs, Namespace.ARGS: secrets or {}}
    hidden: Mapping[Namespace, Collection[str]] = {
        Namespace.ENVS: secret_envs,
        Namespace.ARGS: values[Namespace.ARGS],
    }

    def filled(path: str, text: str) -> str:
        right = True
        for namespace, known in values.items():
            for name in _names(text, namespace):
                if name not in known:
                    missing.setdefault((namespace, name), _missing(path, namespace, name))
                elif name in hidden[namespace] and not may_hold_secrets(path):
                    reason = f"{namespace}.{name} is secret, and others could read it here"
                    wrong.append(Violation(field=_FIELD + path, reason=reason, advice=ADVICE))
                else:
                    continue
                right = False
        if not right:
            return text
        result = fill(text, values)
        if result is not text and (problem := text_problem(path, result)):
            wrong.append(Violation(field=_FIELD + path, reason=problem[0], advice=problem[1]))
        return result

    changed = map_texts(container, filled)
    if violations := [*missing.values(), *wrong]:
        first = violations[0]
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            f"{first.field}: {first.reason}",
            violations=violations,
            hint=first.advice,
        )
    return changed


def _names(text: str, namespace: Namespace) -> Iterator[str]:
    for found in find(text):
        if isinstance(found, Template) and found.namespace is namespace:
            yield found.name


def _missing(path: str, namespace: Namespace, name: str) -> Violation:
    if namespace is Namespace.ARGS:
        return Violation(field=_FIELD + path, reason=f"the value of the secret {name} is missing")
    return Violation(
        field=_FIELD + path,
        reason=f"the node has no env {name}",
        advice=f"define {name} in the agent's configuration, or pass -e {name}=…",
    )


def _read(match: re.Match[str]) -> Found:
    inside = _INSIDE.fullmatch(match["inside"])
    if not inside:
        return Mistake(
            match.start(),
            f"{match[0]} cannot be read",
            "write ${{ args.NAME }} or ${{ envs.NAME }}",
        )
    if inside["namespace"] not in tuple(Namespace):
        return Mistake(
            match.start(),
            f"{match[0]}: there is no {inside['namespace']!r}",
            f"write ${{{{ args.{inside['name']} }}}} or ${{{{ envs.{inside['name']} }}}}",
        )
    return Template(Namespace(inside["namespace"]), inside["name"], match.start(), match.end())


def _unclosed(text: str, start: int) -> Mistake:
    beginning = text[start : start + 20].splitlines()[0]
    return Mistake(start, f"the template {beginning!r} is not closed", "end it with }}")


def _map(value: object, path: str, change: Callable[[str, str], str]) -> object:
    match value:
        case str():
            return change(path, value)
        case tuple():
            return tuple(_map(item, f"{path}[{i}]", change) for i, item in enumerate(value))
        case Mapping():
            return {key: _map(item, f"{path}.{key}", change) for key, item in value.items()}
        case _ if is_dataclass(value) and not isinstance(value, type):
            below = path + "." if path else ""
            changed = {
                f.name: _map(getattr(value, f.name), below + f.name, change) for f in fields(value)
            }
            return replace(value, **changed)
        case _:
            return value
