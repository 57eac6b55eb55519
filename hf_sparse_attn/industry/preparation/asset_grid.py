"""All channels of an asset on one coarse grid: mean and movement of each by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .channel_series import SECOND, ChannelSeries, Floats, Ints

STEPS = 40_000  # of a grid at most
READINGS_A_STEP = 4  # of the slower channels: fewer tell no movement
QUIET = 0.2  # of the usual movement: below, a channel rests


@dataclass
class AssetGrid:
    """Means and movements of channels, each (steps,), NaN where nothing was read.

    Attributes:
        start, step: nanoseconds; step i covers ``start + i * step`` up to the next.
        means: by number of the channel, the mean of its readings.
        movements: by number of the channel, the mean absolute difference of neighbouring readings.
    """

    start: int
    step: int
    steps: int
    means: dict[int, Floats] = field(default_factory=dict)
    movements: dict[int, Floats] = field(default_factory=dict)

    @classmethod
    def over(cls, start: int, end: int, interval: float) -> AssetGrid:
        """A grid from ``start`` to ``end`` (nanoseconds) for readings about ``interval`` seconds apart."""
        step = max(int(READINGS_A_STEP * interval * SECOND), -(-(end - start + 1) // STEPS), 1)
        return cls(start, step, (end - start) // step + 1)

    def steps_of(self, times: Ints) -> Ints:
        """Number of the step that each time (n,) lies in; the ends for what lies outside."""
        return np.clip((times - self.start) // self.step, 0, self.steps - 1)

    def add(self, series: ChannelSeries) -> None:
        """Add a channel."""
        values = series.values
        at = self.steps_of(series.times)
        with np.errstate(invalid="ignore", divide="ignore"):
            count = np.bincount(at, minlength=self.steps)
            self.means[series.number] = np.bincount(at, values, self.steps) / count
            moves = np.bincount(at[1:], np.abs(np.diff(values)), self.steps)
            self.movements[series.number] = moves / np.bincount(at[1:], minlength=self.steps)

    def others_moving(self, channel: int) -> Floats:
        """(steps,) Share of the other channels that move as they usually do, NaN where nothing is known of them."""
        known, moving = np.zeros(self.steps), np.zeros(self.steps)
        for number, movement in self.movements.items():
            seen = ~np.isnan(movement)
            usual = float(np.median(movement[seen & (movement > 0)])) if np.any(movement[seen] > 0) else 0.0
            if number != channel and usual > 0:
                known += seen
                moving += seen & (movement >= QUIET * usual)
        return np.where(known > 0, moving / np.maximum(known, 1), np.nan)
