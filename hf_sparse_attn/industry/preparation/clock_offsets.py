"""Offset of one clock against another: the lag at which pre-whitened signals of the two correlate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .channel_series import SECOND, Bools, Floats, Ints

LEAST_Z = 6.0  # of the peak, for an offset that counts as verified
HALF_Z = 4.0  # of the peak in each half of the record, where the whole one's must stand, too
UNIQUE = 1.25  # of the peak against the next highest: what repeats itself has several
STEPS = 2**16  # of the common grid at most: the end of a longer record is used
LEAST_STEPS = 200
ORDER = 8  # of the autoregression that whitens
CLIP = 6.0  # standard deviations: single jumps must not decide alone
AROUND = 10  # steps around the peak that belong to it
REFINED, SHIFTS = 100_000, 121  # readings and shifts that an offset is refined by
ALIKE = 0.5  # correlation of changes, from which on two sensors record the same
AGREED = 2.0  # steps that the peak of a half may lie off
LEAST_EVENTS = 10  # of one kind
SHORTEST_STEP = 1.0  # seconds

Spectrum = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class ClockSignal:
    """What a source recorded: readings of a sensor, or the times of one kind of log line.

    Attributes:
        name: of the channel, or of the kind of line.
        times: (n,) ascending, nanoseconds.
        values: (n,) readings; None for log lines.
    """

    name: str
    times: Ints
    values: Floats | None

    @property
    def interval(self) -> float:
        """Usual seconds between readings."""
        return float(np.median(np.diff(self.times))) / SECOND if len(self.times) > 1 else float("inf")


@dataclass(frozen=True)
class ClockOffset:
    """``seconds`` that a clock is ahead of the reference; ``z`` of the peak; ``step`` of the grid in seconds.

    ``signals``: the pair with the highest peak; ``pairs``: how many agreed to tell it; ``by_lines``: only pairs with
    log lines did, which tell an offset to about a step. ``before``: the seconds of the first half of the record,
    where one of the clocks was set in between.
    """

    seconds: float
    z: float
    step: float
    signals: tuple[str, str]
    pairs: int
    by_lines: bool
    before: float | None = None


@dataclass(frozen=True)
class _Peak:
    """Of a pair of signals: ``z``, ``seconds`` that the second is ahead, the names, whether one of them is a log."""

    z: float
    seconds: float
    signals: tuple[str, str]
    by_lines: bool


@dataclass(frozen=True)
class _Level:
    """A signal on the common grid: differences of readings, or how many lines; (steps,)."""

    name: str
    values: Floats
    residual: float  # seconds by which the readings come after the points of the grid
    events: bool


@dataclass(frozen=True)
class _Spectra:
    """Of a signal: whitened, and its absolute value: how much happened."""

    signal: _Level
    level: Spectrum
    activity: Spectrum


def estimate_offset(reference: Sequence[ClockSignal], other: Sequence[ClockSignal], most: float) -> ClockOffset | None:
    """Offset of the clock of ``other`` against that of ``reference``, None where no peak is certain.

    Generalised cross-correlation (Knapp and Carter 1976) by FFT with autoregressive pre-whitening: sensor against
    sensor by level, log lines against sensors by activity. A peak counts with z >= `LEAST_Z` against the other lags and
    `UNIQUE` times the next highest. With r0 the peak, r1 its higher neighbour, r2 the one beyond and r-1 that on the
    other side, (r1 - r-1) / (r1 - r-1 + r0 - r2) of a step is added: exact for steps at random times whatever the shape
    of the peak, within 0.07 of a step for band-limited signals. Of several pairs the median counts, weighted by z
    squared: a delay between two sensors is not that of their clocks. Each half of the record must have a peak there, z
    >= `HALF_Z`: the highest of many pairs and lags is high by chance, but not in the same place twice.

    Args:
        most: seconds, the largest offset that is sought.
    """
    grid = _common_grid(reference, other)
    if grid is None:
        return None
    start, step, steps = grid
    peaks = _peaks(reference, other, grid, most, LEAST_Z)
    starts = (start, start + int(steps // 2 * step * SECOND))
    halves = [_peaks(reference, other, (first, step, steps // 2), most, HALF_Z) for first in starts]
    if peaks:
        offset = _agreed(peaks, step)
        if all(any(abs(peak.seconds - offset.seconds) <= AGREED * step for peak in half) for half in halves):
            return _refined(offset, reference, other)
    return _changed(halves, step)


def _refined(offset: ClockOffset, reference: Sequence[ClockSignal], other: Sequence[ClockSignal]) -> ClockOffset:
    """The offset to a fraction of a step, where two sensors tell it that move alike: the shift at which changes of the
    one, between its own readings, correlate best with those of the other, interpolated.
    """
    one = next(signal for signal in reference if signal.name == offset.signals[0])
    two = next(signal for signal in other if signal.name == offset.signals[1])
    if one.values is None or two.values is None:
        return offset
    times, values = two.times[-REFINED:], two.values[-REFINED:]
    change = np.diff(values)
    shifts = offset.seconds + offset.step * np.linspace(-1.5, 1.5, SHIFTS)
    alike = np.zeros(SHIFTS)
    for at, shift in enumerate(shifts):
        moved = np.diff(np.interp(times - round(shift * SECOND), one.times, one.values))
        spread = float(moved.std() * change.std())
        alike[at] = abs(float(np.mean((moved - moved.mean()) * (change - change.mean())))) / spread if spread else 0.0
    if alike.max() < ALIKE:
        return offset
    return replace(offset, seconds=float(shifts[int(alike.argmax())]))


def _changed(halves: list[list[_Peak]], step: float) -> ClockOffset | None:
    """The offset of the second half where each half has one of its own by sensors: a clock that was set in between."""
    certain = [[peak for peak in half if peak.z >= LEAST_Z and not peak.by_lines] for half in halves]
    if not all(certain):
        return None
    first, second = (_agreed(half, step) for half in certain)
    return replace(second, before=first.seconds)


def _peaks(
    reference: Sequence[ClockSignal],
    other: Sequence[ClockSignal],
    grid: tuple[int, float, int],
    most: float,
    least_z: float,
) -> list[_Peak]:
    """The certain peak of every pair of signals that has one, on the grid: start (ns), step (seconds), steps."""
    start, step, steps = grid
    lags = min(int(most / step), steps // 2)
    if lags < 2 * AROUND:
        return []
    size = 1 << int(np.ceil(np.log2(steps + lags)))
    levels = _levels(reference, start, step, steps, 0.0)
    count = len(levels)
    levels += _levels(other, start, step, steps, levels[0].residual if levels else 0.0)
    spectra = _spectra(levels, size)
    peaks = []
    for one in spectra[:count]:
        for two in spectra[count:]:
            by_level = one.signal.events == two.signal.events
            product = np.conj(one.level if by_level else one.activity) * (two.level if by_level else two.activity)
            correlation = np.fft.irfft(product, size)
            peak = _peak(np.concatenate((correlation[-lags:], correlation[: lags + 1])), lags, least_z)
            if peak is not None:
                residual = two.signal.residual - one.signal.residual
                by_lines = one.signal.events or two.signal.events
                names = (one.signal.name, two.signal.name)
                peaks.append(_Peak(peak[1], peak[0] * step + residual, names, by_lines))
    return peaks


def _agreed(peaks: list[_Peak], step: float) -> ClockOffset:
    peaks = sorted(peaks, key=lambda peak: peak.seconds)
    weights = np.cumsum([peak.z**2 for peak in peaks])
    seconds = peaks[int(np.searchsorted(weights, weights[-1] / 2))].seconds
    near = [peak for peak in peaks if abs(peak.seconds - seconds) <= step]
    best = max(near, key=lambda peak: peak.z)
    return ClockOffset(seconds, best.z, step, best.signals, len(near), all(peak.by_lines for peak in near))


def _common_grid(reference: Sequence[ClockSignal], other: Sequence[ClockSignal]) -> tuple[int, float, int] | None:
    """Start (nanoseconds), step (seconds) and number of steps; None where the two hardly overlap."""
    sides = [[signal for signal in side if len(signal.times) >= 2] for side in (reference, other)]
    if not all(sides):
        return None
    intervals = [[signal.interval for signal in side if signal.values is not None] for side in sides]
    step = max((float(np.median(of_side)) for of_side in intervals if of_side), default=SHORTEST_STEP)
    step = max(step, SHORTEST_STEP)
    start = max(min(int(signal.times[0]) for signal in side) for side in sides)
    end = min(max(int(signal.times[-1]) for signal in side) for side in sides)
    steps = int((end - start) / SECOND / step)
    if steps < LEAST_STEPS:
        return None
    if steps > STEPS:
        start, steps = end - int(STEPS * step * SECOND), STEPS
    return start, step, steps


def _levels(signals: Sequence[ClockSignal], start: int, step: float, steps: int, residual: float) -> list[_Level]:
    """Signals that say something; ``residual``: of the sensors that log lines are compared with."""
    levels = []
    for signal in signals:
        place = (signal.times - start) / SECOND / step
        if signal.values is None:
            # a line is seen by the next reading, hence upwards
            at = np.ceil(place - residual / step).astype(np.int64)
            inside = (at >= 0) & (at < steps)
            if inside.sum() < LEAST_EVENTS:
                continue
            values, shift = np.log1p(np.bincount(at[inside], minlength=steps).astype(np.float64)), residual
        else:
            at = np.rint(place).astype(np.int64)
            inside = (at >= 0) & (at < steps)
            if inside.sum() < LEAST_STEPS / 2:
                continue
            values = np.diff(_held(signal.values[inside], at[inside], steps), prepend=0.0)
            values[0] = 0.0
            shift = float(np.mean(place[inside] - at[inside])) * step
        values = values - values.mean()
        if (spread := float(values.std())) > 0:
            levels.append(_Level(signal.name, np.clip(values / spread, -CLIP, CLIP), shift, signal.values is None))
    return levels


def _held(values: Floats, at: Ints, steps: int) -> Floats:
    """Readings on the grid (steps,), each held until the next."""
    last = np.zeros(steps, np.int64)
    last[at] = np.arange(len(at))
    return values[np.maximum.accumulate(last)]


def _spectra(levels: Sequence[_Level], size: int) -> list[_Spectra]:
    """All sensors whitened by one filter, all logs by another: filters of different shape would move the peak."""
    weights = {
        events: _prediction([level.values for level in levels if level.events == events]) for events in (False, True)
    }
    spectra = []
    for level in levels:
        filtered = np.convolve(level.values, np.concatenate(([1.0], -weights[level.events])))[: len(level.values)]
        white = np.clip(filtered / filtered.std(), -CLIP, CLIP)
        # not of the whitened one, whose filter smears a jump towards later
        activity = np.abs(level.values)
        parts = [np.fft.rfft(part - part.mean(), size) for part in (white, activity)]
        spectra.append(_Spectra(level, parts[0], parts[1]))
    return spectra


def _prediction(signals: Sequence[Floats]) -> Floats:
    """Weights (ORDER,) by Yule and Walker's equations of the autoregression that fits the signals on average."""
    if not signals:
        return np.zeros(ORDER)
    covariance = np.zeros(ORDER + 1)
    for signal in signals:
        spectrum = np.abs(np.fft.rfft(signal, 2 * len(signal))) ** 2
        covariance += np.fft.irfft(spectrum)[: ORDER + 1] / len(signal)
    matrix = covariance[np.abs(np.subtract.outer(np.arange(ORDER), np.arange(ORDER)))]
    weights: Floats = np.linalg.solve(matrix + 1e-6 * covariance[0] * np.eye(ORDER), covariance[1:])
    return weights


def _peak(correlation: Floats, lags: int, least_z: float) -> tuple[float, float] | None:
    """Place in steps and z of the highest peak of ``correlation`` (2 * lags + 1,), None where it is not certain."""
    size = np.abs(correlation)
    at = int(np.argmax(size))
    others: Bools = np.abs(np.arange(len(size)) - at) > AROUND
    noise = float(correlation[others].std())
    if noise == 0 or size[at] < least_z * noise or size[at] < UNIQUE * size[others].max():
        return None
    inside = min(max(at, 2), len(size) - 3)
    before, peak, after = (np.sign(correlation[at]) * correlation[inside + side] for side in (-1, 0, 1))
    side = 1 if after >= before else -1
    # what lies beyond the higher neighbour takes side lobes out: both are symmetric around the true place
    beyond = np.sign(correlation[at]) * correlation[inside + 2 * side]
    split = abs(after - before)
    fraction = side * split / (split + max(peak - beyond, 1e-12))
    return inside - lags + float(fraction), float(size[at] / noise)
