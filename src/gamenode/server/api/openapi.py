"""The description of the HTTP interface, made of the operations and the types that serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from gamenode import __version__
from gamenode.domain.access import Role
from gamenode.server.api.decode import PATH_PARAMETERS
from gamenode.server.api.operation import Operation
from gamenode.server.api.problem import PROBLEM_MEDIA_TYPE
from gamenode.wire import http

_REF: Final = "#/components/schemas/{name}"

Document = dict[str, Any]


def describe(operations: Sequence[Operation[Any, Any]], *, roles: Mapping[str, Role]) -> Document:
    """Return the OpenAPI 3.1 document of `operations`."""
    models: list[type[Any]] = [http.Problem, http.LogLine, http.Event]
    for operation in operations:
        models += [operation.answer] if operation.answer else []
        models += [operation.body.model] if operation.body else []
    references, components = msgspec.json.schema_components(models, ref_template=_REF)
    schemas = dict(zip(models, references, strict=True))
    paths: dict[str, Document] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(
            operation, schemas, components, roles[operation.name]
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "GameNode", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(
    operation: Operation[Any, Any],
    schemas: Mapping[type[Any], Document],
    components: dict[str, Document],
    role: Role,
) -> Document:
    described: Document = {
        "operationId": operation.handler.__qualname__.replace("Routes._", "."),
        "summary": operation.summary,
        "description": f"Needs the role {role}.",
        "parameters": [
            *_path_parameters(operation),
            *_query_parameters(operation, components),
            *_header_parameters(operation),
        ],
        "responses": {
            str(operation.status.value): _success(operation, schemas),
            "default": {
                "description": "An error",
                "content": {PROBLEM_MEDIA_TYPE: {"schema": schemas[http.Problem]}},
            },
        },
    }
    if operation.body is not None:
        content: Document = {"application/json": {"schema": schemas[operation.body.model]}}
        if operation.body.takes_file:
            content["application/yaml"] = {"schema": {"type": "string"}}
        described["requestBody"] = {"required": operation.body.required, "content": content}
    return described


def _success(operation: Operation[Any, Any], schemas: Mapping[type[Any], Document]) -> Document:
    content: Document = {
        media_type: {"schema": {"type": "string"}} for media_type in operation.media_types
    }
    if operation.answer is not None:
        content["application/json"] = {"schema": schemas[operation.answer]}
    return {"description": HTTPStatus(operation.status).phrase, "content": content}


def _path_parameters(operation: Operation[Any, Any]) -> list[Document]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PATH_PARAMETERS[name].description,
            "schema": {"type": "string", "pattern": f"^{PATH_PARAMETERS[name].pattern.pattern}$"},
        }
        for name in operation.path_parameters
    ]


def _query_parameters(
    operation: Operation[Any, Any], components: dict[str, Document]
) -> list[Document]:
    model = operation.query.model
    (_,), own = msgspec.json.schema_components([model], ref_template=_REF)
    properties: dict[str, Document] = own.pop(model.__name__)["properties"]
    components.update(own)  # the enums that its parameters take
    return [
        {
            "name": name,
            "in": "query",
            "description": schema.get("description", ""),
            "schema": {key: value for key, value in schema.items() if key != "description"},
        }
        for name, schema in properties.items()
    ]


def _header_parameters(operation: Operation[Any, Any]) -> list[Document]:
    return [
        {"name": name, "in": "header", "description": meaning, "schema": {"type": "string"}}
        for name, meaning in (operation.headers or {}).items()
    ]
