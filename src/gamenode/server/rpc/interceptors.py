"""What stands before every gRPC method: its role, its rules, and the translation of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final, NoReturn, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from protovalidate import Validator, Violation

from gamenode.domain.access import Actor, Role
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.errors import Violation as FieldViolation
from gamenode.lib.ids import Ids
from gamenode.wire.errors import OUTWARD

_log = logging.getLogger(__name__)

Authenticate = Callable[[Mapping[str, str], str], Actor]
"""Returns who calls, from the call's metadata and its peer; raises UNAUTHENTICATED."""

_SERVICE: Final = "gamenode.v1.GameNodeService"
_ERROR_DOMAIN: Final = "gamenode"
_caller: ContextVar[Actor] = ContextVar("caller")


def check_message(validator: Validator, message: Message) -> None:
    """Hold a message against the rules that its contract states.

    Raises:
        GameNodeError: INVALID_REQUEST, with every violation at once (A2).
    """
    found = validator.collect_violations(message)
    if not found:
        return
    violations = [_field_violation(violation) for violation in found]
    raise GameNodeError(
        ErrorCode.INVALID_REQUEST,
        "; ".join(f"{violation.field}: {violation.reason}" for violation in violations),
        violations=violations,
    )


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Checks role and rules before the method, and says every error the same way after it."""

    def __init__(self, *, roles: Mapping[str, Role], authenticate: Authenticate, ids: Ids) -> None:
        """Guard with the one method -> role table; a method that is not in it is never called."""
        self._roles = roles
        self._authenticate = authenticate
        self._ids = ids
        self._validator = Validator()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(f"/{_SERVICE}/"):
            return handler
        role = self._roles[method]
        read = _reading(cast("Any", handler.request_deserializer))
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(cast("Any", handler.stream_stream), role),
                read,
                handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._unary_stream(cast("Any", handler.unary_stream), role),
                read,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(cast("Any", handler.unary_unary), role),
            read,
            handler.response_serializer,
        )

    def _admit(self, context: grpc.aio.ServicerContext[Any, Any], role: Role) -> None:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        actor = self._authenticate(metadata, context.peer())
        if not actor.may(role):
            raise GameNodeError(
                ErrorCode.PERMISSION_DENIED, f"this needs the role {role}; yours is {actor.role}"
            )
        _caller.set(actor)

    def _check(self, request: Message | GameNodeError) -> None:
        if isinstance(request, GameNodeError):
            raise request
        check_message(self._validator, request)

    def _unary(self, call: Callable[..., Awaitable[Any]], role: Role) -> Callable[..., Any]:
        async def guarded(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._admit(context, role)
                self._check(request)
                return await call(request, context)
            except Exception as error:  # noqa: BLE001 - the edge translates all
                await self._refuse(context, error)

        return guarded

    def _unary_stream(
        self, call: Callable[..., AsyncIterator[Any]], role: Role
    ) -> Callable[..., Any]:
        async def guarded(
            request: Message, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            try:
                self._admit(context, role)
                self._check(request)
                async for response in call(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001 - the edge translates all
                await self._refuse(context, error)

        return guarded

    def _stream(self, call: Callable[..., Awaitable[None]], role: Role) -> Callable[..., Any]:
        async def guarded(
            requests: AsyncIterator[Message], context: grpc.aio.ServicerContext[Any, Any]
        ) -> None:
            async def checked() -> AsyncIterator[Message]:
                async for request in requests:
                    self._check(request)
                    yield request

            try:
                self._admit(context, role)
                await call(checked(), context)
            except Exception as error:  # noqa: BLE001 - the edge translates all
                await self._refuse(context, error)

        return guarded

    async def _refuse(
        self, context: grpc.aio.ServicerContext[Any, Any], error: Exception
    ) -> NoReturn:
        """End a call with a status that carries google.rpc details (J1)."""
        if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
            raise error
        if not isinstance(error, GameNodeError):
            error_id = self._ids.new()
            _log.error(
                "unexpected error in a call",
                exc_info=error,
                extra={"event": "error.internal", "error_id": error_id},
            )
            error = GameNodeError(
                ErrorCode.INTERNAL, f"an error in the server; its id is {error_id}"
            )
        status = rpc_status.to_status(_status_of(error))
        context.set_trailing_metadata(status.trailing_metadata)
        await context.abort(status.code, status.details)


def _reading(read: Callable[[bytes], Message]) -> Callable[[bytes], Message | GameNodeError]:
    """Return `read`, with the refusal in place of a message that is none.

    The library would answer UNKNOWN to what a deserializer raises.
    """

    def read_or_refuse(data: bytes) -> Message | GameNodeError:
        try:
            return read(data)
        except DecodeError as error:
            return GameNodeError(ErrorCode.INVALID_REQUEST, f"the message cannot be read: {error}")

    return read_or_refuse


def calling_actor() -> Actor:
    """Return who makes the call that is being served."""
    return _caller.get()


def _status_of(error: GameNodeError) -> status_pb2.Status:
    outward = OUTWARD[error.code]
    code = grpc.StatusCode[outward.grpc_status].value[0]
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.code,
            domain=_ERROR_DOMAIN,
            metadata={"hint": error.hint} if error.hint else {},
        )
    ]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field,
                        description=_description(violation),
                    )
                    for violation in error.violations
                ]
            )
        )
    if error.retry_after_s is not None:
        seconds, rest_s = divmod(error.retry_after_s, 1.0)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(rest_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code, message=f"{error.code}: {error.message}")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _description(violation: FieldViolation) -> str:
    where = f"line {violation.line}, column {violation.column}: " if violation.line else ""
    advice = f" ({violation.advice})" if violation.advice else ""
    return f"{where}{violation.reason}{advice}"


def _field_violation(violation: Violation) -> FieldViolation:
    proto = violation.proto
    path = ""
    for element in proto.field.elements if proto.field is not None else ():
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None:
            path += f"[{subscript.value}]"
    return FieldViolation(field=path, reason=_reason(proto.rule_id, proto.message))


def _reason(rule: str, message: str) -> str:
    if rule in ("required", "enum.not_in"):
        return "must be set"
    return message.removeprefix("value ")
