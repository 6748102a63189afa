"""What stands before every gRPC method: its role, its rules, and the translation of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, NoReturn, Protocol, cast
from urllib.parse import unquote

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
from gamenode.server.access.refusals import Refusals
from gamenode.server.access.roles import require
from gamenode.server.events.internal_errors import InternalErrors
from gamenode.wire.errors import OUTWARD


class Authenticate(Protocol):
    """Says who calls."""

    async def __call__(
        self, authorization: str | None, /, *, source: str, as_agent: bool = False
    ) -> Actor:
        """Return who sent this metadata from this address, or raise UNAUTHENTICATED.

        With `as_agent`, who sends none may be an agent.
        """


Context = grpc.aio.ServicerContext[Any, Any]

_CREDENTIALS: Final = "authorization"
_ERROR_DOMAIN: Final = "gamenode"
_caller: ContextVar[Actor] = ContextVar("caller")


Check = Callable[[Any], GameNodeError | None]
"""Returns why a message is refused, or None; its contract may be violated as well."""


def check_message(validator: Validator, message: Message, further: Check | None = None) -> None:
    """Hold a message against the rules that its contract states, and against `further` ones.

    Raises:
        GameNodeError: INVALID_REQUEST, with every violation of either kind at once (A2).
    """
    found = [_field_violation(violation) for violation in validator.collect_violations(message)]
    refusal = further(message) if further is not None else None
    if refusal is not None:
        named = [violation.field for violation in refusal.violations]
        found = [wrong for wrong in found if not _is_named(wrong.field, named)]
        if not found:
            raise refusal
        found = [*refusal.violations, *found]
    if found:
        raise GameNodeError(
            ErrorCode.INVALID_REQUEST,
            "; ".join(f"{violation.field}: {violation.reason}" for violation in found),
            violations=found,
        )


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Checks role and rules before the method, and says every error the same way after it."""

    def __init__(
        self,
        *,
        roles: Mapping[str, Role],
        authenticate: Authenticate,
        refusals: Refusals,
        internal_errors: InternalErrors,
        checks: Mapping[type[Message], Check],
    ) -> None:
        """Guard with the one method -> role table; a method that is not in it is never called.

        `checks` are rules beyond the contract's own, by the type of a request.
        """
        self._checks = checks
        self._roles = roles
        self._authenticate = authenticate
        self._refusals = refusals
        self._internal_errors = internal_errors
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
        if handler is None:
            return None
        method = handler_call_details.method
        if self._roles[method] is Role.PUBLIC:
            return handler
        read = _reading(cast("Any", handler.request_deserializer))
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(cast("Any", handler.stream_stream), method),
                read,
                handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._unary_stream(cast("Any", handler.unary_stream), method),
                read,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(cast("Any", handler.unary_unary), method),
            read,
            handler.response_serializer,
        )

    async def _admit(self, context: Context, method: str) -> None:
        needed = self._roles[method]
        sent = [
            str(value) for key, value in context.invocation_metadata() or () if key == _CREDENTIALS
        ]
        actor = await self._authenticate(
            # A call with two of them is nobody's: joined, they are no credentials.
            ", ".join(sent) if sent else None,
            source=_host_of(context.peer()),
            as_agent=needed is Role.NODE,
        )
        _caller.set(actor)
        require(actor, needed)

    def _check(self, request: Message | GameNodeError) -> None:
        if isinstance(request, GameNodeError):
            raise request
        check_message(self._validator, request, self._checks.get(type(request)))

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Any]:
        async def guarded(request: Message, context: Context) -> Any:
            try:
                await self._admit(context, method)
                self._check(request)
                return await call(request, context)
            except Exception as error:  # noqa: BLE001 - the edge translates all
                await self._refuse(context, error, method, request)

        return guarded

    def _unary_stream(
        self, call: Callable[..., AsyncIterator[Any]], method: str
    ) -> Callable[..., Any]:
        async def guarded(request: Message, context: Context) -> AsyncIterator[Any]:
            try:
                await self._admit(context, method)
                self._check(request)
                async for response in call(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001 - the edge translates all
                await self._refuse(context, error, method, request)

        return guarded

    def _stream(
        self, call: Callable[..., Awaitable[None] | AsyncIterator[Any]], method: str
    ) -> Callable[..., Any]:
        async def guarded(requests: AsyncIterator[Message], context: Context) -> None:
            async def checked() -> AsyncIterator[Message]:
                async for request in requests:
                    self._check(request)
                    yield request

            try:
                await self._admit(context, method)
                answers = call(checked(), context)
                if isinstance(answers, AsyncIterator):
                    async for response in answers:
                        await context.write(response)
                else:
                    await answers  # it writes by itself
            except Exception as error:  # noqa: BLE001 - the edge translates all
                await self._refuse(context, error, method)

        return guarded

    async def _refuse(
        self, context: Context, error: Exception, method: str, request: Message | None = None
    ) -> NoReturn:
        """End a call with a status that carries google.rpc details (J1)."""
        if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
            raise error
        if not isinstance(error, GameNodeError):
            error = self._internal_errors.report(error, place=method)
        actor = _caller.get(None)
        if actor is not None:
            await self._refusals.record(
                error,
                operation=method,
                by=actor,
                target=getattr(request, "pipeline_id", "") or getattr(request, "node_id", ""),
                reason=getattr(request, "reason", ""),
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


def _is_named(field: str, named: Sequence[str]) -> bool:
    """Return whether `field`, or something in it, is among what is wrong already."""
    return any(other == field or other.startswith((f"{field}.", f"{field}[")) for other in named)


def _host_of(peer: str) -> str:
    """Return the address in a peer's name, such as `ipv4:127.0.0.1:5000`."""
    kind, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind.startswith("ip") else kind


def _status_of(error: GameNodeError) -> status_pb2.Status:
    outward = OUTWARD[error.code]
    code = grpc.StatusCode[outward.grpc_status].value[0]
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.code,
            domain=_ERROR_DOMAIN,
            metadata={
                name: value
                for name, value in (("hint", error.hint), ("id", error.error_id))
                if value
            },
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
