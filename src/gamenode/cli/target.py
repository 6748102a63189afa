"""Where to connect, and as whom: the command line, the environment, the context file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final
from urllib.parse import urlsplit

import click

from gamenode.domain.errors import ErrorCode, GameNodeError, invalid

URL_DEFAULT: Final = "http://127.0.0.1:8080"
_TOKEN_BYTES_MAX: Final = 8192
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and the token to show it."""

    url: str = URL_DEFAULT
    token: str = field(default="", repr=False)
    source: str = "the default"
    """Who named the server, in words."""

    @property
    def exposes_token(self) -> bool:
        """Whether the token would cross a network where others can read it."""
        parts = urlsplit(self.url)
        return bool(self.token) and parts.scheme == "http" and parts.hostname not in _LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One context: a server that has a name here."""

    url: str
    token_file: str = ""
    token: str = field(default="", repr=False)

    def read_token(self) -> str:
        """Return the token of this context; empty where it has none."""
        return read_token(self.token_file) if self.token_file else self.token


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """What the context file holds."""

    places: Mapping[str, Place] = field(default_factory=dict)
    current: str = ""

    def get(self, name: str) -> Place:
        """Return the context called `name`.

        Raises:
            GameNodeError: NOT_FOUND, naming those that there are.
        """
        try:
            return self.places[name]
        except KeyError:
            known = ", ".join(sorted(self.places)) or "none yet: gamenode context add"
            raise GameNodeError(
                ErrorCode.NOT_FOUND, f"no context {name!r}", hint=f"there are: {known}"
            ) from None


class ContextFile:
    """The file of contexts in the user's configuration folder; only its owner may read it."""

    def __init__(self, path: Path | None = None) -> None:
        """Use `path`, or the user's own file."""
        self._path = path or Path(click.get_app_dir("gamenode")) / "contexts.json"

    def load(self) -> Contexts:
        """Return what the file holds; a file that is not there holds nothing.

        Raises:
            GameNodeError: INVALID_REQUEST, where it cannot be read as contexts.
        """
        try:
            document = json.loads(self._path.read_bytes())
            places = {name: Place(**place) for name, place in document["contexts"].items()}
            return Contexts(places=places, current=document.get("current", ""))
        except FileNotFoundError:
            return Contexts()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise invalid(
                str(self._path), f"is no context file: {error}", advice="repair or remove it"
            ) from error

    def save(self, contexts: Contexts) -> None:
        """Replace the file as a whole, readable by its owner alone."""
        document = {
            "current": contexts.current,
            "contexts": {
                name: {
                    key: value
                    for key, value in (
                        ("url", place.url),
                        ("token_file", place.token_file),
                        ("token", place.token),
                    )
                    if value
                }
                for name, place in contexts.places.items()
            },
        }
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made with mode 0600, then moved: nobody ever reads a half of it, or another's token.
            with NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(document, file, indent=2)
            os.replace(file.name, self._path)  # noqa: PTH105 - both are names already
        except OSError as error:
            raise invalid(str(self._path), f"cannot be written: {error.strerror}") from error


def read_token(path: str) -> str:
    """Return the token in the file at `path`; `-` is standard input.

    Raises:
        GameNodeError: INVALID_REQUEST, where there is no readable, non-empty line of text.
    """
    try:
        with click.open_file(path) as file:
            token = str(file.read(_TOKEN_BYTES_MAX)).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise invalid("--token-file", f"{path}: {reason}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise invalid("--token-file", f"{path}: holds no token")
    return token


def choose_target(
    *,
    url: str | None,
    context: str | None,
    token_file: str | None,
    environ: Mapping[str, str],
    contexts: ContextFile,
) -> Target:
    """Return the server to speak to, and as whom.

    The nearest word counts: `--url`, `--context`, `GAMENODE_URL`, `GAMENODE_CONTEXT`, the current
    context, the default. A context's token goes to that context's server and to no other.
    """
    named = context or (environ.get("GAMENODE_CONTEXT") if not environ.get("GAMENODE_URL") else "")
    place: Place | None = None
    if url:
        source = "--url"
    elif not context and (url := environ.get("GAMENODE_URL")):
        source = "GAMENODE_URL"
    else:
        known = contexts.load()
        name = named or known.current
        place = known.get(name) if name else None
        url = place.url if place else URL_DEFAULT
        source = f"the context {name!r}" if place else "the default"
    if token_file:
        token = read_token(token_file)
    elif context and place:
        token = place.read_token() or environ.get("GAMENODE_TOKEN", "")
    else:
        token = environ.get("GAMENODE_TOKEN", "") or (place.read_token() if place else "")
    return Target(url=check_url(url), token=token, source=source)


def check_url(url: str) -> str:
    """Return `url` without a final slash.

    Raises:
        GameNodeError: INVALID_REQUEST, where it is no HTTP address.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    else:
        valid = valid and not (parts.query or parts.fragment or parts.username)
    if not valid or not url.isprintable() or " " in url:
        raise invalid("--url", f"{url!r} is no address", advice=f"write it like {URL_DEFAULT}")
    return url.rstrip("/")
