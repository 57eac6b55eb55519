"""The gain of every context as places in a drawing: values, intervals, and what shuffled far blocks gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .context_gain import ContextGain

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 12, 30  # margins


@dataclass(frozen=True)
class GainMark:
    """Where one context is drawn: its ``x``, and y of the gain, of its interval and of the shuffled gain."""

    label: str
    x: float
    value: float
    low: float
    high: float
    shuffled: float | None


@dataclass(frozen=True)
class GainChart:
    """A drawing of ``width`` × ``height``; ``ticks``: label and y; ``divider``: x beyond the near context."""

    marks: tuple[GainMark, ...]
    ticks: tuple[tuple[str, float], ...]
    zero: float
    divider: float
    left: int = LEFT
    right: int = WIDTH - RIGHT
    width: int = WIDTH
    height: int = HEIGHT
    bottom: int = HEIGHT - BOTTOM


def gain_chart(gains: Sequence[ContextGain]) -> GainChart | None:
    """The chart of some gains, None without any."""
    if not gains:
        return None
    shown = [0.0, *(n for g in gains for n in (g.gain, g.low, g.high, g.shuffled) if n is not None)]
    step = _tick_step(max(shown) - min(shown))
    low, high = np.floor(min(shown) / step) * step, np.ceil(max(shown) / step) * step
    high = high if high > low else low + step

    def y(bits: float) -> float:
        return round(float(TOP + (HEIGHT - TOP - BOTTOM) * (high - bits) / (high - low)), 1)

    column = (WIDTH - LEFT - RIGHT) / len(gains)
    marks = [
        GainMark(
            label=f"{gain.multiple:.3g}×",
            x=round(LEFT + column * (n + 0.5), 1),
            value=y(gain.gain),
            low=y(gain.low),
            high=y(gain.high),
            shuffled=None if gain.shuffled is None else y(gain.shuffled),
        )
        for n, gain in enumerate(gains)
    ]
    levels = np.arange(round((high - low) / step) + 1) * step + low
    ticks = tuple((f"{level + 0.0:.3g}", y(level)) for level in levels)
    return GainChart(tuple(marks), ticks, y(0), round(LEFT + column, 1))


def _tick_step(span: float) -> float:
    """Distance of ticks, 1, 2 or 5 times a power of ten, at most six of them."""
    if span <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(span / 5))
    return float(next(size * power for size in (1, 2, 5, 10) if span / (size * power) <= 5))
