"""Runs the operators' program inside the test."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from gamenode.cli.command import Invocation
from gamenode.cli.main import cli
from gamenode.cli.settings import CliSettings

FAST = CliSettings(
    silence_s=0.2,
    away_s_max=3.0,
    start_s_max=0.3,
    retry_s_first=0.01,
    retry_s_most=0.05,
    poll_s_first=0.01,
    poll_s_most=0.05,
    watch_s=0.02,
)


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()


class _Screen(io.TextIOWrapper):
    """A stream that says whether it is a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


@dataclass(frozen=True)
class Program:
    """How the program is started: where its server is, and what surrounds it."""

    url: str = ""
    settings: CliSettings = FAST
    environ: Mapping[str, str] = field(default_factory=dict)
    sleep: Callable[[float], None] = time.sleep
    terminal: bool = False

    def __call__(self, *args: str, stdin: bytes = b"") -> Result:
        streams = [_Screen(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        for stream in streams:
            stream.terminal = self.terminal
        stdout, stderr = streams
        invocation = Invocation(settings=self.settings, environ=self._environ(), sleep=self.sleep)
        with (
            patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
            patch.object(sys, "stdout", stdout),
            patch.object(sys, "stderr", stderr),
        ):
            exit_code = _exit_code(list(args), invocation)
            stdout.flush()
            stderr.flush()
        return Result(exit_code, _content(stdout), _content(stderr).decode())

    def _environ(self) -> Mapping[str, str]:
        return {"GAMENODE_URL": self.url, **self.environ} if self.url else self.environ


def _exit_code(args: list[str], invocation: Invocation) -> int:
    try:
        cli.main(args, obj=invocation)
    except SystemExit as ended:
        code: Any = ended.code
        return int(code or 0)
    raise AssertionError("the program did not exit")


def _content(stream: io.TextIOWrapper) -> bytes:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue()
