from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import pytest

from gamenode.lib.settings import SettingsError, load_settings


class _Mode(StrEnum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True, kw_only=True)
class _Section:
    address: str = "here"
    mode: _Mode = _Mode.SAFE
    wait_s: float = 1.0
    look_interval_s: float = 1.0
    queue_max: int = 1
    retries: int = 1


@dataclass(frozen=True, kw_only=True)
class _Settings:
    server: _Section = field(default_factory=_Section)


def _load(
    file: dict[str, object], environment: dict[str, str], flags: dict[str, object]
) -> _Section:
    return load_settings(
        _Settings,
        file={"server": file},
        file_name="server.toml",
        environment=environment,
        prefix="GAMENODE_",
        flags={"server": flags},
    ).server


def test_a_flag_beats_the_environment_which_beats_the_file() -> None:
    file: dict[str, object] = {"address": "file", "wait_s": 2}
    environment = {"GAMENODE_SERVER__ADDRESS": "environment"}
    assert _load(file, {}, {}) == _Section(address="file", wait_s=2.0)
    assert _load(file, environment, {"address": None}).address == "environment"
    assert _load(file, environment, {"address": "flag"}).address == "flag"


def test_a_choice_is_read_from_its_name() -> None:
    assert _load({"mode": "fast"}, {}, {}).mode is _Mode.FAST
    assert _load({}, {"GAMENODE_SERVER__MODE": "fast"}, {}).mode is _Mode.FAST


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("GAMENODE_SERVER__ADRESS", "did you mean server.address?"),
        ("GAMENODE_SERVR__ADDRESS", "did you mean server?"),
        ("GAMENODE_SERVER__WAIT_S", "could not convert"),
        ("GAMENODE_SERVER__MODE", "must be one of fast, safe, not 'x'"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(variable: str, told: str) -> None:
    with pytest.raises(SettingsError, match=variable) as caught:
        _load({}, {variable: "x"}, {})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wait_s", "nan"),
        ("wait_s", "inf"),
        ("wait_s", "-1"),
        ("look_interval_s", "0"),
        ("queue_max", "0"),
        ("queue_max", "-1"),
        ("retries", "-1"),
    ],
)
def test_a_number_that_can_be_no_bound_is_refused(name: str, value: str) -> None:
    variable = f"GAMENODE_SERVER__{name.upper()}"
    with pytest.raises(SettingsError, match=f"{variable}: server.{name}: must be"):
        _load({}, {variable: value}, {})


@pytest.mark.parametrize("name", ["wait_s", "retries"])
def test_no_wait_and_no_retry_can_be_wanted(name: str) -> None:
    assert getattr(_load({}, {f"GAMENODE_SERVER__{name.upper()}": "0"}, {}), name) == 0
