"""Shares between window + sink and the oracle: of log-loss with a paired bootstrap, and of kept mass per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..training.router_loss import recovered_share
from .quality import WindowResult

LEAST_GAP = 0.02  # a layer counts for the worst layer only where the oracle keeps this much more mass than the window
RESAMPLES = 2000


# share = (L_window − L) / (L_window − L_oracle), L the mean loss: 0 as window + sink, 1 as the oracle
# Percentile bootstrap, Efron 1979. One draw of windows serves all three: what makes a window hard cancels.
def loss_share(window: np.ndarray, loss: np.ndarray, oracle: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Share of the way from the window's to the oracle's mean loss, with a 95 % interval over resampled windows.

    Each argument holds one loss per window, paired by position.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(loss), (RESAMPLES, len(loss)))

    def share(index: np.ndarray) -> np.ndarray:
        # a draw in which window and oracle are equal has no share: it counts as 0
        gap = window[index].mean(-1) - oracle[index].mean(-1)
        ratio: np.ndarray = np.divide(
            window[index].mean(-1) - loss[index].mean(-1), gap, out=np.zeros_like(gap), where=gap != 0
        )
        return ratio

    low, high = np.quantile(share(picks), [0.025, 0.975])
    return {"share": float(share(np.arange(len(loss)))), "low": float(low), "high": float(high)}


# paired: the bootstrap resamples differences, whose spread is smaller than that of either loss
def loss_above(loss: np.ndarray, other: np.ndarray, seed: int = 0) -> dict[str, float]:
    """How much the mean loss lies above the other's (below it if negative), with a 95 % interval over resampled
    windows, paired.
    """
    rng = np.random.default_rng(seed)
    above = loss - other
    low, high = np.quantile(above[rng.integers(0, len(loss), (RESAMPLES, len(loss)))].mean(-1), [0.025, 0.975])
    return {"mean": float(above.mean()), "low": float(low), "high": float(high)}


def shares_by_layer(kept: dict[int, float], window: dict[int, float], oracle: dict[int, float]) -> dict[str, Any]:
    """Σ(kept − window) / Σ(oracle − window) over layers, per layer, and the worst layer with a gap of at least 0.02."""
    shares = {
        layer: recovered_share(kept[layer], window[layer], oracle[layer])
        for layer in kept
        if oracle[layer] - window[layer] >= LEAST_GAP
    }
    worst = min(shares, key=lambda layer: shares[layer]) if shares else None
    return {
        # sums before the ratio: a layer where the oracle gains nothing has no weight
        "share": recovered_share(*(sum(mass[layer] for layer in kept) for mass in (kept, window, oracle))),
        "worst": None if worst is None else shares[worst],
        "worst_layer": worst,
        "by_layer": {str(layer): value for layer, value in shares.items()},
    }


ByHead = dict[int, np.ndarray]  # one figure for every KV head, by layer


def _mean_by_head(readings: Sequence[dict[int, list[float]]]) -> ByHead:
    """Means over windows; layers that some window lacks are left out."""
    # layers are texts in results that were read from JSON
    layers = sorted(set.intersection(*({int(layer) for layer in one} for one in readings)))
    by_layer = [{int(layer): values for layer, values in one.items()} for one in readings]
    return {layer: np.mean([one[layer] for one in by_layer], 0) for layer in layers}


def worst_head(kept: ByHead, window: ByHead, oracle: ByHead) -> dict[str, Any] | None:
    """The KV head with the least recovered share among those with a gap of at least 0.02, None if no head has one."""
    shares = [
        (recovered_share(*(float(mass[layer][head]) for mass in (kept, window, oracle))), layer, head)
        for layer in kept
        for head, gap in enumerate(oracle[layer] - window[layer])
        if gap >= LEAST_GAP
    ]
    return dict(zip(("share", "layer", "head"), min(shares), strict=True)) if shares else None


def _mean_mass(results: Sequence[WindowResult]) -> dict[int, float]:
    by_layer: dict[int, list[float]] = defaultdict(list)
    for result in results:
        for layer, value in result.mass.items():
            by_layer[int(layer)].append(value)
    return {layer: float(np.mean(values)) for layer, values in sorted(by_layer.items())}


def quality_table(results: Sequence[WindowResult]) -> list[dict[str, Any]]:
    """Mean log-losses, shares, kept mass and recovered share, with n:
    a row per selection, each budget after its dense row.
    """
    rows: list[dict[str, Any]] = []
    dense = {(r.document, r.length): r for r in results if r.keys is None}
    cells: dict[tuple[int, int], dict[str, list[WindowResult]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.keys is not None:
            cells[result.length, result.keys][result.selection].append(result)
    for (length, keys), by_selection in sorted(cells.items()):
        bounds = [{r.document: r for r in by_selection[name]} for name in ("window + sink", "oracle")]
        # only windows for which every selection is there: an interrupted run never mixes unpaired ones
        documents = sorted(
            set.intersection(*({r.document for r in window_results} for window_results in by_selection.values()))
        )
        if not documents:
            continue
        rows.append(_row(length, None, "dense", [dense[d, length] for d in documents], None))
        paired = [[bound[d] for d in documents] for bound in bounds]
        for selection, window_results in by_selection.items():
            by_document = {r.document: r for r in window_results}
            rows.append(_row(length, keys, selection, [by_document[d] for d in documents], paired))
    return rows


def _row(
    length: int, keys: int | None, selection: str, results: list[WindowResult], bounds: list[list[WindowResult]] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"length": length, "keys": keys, "selection": selection, "n": len(results)}
    for path in ("prefill", "decode"):
        if any(getattr(r, path) is None for r in results):
            continue
        losses = np.array([getattr(r, path) for r in results])
        row[path] = float(losses.mean())
        if bounds is not None:
            window, oracle = (np.array([getattr(r, path) for r in bound]) for bound in bounds)
            row[f"{path}_share"] = loss_share(window, losses, oracle)
            row[f"{path}_above_oracle"] = loss_above(losses, oracle)
    tails = [
        r.decode - r.prefill_of_decoded for r in results if r.decode is not None and r.prefill_of_decoded is not None
    ]
    if len(tails) == len(results):
        # perplexity of the same tokens, tiles of 1 over tiles of query_tile
        row["decode_over_prefill"] = float(np.exp(np.mean(tails)))
    for name in ("kept", "kept_all", "kept_decode", "low_mass", "kl", "output_error"):
        series = [getattr(r, name) for r in results]
        if all(value is not None for value in series):
            row[name] = float(np.mean(series))
    if all(r.by_position for r in results):
        row["by_position"] = np.mean([r.by_position for r in results], 0).tolist()
    recalls = _mean_by_head([r.recall for r in results])
    if recalls:
        row["recall"] = float(np.mean(list(recalls.values())))
    if bounds is not None and results[0].mass and bounds[0][0].mass and bounds[1][0].mass:
        mass = _mean_mass(results)
        row["kept_mass"] = {
            "mean": float(np.mean(list(mass.values()))),
            "by_layer": {str(k): v for k, v in mass.items()},
        }
        row["recovered_share"] = shares_by_layer(mass, _mean_mass(bounds[0]), _mean_mass(bounds[1]))
        heads, lower, upper = (_mean_by_head([r.head_mass for r in series]) for series in (results, *bounds))
        if heads and lower and upper:
            row["head_mass"] = {str(layer): values.tolist() for layer, values in heads.items()}
            row["worst_head"] = worst_head(heads, lower, upper)
    return row
