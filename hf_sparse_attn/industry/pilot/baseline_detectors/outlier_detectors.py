"""Two of PyOD's detectors on the features of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ....system.extras import needs_extra
from ..timeline import Array, Timeline
from .detector_base import StateScaler, TimelineDetector, sample_rows, trailing_features

with needs_extra("industry", "the baselines of the pilot"):
    from pyod.models.hbos import HBOS
    from pyod.models.iforest import IForest

MOST_ROWS = 20_000  # of training that are fitted
CHUNK = 65_536


class _PyodDetector(TimelineDetector):
    """A detector of PyOD over z, trailing means and trailing event counts."""

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
        rows = trailing_features(train, self.scaler.z(train))
        self.fitted = self.model().fit(rows[sample_rows(len(rows), MOST_ROWS, self.seed)])
        return self

    def scores(self, timeline: Timeline) -> Array:
        rows = trailing_features(timeline, self.scaler.z(timeline))
        return np.concatenate(
            [self.fitted.decision_function(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)]
        ).astype(np.float64)


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
