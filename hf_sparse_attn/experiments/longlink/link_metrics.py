"""Scores of LongLink as `evaluate` metrics, which work without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

SOURCE = "hf_sparse_attn, LongLink"


def _info(description: str, **features: str) -> evaluate.MetricInfo:
    named = {name: datasets.Value(kind) for name, kind in features.items()}
    return evaluate.MetricInfo(
        description=description, citation=SOURCE, inputs_description=", ".join(features), features=datasets.Features(named)
    )


class NormalisedAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Accuracy between guessing (0) and the ceiling (1): ``compute(predictions, references, chance=…, ceiling=…)``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(self.__doc__), predictions="int64", references="int64")

    def _compute(self, predictions: Sequence[int], references: Sequence[int], chance: float, ceiling: float) -> dict[str, Any]:
        if ceiling <= chance:
            raise ValueError(f"the ceiling {ceiling} is not above chance {chance}: there is nothing to find")
        right = np.asarray(predictions) == np.asarray(references)
        accuracy, error = float(right.mean()), float(right.std() / math.sqrt(len(right)))
        scale = ceiling - chance
        return {"accuracy": accuracy, "normalised": (accuracy - chance) / scale, "error": error / scale, "n": len(right)}


class AveragePrecision(evaluate.Metric):  # type: ignore[misc]
    """Area under precision over recall of a ranking: ``predictions`` are scores, ``references`` 1 for what should come first, else 0.

    Ties count as the mean over their orders does on average: a positive among tied ones gets their middle rank.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(self.__doc__), predictions="float64", references="int64")

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, Any]:
        return {"average_precision": average_precision(np.asarray(predictions, float), np.asarray(references))}


def average_precision(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Mean precision at the ranks of the ``wanted`` entries (1 or 0) of ``scores``, best first; tied scores share their middle rank.

    Raises:
        ValueError: nothing is wanted.
    """
    if not wanted.any():
        raise ValueError("no reference is 1: a ranking of nothing has no precision")
    above = (scores[None] > scores[:, None]).sum(1)
    tied = (scores[None] == scores[:, None]).sum(1)
    rank = above + (tied + 1) / 2
    found = np.sort(rank[wanted == 1])
    return float(np.mean(np.arange(1, len(found) + 1) / found))


class ChanceAdjustedRecall(evaluate.Metric):  # type: ignore[misc]
    """(r − r0) / (1 − r0) of the recall r: ``predictions`` 1 where a link was kept, ``references`` the share of blocks that were, r0."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(self.__doc__), predictions="float64", references="float64")

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, Any]:
        recall, base = float(np.mean(predictions)), float(np.mean(references))
        error = float(np.std(predictions) / math.sqrt(len(predictions)))
        adjusted = {"chance_adjusted_recall": adjust(recall, base), "error": error / (1 - base) if base < 1 else 0.0}
        return {"recall": recall, "chance": base, **adjusted, "n": len(predictions)}


def adjust(recall: float, base: float) -> float:
    """(r − r0) / (1 − r0); of a selection that keeps everything 1."""
    return 1.0 if base == 1 else (recall - base) / (1 - base)
