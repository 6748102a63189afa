"""The HTTP interface, as the commands use it: one kept connection, and one for each stream."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from gamenode import __version__
from gamenode.cli.errors import ApiError, SilentError, UnreachableError, problem_of_answer
from gamenode.cli.settings import CliSettings
from gamenode.cli.target import URL_DEFAULT, Target
from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.lib.clock import Clock

API: Final = "/api/v1"

Body = Mapping[str, Any]
Query = Mapping[str, str | int | bool | Sequence[str] | None]
Trace = Callable[[str], None]
"""Is told of each exchange, in one line of text without secrets."""

_PATH_SAFE: Final = "/:@!$&'()*+,;=~%-._?"
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_SECRET_HEADERS: Final = frozenset({"authorization", "cookie", "set-cookie"})


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `path` is from the server's root; the server may take `wait_s` to answer."""

    method: str
    path: str
    query: Query = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does what sending it once does."""
        return self.method in {"GET", "HEAD"} or "Idempotency-Key" in self.headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer that is no error."""

    content_type: str
    body: bytes

    def json(self) -> Any:
        """Return the body's JSON.

        Raises:
            GameNodeError: INTERNAL, where it is none: something else than GameNode answered.
        """
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise GameNodeError(
                ErrorCode.INTERNAL,
                f"the answer is no JSON but {self.content_type or 'untyped'}",
                hint="check --url: is that a GameNode server?",
            ) from error


class Stream:
    """An answer that goes on: bytes as they come."""

    def __init__(self, response: HTTPResponse, *, block_bytes: int, describe: str) -> None:
        """Read from `response`, at most `block_bytes` at once."""
        self._response = response
        self._block_bytes = block_bytes
        self._describe = describe

    @property
    def content_type(self) -> str:
        """What the bytes are."""
        return self._response.headers.get("Content-Type", "")

    def header(self, name: str) -> str:
        """Return a header of the answer; empty where it has none such."""
        return self._response.headers.get(name, "")

    def read(self) -> bytes:
        """Return the next bytes, none at the end that the server meant.

        Raises:
            SilentError: nothing came for a while; the stream cannot be read any further.
            UnreachableError: the stream broke off.
        """
        try:
            return self._response.read1(self._block_bytes)
        except TimeoutError as error:
            raise SilentError(f"{self._describe} is silent", sent=True) from error
        except (OSError, HTTPException) as error:
            raise UnreachableError(f"{self._describe} broke off", sent=True) from error

    def lines(self) -> Iterator[bytes]:
        """Yield whole lines as they come; a last line without its end is not one."""
        rest = b""
        while block := self.read():
            *whole, rest = (rest + block).split(b"\n")
            yield from whole


class ApiClient:
    """Speaks to one server. Not for several threads at once."""

    def __init__(
        self,
        target: Target,
        *,
        clock: Clock,
        settings: CliSettings,
        trace: Trace | None = None,
        headers_traced: bool = False,
        answer_s: float | None = None,
    ) -> None:
        """Speak to `target`; nothing is sent before the first request.

        `answer_s` bounds the wait for an answer, in place of the settings' bound.
        """
        self.target = target
        self._parts = urlsplit(target.url)
        self._clock = clock
        self._settings = settings
        self._trace = trace
        self._headers_traced = headers_traced
        self._answer_s = answer_s or settings.answer_s
        self._connection: HTTPConnection | None = None

    def get(self, path: str, query: Query | None = None, *, wait_s: float = 0.0) -> Any:
        """Return the JSON at `path` below /api/v1; the server may take `wait_s` for it."""
        return self.send(Request("GET", API + path, query or {}, wait_s=wait_s)).json()

    def patch(self, path: str, body: Body) -> Any:
        """Patch what is at `path` below /api/v1; return the answer's JSON."""
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json"}
        return self.send(Request("PATCH", API + path, body=content, headers=headers)).json()

    def delete(self, path: str, query: Query | None = None) -> Any:
        """Delete what is at `path` below /api/v1; return the answer's JSON, if it has any."""
        answer = self.send(Request("DELETE", API + path, query or {}))
        return answer.json() if answer.body else None

    def put(self, path: str, body: Body, query: Query | None = None, *, wait_s: float = 0.0) -> Any:
        """Put `body` to `path` below /api/v1; return the answer's JSON."""
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(
            "PUT", API + path, query or {}, body=content, headers=headers, wait_s=wait_s
        )
        return self.send(request).json()

    def post(
        self,
        path: str,
        body: Body,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Post `body` to `path` below /api/v1; return the answer's JSON."""
        content = json.dumps(body, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = Request("POST", API + path, query or {}, body=content, headers=headers)
        return self.send(request).json()

    def items(self, path: str, query: Query) -> Iterator[Body]:
        """Yield every item of the list at `path`, page after page, as far as they are asked for."""
        cursor: str | None = None
        while True:
            page = self.get(path, {**query, "cursor": cursor})
            yield from page["items"]
            cursor = page.get("next_cursor")
            if not cursor:
                return

    def send(self, request: Request) -> Answer:
        """Return the answer to one request.

        A request that may be repeated is sent again, once, where a kept connection turns out to
        have been closed in the meantime.

        Raises:
            ApiError: the server refused.
            UnreachableError: no whole answer came.
        """
        kept = self._connection is not None
        try:
            return self._exchange(request)
        except SilentError:
            raise
        except UnreachableError:
            if not (kept and request.repeatable):
                raise
            return self._exchange(request)

    @contextmanager
    def stream(self, request: Request, *, silence_s: float) -> Generator[Stream]:
        """Open an answer that goes on; `silence_s` bounds each wait for its next bytes.

        Raises:
            ApiError: the server refused.
            UnreachableError: no answer began.
        """
        connection = self._connect()
        try:
            response = self._begin(connection, request)
            if response.status >= HTTPStatus.BAD_REQUEST:
                raise ApiError(self._problem(response, self._read(response)))
            _set_timeout(connection, silence_s)
            yield Stream(
                response,
                block_bytes=self._settings.block_bytes,
                describe=f"the stream from {self.target.url}",
            )
        finally:
            connection.close()

    def close(self) -> None:
        """Close the kept connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(self, request: Request) -> Answer:
        if self._connection is None:
            self._connection = self._connect()
        try:
            response = self._begin(self._connection, request)
            content = self._read(response)
        except BaseException:
            # Whatever stopped us (Ctrl-C too): the connection is in the middle of an answer.
            self.close()
            raise
        if response.will_close:
            self.close()
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise ApiError(self._problem(response, content))
        return Answer(content_type=response.headers.get("Content-Type", ""), body=content)

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        assert self._parts.hostname is not None  # checked when the target was chosen
        connection = kind(self._parts.hostname, self._parts.port, timeout=self._settings.connect_s)
        try:
            connection.connect()
        except OSError as error:
            raise UnreachableError(
                f"cannot connect to {self.target.url}, named by {self.target.source}:"
                f" {error.strerror or error}",
                sent=False,
                hint=_connect_hint(self.target),
            ) from error
        _keep_alive(connection.sock)
        return connection

    def _begin(self, connection: HTTPConnection, request: Request) -> HTTPResponse:
        address = self._parts.path + quote(request.path, safe=_PATH_SAFE) + _encode(request)
        headers = {
            "Accept": "application/json, */*;q=0.5",
            "User-Agent": f"gamenode/{__version__}",
            **({"Authorization": f"Bearer {self.target.token}"} if self.target.token else {}),
            **request.headers,
        }
        patience_s = self._answer_s + request.wait_s
        began_s = self._clock.monotonic_s()
        try:
            _set_timeout(connection, patience_s)
            connection.request(request.method, address, body=request.body, headers=headers)
            response = connection.getresponse()
        except TimeoutError as error:
            raise SilentError(
                f"{self.target.url} gave no answer within {patience_s:g} s",
                sent=True,
                hint="the server may be overloaded; --timeout waits longer",
            ) from error
        except (OSError, HTTPException) as error:
            raise self._broke_off(error) from error
        if self._trace is not None:
            took_ms = (self._clock.monotonic_s() - began_s) * 1000
            self._trace(f"{request.method} {address} -> {response.status} in {took_ms:.1f} ms")
            if self._headers_traced:
                _trace_headers(self._trace, "> ", headers.items())
                _trace_headers(self._trace, "< ", response.getheaders())
        return response

    def _read(self, response: HTTPResponse) -> bytes:
        try:
            content = response.read(self._settings.answer_bytes_max + 1)
        except (OSError, HTTPException) as error:
            raise self._broke_off(error) from error
        if len(content) > self._settings.answer_bytes_max:
            raise GameNodeError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"the answer is longer than {self._settings.answer_bytes_max} bytes",
            )
        return content

    def _broke_off(self, error: OSError | HTTPException) -> UnreachableError:
        return UnreachableError(f"{self.target.url} broke off: {_reason(error)}", sent=True)

    def _problem(self, response: HTTPResponse, content: bytes) -> Body:
        return problem_of_answer(
            response.status,
            content,
            content_type=response.headers.get("Content-Type", ""),
            url=self.target.url,
        )


def segment(text: str) -> str:
    """Return `text` as one segment of a path, whatever characters it has."""
    return quote(text, safe="")


def is_away(error: ApiError | GameNodeError) -> bool:
    """Return whether `error` says that the server, or what stands before it, is away for now."""
    if isinstance(error, ApiError):
        return error.code == ErrorCode.UNAVAILABLE
    return isinstance(error, UnreachableError)


def _encode(request: Request) -> str:
    pairs: list[tuple[str, str]] = []
    for name, value in request.query.items():
        if value is None or value == "":
            continue
        if isinstance(value, bool):
            pairs.append((name, "true" if value else "false"))
        elif isinstance(value, (str, int)):
            pairs.append((name, str(value)))
        else:
            pairs.extend((name, each) for each in value)
    if not pairs:
        return ""
    return ("&" if "?" in request.path else "?") + urlencode(pairs)


def _trace_headers(trace: Trace, mark: str, headers: Iterable[tuple[str, str]]) -> None:
    for name, value in headers:
        trace(f"{mark}{name}: {'(redacted)' if name.lower() in _SECRET_HEADERS else value}")


def _reason(error: OSError | HTTPException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _set_timeout(connection: HTTPConnection, seconds: float) -> None:
    # The socket is gone where the server closed it after its last answer; sending will say so.
    with contextlib.suppress(AttributeError):
        connection.sock.settimeout(seconds)


def _keep_alive(sock: socket.socket) -> None:
    # A host that loses its power says no goodbye; without this a stream would wait for ever.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _connect_hint(target: Target) -> str:
    if target.url == URL_DEFAULT:
        return "`gamenode dev` starts a server here; --url or GAMENODE_URL names another"
    return "is the server running? --url, GAMENODE_URL or a context says where to connect"
