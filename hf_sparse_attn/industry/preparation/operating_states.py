"""Operating states of a machine: change points of its sensors, clustered into idle, start-up, load and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...system.extras import needs_extra
from ..dataset import STATES
from .asset_grid import AssetGrid
from .channel_series import Bools, Floats, Ints

with needs_extra("industry", "operating states"):
    import polars as pl
    import ruptures
    from sklearn.cluster import KMeans

CHUNK = 1000  # steps in which change points are sought at once: the search is quadratic
SHORTEST = 3  # steps of a segment
PENALTY = 12.0  # of a change point, in units of channels * log(steps) * variance of the noise
CLIP = 5.0  # robust scales: a faulty sensor must not outweigh the others
BETWEEN = 0.04  # share of steps halfway between two states at most: machines switch, what drifts has no states
LEAST_SHARE = 0.005  # of the steps, for a state
SEPARATION = 3.0  # distance of two states at least, in spreads within them
START_UP = 0.5  # length of start-ups against that of the state they lead to, at most


@dataclass(frozen=True)
class StateSegments:
    """Stretches of one state each, in order; between them there may be time without data.

    Attributes:
        starts, ends: (s,) nanoseconds in UTC.
        labels: (s,) numbers of states, from 0 by rising activity.
        names: of the states, by number.
    """

    starts: Ints
    ends: Ints
    labels: Ints
    names: tuple[str, ...]

    def at(self, times: Ints) -> Ints:
        """State of each time (n,); of a time between two stretches the state before it."""
        if len(self.starts) == 0:
            return np.zeros(len(times), np.int64)
        return self.labels[np.maximum(np.searchsorted(self.starts, times, side="right") - 1, 0)]

    def frame(self) -> pl.DataFrame:
        """Schema `STATES`."""
        names = [self.names[label] for label in self.labels]
        return pl.DataFrame({"start": self.starts, "end": self.ends, "state": names}).cast(STATES)


def find_states(grid: AssetGrid, *, most: int = 6, names: Mapping[str, str] | None = None) -> StateSegments:
    """States of the machine whose channels are on ``grid``; at most ``most``.

    Change points by kernel change point detection with a linear kernel (Celisse et al. 2018, of ruptures) on robustly
    scaled means; their segments' means clustered by k-means. The largest k is taken whose states lie apart and are
    switched between: a signal that drifts from one level to another has many steps in between, and no states.

    Args:
        names: what the user calls a state, by its proposed name (idle, start-up, load, state B …).
    """
    levels, seen = _scaled_levels(grid)
    labels = np.zeros(len(levels), np.int64)
    if len(levels) >= 10 * SHORTEST:
        labels = _clustered(levels, _change_points(levels), most)
    labels, count = _by_activity(labels, levels, _activity(grid)[seen])
    steps = np.flatnonzero(seen)
    cuts = np.flatnonzero((np.diff(labels) != 0) | (np.diff(steps) > 1)) + 1
    firsts, lasts = np.append(0, cuts)[: len(steps)], np.append(cuts, len(steps))[: len(steps)] - 1
    proposed = _proposed_names(count, labels[firsts], lasts - firsts + 1)
    return StateSegments(
        grid.start + steps[firsts] * grid.step,
        grid.start + (steps[lasts] + 1) * grid.step,
        labels[firsts],
        tuple((names or {}).get(name, name) for name in proposed),
    )


def _scaled_levels(grid: AssetGrid) -> tuple[Floats, Bools]:
    """Levels (steps with data, channels) in robust scales, and which steps those are (steps,)."""
    columns = []
    for mean in grid.means.values():
        known = ~np.isnan(mean)
        if known.sum() < SHORTEST:
            continue
        center = np.median(mean[known])
        low, high = np.quantile(mean[known], [0.02, 0.98])
        scale = max(1.4826 * float(np.median(np.abs(mean[known] - center))), float(high - low) / 4)
        if scale > 0:
            columns.append(np.clip((mean - center) / scale, -CLIP, CLIP))
    if not columns:
        read = [~np.isnan(mean) for mean in grid.means.values()]
        constant: Bools = np.logical_or.reduce(read) if read else np.zeros(grid.steps, bool)
        return np.zeros((int(constant.sum()), 0)), constant
    levels = np.stack(columns, axis=1)
    seen: Bools = np.logical_or.reduce(~np.isnan(levels), axis=1)
    # a slow channel holds its last value; before its first it is at its median
    for column in levels.T:
        known = np.flatnonzero(~np.isnan(column))
        last = np.maximum.accumulate(np.where(np.isnan(column), -1, np.arange(len(column))))
        column[:] = np.where(last >= 0, column[np.maximum(last, known[0])], 0.0)
    return levels[seen], seen


def _change_points(levels: Floats) -> Ints:
    """Starts of segments, the first is 0."""
    if levels.shape[1] == 0:
        return np.zeros(1, np.int64)
    # variance of the noise by neighbouring steps; switching is rare enough not to reach their median
    noise = np.median(np.abs(np.diff(levels, axis=0)), axis=0) / 0.9539
    scaled = levels / np.maximum(noise, 0.02)
    penalty = PENALTY * levels.shape[1] * np.log(len(levels))
    starts = [0]
    for begin in range(0, len(scaled), CHUNK):
        part = scaled[begin : begin + CHUNK]
        if len(part) >= 2 * SHORTEST:
            ends = ruptures.KernelCPD(kernel="linear", min_size=SHORTEST).fit(part).predict(pen=penalty)
            starts += [begin + end for end in ends]
    return np.unique(np.asarray([start for start in starts if start < len(levels)], np.int64))


def _clustered(levels: Floats, starts: Ints, most: int) -> Ints:
    """State of every step (steps,)."""
    lengths = np.diff(np.append(starts, len(levels)))
    means = np.add.reduceat(levels, starts, axis=0) / lengths[:, None]
    best = np.zeros(len(starts), np.int64)
    for count in range(2, min(most, len(starts)) + 1):
        model = KMeans(count, n_init=4, random_state=0).fit(means, sample_weight=lengths.astype(np.float64))
        candidate = model.labels_.astype(np.int64)
        if len(np.unique(candidate)) == count and _switches(levels, np.repeat(candidate, lengths), count):
            best = candidate
    return np.repeat(best, lengths)


def _switches(levels: Floats, labels: Ints, count: int) -> bool:
    """Whether the states lie apart, and the machine switches between them instead of drifting."""
    shares = np.bincount(labels, minlength=count) / len(labels)
    if shares.min() < LEAST_SHARE:
        return False
    centers = np.stack([levels[labels == label].mean(axis=0) for label in range(count)])
    for one in range(count):
        for other in range(one + 1, count):
            axis = centers[other] - centers[one]
            length = float(np.linalg.norm(axis))
            both = (labels == one) | (labels == other)
            if length == 0:
                return False
            along = (levels[both] - centers[one]) @ axis / length**2
            mine = labels[both] == one
            spread = max(
                1.4826 * float(np.median(np.abs(along[part] - np.median(along[part])))) for part in (mine, ~mine)
            )
            if spread * SEPARATION > 1 or np.mean((along > 1 / 3) & (along < 2 / 3)) > BETWEEN:
                return False
    return True


def _activity(grid: AssetGrid) -> Floats:
    """(steps,) Mean over channels of the rank of level and movement: what rests ranks low."""
    total, known = np.zeros(grid.steps), np.zeros(grid.steps)
    for values in (*grid.means.values(), *grid.movements.values()):
        seen = ~np.isnan(values)
        if seen.any():
            total[seen] += np.searchsorted(np.sort(values[seen]), values[seen]) / seen.sum()
            known += seen
    return total / np.maximum(known, 1)


def _by_activity(labels: Ints, levels: Floats, activity: Floats) -> tuple[Ints, int]:
    """Labels numbered by rising activity, and how many there are."""
    present = np.unique(labels)
    order = sorted(present, key=lambda label: float(activity[labels == label].mean()))
    number = {label: at for at, label in enumerate(order)}
    return np.asarray([number[label] for label in labels], np.int64), len(present)


def _proposed_names(count: int, labels: Ints, lengths: Ints) -> list[str]:
    """The quietest state is idle, the most active load, a short one that mostly leads up to load start-up."""
    if count <= 1:
        return ["state A"] * count
    names = ["idle", *(f"state {chr(ord('B') + at)}" for at in range(count - 2)), "load"]
    usual = [float(np.median(lengths[labels == label])) for label in range(count)]
    for label in range(1, count - 1):
        places = np.flatnonzero(labels[:-1] == label)
        leads = len(places) > 0 and float(np.mean(labels[places + 1] > label)) > 0.5
        if leads and usual[label] < START_UP * usual[-1] and "start-up" not in names:
            names[label] = "start-up"
    return names
