"""The one grammar for choosing nodes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gamenode.domain.errors import ErrorCode, GameNodeError
from gamenode.domain.selector import Selector, parse_selector

VALUES = {"zone": ["a"], "gpu.model": ["RTX 4090", "RTX 3080"], "empty": [""]}


def matches(selector: Selector) -> bool:
    return selector.matches(lambda key: VALUES.get(key, ()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("zone", True),
        ("nothing", False),
        ("!nothing", True),
        ("!zone", False),
        ("zone=a", True),
        ("zone = a", True),
        ("zone=b", False),
        ("zone!=b", True),
        ("zone!=a", False),
        ("nothing!=a", True),
        ("nothing=a", False),
        ("gpu.model~4090", True),
        ("gpu.model!~4090", False),
        ("gpu.model!~5090", True),
        ("nothing!~x", True),
        ("gpu.model=RTX 3080", True),
        ("zone in (a|b)", True),
        ("zone in ( b | c )", False),
        ("empty=", True),
        ("zone=a,gpu.model~4090,!broken", True),
        ("zone=a,gpu.model~5090", False),
        (" zone = a , , !broken ", True),
        ("zone in (a|b),gpu.model in (RTX 4090)", True),
    ],
)
def test_what_a_selector_matches(text: str, expected: bool) -> None:
    assert matches(parse_selector(text)) is expected


@pytest.mark.parametrize(
    "text", ["=a", "!", "zone in a", "zone in (a", "zone in (a(b))", "a b", "!zone=a", "~", "zone("]
)
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(GameNodeError) as caught:
        parse_selector(text, field="placement.selector")
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.violations[0].field == "placement.selector"


@given(st.one_of(st.text(max_size=40), st.text("az=!~,()| in", max_size=30)))
@example("a" * 1025)
@example("zone=\n")
def test_any_text_is_a_selector_or_an_invalid_request(text: str) -> None:
    try:
        selector = parse_selector(text)
    except GameNodeError as error:
        assert error.code is ErrorCode.INVALID_REQUEST  # noqa: PT017 - the other way out is fine
    else:
        matches(selector)
