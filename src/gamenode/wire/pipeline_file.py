"""The pipeline file: YAML text to `PipelineSpec`, with every mistake at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Final

from gamenode.domain.pipeline import PipelineSpec
from gamenode.domain.template import Namespace
from gamenode.wire.pipeline_schema import PIPELINE, name_of
from gamenode.wire.shapes import JsonSchema, Reading
from gamenode.wire.yaml_document import (
    ListNode,
    MapNode,
    Node,
    Problems,
    decode_text,
    read_document,
)

_FILES_KEPT_MAX: Final = 64


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
    for use in reading.uses:
        template = use.template
        names = declared[template.namespace]
        if template.name not in names:
            reason = f"uses {template.namespace}.{template.name}, which is not declared"
            advice = _declare(template.namespace, template.name, names, reading)
            reading.problems.add(use.field, use.mark, reason, advice)


def _declare(kind: Namespace, name: str, declared: Collection[str], reading: Reading) -> str:
    near = [] if reading.problems.full else get_close_matches(name, declared, n=1)
    return f"did you mean {near[0]}?" if near else f"add {name} to {kind}:"


def _names(document: Node, key: str) -> Iterator[str]:
    declared = document.entries.get(key) if isinstance(document, MapNode) else None
    if not declared or not isinstance(declared[1], ListNode):
        return
    for item in declared[1].items:
        name = name_of(item)
        if name is not None:
            yield name
