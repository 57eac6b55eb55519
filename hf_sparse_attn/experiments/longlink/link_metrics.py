"""What LongLink is scored by, as metrics of the library evaluate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import numpy as np

from ...evaluation.metrics import INTEGER, NUMBER, ArrayMetric


class NormalisedAccuracy(ArrayMetric):
    """Share of right answers, and where it lies between guessing and the ceiling: ``compute(…, chance=…, ceiling=…)``.

    ``error`` is the standard error of the share, ``normalised`` (accuracy − chance) / (ceiling − chance), None where
    those are one.
    """

    columns: ClassVar[dict[str, Any]] = {"predictions": INTEGER, "references": INTEGER}

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], chance: float, ceiling: float
    ) -> dict[str, Any]:
        if ceiling < chance:
            raise ValueError(f"the ceiling {ceiling} lies below chance {chance}: no reader is worse than guessing")
        right = np.asarray(predictions) == np.asarray(references)
        accuracy = float(right.mean())
        # of n independent answers that are right with probability p: √(p(1 − p) / n)
        error = math.sqrt(accuracy * (1 - accuracy) / len(right))
        normalised = None if ceiling == chance else (accuracy - chance) / (ceiling - chance)
        return {"accuracy": accuracy, "error": error, "normalised": normalised, "n": len(right)}


class AveragePrecision(ArrayMetric):
    """Mean over rankings of the area under precision over recall.

    A row of ``predictions`` holds the scores of one ranking, that of ``references`` 1 for what should come first, else
    0.
    """

    columns: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Sequence(NUMBER),
        "references": datasets.Sequence(INTEGER),
    }

    def _compute(self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[int]]) -> dict[str, Any]:
        rankings = zip(predictions, references, strict=True)
        precision = [average_precision(np.asarray(scores, float), np.asarray(wanted)) for scores, wanted in rankings]
        return {"average_precision": float(np.mean(precision)), "n": len(precision)}


def average_precision(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Mean precision at the ranks of the ``wanted`` entries (1 or 0) of ``scores``, best first; tied scores share their
    middle rank.

    Raises:
        ValueError: nothing is wanted.
    """
    if not wanted.any():
        raise ValueError("no reference is 1: a ranking of nothing has no precision")
    above = (scores[None] > scores[:, None]).sum(1)
    tied = (scores[None] == scores[:, None]).sum(1)
    # rank r_i = entries above + (tied + 1) / 2; of wanted entries in the order of their ranks: mean over i of i / r_i
    ranks = np.sort((above + (tied + 1) / 2)[wanted == 1])
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


class ChanceAdjustedRecall(ArrayMetric):
    """(r − r0) / (1 − r0) of the recall r: ``predictions`` 1 where a link was kept, ``references`` the share of blocks
    that were, r0.

    Of a selection that keeps everything it is 1.
    """

    columns: ClassVar[dict[str, Any]] = {"predictions": NUMBER, "references": NUMBER}

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, Any]:
        recall, chance = float(np.mean(predictions)), float(np.mean(references))
        # 1 − r0 is 0 where everything is kept
        adjusted = 1.0 if chance == 1 else (recall - chance) / (1 - chance)
        return {"recall": recall, "chance": chance, "chance_adjusted_recall": adjusted, "n": len(predictions)}
