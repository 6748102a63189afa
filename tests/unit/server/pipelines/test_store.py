"""What is asked again and again costs nothing while there is nothing to find (RC3)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import sqlite

from gamenode.server.db import schema
from gamenode.server.pipelines import queue, store

SWEPT: dict[str, Any] = {
    "what is asked for": queue._DEMAND_IDS,
    "what is asked for by one": queue._DEMAND,
    "what was not taken": store._OWED[0],
    "whose end is not known": store._OWED[1],
    "whose extension is not known": store._OWED[2],
    "what may still run": store._LINGERING,
    "what does not wait": store._NODES_OF_FAILING,
}


@pytest.mark.parametrize("what", SWEPT)
def test_a_sweep_reads_an_index_of_what_it_looks_for_and_no_table(what: str) -> None:
    compiled = SWEPT[what].compile(dialect=sqlite.dialect(paramstyle="named"))
    engine = create_engine("sqlite://")
    schema.metadata.create_all(engine)
    with engine.connect() as conn:
        asked = text(f"EXPLAIN QUERY PLAN {compiled}")
        plan = conn.execute(asked, dict.fromkeys(compiled.params, 1)).all()
    engine.dispose()
    details = [row.detail for row in plan]
    assert re.search("INDEX (pipelines|reservations)_", details[0]), details
    assert not any(detail == "SCAN pipelines" for detail in details), details
