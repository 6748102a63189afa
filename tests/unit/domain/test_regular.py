from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamenode.domain.regular import PATTERN_LENGTH_MAX, VALUE_LENGTH_MAX, read_pattern

ATOMS = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "1", "(?:ab)", "(a|b1)"]
)
TIMES = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,}", "{0,2}", "{2,3}"])


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.builds(lambda body, times: f"({body}){times}", inner, TIMES)
    either = st.builds(lambda a, b: f"(?:{a}|{b})", inner, inner)
    return st.builds(lambda a, b: a + b, group | either, inner)


PATTERNS = st.recursive(
    st.builds(lambda a, t, b, u: a + t + b + u, ATOMS, TIMES, ATOMS, TIMES), _nested, max_leaves=3
)


@given(PATTERNS, st.text(alphabet="ab1.", max_size=8))
def test_it_matches_what_re_matches(pattern: str, value: str) -> None:
    expected = re.fullmatch(pattern, value, re.ASCII) is not None
    assert read_pattern(pattern).matches(value) is expected


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        (r"^\d{1,3}(\.\d{1,3}){3}$", "192.168.0.1", True),
        (r"\d{1,3}(\.\d{1,3}){3}", "192.168.0", False),
        (r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", "a-b", True),
        (r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", "a-", False),
        (r"prod|staging", "staging", True),
        (r"prod|staging", "stagin", False),
        (r"a\$", "a$", True),
        (r"[\]\\-]+", "]\\-", True),
        (r"[]a]+", "]a", True),
        (r"", "", True),
        (r"", "a", False),
        (r"a", "a\n", False),
        (r".", "\n", False),
        (r"é+", "éé", True),
    ],
)
def test_the_whole_value_is_described(pattern: str, value: str, matches: bool) -> None:
    assert read_pattern(pattern).matches(value) is matches


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)", "(a", "[a", "*", "a**", "a{3,2}", "a{0}", "a*?", "{2}", "[z-a]", "[[a]"),
        *("(?=a)", "(?<n>a)", "(?i)a", r"\1", r"\b", "\\", "a$b", "a^b", "[a||b]", "[+--]"),
        *("(a{999}){999}", "((((){99}){99}){99}){99}", "a" * (PATTERN_LENGTH_MAX + 1), "a{300}"),
    ],
)
def test_what_cannot_be_matched_safely_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be read|is too large|longer than|more than"):
        read_pattern(pattern)


@given(st.text(alphabet=r"ab()[]{}*+?|^$\.-,0123456789:"))
def test_any_text_is_read_or_refused(pattern: str) -> None:
    try:
        read_pattern(pattern)
    except ValueError:
        return
    re.compile(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a*)*(a*)*b", "(.*.*.*.*){5}b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    started_s = time.perf_counter()
    assert not read_pattern(pattern).matches("a" * VALUE_LENGTH_MAX)
    assert time.perf_counter() - started_s < 1.0


def test_a_long_value_never_matches() -> None:
    assert not read_pattern("a*").matches("a" * (VALUE_LENGTH_MAX + 1))
