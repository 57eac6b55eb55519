"""The table of ``docs/selectors.md``: every selector at equal budget on the same windows, from one results file."""

from __future__ import annotations

from typing import Any

from . import provenance
from .markdown import table
from .quality_tables import interval, number

NAME = "selectors"
HEADER = [
    "selection",
    "n",
    "keys kept",
    "log-loss",
    "above the oracle's",
    "KL from dense",
    "log-loss, token by token",
    "kept mass",
    "recall",
]


def lines() -> list[str]:
    """Where the figures come from, and the table."""
    results = provenance.read(NAME)
    rows = results["table"]
    length, keys = rows[-1]["length"], rows[-1]["keys"]
    alone = rows[-1]["n"] == 1
    spread = "one window, an illustration" if alone else "in brackets the 95 % interval over windows, paired"
    caption = (
        f"{keys} of {length} keys, {spread}. Log-loss and KL in nats a token. Token by token: the last tokens, "
        "each routed by itself."
    )
    return [*provenance.lines(NAME, results), caption, "", *table(HEADER, [cells(row) for row in rows])]


def cells(row: dict[str, Any]) -> list[Any]:
    """One selector: empty cells where the figure says nothing of it."""
    mass = row.get("kept_mass")
    return [
        *(row["selection"], row["n"], number(row.get("kept"), 0) or "all", number(row["prefill"])),
        *(interval(row.get("prefill_above_oracle"), "mean"), number(row.get("kl")), number(row.get("decode"))),
        *(None if mass is None else number(mass["mean"]), number(row.get("recall"))),
    ]
