"""Write docs/operations/settings.md from the settings of the server and the agent.

python tools/settings_reference.py          # write it
python tools/settings_reference.py --check  # exit 1 if it is not what the code says
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gamenode.agent.settings import AgentSettings
from gamenode.server.settings import ServerSettings

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "operations" / "settings.md"
_HEAD: Final = """\
<!-- Written by tools/settings_reference.py; `make test` checks that it is current. -->

# Settings

Every setting of `gamenode server` and `gamenode agent`. Each can come, in rising order, from

1. the TOML file that `--config FILE` names: a table for each section;
2. an environment variable `GAMENODE_<SECTION>__<NAME>`;
3. a flag, where the command has one (`gamenode server --help`).

```toml
# agent.toml
[agent]
server = "127.0.0.1:9090"
node_id = "fra-07"
labels = { zone = "a" }

[envs.values]
WIND_ROOT = "/srv/wind"
```

    GAMENODE_AGENT__NODE_ID=fra-07 gamenode agent --config agent.toml

A section, a name or a value that cannot be used is an error that names it, and the nearest known
one. A variable that only the other program knows is left to it, so that one environment can serve
both; `gamenode dev` takes variables of both, and no file. Tables (such as `labels`) come from the
file alone.

The end of a name is its unit: `_s` seconds, `_bytes` bytes; `_max` is a limit.
"""


def page() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for command, settings_type in (("server", ServerSettings), ("agent", AgentSettings)):
        parts.append(f"## `gamenode {command}`\n")
        parts += [_section(name, section) for name, section in _sections(settings_type)]
    return "\n".join(parts)


def _sections(settings_type: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    hints = typing.get_type_hints(settings_type)
    for field in dataclasses.fields(settings_type):
        yield field.name, hints[field.name]


def _section(name: str, section: type[Any]) -> str:
    words = _words(section)
    summary = (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ")
    rows = [
        f"| `{field.name}` | `{_default(field)}` | {words.get(field.name, '')} |"
        for field in dataclasses.fields(section)
    ]
    table = "\n".join(["| name | default | what it is |", "|---|---|---|", *rows])
    return f"### `[{name}]`\n\n{summary}\n\n{table}\n"


def _words(section: type[Any]) -> Mapping[str, str]:
    """Return the text that follows each field in the source, of what it inherits too."""
    words: dict[str, str] = {}
    for parent in section.__bases__:
        if dataclasses.is_dataclass(parent):
            words |= _words(parent)
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str() as text)),
            ):
                words[name] = re.sub(r"\s+", " ", text).strip().replace("|", "\\|")
            case _:
                pass
    return words


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        assert field.default_factory is not dataclasses.MISSING
        value = field.default_factory()
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:_}"
        case float():
            return f"{value:_g}" if value < 1 else f"{value:_.10g}"
        case str() | Path():
            return f'"{value}"'
        case Mapping():
            return "{}"
        case frozenset() | tuple():
            return f"[{', '.join(sorted(map(str, value)))}]"
        case _:
            return str(value)


def main() -> int:
    """Return the exit code."""
    written = PAGE.read_text() if PAGE.exists() else ""
    if "--check" in sys.argv:
        if written != page():
            print(f"{PAGE.name} is not what the code says: run tools/settings_reference.py")
            return 1
        return 0
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
