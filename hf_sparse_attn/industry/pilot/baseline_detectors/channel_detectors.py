"""Detectors on sensors that need no library: random, max |z|, EWMA, seasonal naive."""

from __future__ import annotations

import numpy as np

from ....system.extras import needs_extra
from ..timeline import DAY, Array, Timeline
from .detector_base import HOUR, ChannelDetector, StateScaler, TimelineDetector, filled_z, robust_spread

with needs_extra("industry", "a pilot"):
    from scipy.signal import lfilter


class RandomScores(TimelineDetector):
    """Scores without any meaning: what they reach is the base rate."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, train: Timeline) -> RandomScores:
        return self

    def scores(self, timeline: Timeline) -> Array:
        return np.random.default_rng(self.seed).random(len(timeline))


class MaxZ(ChannelDetector):
    """Largest |z| over the channels, z by operating state."""

    name = "max |z|"

    def fit(self, train: Timeline) -> MaxZ:
        self.scaler = StateScaler().fit(train)
        return self

    def scores(self, timeline: Timeline) -> Array:
        largest: Array = np.abs(filled_z(self.scaler.z(timeline))).max(1)
        return largest


# w_t = α z_t + (1 − α) w_{t−1}, in units of its spread in training. Roberts, Technometrics 1(3), 1959
class Ewma(ChannelDetector):
    """Largest exponentially weighted mean of z over the channels, α = 2 / (steps of an hour + 1)."""

    name = "EWMA"

    def fit(self, train: Timeline) -> Ewma:
        self.scaler = StateScaler().fit(train)
        means = self._means(train)
        self.center = np.median(means, 0)
        self.spread = robust_spread(means - self.center)
        return self

    def scores(self, timeline: Timeline) -> Array:
        largest: Array = (np.abs(self._means(timeline) - self.center) / self.spread).max(1)
        return largest

    def _means(self, timeline: Timeline) -> Array:
        alpha = 2 / (timeline.steps_in(HOUR) + 1)
        means: Array = lfilter([alpha], [1, alpha - 1], filled_z(self.scaler.z(timeline)), axis=0)
        return means


class SeasonalNaive(ChannelDetector):
    """Largest change against the same time of the day before (of the week before from three weeks of training on)."""

    name = "seasonal naive residual"

    def unavailable(self, timeline: Timeline) -> str | None:
        days = timeline.train_steps * timeline.step / DAY
        return super().unavailable(timeline) or (
            None if days > 2 else f"{days:.1f} days of training, more than 2 needed"
        )

    def fit(self, train: Timeline) -> SeasonalNaive:
        days = 7 if len(train) * train.step >= 21 * DAY else 1
        self.season = train.steps_in(days * DAY / 1e9)
        self.scale = robust_spread(self._residual(train))
        return self

    def scores(self, timeline: Timeline) -> Array:
        largest: Array = np.abs(filled_z(self._residual(timeline) / self.scale)).max(1)
        return largest

    def _residual(self, timeline: Timeline) -> Array:
        residual = np.full(timeline.values.shape, np.nan)
        residual[self.season :] = timeline.values[self.season :] - timeline.values[: -self.season]
        return residual
