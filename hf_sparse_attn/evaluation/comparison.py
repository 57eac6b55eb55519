"""Before and after the joint stage, and against dense LoRA on the same rows: perplexity, paired by window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .shares import RESAMPLES

Windows = Sequence[Mapping[str, Any]]  # of WindowResult.to_dict
Key = tuple[int, int | None, str]


def comparison(after: Windows, before: Windows | None = None, reference: Windows | None = None) -> list[dict[str, Any]]:
    """One row per length, budget and selection of ``after``: mean log-losses in nats a token and their perplexities.

    ``over_reference`` is the perplexity after the joint stage over that of ``reference`` (dense LoRA, read densely),
    with a 95 % interval over resampled windows; only windows that both have.
    """
    dense = {(w["length"], w["document"]): w["prefill"] for w in reference or ()}
    old = {(_key(w), w["document"]): w["prefill"] for w in before or ()}
    cells: dict[Key, dict[str, float]] = defaultdict(dict)
    for window in after:
        cells[_key(window)][window["document"]] = window["prefill"]
    return [_row(key, losses, old, dense) for key, losses in sorted(cells.items(), key=_order)]


def _key(window: Mapping[str, Any]) -> Key:
    return window["length"], window["keys"], window["selection"]


def _order(cell: tuple[Key, Any]) -> tuple[int, int]:
    (length, keys, _), _ = cell
    return length, keys or 0


def _row(key: Key, losses: dict[str, float], old: Mapping[Any, float], dense: Mapping[Any, float]) -> dict[str, Any]:
    length, keys, selection = key
    row: dict[str, Any] = {"length": length, "keys": keys, "selection": selection, "n": len(losses)}
    row |= {"after": _mean(losses.values()), "perplexity_after": float(np.exp(_mean(losses.values())))}
    known = [old[key, document] for document in losses if (key, document) in old]
    if len(known) == len(losses):
        row |= {"before": _mean(known), "perplexity_before": float(np.exp(_mean(known)))}
    paired = np.array([loss - dense[length, document] for document, loss in losses.items() if (length, document) in dense])
    if len(paired):
        picks = np.random.default_rng(0).integers(0, len(paired), (RESAMPLES, len(paired)))
        low, high = np.exp(np.quantile(paired[picks].mean(-1), [0.025, 0.975]))
        row["over_reference"] = {"ratio": float(np.exp(paired.mean())), "low": float(low), "high": float(high)}
    return row


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
