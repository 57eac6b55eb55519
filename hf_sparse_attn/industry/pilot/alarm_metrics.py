"""Alarms at a budget, and how they meet faults: event F1 with tolerance, alarms a day, lead time.

There is no point-adjusted F1: it counts a whole fault as found at one hit, so that random scores reach 0.68 to 0.98.
"""

# Shapes: n steps, A alarms, F faults.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PlantDataError
from .timeline import Array


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


def alarm_steps(scores: Array, threshold: float, cool_down: int, most: int | None = None) -> Array:
    """Steps in which an alarm is raised, int64: the score reaches the threshold, and ``cool_down`` steps have passed
    since the last alarm. Stops after ``most`` + 1 alarms.
    """
    alarms: list[int] = []
    above, at = np.flatnonzero(scores >= threshold), 0
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

    ``alarm_hits`` bool [A] and ``fault_hits`` bool [F]: the pairs of a one-to-one matching; ``false_alarms`` bool [A]:
    those in no window; ``leads`` float64 [F]: steps from the first alarm in a fault's window to its start, negative
    after it, NaN without one.
    """

    alarm_hits: Array
    false_alarms: Array
    fault_hits: Array
    leads: Array


# F1 = 2 · pairs / (pairs + false alarms + faults). Taking for each alarm, by time, the open window that ends first
# gives the largest matching of points and intervals (Glover 1967).
def match_events(alarms: Array, faults: Array, before: int, after: int) -> Matching:
    """Match alarms [A], by time, one to one with faults [F, 2] (first step, last excluded) whose window holds them.

    A window reaches from ``before`` steps ahead of the fault to ``after`` past its end. A second alarm in it is no
    hit, but repeats what is known, so it is no false one either.
    """
    opens, closes = faults[:, 0] - before, faults[:, 1] + after
    alarm_hits, fault_hits = np.zeros(len(alarms), bool), np.zeros(len(faults), bool)
    false_alarms, leads = np.zeros(len(alarms), bool), np.full(len(faults), np.nan)
    for n, at in enumerate(alarms):
        inside = (opens <= at) & (at < closes)
        false_alarms[n] = not inside.any()
        leads[inside & np.isnan(leads)] = (faults[:, 0] - at)[inside & np.isnan(leads)]
        free = np.flatnonzero(inside & ~fault_hits)
        if len(free):
            alarm_hits[n] = fault_hits[free[np.argmin(closes[free])]] = True
    return Matching(alarm_hits, false_alarms, fault_hits, leads)
