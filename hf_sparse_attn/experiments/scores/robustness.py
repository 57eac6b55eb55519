"""Where routers meet what they were not trained on: other kinds of text, longer inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...evaluation.statistics import loss_share

UPPER, LOWER = "oracle", "window + sink"
Readings = Sequence[Mapping[str, Any]]  # of Reading.to_dict, with "domain", "length", "keys" and "selection"


# share = (window's KL − KL) / (window's KL − oracle's KL), of means over windows
def robustness_table(readings: Readings) -> list[dict[str, Any]]:
    """One row per domain, length and selection: mean KL from dense attention and log-loss, in nats a token.

    ``share`` is how far the KL comes from window + sink (0) to the oracle (1), with a 95 % interval over resampled
    windows, paired.

    Raises:
        ValueError: a domain and length lack the oracle or window + sink on some window.
    """
    cells: dict[tuple[str, int, int], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for reading in readings:
        cell = cells.setdefault((reading["domain"], reading["length"], reading["keys"]), {})
        cell.setdefault(reading["selection"], {})[reading["document"]] = reading
    rows = []
    for (domain, length, keys), by_selection in cells.items():
        bounds = by_selection.get(LOWER, {}), by_selection.get(UPPER, {})
        for selection, cell_rows in by_selection.items():
            # shares are paired by window: both ends must have read each
            if any(document not in bound for document in cell_rows for bound in bounds):
                raise ValueError(
                    f"{domain}, {length} tokens: {selection!r} has windows that {LOWER!r} or {UPPER!r} lacks"
                )
            lower, mine, upper = (
                np.array([source[document]["kl"] for document in cell_rows])
                for source in (bounds[0], cell_rows, bounds[1])
            )
            loss = float(np.mean([reading["loss"] for reading in cell_rows.values()]))
            row = {"domain": domain, "length": length, "keys": keys, "selection": selection, "n": len(cell_rows)}
            rows.append({**row, "kl": float(mine.mean()), "loss": loss, "share": loss_share(lower, mine, upper)})
    return rows
