"""Gaps of a channel against its own usual interval; which steps of a grid were observed, and how long ago."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .channel_series import SECOND, Floats, Ints

BLOCK = 512  # intervals over which the usual one is taken: a channel may change its rate
REGULAR = 0.9  # share of intervals of at most 1.5 usual ones, from which on sampling counts as regular
FALSE_GAPS = 0.01  # gaps expected by chance in a whole record
RECURRING = 4  # as many pauses of a similar length are how an irregular channel works
LEAST_INTERVALS = 30  # below, nothing is usual


@dataclass(frozen=True)
class SamplingGaps:
    """Gaps of one channel.

    Attributes:
        after: (g,) index of the first reading after each gap.
        seconds: (g,) from the reading before to the one after.
        usual: (g,) usual interval at that place, seconds.
        regular: False for channels that report on change or by event.
        threshold: seconds from which on silence at the end of the record counts; infinite where none does.
    """

    after: Ints
    seconds: Floats
    usual: Floats
    regular: bool
    threshold: float


def find_gaps(times: Ints) -> SamplingGaps:
    """Gaps in ascending ``times`` (n,), nanoseconds.

    Regular channels: a run of k missing samples is a gap where k >= 2 and losing single samples independently, at the
    rate at which this channel does, would leave fewer than `FALSE_GAPS` runs as long. Irregular ones: an interval
    beyond what an exponential and a Pareto tail, both fitted above the 95th percentile, would reach, and of which there
    are not several of a similar length: pauses that recur are how the channel works.
    """
    steps = np.diff(times) / SECOND
    places = np.flatnonzero(steps > 0)
    intervals = steps[places]
    none = np.zeros(0)
    if len(intervals) < LEAST_INTERVALS:
        return SamplingGaps(none.astype(np.int64), none, none, False, float("inf"))
    usual = _local_medians(intervals)
    relative = intervals / usual
    regular = bool(np.mean(relative <= 1.5) >= REGULAR)
    if regular:
        lost = float((np.sum((relative > 1.5) & (relative < 2.5)) + 1) / (len(intervals) + 1))
        run = max(2.0, np.ceil(np.log(FALSE_GAPS / len(intervals)) / np.log(lost)))
        gaps, threshold = relative >= run + 0.5, float((run + 0.5) * np.median(intervals))
    else:
        threshold = _irregular_threshold(intervals)
        gaps = intervals > threshold
        ordered = np.sort(intervals)
        similar = len(ordered) - np.searchsorted(ordered, intervals[gaps] / 3)
        gaps[np.flatnonzero(gaps)[similar > RECURRING]] = False
    return SamplingGaps(places[gaps] + 1, intervals[gaps], usual[gaps], regular, threshold)


def _local_medians(intervals: Floats) -> Floats:
    whole = len(intervals) // BLOCK * BLOCK
    if whole == 0:
        return np.full(len(intervals), np.median(intervals))
    medians = np.median(intervals[:whole].reshape(-1, BLOCK), axis=1)
    # a rate may change within a block: the slowest of three blocks is usual
    around = np.concatenate((medians[:1], medians, medians[-1:]))
    slowest = np.maximum(np.maximum(around[:-2], around[1:-1]), around[2:])
    # what is left over goes by the last whole block
    return np.repeat(np.append(slowest, slowest[-1]), BLOCK)[: len(intervals)]


def _irregular_threshold(intervals: Floats) -> float:
    base = float(np.quantile(intervals, 0.95))
    above = intervals[intervals > base]
    if len(above) < LEAST_INTERVALS:
        return float("inf")
    expected = len(above) / FALSE_GAPS
    # medians instead of means: the gaps themselves are among the exceedances
    exponential = base + np.median(above - base) / np.log(2) * np.log(expected)
    pareto = base * expected ** (np.median(np.log(above / base)) / np.log(2))
    return float(max(exponential, pareto))
