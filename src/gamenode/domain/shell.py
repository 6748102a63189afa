"""Values in shell text: they arrive as variables, never as syntax.

`echo ${{ args.WHO }}` becomes `echo "${GAMENODE_ARG_WHO}"`, and the value travels in the
environment. Whatever it holds, the shell reads it after it has read the script, so it stays one
word. Quotes are only added where the author's own are not, which is what the scan below is for:
were it ever wrong, a value might be split into words, but it still could not run anything.

Where a variable would not mean its value (single quotes, here-documents, arithmetic, backquotes)
a template is a mistake. So it is in text that the shell, or one that it starts, reads a second time
as a script: `eval`, `trap`, the script of `sh -c`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from gamenode.domain.template import OPENING, Mistake, Namespace, Template, find

VARIABLE_PREFIXES: Final = {
    Namespace.ARGS: "GAMENODE_ARG_",
    Namespace.ENVS: "GAMENODE_ENV_",
}
"""Variables that begin so are GameNode's own."""

_BY_ENVIRONMENT: Final = 'give it a name in environment, and write "$NAME" here'
_TROUBLES: Final = {
    "'": ("in single quotes, where the shell looks at nothing", "use double quotes"),
    "`": ("in backquotes", "write $(…) in place of the backquotes"),
    "${": ("inside ${…}", _BY_ENVIRONMENT),
    "((": ("in arithmetic, which would calculate what it holds", _BY_ENVIRONMENT),
    "a(": ("in arithmetic, which would calculate what it holds", _BY_ENVIRONMENT),
    "<<": ("in or after a here-document", _BY_ENVIRONMENT),
    "$'": ("after $'…', which shells read differently", _BY_ENVIRONMENT),
    "case": ("in a $(…) that holds a case", _BY_ENVIRONMENT),
    "again": ("in what is read as a script once more", _BY_ENVIRONMENT),
}

_WORD_BEGINS: Final = r"(?<![^\s;&|()`/])"
_READ_AGAIN: Final = re.compile(
    rf"{_WORD_BEGINS}(?:(?P<whole>eval|trap|let)\s"
    r"|(?:ba|da|a|k|z)?sh(?:\s+[-+][a-zA-Z]*[oO]\s+\w+|\s+[-+]\S+){0,8}?\s+-[a-zA-Z]*c[a-zA-Z]*\s)"
    # Where two sides are compared as numbers, bash calculates what they hold.
    r"|(?P<compared>\[\[\s(?=[^\]]{0,1000}?\s-(?:eq|ne|l[te]|g[te])\s))"
)
"""What makes a shell read its words once more: all of them, or the next one as its script."""
_QUOTED: Final = r"\"(?:[^\"\\]|\\.)*+(?:\"|(?P<open>\Z))|'[^']*+'?|\\."
_AGAIN_TO: Final = {
    "script": re.compile(rf"\s*(?:{_QUOTED}|[^\s;&|\"'\\])*+", re.DOTALL),
    "whole": re.compile(rf"(?:{_QUOTED}|[^;&|\n\"'\\])*+", re.DOTALL),
    "compared": re.compile(r"(?:(?!\]\]).)*+", re.DOTALL),
}

_SUBSTITUTION: Final = r"\$?\(\(|\$\(|\$\{"
# What can end or begin a context, by the context that it is in; "" is plain script.
_PLAIN: Final = re.compile(
    rf"\\.|['\"`]|{_SUBSTITUTION}|\$'|[()]|<<<?|(?<![^\s;&|()])(?:\#|case(?=\s))", re.DOTALL
)
_MARKS: Final = {
    "": _PLAIN,
    "$(": _PLAIN,
    "(": _PLAIN,
    "'": re.compile(r"'"),
    '"': re.compile(r"\\.|[\"`]|\$\(\(|\$\(|\$\{", re.DOTALL),
    "`": re.compile(r"\\.|`", re.DOTALL),
    "#": re.compile(r"\n"),
    "${": re.compile(rf"\\.|['\"`}}]|{_SUBSTITUTION}", re.DOTALL),
    "((": re.compile(rf"\\.|['\"`]|\)\)|{_SUBSTITUTION}|\(", re.DOTALL),
    "a(": re.compile(rf"\\.|['\"`]|{_SUBSTITUTION}|[()]", re.DOTALL),
}
_CLOSING: Final = {"'": "'", '"': '"', "`": "`", "#": "\n", "${": "}", "$(": ")", "(": ")"} | {
    "((": "))",
    "a(": ")",
}
_OPENING: Final = {"'": "'", '"': '"', "`": "`", "#": "#", "${": "${", "$(": "$(", "(": "("} | {
    "$((": "((",
    "((": "((",
}
_SHELLS: Final = frozenset({"sh", "ash", "bash", "dash", "ksh", "zsh"})
_SCRIPT_OPTION: Final = re.compile(r"-[a-zA-Z]*c[a-zA-Z]*")
_NAMED_OPTION: Final = re.compile(r"[-+][a-zA-Z]*[oO]")  # its name is the next word: -o pipefail


class Shell:
    """Rewrites the lines of one script, in order; quotes may span lines."""

    def __init__(self) -> None:
        """Begin at the start of a script."""
        self.variables: dict[str, str] = {}
        """The variables that the lines written so far need: name to template."""
        self._contexts: list[str] = []
        self._again_in: int | None = None
        """How deep the quotes are, of an earlier line, whose text is read once more."""
        self._beyond: str | None = None
        self._mark_end = 0

    def line(self, text: str) -> tuple[str, list[Mistake]]:
        """Return `text` with variables in place of templates, and the templates that cannot be."""
        parts: list[str] = []
        mistakes: list[Mistake] = []
        end = self._mark_end = 0
        again = _read_again(text) if OPENING in text or '"' in text else []
        for found in find(text):
            self._advance(text, end, found.start)
            if isinstance(found, Mistake):
                mistakes.append(found)
                continue
            trouble = self._trouble(text, found)
            while again and again[0][1] <= found.start:
                del again[0]
            if self._again_in is not None or (again and again[0][0] <= found.start):
                trouble = trouble or _TROUBLES["again"]
            if trouble:
                mistakes.append(
                    Mistake(found.start, f"a template cannot stand {trouble[0]}", trouble[1])
                )
            parts += text[end : found.start], self._variable(found)
            end = found.end
        self._advance(text, end, len(text))
        if again and again[-1][2] and self._again_in is None and self._contexts[-1:] == ['"']:
            self._again_in = len(self._contexts)
        self._advance("\n", 0, 1)
        return "".join([*parts, text[end:]]), mistakes

    def _variable(self, template: Template) -> str:
        name = VARIABLE_PREFIXES[template.namespace] + template.name
        self.variables[name] = f"${{{{ {template.namespace}.{template.name} }}}}"
        quoted = self._contexts[-1:] in (['"'], ["#"])
        return f"${{{name}}}" if quoted else f'"${{{name}}}"'

    def _trouble(self, text: str, template: Template) -> tuple[str, str] | None:
        before = text[template.start - 1 : template.start]
        if before in {"$", "\\"} and self._mark_end < template.start:
            return f"right after {before}", _BY_ENVIRONMENT
        if self._beyond:
            return _TROUBLES[self._beyond]
        # From any depth: what is substituted inside arithmetic is calculated as well.
        return next((_TROUBLES[c] for c in self._contexts if c in _TROUBLES), None)

    def _advance(self, text: str, start: int, end: int) -> None:
        while start < end:
            context = self._contexts[-1] if self._contexts else ""
            mark = _MARKS[context].search(text, start, end)
            if not mark:
                return
            self._take(context, mark[0])
            start = self._mark_end = mark.end()

    def _take(self, context: str, mark: str) -> None:
        if mark == _CLOSING.get(context):
            self._contexts.pop()
            if self._again_in is not None and len(self._contexts) < self._again_in:
                self._again_in = None
        elif mark in {"<<", "$'"} or (mark == "case" and "$(" in self._contexts):
            self._beyond = self._beyond or mark
        elif mark == "(" and context in {"((", "a("}:
            self._contexts.append("a(")
        elif mark == "'" and '"' in self._contexts and context == "${":
            pass  # an ordinary character there
        elif mark in _OPENING:
            self._contexts.append(_OPENING[mark])


def _read_again(text: str) -> list[tuple[int, int, bool]]:
    """Return which parts of a line are read once more, and whether quotes there stay open."""
    parts: list[tuple[int, int, bool]] = []
    at = 0
    while begin := _READ_AGAIN.search(text, at):
        to = _AGAIN_TO[begin.lastgroup or "script"].match(text, begin.end())
        assert to is not None
        is_open = "open" in to.re.groupindex and to["open"] is not None
        parts.append((begin.end(), to.end(), is_open))
        at = max(to.end(), begin.end())
    return parts


def script_index(words: Sequence[str]) -> int | None:
    """Return which of `words` a shell would read as a script, as in `sh -c SCRIPT`, if any."""
    for index, word in enumerate(words):
        if word.rpartition("/")[2] in _SHELLS:
            at = _after_options(words, index + 1)
            if at < len(words) and _SCRIPT_OPTION.fullmatch(words[at - 1]):
                return at
    return None


def _after_options(words: Sequence[str], at: int) -> int:
    # Up to and with the option that says that a script follows.
    while at < len(words) and words[at][:1] in {"-", "+"}:
        if _SCRIPT_OPTION.fullmatch(words[at]):
            return at + 1
        at += 2 if _NAMED_OPTION.fullmatch(words[at]) else 1
    return at
