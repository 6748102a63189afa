"""Structured logs of the server and the agent: text for a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, TextIO

from gamenode.domain.errors import GameNodeError

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LogLevel(StrEnum):
    """What is logged: this, and what is graver."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def set_up_logging(level: LogLevel, *, stream: TextIO | None = None) -> None:
    """Send every log record to `stream` (standard error), as text on a terminal, else as JSON."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Text() if stream.isatty() else _Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Each says at INFO what we say ourselves, or nothing of use.
    for noisy in ("uvicorn", "grpc", "asyncio", "alembic", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Return False for an answer that broke off with an error of ours: that is how it is said."""
    return not (record.exc_info and isinstance(record.exc_info[1], GameNodeError))


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Json(logging.Formatter):
    """One object a line: time, level, event, message, and what the record carries."""

    def format(self, record: logging.LogRecord) -> str:
        extras = _extras(record)
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": extras.pop("event", record.name),
            "message": record.getMessage(),
            **extras,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _Text(logging.Formatter):
    """One line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(
            f"{name}={value}" for name, value in _extras(record).items() if name != "event"
        )
        line = f"{_time(record)[11:23]} {record.levelname.lower():7} {record.getMessage()}"
        if extras:
            line += f"  ({extras})"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line
