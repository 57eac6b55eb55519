"""Runs of one value in a channel: stuck sensors, and sensors on the limit of their range."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .channel_series import Bools, ChannelSeries, Floats, Ints, quantum

LEAST_RUN = 12  # readings
TAIL = 3.0  # times as long as the longest run that chance would leave
FALSE_RUNS = 0.01  # runs expected by chance beyond the tail in a whole record
LEAST_HISTORY = 30  # runs, below which a channel has no usual length
DISCRETE = 8  # values, up to which a channel is a switch: it may hold each for any time
RECURRING = 4  # as many runs of a similar length are how the channel works
RESTS = 0.3  # share of a state's readings in long runs, from which on the channel rests in that state
INTO = 0.2  # share of a run in a state that counts
BESIDE = 20  # readings on each side of a run that tell how it was reached
MOST_LIMITS = 6  # levels looked at, those with the most readings in plateaus
TOPS = 4  # plateaus on one value that make a limit
CLIPPED = 50  # readings on a limit at least
CLIPPED_SHARE = 0.05  # of the readings in between, at least
ONE_RUN = 0.7  # of the readings on a limit in a single run, at most
CLIP_RATIO = 3.0  # readings on a limit against those one resolution below it, where many come in plateaus
CLIP_SURE = 20.0  # the same where few do


@dataclass(frozen=True)
class ConstantRuns:
    """Runs of equal values: start (r,), length (r,) in readings, value (r,), state of the machine (r,)."""

    starts: Ints
    lengths: Ints
    values: Floats
    states: Ints


def constant_runs(values: Floats, states: Ints) -> ConstantRuns:
    """Runs in ``values`` (n,); ``states`` (n,) by rising activity: of a run that at its middle, of a long one the most
    active of those it reaches far into.
    """
    starts = np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)
    lengths = np.diff(np.append(starts, len(values)))
    state = states[starts + lengths // 2]
    for run in np.flatnonzero(lengths >= LEAST_RUN).tolist():
        shares = np.bincount(states[starts[run] : starts[run] + lengths[run]]) / lengths[run]
        state[run] = np.flatnonzero(shares >= INTO)[-1] if np.any(shares >= INTO) else state[run]
    return ConstantRuns(starts, lengths, values[starts], state)


def usual_longest(lengths: Ints) -> float:
    """What a run must exceed to be no longer chance: 3 times the length beyond which an exponential tail through the
    95th and the 99.5th percentile expects `FALSE_RUNS` of these runs (r,).
    """
    low, high = np.quantile(lengths, [0.95, 0.995])
    scale = (high - low) / np.log(10)
    return max(float(LEAST_RUN), TAIL * float(low + scale * np.log(0.05 * len(lengths) / FALSE_RUNS)))


def find_stuck(series: ChannelSeries, states: Ints, others_moving: Floats) -> list[slice]:
    """Stretches in which the channel holds one value for far longer than it ever does in that state of the machine.

    Args:
        states: (n,) state at each reading.
        others_moving: (n,) share of the other channels that move, NaN where there are none.
    """
    values = series.values
    if len(values) < LEAST_HISTORY or len(np.unique(values[:: max(1, len(values) // 5000)])) <= DISCRETE:
        return []
    runs = constant_runs(values, states)
    if len(runs.starts) < LEAST_HISTORY:
        return []
    long = runs.lengths >= LEAST_RUN
    resting = _resting_values(runs, long)
    bottom = float(values.min())
    stuck = []
    for state in np.unique(runs.states[long]):
        here = runs.states == state
        history = here & ~np.isin(runs.values, resting)
        lengths = runs.lengths[history if history.sum() >= LEAST_HISTORY else ~np.isin(runs.values, resting)]
        if len(lengths) < LEAST_HISTORY:
            continue
        analog = np.quantile(lengths, 0.995) <= 2
        for run in np.flatnonzero(here & (runs.lengths > usual_longest(lengths))).tolist():
            stretch = slice(int(runs.starts[run]), int(runs.starts[run] + runs.lengths[run]))
            moving = others_moving[stretch]
            alone = bool(np.isnan(moving).all())
            busy = not alone and float(np.nanmean(moving)) >= 0.5
            at_rest = runs.values[run] in resting or runs.values[run] in (0.0, bottom)
            if _rests_in(runs, long, here, run) or (at_rest and not alone and not busy):
                continue
            if _similar(runs, here, run) >= RECURRING and not (analog and busy):
                continue
            stuck.append(stretch)
    return sorted(stuck, key=lambda stretch: stretch.start)


def _resting_values(runs: ConstantRuns, long: Bools) -> Floats:
    """Values that the channel comes back to and holds, such as the zero of a pump that is off."""
    values, counts = np.unique(runs.values[long], return_counts=True)
    return values[counts >= 3]


def _rests_in(runs: ConstantRuns, long: Bools, here: Bools, run: int) -> bool:
    others = here.copy()
    others[run] = False
    total = runs.lengths[others].sum()
    return bool(total) and float(runs.lengths[others & long].sum() / total) > RESTS


def _similar(runs: ConstantRuns, here: Bools, run: int) -> int:
    return int(np.sum(here & (runs.lengths >= runs.lengths[run] / 3))) - 1


def on_limit(series: ChannelSeries, stretch: slice) -> bool:
    """Whether a stretch of one value is one of a signal that is cut off: on the highest or lowest value of the channel,
    or reached and left in usual steps from one side only. A sensor that comes unstuck jumps.
    """
    values = series.values
    value = float(values[stretch.start])
    elsewhere = int(np.sum(values == value)) - (stretch.stop - stretch.start)
    # the zero of a machine that is off is no limit
    if (value >= values.max() or value <= values.min()) and elsewhere < LEAST_RUN:
        return True
    width = int(np.clip((stretch.stop - stretch.start) // 5, BESIDE, 3 * BESIDE))
    before, after = values[max(0, stretch.start - width) : stretch.start], values[stretch.stop : stretch.stop + width]
    if min(len(before), len(after)) < BESIDE:
        return False
    moves = np.abs(np.concatenate((np.diff(before[-BESIDE:]), np.diff(after[:BESIDE]))))
    # coarse readings mostly do not move, and then by one resolution
    step = max(3 * float(moves.mean()), 1.5 * float(moves[moves > 0].min(initial=np.inf))) if moves.any() else 0.0
    joined = max(abs(before[-1] - value), abs(after[0] - value)) <= step
    one_side = max(before.max(), after.max()) <= value or min(before.min(), after.min()) >= value
    return bool(joined and one_side)


def find_clipped(series: ChannelSeries, resting: Bools) -> list[tuple[slice, float]]:
    """Stretches in which values are cut off at one level, each with that level: plateaus on it again and again,
    nothing beyond it in between, and far more readings on it than one resolution further in.

    Args:
        resting: (n,) where the machine rests: a zero there is no limit.
    """
    found = []
    for sign in (1.0, -1.0):
        values = sign * series.values
        runs = constant_runs(values, np.zeros(len(values), np.int64))
        for value in _limits(runs, values, resting):
            stretch = _clipped_stretch(runs, values, float(value))
            if stretch is not None and np.mean(resting[stretch][values[stretch] == value]) < 0.5:
                found.append((stretch, sign * float(value)))
    return sorted(found, key=lambda clipped: clipped[0].start)


def _limits(runs: ConstantRuns, values: Floats, resting: Bools) -> Floats:
    """Values on which several plateaus lie: runs of 3 readings and more with lower values on both sides."""
    inner = np.arange(1, len(runs.starts) - 1)
    top = (runs.values[inner] > runs.values[inner - 1]) & (runs.values[inner] > runs.values[inner + 1])
    plateaus = inner[top & (runs.lengths[inner] >= 3)]
    plateaus = plateaus[~resting[runs.starts[plateaus] + runs.lengths[plateaus] // 2]]
    levels, at, counts = np.unique(runs.values[plateaus], return_inverse=True, return_counts=True)
    readings = np.bincount(at, runs.lengths[plateaus]) * (counts >= TOPS)
    order = np.argsort(-readings, kind="stable")[:MOST_LIMITS]
    return levels[order[readings[order] > 0]]


def _clipped_stretch(runs: ConstantRuns, values: Floats, value: float) -> slice | None:
    on = np.flatnonzero(runs.values == value)
    # the longest stretch without anything beyond the limit
    pieces = np.cumsum(runs.values > value)[on]
    piece = on[pieces == np.argmax(np.bincount(pieces, runs.lengths[on]))]
    if len(piece) < TOPS:
        return None
    stretch = slice(int(runs.starts[piece[0]]), int(runs.starts[piece[-1]] + runs.lengths[piece[-1]]))
    inside = values[stretch]
    below = inside[inside < value]
    count = len(inside) - len(below)
    step = quantum(inside)
    if len(below) < TOPS or count < max(CLIPPED, CLIPPED_SHARE * len(inside)):
        return None
    if runs.lengths[piece].max() > ONE_RUN * count:
        return None  # stuck, rather
    # width below the limit in which a signal that is not cut off would be about as often as on it
    width = 3 * step if step > 0 else 0.3 * float(np.median(np.abs(np.diff(inside)[np.diff(inside) != 0])))
    near = float(np.sum(below >= value - width * 1.001)) / (3 if step > 0 else 1)
    deep = float(value - np.quantile(below, 0.05)) >= 8 * step
    plateaus = np.mean(runs.lengths[piece] >= 3) >= 0.2
    return stretch if deep and count >= (CLIP_RATIO if plateaus else CLIP_SURE) * max(near, 1.0) else None
