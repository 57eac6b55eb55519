"""Reading windows at every level, and what the levels differ by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.call import SparseCall
from ...data.windows import Window
from ...evaluation.divergence import last_hidden, predictions
from ...evaluation.statistics import loss_above
from .factors import Level

FIGURES = ("kl", "loss")


@dataclass(frozen=True)
class Reading:
    """One window at one level: log-loss and KL from dense attention, nats a token, means over the last half."""

    factor: str
    level: str
    seed: int
    document: str
    loss: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(
    model: PreTrainedModel,
    windows: Sequence[Window],
    dense: Sequence[Tensor],
    call: SparseCall,
    level: Level,
    seed: int,
) -> list[Reading]:
    """Every window under ``call``; ``dense`` holds the last hidden states of dense attention for each."""
    results = []
    for window, reference in zip(windows, dense, strict=True):
        prediction = predictions(model, window.ids, last_hidden(model, window.ids, call), reference, whole=False)
        results.append(Reading(level.factor, level.name, seed, window.document, prediction.loss, prediction.kl))
    return results


def by_seed(readings: Sequence[Mapping[str, Any]], name: str) -> dict[int, dict[str, float]]:
    """A figure of some readings, by seed and window."""
    values: dict[int, dict[str, float]] = {}
    for reading in readings:
        values.setdefault(reading["seed"], {})[reading["document"]] = reading[name]
    return values


def difference(
    readings: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """How much a figure lies above the baseline's: mean with a 95 % interval over resampled windows, paired by window
    and seed.

    ``seeds`` are the means of the single seeds, whose spread is what training alone does.

    Raises:
        ValueError: the baseline lacks a seed or window.
    """
    mine, base = by_seed(readings, name), by_seed(baseline, name)
    lacking = [
        (seed, document) for seed, values in mine.items() for document in values if document not in base.get(seed, {})
    ]
    if lacking:
        raise ValueError(f"the baseline lacks seed and window {lacking[0]}: read it at the same seeds and windows")
    # [seeds, windows]
    above = np.array(
        [[value - base[seed][document] for document, value in values.items()] for seed, values in mine.items()]
    )
    # over seeds first: the interval is one over windows, of which each counts once
    means = above.mean(0)
    return {**loss_above(means, np.zeros_like(means)), "seeds": above.mean(1).tolist()}
