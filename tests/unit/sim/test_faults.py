from __future__ import annotations

import pytest

from gamenode.domain.errors import GameNodeError
from gamenode.sim.faults import Fault, FaultKind, parse_faults


def test_a_specification_names_what_goes_wrong_how_often_and_for_how_long() -> None:
    assert parse_faults("partition=0.05/30s, kill=.01/1m,slow=0.02,skew=0.01:90s,silence=1") == (
        Fault(kind=FaultKind.PARTITION, ratio=0.05, duration_s=30.0),
        Fault(kind=FaultKind.KILL, ratio=0.01, duration_s=60.0),
        Fault(kind=FaultKind.SLOW, ratio=0.02, duration_s=2.0),
        Fault(kind=FaultKind.SKEW, ratio=0.01, duration_s=90.0),
        Fault(kind=FaultKind.SILENCE, ratio=1.0, duration_s=60.0),
    )
    assert parse_faults("") == ()


@pytest.mark.parametrize(
    "text", ["fire=0.1", "kill", "kill=1.5", "kill=0.1/soon", "kill=0.1,kill=0.2", "kill=-1"]
)
def test_what_is_no_specification_is_refused(text: str) -> None:
    with pytest.raises(GameNodeError, match="--faults"):
        parse_faults(text)
