"""The table of an ablation: a row per level, with what it changes in quality, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .factors import BASELINE
from .readings import FIGURES, difference

Readings = Sequence[Mapping[str, Any]]  # of Reading.to_dict


def ablation_table(readings: Readings, costs: Mapping[str, Any], defaults: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per factor for its default and one per level, in the order they were read.

    ``readings`` hold those of the baseline (factor and level "default") and of the levels; a factor that brings its own
    default (level "default") is compared with that. ``costs`` are those of `measure` by "factor level" and "default"; a
    level without any has the default's. ``defaults`` name each factor's default.
    """
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for reading in readings:
        cells.setdefault((reading["factor"], reading["level"]), []).append(reading)
    rows = []
    for factor in dict.fromkeys(factor for factor, _ in cells if factor != BASELINE):
        baseline = cells.get((factor, BASELINE), cells[BASELINE, BASELINE])
        # the default against itself: differences of 0
        rows.append(_row(factor, defaults[factor], baseline, baseline, costs.get(BASELINE), True))
        for (other, level), cell in cells.items():
            if other == factor and level != BASELINE:
                rows.append(_row(factor, level, cell, baseline, costs.get(f"{factor} {level}"), False))
    return rows


def _row(
    factor: str, level: str, readings: Readings, baseline: Readings, cost: Mapping[str, Any] | None, default: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {"factor": factor, "level": level, "default": default}
    row |= {"n": len({r["document"] for r in readings}), "seeds": len({r["seed"] for r in readings})}
    for name in FIGURES:
        row[name] = float(np.mean([reading[name] for reading in readings]))
        row[f"{name}_above"] = difference(readings, baseline, name)
    row["verdict"] = "default" if default else _verdict(row["kl_above"])
    if cost is not None:
        row |= {"ms": cost["ms"], "mb": cost.get("mb"), "over_default": cost["over_default"]}
    return row


def _verdict(above: Mapping[str, Any]) -> str:
    """What the interval of the KL says."""
    # an interval that holds 0 shows nothing
    return "worse" if above["low"] > 0 else "better" if above["high"] < 0 else "no difference shown"
