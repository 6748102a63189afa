"""Programs of the host that are asked for what no file shows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Final

Run = Callable[..., str | None]
"""Runs a program with arguments: what it printed, or None where there is no such program.

Raises `ProgramError` where it failed, or did not end in time."""

_FOLDERS: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ProgramError(Exception):
    """A program of the host failed or did not end in time."""


def folders() -> str:
    """Return where programs are looked for, separated like `PATH`."""
    # A service's PATH often lacks the folders in which the container runtimes lie.
    return os.pathsep.join(filter(None, (os.environ.get("PATH"), _FOLDERS)))


def runner(timeout_s: float) -> Run:
    """Return what runs a program of this host for at most `timeout_s`, in the C locale."""

    def run(*words: str) -> str | None:
        try:
            done = subprocess.run(  # noqa: S603 - the words are constants of this package
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=True,
                text=True,
                errors="replace",
                env={"PATH": folders(), "LC_ALL": "C"},
            )
        except (FileNotFoundError, PermissionError):
            return None
        except subprocess.TimeoutExpired as error:
            raise ProgramError(f"{words[0]} did not end in {timeout_s:g} s") from error
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip() or f"exit code {error.returncode}"
            raise ProgramError(f"{' '.join(words)}: {reason}") from error
        return done.stdout

    return run
