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
from .unit_changes import UnitChange

BLOCK = 32  # readings whose movement is compared
FLAT_BLOCKS = 3  # in a row
INTERRUPTED = 2  # blocks that do not end a flat stretch
FLAT = 0.25  # of the usual movement in this state of the machine
FLAT_SPREAD = 0.5  # of the usual spread within a block
RECURS = 3  # episodes on one limit, from which on they are how the machine is run
FLAT_RECURS = 0.02  # share of other blocks as calm, from which on the channel is calm at times
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


def check_unit(series: ChannelSeries, sources: Sequence[Source], changes: Sequence[UnitChange]) -> SensorFaults:
    """Stretches in another unit than the first reading; ``changes`` of `find_unit_changes`."""
    faults = SensorFaults.none(len(series))
    for change in changes:
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
    # first: readings that hardly move hold one value for a while, again and again
    for episode in find_flat(series.values, states, others):
        _add_flat(faults, series, sources, episode)
    for stretch, limit in find_clipped(series, _resting(series, states)):
        _add_clipped(faults, series, sources, stretch, limit)
    stuck = [stretch for stretch in find_stuck(series, states, others) if not faults.flags[stretch].any()]
    cut_off = [on_limit(series, stretch) for stretch in stuck]
    for value, at_limit in _by_value(series, [s for s, cut in zip(stuck, cut_off, strict=True) if cut]).items():
        if len(at_limit) >= RECURS:
            _note_recurring(faults, series, sources, value, at_limit)
        else:
            for stretch in at_limit:
                values = {"value": value, "seconds": series.seconds(stretch)}
                faults.add(series, sources, "saturated_sensor", Quality.SATURATED, stretch, values)
    for stretch in (s for s, cut in zip(stuck, cut_off, strict=True) if not cut):
        values = {"value": float(series.values[stretch.start]), "seconds": series.seconds(stretch)}
        faults.add(series, sources, "stuck_sensor", Quality.STUCK, stretch, values)
    return faults


def _by_value(series: ChannelSeries, stretches: Sequence[slice]) -> dict[float, list[slice]]:
    by_value: dict[float, list[slice]] = {}
    for stretch in stretches:
        by_value.setdefault(float(series.values[stretch.start]), []).append(stretch)
    return by_value


def _note_recurring(
    faults: SensorFaults, series: ChannelSeries, sources: Sequence[Source], value: float, stretches: Sequence[slice]
) -> None:
    """A limit that the channel comes back to, as a drive at full speed does: told once, and nothing is flagged."""
    whole = slice(stretches[0].start, stretches[-1].stop)
    values = {
        "value": value,
        "episodes": len(stretches),
        "seconds": max(series.seconds(stretch) for stretch in stretches),
    }
    count = sum(stretch.stop - stretch.start for stretch in stretches)
    faults.findings.append(
        series.finding("saturated_sensor", "information", whole, sources, count=count, values=values)
    )


def _add_flat(faults: SensorFaults, series: ChannelSeries, sources: Sequence[Source], episode: FlatEpisode) -> None:
    stretch = slice(episode.stretches[0].start, episode.stretches[-1].stop)
    values = {"ratio": episode.ratio, "seconds": series.seconds(stretch)}
    for part in episode.stretches:
        faults.flags[part] |= np.uint16(Quality.FLAT)
    count = sum(part.stop - part.start for part in episode.stretches)
    faults.findings.append(series.finding("flat_sensor", "warning", stretch, sources, count=count, values=values))


def _add_clipped(
    faults: SensorFaults, series: ChannelSeries, sources: Sequence[Source], stretch: slice, limit: float
) -> None:
    inside = series.values[stretch]
    on = np.zeros(len(series), bool)
    on[stretch] = inside == limit
    if not faults.flags[on].any():
        faults.flags[on] |= np.uint16(Quality.SATURATED)
        values = {"value": limit, "share": float(np.mean(inside == limit)), "seconds": series.seconds(stretch)}
        count = int(on.sum())
        faults.findings.append(
            series.finding("saturated_sensor", "warning", stretch, sources, count=count, values=values)
        )


def _resting(series: ChannelSeries, states: Ints) -> Bools:
    """(n,) Readings in states in which the channel mostly holds one value."""
    runs = constant_runs(series.values, states)
    long = np.repeat(runs.lengths >= LEAST_RUN, runs.lengths)
    count = np.bincount(states)
    share = np.bincount(states, long) / np.maximum(count, 1)
    return np.asarray(share[states] > 0.5)


@dataclass(frozen=True)
class FlatEpisode:
    """Stretches of readings that move far less than usual, with nothing that moves as usual in between; ``ratio`` of
    their movement to the usual one.
    """

    stretches: list[slice]
    ratio: float


def find_flat(values: Floats, states: Ints, others_moving: Floats) -> list[FlatEpisode]:
    """Where values move far less than in the same state at other times, but move.

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
    others = others_moving[: blocks * BLOCK].reshape(blocks, BLOCK)[:, BLOCK // 2]
    state = states[BLOCK // 2 :: BLOCK][:blocks]
    episodes = []
    for label in np.unique(state):
        of_state = np.flatnonzero(state == label)
        usual, usual_spread = np.median(movement[of_state]), np.median(spread[of_state])
        # too coarse a resolution, or at rest: hardly a reading differs from the one before it
        if usual == 0 or np.median(moving[of_state]) <= 0.25:
            continue
        calm = (movement[of_state] < FLAT * usual) & (spread[of_state] < FLAT_SPREAD * usual_spread)
        for stretch in _closed(calm):
            mine = of_state[stretch]
            elsewhere = np.delete(calm, stretch)
            recurs = len(elsewhere) == 0 or float(elsewhere.mean()) > FLAT_RECURS
            rests = not np.isnan(others[mine]).all() and float(np.nanmean(others[mine])) < 0.5
            if len(mine) >= FLAT_BLOCKS and not recurs and not rests and np.median(movement[mine]) > 0:
                episodes.append(FlatEpisode(_joined(mine), float(movement[mine].mean() / usual)))
    return sorted(episodes, key=lambda episode: episode.stretches[0].start)


def _closed(calm: Bools) -> list[slice]:
    """Runs of calm blocks, over short interruptions: the machine is switched while the sensor hangs."""
    joined: list[slice] = []
    for stretch in true_stretches(calm):
        if joined and stretch.start - joined[-1].stop <= INTERRUPTED:
            joined[-1] = slice(joined[-1].start, stretch.stop)
        else:
            joined.append(stretch)
    return joined


def _joined(blocks: Ints) -> list[slice]:
    """Readings of ascending blocks (b,), neighbouring blocks as one stretch."""
    parts = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1)
    return [slice(int(part[0]) * BLOCK, (int(part[-1]) + 1) * BLOCK) for part in parts]
