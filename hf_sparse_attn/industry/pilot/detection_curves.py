"""Areas under precision and recall of scores: the average precision, and the volume under that surface (VUS-PR)."""

# Shapes: n steps, S segments of labels, K thresholds, B blocks of time, R draws of blocks.

from __future__ import annotations

import numpy as np

from ...system.extras import needs_extra
from .alarm_metrics import check_scores
from .block_bootstrap import ratio
from .timeline import Array

with needs_extra("industry", "the measures of the pilot"):
    from sklearn.metrics import average_precision_score

WIDTHS = 9  # of the slopes beside a label, equally spaced; the paper takes every one
RANKS = 400  # thresholds equally spaced by rank, and as many by its logarithm: few labels need fine steps at the top


class BlockCurves:
    """Precision and recall of scores, with blocks of steps weighted as a bootstrap draws them.

    Args:
        scores: float64 [n], higher is more abnormal.
        labels: bool [n].
        blocks: int64 [n], the number of the block of every step.

    Raises:
        PlantDataError: the scores are not n finite numbers.
    """

    def __init__(self, scores: Array, labels: Array, blocks: Array) -> None:
        self.scores, self.labels = check_scores(scores, len(labels)), np.asarray(labels, bool)
        self.blocks, self.count = blocks, int(blocks.max()) + 1
        ranked = np.sort(self.scores)[::-1]
        ranks = [np.linspace(0, len(ranked) - 1, RANKS), np.geomspace(1, len(ranked), RANKS) - 1]
        self.thresholds = np.unique(ranked[np.concatenate(ranks).round().astype(np.int64)])[::-1]
        # the first threshold that a score reaches; the last is the least score
        self.reached = np.searchsorted(-self.thresholds, -self.scores)
        self.alarms = self._above(np.ones(len(self.scores)))

    def _above(self, amounts: Array) -> Array:
        """Sums of ``amounts`` [n] over the steps of each block that reach each threshold, float64 [B, K]."""
        size = len(self.thresholds)
        sums = np.bincount(self.blocks * size + self.reached, amounts, minlength=self.count * size)
        above: Array = np.cumsum(sums.reshape(-1, size), 1)
        return above

    # AP = Σ_k (R_k − R_{k−1}) P_k
    def average_precision(self, weights: Array) -> Array:
        """Areas for weights [R, B] of the blocks, float64 [R], over at most 800 thresholds; NaN without a label."""
        hits, alarms = weights @ self._above(self.labels), weights @ self.alarms
        precision = np.divide(hits, alarms, out=np.zeros_like(hits), where=alarms > 0)
        areas: Array = (np.diff(hits, prepend=0) * precision).sum(1)
        return ratio(areas, hits[:, -1])

    def volume(self, weights: Array, most_width: int) -> Array:
        """`vus_pr` for weights [R, B] of the blocks, float64 [R]; NaN without a label."""
        areas = np.mean([self._sloped_area(weights, int(width)) for width in slope_widths(most_width)], 0)
        some = weights @ self._above(self.labels)[:, -1] > 0
        return np.where(some, areas, np.nan)

    # precision = Σ l·a / Σ a; recall = min(1, Σ l·a / ((Σ l₀ + Σ l) / 2)) · share of the segments with an alarm, for
    # labels l₀, sloped labels l and alarms a; area = Σ_k (R_k − R_{k−1}) (P_k + P_{k−1}) / 2 from (P, R) = (1, 0)
    def _sloped_area(self, weights: Array, width: int) -> Array:
        labels = sloped_labels(self.labels, width)
        hits, alarms = weights @ self._above(labels), weights @ self.alarms
        precision = np.divide(hits, alarms, out=np.ones_like(hits), where=alarms > 0)
        positives = (weights @ self._above(self.labels)[:, -1] + hits[:, -1])[:, None] / 2
        first, last = segments(labels > 0)
        if not len(first):
            return np.full(len(weights), np.nan)
        # a segment belongs to the block of its middle, as its slopes may reach into others, and is met from the
        # highest threshold on that one of its steps reaches
        met = np.minimum.reduceat(np.append(self.reached, len(self.thresholds)), np.stack([first, last], 1).ravel())[
            ::2
        ]
        drawn = weights[:, self.blocks[(first + last) // 2]].astype(np.float64)
        found = drawn @ (met[:, None] <= np.arange(len(self.thresholds)))
        share = np.divide(
            found, drawn.sum(1, keepdims=True), out=np.zeros_like(found), where=drawn.any(1, keepdims=True)
        )
        recall = np.minimum(np.divide(hits, positives, out=np.zeros_like(hits), where=positives > 0), 1) * share
        before = np.concatenate([np.ones((len(weights), 1)), precision[:, :-1]], 1)
        areas: Array = (np.diff(recall, prepend=0) * (precision + before) / 2).sum(1)
        return areas


def segments(labels: Array) -> tuple[Array, Array]:
    """(First, last excluded) step of every run of true labels, int64 [S] each."""
    edges = np.diff(np.concatenate([[0], labels.astype(np.int8), [0]]))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


# label(s − d) = label(e + d) = sqrt(1 − d / w) for distances d ≤ w / 2 from the ends s and e of a segment, added where
# slopes meet, at most 1. Paparrizos, Boniol, Palpanas, Tsay, Elmore, Franklin, "Volume Under the Surface: A New
# Accuracy Evaluation Measure for Time-Series Anomaly Detection", PVLDB 15(11), 2022, section 4.
def sloped_labels(labels: Array, width: int) -> Array:
    """Labels in [0, 1], float64 [n], with slopes of ``width`` // 2 steps beside each segment."""
    sloped = labels.astype(np.float64)
    for first, last in zip(*segments(labels), strict=True):
        distance = np.arange(1, width // 2 + 1)
        for at in (first - distance, last - 1 + distance):
            inside = (at >= 0) & (at < len(labels))
            sloped[at[inside]] += np.sqrt(1 - distance[inside] / width)
    return np.minimum(sloped, 1)


def slope_widths(most: int) -> Array:
    """At most 9 widths from 0 to ``most`` steps, int64."""
    return np.unique(np.linspace(0, most, WIDTHS).round().astype(np.int64))


def average_precision(scores: Array, labels: Array) -> float:
    """Average precision, exact; its base rate, what random scores get, is the share of labels. NaN without a label."""
    return float(average_precision_score(labels, scores)) if labels.any() else float("nan")


def vus_pr(scores: Array, labels: Array, most_width: int) -> float:
    """Volume under the surface of precision and recall over widths 0 to ``most_width`` of the labels' slopes.

    Random scores get `vus_base_rate`. NaN without a label.

    Source: Paparrizos et al., PVLDB 15(11), 2022, with at most 9 widths, and thresholds that are finer at the top.
    """
    curves = BlockCurves(scores, labels, np.zeros(len(labels), np.int64))
    return float(curves.volume(np.ones((1, 1)), most_width)[0])


def vus_base_rate(labels: Array, most_width: int) -> float:
    """What random scores reach: the mean of the sloped labels over the widths."""
    return float(np.mean([sloped_labels(labels, int(width)).mean() for width in slope_widths(most_width)]))
