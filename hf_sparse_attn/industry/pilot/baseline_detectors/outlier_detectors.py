"""Two of PyOD's detectors on the features of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....system.extras import needs_extra
from ..timeline import Array, Timeline
from .detector_base import HOUR, StateScaler, TimelineDetector, filled_z, sample_rows, trailing_sum

with needs_extra("industry", "the baselines of the pilot"):
    from pyod.models.hbos import HBOS
    from pyod.models.iforest import IForest

MOST_ROWS = 20_000  # of training that are fitted
CHUNK = 65_536


class _PyodDetector(TimelineDetector):
    """A detector of PyOD over the channels' z, their trailing means, and how many events and kinds an hour had."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def unavailable(self, timeline: Timeline) -> str | None:
        part = slice(timeline.train_steps)
        some = timeline.observed[part].any() or timeline.counts[part].any()
        return None if some else "neither readings nor events in training"

    def model(self) -> Any:
        raise NotImplementedError

    def fit(self, train: Timeline) -> _PyodDetector:
        self.scaler = StateScaler().fit(train)
        rows = self._features(train)
        self.fitted = self.model().fit(rows[sample_rows(len(rows), MOST_ROWS, self.seed)])
        return self

    def scores(self, timeline: Timeline) -> Array:
        rows = self._features(timeline)
        return np.concatenate(
            [self.fitted.decision_function(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)]
        ).astype(np.float64)

    # a column for every kind would drown the channels: most are 0 nearly always
    def _features(self, timeline: Timeline) -> Array:
        """Float64 [T, 2 C + 2]."""
        z, steps = filled_z(self.scaler.z(timeline)), timeline.steps_in(HOUR)
        hourly = np.maximum(trailing_sum(timeline.counts, steps), 0)
        summary = np.stack([np.log1p(hourly.sum(1)), (hourly > 0.5).sum(1)], 1)
        return np.concatenate([z, trailing_sum(z, steps) / steps, summary], 1)


class IsolationForest(_PyodDetector):
    """Liu, Ting, Zhou, ICDM 2008, by PyOD."""

    name = "isolation forest"

    def model(self) -> Any:
        return IForest(random_state=self.seed)


class Histograms(_PyodDetector):
    """HBOS, Goldstein & Dengel 2012, by PyOD.

    ECOD and COPOD are no choice here: they rank new rows among those of the evaluation, later ones included.
    """

    name = "HBOS (PyOD)"

    def model(self) -> Any:
        return HBOS(n_bins="auto")
