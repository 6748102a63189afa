from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from gamenode.__main__ import AGENT_SECTIONS, SERVER_SECTIONS
from gamenode.agent.settings import AgentSettings
from gamenode.lib.settings import SettingsError, load_settings
from gamenode.server.settings import ServerSettings


def _load(settings_type: Any, variable: str, value: str, foreign: frozenset[str]) -> Any:
    return load_settings(
        settings_type,
        file={},
        file_name="",
        environment={variable: value},
        prefix="GAMENODE_",
        flags={},
        foreign=foreign,
    )


@pytest.mark.parametrize(
    ("named", "settings"), [(SERVER_SECTIONS, ServerSettings), (AGENT_SECTIONS, AgentSettings)]
)
def test_the_named_sections_are_those_of_the_settings(named: frozenset[str], settings: Any) -> None:
    assert named == {field.name for field in fields(settings)}


@pytest.mark.parametrize(
    "variable", ["GAMENODE_NODES__JUDGE_INTERVAL_S", "GAMENODE_LOGS__CHUNK_BYTES_MIN"]
)
def test_a_variable_of_the_other_program_is_no_mistake(variable: str) -> None:
    assert _load(AgentSettings, variable, "1", SERVER_SECTIONS) == AgentSettings()


@pytest.mark.parametrize("variable", ["GAMENODE_NODE__X", "GAMENODE_RUNNER__X"])
def test_a_variable_that_no_program_knows_is_refused(variable: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        _load(AgentSettings, variable, "1", SERVER_SECTIONS)
