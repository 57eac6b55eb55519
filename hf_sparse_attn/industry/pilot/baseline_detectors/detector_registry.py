"""The detectors of the comparison in the order of the table."""

from __future__ import annotations

from pathlib import Path

from .boosting_detectors import BoostedFailure, BoostedForecast
from .channel_detectors import Ewma, MaxZ, RandomScores, SeasonalNaive
from .detector_base import TimelineDetector
from .event_detectors import EventCountPca, EventNgram, NewTemplate
from .left_matrix_profile import LeftMatrixProfile
from .outlier_detectors import Histograms, IsolationForest
from .pretrained_forecaster import PretrainedForecaster


def all_detectors(
    *, seed: int = 0, horizon_seconds: float = 6 * 3600.0, forecaster: str | Path | None = None
) -> list[TimelineDetector]:
    """One of each, not yet fitted. ``horizon_seconds``: how far ahead a failure counts as announced; ``forecaster``:
    folder of a TimesFM checkpoint.
    """
    return [
        RandomScores(seed),
        MaxZ(),
        Ewma(),
        NewTemplate(),
        EventCountPca(),
        EventNgram(),
        IsolationForest(seed),
        Histograms(seed),
        LeftMatrixProfile(),
        SeasonalNaive(),
        BoostedForecast(seed),
        BoostedFailure(horizon_seconds, seed),
        PretrainedForecaster(forecaster),
    ]
