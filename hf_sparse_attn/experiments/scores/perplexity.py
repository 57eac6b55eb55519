"""Before and after the joint stage, and against dense LoRA on the same rows: perplexity, paired by window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...evaluation.statistics import RESAMPLES

Windows = Sequence[Mapping[str, Any]]  # of WindowResult.to_dict
Key = tuple[int, int | None, str]


def comparison(after: Windows, before: Windows | None = None, reference: Windows | None = None) -> list[dict[str, Any]]:
    """One row per length, budget and selection of ``after``: mean log-losses in nats a token and their perplexities.

    ``over_reference`` is the perplexity after the joint stage over that of ``reference`` (dense LoRA, read densely),
    with a 95 % interval over resampled windows; only windows that both have. ``decode_over_reference`` is the same of
    the tokens that were fed through the cache, where no query knows what later ones of its tile select.
    """
    dense = {(w["length"], w["document"]): w for w in reference or ()}
    old = {(_key(w), w["document"]): w["prefill"] for w in before or ()}
    cells: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for window in after:
        cells[_key(window)].append(window)
    return [_row(key, windows, old, dense) for key, windows in sorted(cells.items(), key=_order)]


def _key(window: Mapping[str, Any]) -> Key:
    return window["length"], window["keys"], window["selection"]


def _order(cell: tuple[Key, Any]) -> tuple[int, int]:
    (length, keys, _), _ = cell
    # dense rows, which have no budget, come first
    return length, keys or 0


def _row(
    key: Key, windows: Windows, old: Mapping[Any, float], dense: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    length, keys, selection = key
    after = _mean(w["prefill"] for w in windows)
    row: dict[str, Any] = {"length": length, "keys": keys, "selection": selection, "n": len(windows)}
    row |= {"after": after, "perplexity_after": float(np.exp(after))}
    known = [old[key, w["document"]] for w in windows if (key, w["document"]) in old]
    # of the same windows only: means over others would differ by their texts
    if len(known) == len(windows):
        row |= {"before": _mean(known), "perplexity_before": float(np.exp(_mean(known)))}
    pairs = [(w, dense[length, w["document"]]) for w in windows if (length, w["document"]) in dense]
    for name, path in (("over_reference", "prefill"), ("decode_over_reference", "decode")):
        above = [w[path] - other[path] for w, other in pairs if w.get(path) is not None and other.get(path) is not None]
        if above:
            row[name] = _perplexity_ratio(np.array(above))
    return row


# exp(mean(after − reference)): the ratio of the two perplexities over the windows that both have
def _perplexity_ratio(above: np.ndarray) -> dict[str, float]:
    """exp of the mean difference of log-losses, with a 95 % interval over resampled windows."""
    picks = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.exp(np.quantile(above[picks].mean(-1), [0.025, 0.975]))
    return {"ratio": float(np.exp(above.mean())), "low": float(low), "high": float(high)}


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
