"""How well scores find faults: area under precision and recall, volume under that surface, and alarms at a budget.

There is no point-adjusted F1: it counts a whole fault as found at one hit, so that random scores reach 0.68 to 0.98.
"""

# Shapes: n steps, S segments of labels, W widths of a label's slope.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PlantDataError
from .timeline import Array

WIDTHS = 9  # of the slopes beside a label, equally spaced; the paper takes every one
THRESHOLDS = 250  # of a curve of precision and recall under slopes, as in the paper's code


def check_scores(scores: Array, steps: int, name: str = "scores") -> Array:
    """The scores as float64. Raises PlantDataError unless they are ``steps`` finite numbers."""
    scores = np.asarray(scores, np.float64)
    if scores.shape != (steps,) or not np.isfinite(scores).all():
        shape, bad = scores.shape, int((~np.isfinite(scores)).sum())
        raise PlantDataError(
            f"{name}: shape {shape} with {bad} that are not finite, {steps} finite numbers are needed",
            ["give one score a step", "score steps without history 0, the least", "leave the detector out"],
        )
    return scores


class RankedScores:
    """Scores sorted once, for areas under many weights of their steps.

    Args:
        scores: float64 [n], higher is more abnormal.
        labels: bool [n].
    """

    def __init__(self, scores: Array, labels: Array) -> None:
        self.scores, self.labels = check_scores(scores, len(labels)), np.asarray(labels, bool)
        self.order = np.argsort(-self.scores, kind="stable")
        ranked = self.scores[self.order]
        # equal scores are one threshold: its last place
        self.ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
        picks = np.unique(np.linspace(0, len(self.ends) - 1, min(THRESHOLDS, len(self.ends))).round().astype(np.int64))
        self.picked = self.ends[picks]

    # AP = Σ_k (R_k − R_{k−1}) P_k over thresholds k, as scikit-learn's average_precision_score
    def average_precision(self, weights: Array | None = None) -> float:
        """Area under precision and recall with steps weighted by ``weights`` [n]; NaN without a labelled step."""
        weights = np.ones(len(self.labels)) if weights is None else weights
        ranked = weights[self.order]
        hits, alarms = np.cumsum(ranked * self.labels[self.order])[self.ends], np.cumsum(ranked)[self.ends]
        if not hits[-1]:
            return float("nan")
        precision = np.divide(hits, alarms, out=np.zeros_like(alarms, float), where=alarms > 0)
        return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])

    def volume(self, widths: Array, weights: Array | None = None) -> float:
        """`vus_pr` with steps weighted by ``weights`` [n]; NaN without a labelled step."""
        weights = np.ones(len(self.labels)) if weights is None else weights
        if not (weights * self.labels).sum():
            return float("nan")
        return float(np.mean([self._sloped_area(sloped_labels(self.labels, int(w)), weights) for w in widths]))

    # precision = Σ label·alarm / Σ alarm; recall = min(1, Σ label·alarm / ((Σ label₀ + Σ label) / 2)) · share of the
    # segments with an alarm; area = Σ_k (R_k − R_{k−1}) (P_k + P_{k−1}) / 2, with (P, R) = (1, 0) first
    def _sloped_area(self, labels: Array, weights: Array) -> float:
        ranked = weights[self.order]
        hits = np.cumsum(ranked * labels[self.order])[self.picked]
        alarms = np.cumsum(ranked)[self.picked]
        precision = np.divide(hits, alarms, out=np.ones_like(hits), where=alarms > 0)
        positives = ((weights * self.labels).sum() + (weights * labels).sum()) / 2
        first, last = segments(labels > 0)
        # a segment may end with the record: one more element for its end
        best = np.maximum.reduceat(np.append(self.scores, -np.inf), np.stack([first, last], 1).ravel())[::2]
        share = weights[first].astype(np.float64)
        # weight of the segments whose best score reaches each threshold
        by_score = np.argsort(-best, kind="stable")
        reached = np.searchsorted(-best[by_score], -self.scores[self.order[self.picked]], side="right")
        found = np.append(0, np.cumsum(share[by_score]))[reached] / max(share.sum(), 1)
        recall = np.minimum(hits / positives, 1) * found
        steps, heights = np.diff(recall, prepend=0), (precision + np.append(1, precision[:-1])) / 2
        return float((steps * heights).sum())


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


def vus_pr(scores: Array, labels: Array, most_width: int) -> float:
    """Volume under the surface of precision and recall over widths 0 to ``most_width`` of the labels' slopes.

    Random scores get the mean of `sloped_labels` over the widths. NaN without a labelled step.

    Source: Paparrizos et al., PVLDB 15(11), 2022, with at most 9 widths and 250 thresholds a width.
    """
    return RankedScores(scores, labels).volume(slope_widths(most_width))


def alarm_steps(scores: Array, threshold: float, cool_down: int, most: int | None = None) -> Array:
    """Steps in which an alarm is raised, int64: the score reaches the threshold, and ``cool_down`` steps have passed
    since the last alarm. Stops after ``most`` + 1 alarms.
    """
    above, alarms, at = np.flatnonzero(scores >= threshold), [], 0
    while at < len(above) and (most is None or len(alarms) <= most):
        alarms.append(int(above[at]))
        at = int(np.searchsorted(above, alarms[-1] + max(cool_down, 1)))
    return np.array(alarms, np.int64)


def budget_threshold(scores: Array, most: int, cool_down: int) -> float:
    """A threshold with at most ``most`` alarms: the lowest that bisection over the scores finds, infinite if even the
    highest score raises more.
    """
    levels = np.unique(scores)[::-1]
    low, high = -1, len(levels) - 1  # levels[: low + 1] keep the budget
    if len(alarm_steps(scores, levels[0], cool_down, most)) > most:
        return float("inf")
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if len(alarm_steps(scores, levels[middle], cool_down, most)) <= most:
            low = middle
        else:
            high = middle - 1
    return float(levels[low])


@dataclass(frozen=True)
class Matching:
    """Alarms against faults.

    ``alarm_hits`` bool [A] and ``fault_hits`` bool [F]: the pairs of a one-to-one matching; ``leads`` float64 [F]:
    steps from the first alarm in a fault's window to its start, negative after it, NaN without one.
    """

    alarm_hits: Array
    fault_hits: Array
    leads: Array


# F1 = 2 · pairs / (alarms + faults). Taking for each alarm, by time, the open window that ends first gives a matching of
# the largest size where points meet intervals (Glover 1967).
def match_events(alarms: Array, faults: Array, before: int, after: int) -> Matching:
    """Match alarms [A] one to one with faults [F, 2] (first step, last excluded) whose window, from ``before`` steps
    ahead of the fault to ``after`` steps past its end, holds them. A second alarm in the same window is a false one.
    """
    opens, closes = faults[:, 0] - before, faults[:, 1] + after
    alarm_hits, fault_hits = np.zeros(len(alarms), bool), np.zeros(len(faults), bool)
    leads = np.full(len(faults), np.nan)
    for n, at in enumerate(np.sort(alarms)):
        inside = (opens <= at) & (at < closes)
        leads[inside & np.isnan(leads)] = (faults[:, 0] - at)[inside & np.isnan(leads)]
        free = np.flatnonzero(inside & ~fault_hits)
        if len(free):
            alarm_hits[n] = fault_hits[free[np.argmin(closes[free])]] = True
    return Matching(alarm_hits, fault_hits, leads)
