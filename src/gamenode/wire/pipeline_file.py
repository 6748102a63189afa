"""The pipeline file: YAML text to `PipelineSpec`, with every mistake at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Final

from gamenode.domain.pipeline import ArgType, PipelineSpec
from gamenode.domain.secret import ADVICE
from gamenode.domain.template import Namespace
from gamenode.wire.pipeline_schema import PIPELINE, name_of
from gamenode.wire.shapes import JsonSchema, Reading
from gamenode.wire.yaml_document import (
    ListNode,
    MapNode,
    Node,
    Problems,
    ScalarNode,
    decode_text,
    read_document,
)

_FILES_KEPT_MAX: Final = 64
_HOLDS_SECRETS: Final = re.compile(
    r"steps\[\d+\]\.container\.(?:environment|commands)\b.*", re.DOTALL
)
# Where a secret can stand: its own processes alone read it there. In commands it is a variable.


def parse_pipeline(text: str | bytes, *, file: str = "pipeline") -> PipelineSpec:
    """Return the pipeline that `text` writes; `file` is what messages call it.

    Templates stay in the texts, except where a shell reads them: there they are variables already
    (see `gamenode.domain.shell`), and `environment` holds what those stand for.

    Raises:
        GameNodeError: INVALID_REQUEST, with a violation for every mistake (up to 100), each with
            its field, line, column, reason and advice.

    Source: F6, F10.
    """
    problems = Problems()
    decoded = decode_text(text, problems)
    if decoded is None:
        raise problems.error(file)
    return _parse(decoded, file)


def pipeline_json_schema() -> JsonSchema:
    """Return the JSON Schema (draft 2020-12) of the pipeline file, from the table that reads it.

    It refuses nothing that `parse_pipeline` takes.

    Source: F6.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "GameNode pipeline file",
    } | PIPELINE.json_schema()


# A file that starts games is sent over and over; specs are frozen, so one can serve them all.
@lru_cache(maxsize=_FILES_KEPT_MAX)
def _parse(text: str, file: str) -> PipelineSpec:
    reading = Reading(Problems())
    document = read_document(text, reading.problems)
    spec = None
    if document:
        spec = PIPELINE.read(document, "", reading)
        _check_declared(document, reading)
    if spec is None or reading.problems.violations:
        raise reading.problems.error(file)
    return spec


def _check_declared(document: Node, reading: Reading) -> None:
    # By the nodes and not by the spec: one mistake elsewhere must not hide these.
    declared = {
        Namespace.ARGS: set(_names(document, "args")),
        Namespace.ENVS: set(_names(document, "envs")),
    }
    secret = set(_secrets(document))
    for use in reading.uses:
        template = use.template
        if (
            template.namespace is Namespace.ARGS
            and template.name in secret
            and not _HOLDS_SECRETS.fullmatch(use.field)
        ):
            reason = f"holds the secret {template.name}, and others could read it here"
            reading.problems.add(use.field, use.mark, reason, ADVICE)
        names = declared[template.namespace]
        if template.name not in names:
            reason = f"uses {template.namespace}.{template.name}, which is not declared"
            advice = _declare(template.namespace, template.name, names, reading)
            reading.problems.add(use.field, use.mark, reason, advice)


def _declare(kind: Namespace, name: str, declared: Collection[str], reading: Reading) -> str:
    near = [] if reading.problems.full else get_close_matches(name, declared, n=1)
    return f"did you mean {near[0]}?" if near else f"add {name} to {kind}:"


def _names(document: Node, key: str) -> Iterator[str]:
    return (name for item in _items(document, key) if (name := name_of(item)) is not None)


def _secrets(document: Node) -> Iterator[str]:
    for item in _items(document, "args"):
        declared = item.entries.get("type") if isinstance(item, MapNode) else None
        if declared and isinstance(declared[1], ScalarNode) and declared[1].text == ArgType.SECRET:
            yield name_of(item) or ""


def _items(document: Node, key: str) -> Sequence[Node]:
    declared = document.entries.get(key) if isinstance(document, MapNode) else None
    return declared[1].items if declared and isinstance(declared[1], ListNode) else ()
