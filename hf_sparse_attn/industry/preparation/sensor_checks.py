"""Faults of sensors in their readings: gaps, stuck, flat, saturated, another unit; each as stretches with flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dataset import Source
from ..findings import Finding, Quality, Severity
from .asset_grid import AssetGrid
from .channel_series import SECOND, Bools, ChannelSeries, Flags, Floats, Ints, true_stretches
from .constant_runs import LEAST_RUN, constant_runs, find_clipped, find_stuck, on_limit
from .sampling_gaps import find_gaps
from .unit_changes import find_unit_changes

BLOCK = 32  # readings whose movement is compared
FLAT_BLOCKS = 3  # in a row
FLAT = 0.25  # of the usual movement in this state of the machine
FLAT_SPREAD = 0.5  # of the usual spread within a block
FLAT_RECURS = 0.02  # share of other blocks as calm, from which on the channel is calm at times
STUCK_ENDS = 2  # readings beside a stuck stretch that do not count as moving
LONG_GAP = 3600.0  # seconds, from which on a gap is a warning however slow the channel
MANY_MISSING = 10  # usual intervals, likewise


@dataclass
class SensorFaults:
    """What was found in one channel: findings, and the flags (n,) of its readings, bits of `Quality`."""

    findings: list[Finding]
    flags: Flags

    @classmethod
    def none(cls, count: int) -> SensorFaults:
        return cls([], np.zeros(count, np.uint16))

    def add(
        self,
        series: ChannelSeries,
        sources: Sequence[Source],
        kind: str,
        flag: Quality,
        stretch: slice,
        values: Mapping[str, Any],
        severity: Severity = "warning",
    ) -> None:
        self.flags[stretch] |= np.uint16(flag)
        self.findings.append(series.finding(kind, severity, stretch, sources, values=values))


def check_sampling(series: ChannelSeries, sources: Sequence[Source], end: int) -> SensorFaults:
    """Gaps of a channel; ``end`` (nanoseconds) is the last reading of its files, before which it may fall silent."""
    faults = SensorFaults.none(len(series))
    gaps = find_gaps(series.times)
    for after, seconds, usual in zip(gaps.after, gaps.seconds, gaps.usual, strict=True):
        long = gaps.regular and (seconds >= LONG_GAP or seconds >= MANY_MISSING * usual)
        values = {"seconds": float(seconds), "usual_seconds": float(usual), "regular": gaps.regular}
        stretch = slice(int(after) - 1, int(after) + 1)
        missing = max(1, round(seconds / usual) - 1)
        severity: Severity = "warning" if long else "information"
        faults.findings.append(series.finding("gap", severity, stretch, sources, count=missing, values=values))
        faults.flags[after] |= np.uint16(Quality.AFTER_GAP)
    silent = (end - int(series.times[-1])) / SECOND if len(series) else 0.0
    if silent > max(gaps.threshold, LONG_GAP):
        values = {"seconds": silent, "at_end": True, "regular": gaps.regular}
        stretch = slice(len(series) - 1, len(series))
        severity = "warning" if gaps.regular else "information"
        faults.findings.append(series.finding("gap", severity, stretch, sources, count=1, values=values))
    return faults


def check_unit(series: ChannelSeries, sources: Sequence[Source]) -> SensorFaults:
    """Stretches in another unit than the first reading."""
    faults = SensorFaults.none(len(series))
    for change in find_unit_changes(series.values):
        conversion = change.conversion
        values = {"from": conversion.old, "to": conversion.new, "factor": conversion.factor, "shift": conversion.shift}
        faults.add(series, sources, "unit_change", Quality.OTHER_UNIT, change.stretch, values)
    return faults


def check_values(series: ChannelSeries, sources: Sequence[Source], states: Ints, grid: AssetGrid) -> SensorFaults:
    """Stuck, saturated and flat stretches.

    Args:
        states: (n,) state of the machine at each reading.
        grid: of the whole asset: what the other channels do tells a sensor that is stuck from a machine that rests.
    """
    faults = SensorFaults.none(len(series))
    if len(series) == 0:
        return faults
    others = grid.others_moving(series.number)[grid.steps_of(series.times)]
    for stretch in find_stuck(series, states, others):
        limit = on_limit(series, stretch)
        kind, flag = ("saturated_sensor", Quality.SATURATED) if limit else ("stuck_sensor", Quality.STUCK)
        seconds = float(series.times[stretch][-1] - series.times[stretch][0]) / SECOND
        faults.add(
            series, sources, kind, flag, stretch, {"value": float(series.values[stretch.start]), "seconds": seconds}
        )
    for stretch in find_clipped(series, _resting(series, states)):
        inside = series.values[stretch]
        limit_value = float(
            inside.max() if np.sum(inside == inside.max()) > np.sum(inside == inside.min()) else inside.min()
        )
        on = np.zeros(len(series), bool)
        on[stretch] = inside == limit_value
        if not faults.flags[on].any():
            faults.flags[on] |= np.uint16(Quality.SATURATED)
            values = {"value": limit_value, "share": float(np.mean(inside == limit_value))}
            faults.findings.append(
                series.finding("saturated_sensor", "warning", stretch, sources, count=int(on.sum()), values=values)
            )
    for stretch, ratio in find_flat(series.values, states, others):
        if not faults.flags[stretch].any():
            seconds = float(series.times[stretch][-1] - series.times[stretch][0]) / SECOND
            values = {"ratio": ratio, "seconds": seconds}
            faults.add(series, sources, "flat_sensor", Quality.FLAT, stretch, values)
    return faults


def _resting(series: ChannelSeries, states: Ints) -> Bools:
    """(n,) Readings in states in which the channel mostly holds one value."""
    runs = constant_runs(series.values, states)
    long = np.repeat(runs.lengths >= LEAST_RUN, runs.lengths)
    count = np.bincount(states)
    share = np.bincount(states, long) / np.maximum(count, 1)
    return np.asarray(share[states] > 0.5)


def find_flat(values: Floats, states: Ints, others_moving: Floats) -> list[tuple[slice, float]]:
    """Stretches in which values move far less than in the same state at other times, but move; each with the ratio of
    its movement to the usual one.

    Args:
        values: (n,)
        states: (n,) of the machine.
        others_moving: (n,) share of the other channels that move, NaN where there are none.
    """
    blocks = len(values) // BLOCK
    if blocks < 10 * FLAT_BLOCKS:
        return []
    cut = values[: blocks * BLOCK].reshape(blocks, BLOCK)
    steps = np.abs(np.diff(cut, axis=1))
    movement, spread, moving = steps.mean(axis=1), cut.std(axis=1), (steps > 0).mean(axis=1)
    state = states[BLOCK // 2 :: BLOCK][:blocks]
    usual, usual_spread, usual_moving = (_by_state(of, state) for of in (movement, spread, moving))
    # too coarse a resolution: hardly a reading differs from the one before it
    told = (usual > 0) & (usual_moving > 0.25)
    calm = told & (movement < FLAT * usual) & (spread < FLAT_SPREAD * usual_spread)
    flat = []
    for stretch in true_stretches(calm):
        inside = slice(stretch.start * BLOCK, stretch.stop * BLOCK)
        same = state == state[stretch.start]
        same[stretch] = False
        recurs = float(np.mean(calm[same])) > FLAT_RECURS if same.any() else True
        others = others_moving[inside]
        rests = not np.isnan(others).all() and float(np.nanmean(others)) < 0.5
        constant = not np.any(movement[stretch] > 0)
        if stretch.stop - stretch.start >= FLAT_BLOCKS and not (recurs or rests or constant):
            flat.append((inside, float(np.mean(movement[stretch] / usual[stretch]))))
    return flat


def _by_state(of: Floats, state: Ints) -> Floats:
    """(blocks,) Median of ``of`` over the blocks of the same state."""
    medians = np.zeros(len(of))
    for label in np.unique(state):
        medians[state == label] = np.median(of[state == label])
    return medians
