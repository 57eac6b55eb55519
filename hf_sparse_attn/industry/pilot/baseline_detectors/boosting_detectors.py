"""Gradient boosting: the residual of a forecast, and the chance of a fault within the horizon."""

# Shapes: T steps, C channels, L lags, f features.

from __future__ import annotations

import numpy as np

from ....system.extras import needs_extra
from ..timeline import DAY, Array, Timeline
from .detector_base import (
    HOUR,
    ChannelDetector,
    StateScaler,
    TimelineDetector,
    filled_z,
    sample_rows,
    trailing_features,
    trailing_sum,
)

with needs_extra("industry", "the baselines of the pilot"):
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

MOST_ROWS = 20_000  # of training that are fitted
MOST_CHANNELS = 8  # forecast, those observed most
LEAST_FAULTS = 5  # in training, for a classifier
LAGS = (1, 2, 4, 8, 16, 32, 64)
CHUNK = 65_536


class BoostedForecast(ChannelDetector):
    """Largest residual of a one-step forecast from 7 lags, the trailing hour and day, state and hour of the day.

    The scale of a residual comes from the last fifth of training, which is not fitted on.
    """

    name = "gradient boosting residual"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, train: Timeline) -> BoostedForecast:
        self.scaler = StateScaler().fit(train)
        z = self.scaler.z(train)
        border = max(1, round(0.8 * len(train)))
        readings = train.observed[:border].sum(0)
        self.channels = [n for n in np.argsort(-readings, kind="stable")[:MOST_CHANNELS] if readings[n]]
        self.models, self.spreads = [], []
        for channel in self.channels:
            features = self._features(train, z[:, channel])
            seen = np.flatnonzero(~np.isnan(z[:, channel]))
            early = seen[seen < border]
            rows = early[sample_rows(len(early), MOST_ROWS, self.seed)]
            model = HistGradientBoostingRegressor(max_iter=60, random_state=self.seed, early_stopping=False)
            self.models.append(model.fit(features[rows], z[rows, channel]))
            late = seen[seen >= border] if (seen >= border).any() else seen
            residual = np.abs(z[late, channel] - self.models[-1].predict(features[late]))
            self.spreads.append(1.4826 * float(np.median(residual)) or 1.0)
        return self

    def scores(self, timeline: Timeline) -> Array:
        z, scores = self.scaler.z(timeline), np.zeros(len(timeline))
        for channel, model, spread in zip(self.channels, self.models, self.spreads, strict=True):
            features = self._features(timeline, z[:, channel])
            for at in range(0, len(z), CHUNK):
                part = slice(at, at + CHUNK)
                residual = np.abs(z[part, channel] - model.predict(features[part])) / spread
                scores[part] = np.maximum(scores[part], np.nan_to_num(residual, nan=0.0))
        return scores

    def _features(self, timeline: Timeline, column: Array) -> Array:
        """Float32 [T, f], of steps before each step; NaN where nothing was observed."""
        lagged = np.full((len(column), len(LAGS)), np.nan)
        for n, lag in enumerate(LAGS):
            lagged[lag:, n] = column[:-lag]
        before, seen = filled_z(lagged[:, 0]), (~np.isnan(lagged[:, 0])).astype(np.float64)
        means = [
            trailing_sum(before, steps) / np.maximum(trailing_sum(seen, steps), 1)
            for steps in (timeline.steps_in(HOUR), timeline.steps_in(DAY / 1e9))
        ]
        hours = timeline.times % DAY / (DAY / 24)
        return np.column_stack([lagged, *means, timeline.states, hours]).astype(np.float32)


class BoostedFailure(TimelineDetector):
    """Chance that a fault starts within the horizon, learnt from the faults of training.

    Features are those of the last step, the trailing hour and the trailing day: a near context. Steps within a fault
    are not fitted on.
    """

    name = "gradient boosting, failure ahead"

    def __init__(self, horizon_seconds: float = 6 * HOUR, seed: int = 0) -> None:
        self.horizon_seconds, self.seed = horizon_seconds, seed

    def unavailable(self, timeline: Timeline) -> str | None:
        known = int((timeline.onsets() < timeline.train_steps).sum())
        return None if known >= LEAST_FAULTS else f"{known} faults in training, {LEAST_FAULTS} needed"

    def fit(self, train: Timeline) -> BoostedFailure:
        self.scaler = StateScaler().fit(train)
        ahead, horizon = np.zeros(len(train) + 1, np.int64), train.steps_in(self.horizon_seconds)
        np.add.at(ahead, np.maximum(train.onsets() - horizon, 0), 1)
        np.add.at(ahead, train.onsets(), -1)
        target = np.cumsum(ahead[:-1]) > 0
        free = ~train.labels
        positive, negative = np.flatnonzero(target & free), np.flatnonzero(~target & free)
        rows = np.concatenate(
            [part[sample_rows(len(part), MOST_ROWS // 2, self.seed)] for part in (positive, negative)]
        )
        model = HistGradientBoostingClassifier(max_iter=60, random_state=self.seed, early_stopping=False)
        self.fitted = model.fit(self._features(train)[rows], target[rows])
        return self

    def scores(self, timeline: Timeline) -> Array:
        features = self._features(timeline)
        parts = (features[at : at + CHUNK] for at in range(0, len(features), CHUNK))
        return np.concatenate([self.fitted.predict_proba(part)[:, 1] for part in parts])

    def _features(self, timeline: Timeline) -> Array:
        z = self.scaler.z(timeline)
        hour, day = (trailing_features(timeline, z, seconds) for seconds in (HOUR, DAY / 1e9))
        return np.concatenate([hour, day[:, z.shape[1] :], timeline.states[:, None]], 1).astype(np.float32)
