"""The routes of pipelines."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from gamenode.domain.args import resolve
from gamenode.domain.errors import invalid
from gamenode.domain.pipeline import NewPipeline, Pipeline, PipelineSpec, Status
from gamenode.domain.quantity import parse_duration
from gamenode.server.api import page
from gamenode.server.api.decode import (
    BodyReader,
    NoQuery,
    QueryReader,
    read_idempotency_key,
)
from gamenode.server.api.operation import Call, Operation, answer
from gamenode.server.api.streams import unless_gone
from gamenode.server.pipelines.manager import PipelineManager
from gamenode.server.pipelines.service import GamePipelineGRPCService
from gamenode.wire import http
from gamenode.wire.pipeline_file import parse_pipeline

PIPELINE_BODY: Final = BodyReader(
    http.PipelineRequest, from_file=lambda text: http.PipelineRequest(file=text)
)
"""What asks for a pipeline: its members as JSON, or the file alone."""


class PipelinesQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which pipelines."""

    status: Annotated[Status | None, Meta(description="Only those with this status.")] = None
    node: Annotated[str, Meta(max_length=63, description="Only those of this node.")] = ""
    q: Annotated[str, Meta(max_length=256, description="Only those with this in id or name.")] = ""
    limit: page.Limit = 100
    cursor: page.Cursor = ""


class PipelineQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to show a pipeline."""

    wait: Annotated[
        str,
        Meta(description="Answer once it has ended, at the latest after this time, such as `30s`."),
    ] = ""


class PipelineRoutes:
    """Creates, lists, shows, cancels, extends and repeats pipelines."""

    def __init__(
        self, manager: PipelineManager, service: GamePipelineGRPCService, *, wait_s_max: float
    ) -> None:
        """Speak for `manager` and `service`; let nobody wait longer than `wait_s_max`."""
        self._manager = manager
        self._service = service
        self._wait_s_max = wait_s_max

    def operations(self) -> Sequence[Operation[Any, Any]]:
        """Return what can be done."""
        return (
            Operation(
                method="POST",
                path="/api/v1/pipelines",
                summary="Create a pipeline",
                handler=self._create,
                query=QueryReader(NoQuery),
                body=PIPELINE_BODY,
                answer=http.Pipeline,
                status=HTTPStatus.CREATED,
                headers={
                    "Idempotency-Key": "The same key and body again answer with the pipeline that "
                    "was created the first time."
                },
            ),
            Operation(
                method="POST",
                path="/api/v1/pipelines:validate",
                summary="Check a pipeline file",
                handler=self._validate,
                query=QueryReader(NoQuery),
                body=BodyReader(
                    http.ValidateRequest, from_file=lambda text: http.ValidateRequest(file=text)
                ),
                answer=http.PipelineFile,
            ),
            Operation(
                method="GET",
                path="/api/v1/pipelines",
                summary="List pipelines",
                handler=self._list,
                query=QueryReader(PipelinesQuery),
                answer=http.PipelineList,
            ),
            Operation(
                method="GET",
                path="/api/v1/pipelines/{pipeline}",
                summary="Show a pipeline",
                handler=self._show,
                query=QueryReader(PipelineQuery),
                answer=http.Pipeline,
            ),
            Operation(
                method="POST",
                path="/api/v1/pipelines/{pipeline}:cancel",
                summary="Cancel a pipeline",
                handler=self._cancel,
                query=QueryReader(NoQuery),
                body=BodyReader(http.CancelRequest, default=http.CancelRequest()),
                answer=http.Pipeline,
            ),
            Operation(
                method="POST",
                path="/api/v1/pipelines/{pipeline}:retry",
                summary="Repeat a pipeline that failed or was cancelled, as a new one",
                handler=self._retry,
                query=QueryReader(NoQuery),
                body=BodyReader(http.RetryRequest, default=http.RetryRequest()),
                answer=http.Pipeline,
                status=HTTPStatus.CREATED,
                headers={"Idempotency-Key": "The same key again answers with the first retry."},
            ),
            Operation(
                method="POST",
                path="/api/v1/pipelines/{pipeline}:extend",
                summary="Let a pipeline and its steps take longer",
                handler=self._extend,
                query=QueryReader(NoQuery),
                body=BodyReader(http.ExtendRequest),
                answer=http.Pipeline,
                headers={"Idempotency-Key": "The same key again extends nothing."},
            ),
        )

    async def _create(self, call: Call[NoQuery, http.PipelineRequest]) -> ASGIApp:
        request = new_pipeline(call.body, idempotency_key=read_idempotency_key(call.request))
        return _created(await self._manager.create(request, by=call.actor))

    async def _validate(self, call: Call[NoQuery, http.ValidateRequest]) -> ASGIApp:
        # On a thread: a hostile file may take its time.
        spec = await asyncio.to_thread(_checked, call.body.file, call.body.args)
        return answer(http.encode_pipeline_file(spec))

    async def _list(self, call: Call[PipelinesQuery, None]) -> ASGIApp:
        query = call.query
        found = await self._service.list(
            status=query.status,
            node=query.node,
            q=query.q,
            limit=query.limit + 1,
            before=page.read_pipeline_cursor(query.cursor),
        )
        pipelines, last = page.split(found, query.limit)
        return answer(
            http.PipelineList(
                items=[http.encode_pipeline(pipeline) for pipeline in pipelines],
                next_cursor=page.pipeline_cursor(last.created_at, last.id) if last else None,
            )
        )

    async def _show(self, call: Call[PipelineQuery, None]) -> ASGIApp:
        pipeline_id = call.path["pipeline"]
        wait_s = parse_duration(call.query.wait, field="wait") if call.query.wait else 0.0
        if wait_s > self._wait_s_max:
            raise invalid("wait", f"must be at most {self._wait_s_max:g}s", advice="ask again then")
        pipeline = await (
            unless_gone(call.request.receive, self._manager.wait_ended(pipeline_id, wait_s))
            if wait_s
            else self._service.get(pipeline_id)
        )
        return answer(http.encode_pipeline(pipeline))

    async def _cancel(self, call: Call[NoQuery, http.CancelRequest]) -> ASGIApp:
        pipeline = await self._manager.cancel(
            call.path["pipeline"],
            reason=call.body.reason,
            force=call.body.force,
            by=call.actor,
        )
        return answer(http.encode_pipeline(pipeline))

    async def _retry(self, call: Call[NoQuery, http.RetryRequest]) -> ASGIApp:
        return _created(
            await self._manager.retry(
                call.path["pipeline"],
                from_failed=call.body.from_failed,
                key=read_idempotency_key(call.request),
                by=call.actor,
            )
        )

    async def _extend(self, call: Call[NoQuery, http.ExtendRequest]) -> ASGIApp:
        pipeline = await self._manager.extend(
            call.path["pipeline"],
            call.body.by_s,
            key=read_idempotency_key(call.request),
            by=call.actor,
        )
        return answer(http.encode_pipeline(pipeline))


def _created(pipeline: Pipeline) -> ASGIApp:
    return answer(
        http.encode_pipeline(pipeline),
        status=HTTPStatus.CREATED,
        headers={"location": f"/api/v1/pipelines/{pipeline.id}"},
    )


def new_pipeline(asked: http.PipelineRequest, *, idempotency_key: str = "") -> NewPipeline:
    """Return what a body asks for."""
    return NewPipeline(
        file=asked.file,
        args=_texts(asked.args),
        envs=_texts(asked.envs),
        node=asked.node,
        selector=asked.selector,
        priority=asked.priority,
        idempotency_key=idempotency_key,
    )


def _texts(values: Mapping[str, http.ArgValue]) -> dict[str, str]:
    return {name: http.arg_text(value) for name, value in values.items()}


def _checked(file: str, args: Mapping[str, http.ArgValue] | None) -> PipelineSpec:
    spec = parse_pipeline(file)
    if args is not None:
        resolve(spec, _texts(args))
    return spec
