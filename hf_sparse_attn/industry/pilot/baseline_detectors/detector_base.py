"""What a detector of this comparison is, and what several share: scaling by state, sums of a trailing window."""

# Shapes: T steps, C channels, K kinds of events.

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ..timeline import Array, Timeline

LEAST_OF_STATE = 100  # readings of a channel in a state, below which the scale of all states stands
HOUR = 3600.0


class TimelineDetector(ABC):
    """Gives every step a score, higher is more abnormal, from that step and those before it alone."""

    name: str

    def unavailable(self, timeline: Timeline) -> str | None:
        """Why it cannot score this record; None if it can. Asked before `fit`, with the whole record."""
        return None

    @abstractmethod
    def fit(self, train: Timeline) -> TimelineDetector:
        """Learn from the training period."""

    @abstractmethod
    def scores(self, timeline: Timeline) -> Array:
        """Float64 [T], finite."""


class ChannelDetector(TimelineDetector):
    """One that needs numbers of sensors."""

    def unavailable(self, timeline: Timeline) -> str | None:
        return None if timeline.observed[: timeline.train_steps].any() else "no readings of sensors in training"


class EventDetector(TimelineDetector):
    """One that needs events of a log."""

    def unavailable(self, timeline: Timeline) -> str | None:
        return None if timeline.counts[: timeline.train_steps].any() else "no log events in training"


# z = (x − median_s) / (1.4826 · MAD_s) of state s; the standard deviation where MAD is 0
class StateScaler:
    """Robust scaling of channels by operating state, from the training period."""

    def fit(self, train: Timeline) -> StateScaler:
        overall = [_center_and_scale(column) for column in train.values.T]
        self.parameters = np.empty((len(train.state_names), len(overall), 2))
        for state in range(len(train.state_names)):
            rows = train.values[train.states == state]
            for n, column in enumerate(rows.T):
                enough = (~np.isnan(column)).sum() >= LEAST_OF_STATE
                self.parameters[state, n] = _center_and_scale(column) if enough else overall[n]
        return self

    def z(self, timeline: Timeline) -> Array:
        """Float64 [T, C]; NaN where nothing was observed."""
        center, scale = np.moveaxis(self.parameters[timeline.states], -1, 0)
        z: Array = (timeline.values - center) / scale
        return z


def _center_and_scale(column: Array) -> tuple[float, float]:
    seen = column[~np.isnan(column)]
    if not len(seen):
        return 0.0, 1.0
    center = float(np.median(seen))
    scale = 1.4826 * float(np.median(np.abs(seen - center))) or float(seen.std()) or 1.0
    return center, scale


def robust_spread(residuals: Array) -> Array:
    """1.4826 · median |residual| of every column [T, C], 1 where that is 0 or nothing was observed; float64 [C]."""
    seen = [column[~np.isnan(column)] for column in residuals.T]
    return np.array([(1.4826 * float(np.median(np.abs(s))) if len(s) else 0.0) or 1.0 for s in seen])


def trailing_sum(numbers: Array, steps: int) -> Array:
    """Sums of the last ``steps`` rows, the row itself included, float64 of the shape of ``numbers``."""
    total = np.cumsum(numbers, 0, dtype=np.float64)
    total[steps:] -= total[:-steps].copy()
    return total


def filled_z(z: Array) -> Array:
    """Missing values as 0: no evidence either way."""
    return np.nan_to_num(z, nan=0.0)


def trailing_features(timeline: Timeline, z: Array, seconds: float = HOUR) -> Array:
    """Features of a step, float64 [T, 2 C + K]: z, its mean over the trailing hour, log(1 + events of that hour)."""
    steps = timeline.steps_in(seconds)
    known = filled_z(z)
    seen = np.maximum(trailing_sum(~np.isnan(z), steps), 1)
    return np.concatenate(
        [known, trailing_sum(known, steps) / seen, np.log1p(np.maximum(trailing_sum(timeline.counts, steps), 0))], 1
    )


def sample_rows(rows: int, most: int, seed: int) -> Array:
    """At most ``most`` numbers of rows, drawn without replacement, in order."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
