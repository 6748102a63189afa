"""How the outcome of a simulation is shown."""

from __future__ import annotations

from typing import Final

from gamenode.cli.output import Column, Part, View, field

VIEW: Final = View(
    columns=(
        Column("NODES", field("nodes")),
        Column("SEED", field("seed")),
        Column("KEPT", field("kept")),
    ),
    name=lambda body: str(body["seed"]),
    parts=(
        Part(
            "promises",
            (
                Column("PROMISE", field("promise")),
                Column("VERDICT", field("verdict")),
                Column("WHAT", field("text")),
                Column("SEEN", field("seen")),
            ),
        ),
        Part("figures", (Column("FIGURE", field("name")), Column("VALUE", field("value")))),
    ),
)
