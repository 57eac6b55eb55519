"""Offset of one clock against another: the lag at which pre-whitened signals of the two correlate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .channel_series import SECOND, Bools, Floats, Ints

LEAST_Z = 6.0  # of the peak, for an offset that counts as verified
UNIQUE = 1.25  # of the peak against the next highest: what repeats itself has several
STEPS = 2**17  # of the common grid at most: the end of a longer record is used
LEAST_STEPS = 200
ORDER = 8  # of the autoregression that whitens
CLIP = 6.0  # standard deviations: single jumps must not decide alone
AROUND = 10  # steps around the peak that belong to it
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

    ``signals``: the pair with the highest peak; ``pairs``: how many agreed to tell it.
    """

    seconds: float
    z: float
    step: float
    signals: tuple[str, str]
    pairs: int


@dataclass(frozen=True)
class _Whitened:
    name: str
    level: Spectrum  # of the whitened signal
    activity: Spectrum  # of its absolute value: how much happened
    residual: float  # seconds by which the readings come after the points of the grid
    events: bool


def estimate_offset(reference: Sequence[ClockSignal], other: Sequence[ClockSignal], most: float) -> ClockOffset | None:
    """Offset of the clock of ``other`` against that of ``reference``, None where no peak is certain.

    Generalised cross-correlation (Knapp and Carter 1976) by FFT with autoregressive pre-whitening: sensor against
    sensor by level, log lines against sensors by activity. A peak counts with z >= `LEAST_Z` against the other lags and
    `UNIQUE` times the next highest. The two highest neighbours r0, r1 give the fraction r1 / (r0 + r1) of a step, which
    is exact for band-limited signals and for steps at random times alike. Of several pairs the median counts,
    weighted by z squared: a delay between two sensors is not that of their clocks.

    Args:
        most: seconds, the largest offset that is sought.
    """
    grid = _common_grid(reference, other)
    if grid is None:
        return None
    start, step, steps = grid
    lags = min(int(most / step), steps // 2)
    if lags < 2 * AROUND:
        return None
    size = 1 << int(np.ceil(np.log2(steps + lags)))
    mine = _whitened(reference, start, step, steps, size, 0.0)
    theirs = _whitened(other, start, step, steps, size, mine[0].residual if mine else 0.0)
    peaks = []
    for one in mine:
        for two in theirs:
            by_level = one.events == two.events
            product = np.conj(one.level if by_level else one.activity) * (two.level if by_level else two.activity)
            correlation = np.fft.irfft(product, size)
            peak = _peak(np.concatenate((correlation[-lags:], correlation[: lags + 1])), lags)
            if peak is not None:
                residual = 0.0 if not by_level else two.residual - one.residual
                peaks.append((peak[1], peak[0] * step + residual, (one.name, two.name)))
    return _agreed(peaks, step) if peaks else None


def _agreed(peaks: list[tuple[float, float, tuple[str, str]]], step: float) -> ClockOffset:
    peaks = sorted(peaks, key=lambda peak: peak[1])
    weights = np.cumsum([z**2 for z, _, _ in peaks])
    seconds = peaks[int(np.searchsorted(weights, weights[-1] / 2))][1]
    z, _, signals = max(peaks, key=lambda peak: (abs(peak[1] - seconds) <= step, peak[0]))
    return ClockOffset(seconds, z, step, signals, sum(abs(at - seconds) <= step for _, at, _ in peaks))


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


def _whitened(
    signals: Sequence[ClockSignal], start: int, step: float, steps: int, size: int, residual: float
) -> list[_Whitened]:
    """Signals that say something, whitened; ``residual``: of the sensors that log lines are compared with."""
    whitened = []
    for signal in signals:
        place = (signal.times - start) / SECOND / step
        if signal.values is None:
            # a line is seen by the next reading, hence upwards
            at = np.ceil(place - residual / step).astype(np.int64)
            inside = (at >= 0) & (at < steps)
            if inside.sum() < LEAST_EVENTS:
                continue
            level = np.log1p(np.bincount(at[inside], minlength=steps).astype(np.float64))
            shift = residual
        else:
            at = np.rint(place).astype(np.int64)
            inside = (at >= 0) & (at < steps)
            if inside.sum() < LEAST_STEPS / 2:
                continue
            level = np.diff(_held(signal.values[inside], at[inside], steps), prepend=np.nan)
            level[0] = 0.0
            shift = float(np.mean(place[inside] - at[inside])) * step
        if (white := _white(level)) is not None:
            activity = np.abs(white)
            spectra = [np.fft.rfft(part - part.mean(), size) for part in (white, activity)]
            whitened.append(_Whitened(signal.name, spectra[0], spectra[1], shift, signal.values is None))
    return whitened


def _held(values: Floats, at: Ints, steps: int) -> Floats:
    """Readings on the grid (steps,), each held until the next."""
    last = np.zeros(steps, np.int64)
    last[at] = np.arange(len(at))
    return values[np.maximum.accumulate(last)]


def _white(level: Floats) -> Floats | None:
    """Residual of an autoregression by Yule and Walker's equations, of standard deviation 1, clipped."""
    level = level - level.mean()
    spread = float(level.std())
    if spread == 0:
        return None
    level = np.clip(level / spread, -CLIP, CLIP)
    spectrum = np.abs(np.fft.rfft(level, 2 * len(level))) ** 2
    covariance = np.fft.irfft(spectrum)[: ORDER + 1] / len(level)
    matrix = covariance[np.abs(np.subtract.outer(np.arange(ORDER), np.arange(ORDER)))]
    weights = np.linalg.solve(matrix + 1e-6 * covariance[0] * np.eye(ORDER), covariance[1:])
    white: Floats = level - np.convolve(level, np.concatenate(([0.0], weights)))[: len(level)]
    white /= white.std()
    return np.clip(white, -CLIP, CLIP)


def _peak(correlation: Floats, lags: int) -> tuple[float, float] | None:
    """Place in steps and z of the highest peak of ``correlation`` (2 * lags + 1,), None where it is not certain."""
    size = np.abs(correlation)
    at = int(np.argmax(size))
    others: Bools = np.abs(np.arange(len(size)) - at) > AROUND
    noise = float(correlation[others].std())
    if noise == 0 or size[at] < LEAST_Z * noise or size[at] < UNIQUE * size[others].max():
        return None
    sign = np.sign(correlation[at])
    sides = [(sign * correlation[at + side], side) for side in (-1, 1) if 0 <= at + side < len(size)]
    beside, side = max(sides)
    # a neighbour within the noise says nothing about the fraction
    fraction = side * beside / (beside + size[at]) if beside > 2.5 * noise else 0.0
    return at - lags + float(fraction), float(size[at] / noise)
