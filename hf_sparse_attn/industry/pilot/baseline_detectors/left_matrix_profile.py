"""The matrix profile with neighbours from the past alone."""

# Shapes: T steps, n points after averaging, m length of a subsequence.

from __future__ import annotations

import numpy as np

from ..timeline import DAY, Array, Timeline
from .detector_base import ChannelDetector, StateScaler

MOST_POINTS = 8192  # of a channel: time grows with their square
MOST_CHANNELS = 8  # those observed most
ROWS = 512  # of the matrix of correlations held at a time


class LeftMatrixProfile(ChannelDetector):
    """Distance of the trailing day (at least 8 points) to its nearest neighbour in the past, largest over channels.

    A long record is averaged to at most 8,192 points; a step has the score of the last point that is complete then.
    Yeh et al., "Matrix Profile I", ICDM 2016.
    """

    name = "matrix profile (left)"

    def fit(self, train: Timeline) -> LeftMatrixProfile:
        self.scaler = StateScaler().fit(train)
        return self

    def scores(self, timeline: Timeline) -> Array:
        z = self.scaler.z(timeline)
        size = -(-len(z) // MOST_POINTS)
        length = max(8, round(DAY / timeline.step / size))
        points = len(z) // size
        if points < 3 * length:
            return np.zeros(len(z))
        most = np.argsort(-timeline.observed.sum(0), kind="stable")[:MOST_CHANNELS]
        profiles = [left_profile(_averages(z[:, n], size, points), length) for n in most]
        # point p is complete at the end of step (p + 1) · size − 1
        ready = (np.arange(len(z)) + 1) // size - 1
        scores: Array = np.where(ready >= 0, np.max(profiles, 0)[ready], 0.0)
        return scores


def _averages(column: Array, size: int, points: int) -> Array:
    parts = column[: points * size].reshape(points, size)
    seen = ~np.isnan(parts)
    total = np.where(seen, parts, 0).sum(1)
    means: Array = np.divide(total, seen.sum(1), out=np.full(points, np.nan), where=seen.any(1))
    # the last value that was observed: a gap is no pattern, and stumpy would drop every window that holds one
    at = np.maximum.accumulate(np.where(np.isnan(means), -1, np.arange(points)))
    return np.where(at >= 0, means[at], 0.0)


# d(i, j) = √(2 m (1 − r)), r the correlation of the subsequences, in units of its largest value 2 √m; r = 1 of two flat
# ones, 1/2 of a flat one with another, as in stumpy. Not by stumpy itself: it compiles for minutes in every process,
# while a product of matrices takes seconds at this number of points; a test holds both against each other.
def left_profile(points: Array, length: int) -> Array:
    """For every point the distance in [0, 1] of the subsequence that ends there to its nearest one before, at least a
    quarter of its length earlier; float64 [n], 0 where there is none.
    """
    windows = np.lib.stride_tricks.sliding_window_view(points, length)
    spread = windows.std(1, keepdims=True)
    flat = spread[:, 0] < 1e-10
    normal = (windows - windows.mean(1, keepdims=True)) / np.where(spread > 1e-10, spread, 1.0)
    normal = (normal * ~flat[:, None] / np.sqrt(length)).astype(np.float32)
    apart, profile = length // 4 + 1, np.zeros(len(points))
    for first in range(apart, len(normal), ROWS):
        rows = slice(first, min(first + ROWS, len(normal)))
        earlier = np.arange(rows.stop - apart)
        correlation = normal[rows] @ normal[earlier].T
        correlation += 0.5 * (flat[rows, None] | flat[earlier]) + 0.5 * (flat[rows, None] & flat[earlier])
        correlation[earlier > np.arange(rows.start, rows.stop)[:, None] - apart] = -1
        nearest = correlation.max(1).clip(-1, 1).astype(np.float64)
        profile[rows.start + length - 1 : rows.stop + length - 1] = np.sqrt((1 - nearest) / 2)
    return profile
