"""Percentile intervals by a bootstrap over blocks: of time, or whole assets where there are enough of them."""

# Shapes: n steps of evaluation, B blocks, R draws.

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .timeline import DAY, Array, Timeline

DRAWS = 1000
LEAST_ASSETS = 8  # below that, resampled assets say little about others: blocks of time are drawn


def block_numbers(timelines: list[Timeline], block_seconds: float) -> Array:
    """Block of every step of evaluation, int64 [n], one timeline after the other.

    A block is an asset where there are at least 8, else ``block_seconds`` of one asset.
    """
    numbers: list[Array] = []
    for timeline in timelines:
        steps = len(timeline) - timeline.test_from
        size = steps if len(timelines) >= LEAST_ASSETS else timeline.steps_in(block_seconds)
        numbers.append((numbers[-1][-1] + 1 if numbers else 0) + np.arange(steps) // size)
    return np.concatenate(numbers)


def default_block_seconds(timelines: list[Timeline]) -> float:
    """A day, or longer if a fault lasts longer: a block shall hold what belongs together."""
    longest = max((int((t.faults[:, 1] - t.faults[:, 0]).max()) for t in timelines if len(t.faults)), default=0)
    return float(max(DAY, -(-longest // DAY) * DAY)) / 1e9


# Efron 1979, percentile interval; blocks keep the dependence within them, Künsch 1989
def drawn_weights(blocks: int, seed: int, draws: int = DRAWS) -> Array:
    """How often each block is drawn, int64 [R, B]: B draws with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=draws)


def interval(measure: Callable[[Array], Array], weights: Array, level: float = 0.95) -> dict[str, float | None]:
    """Value, low and high of ``measure``, a function of weights [R, B] to [R]; None where it is not defined.

    ``undefined``: share of draws without a value, e.g. because no fault was drawn; the interval is over the others.
    """
    value = float(measure(np.ones((1, weights.shape[1]), np.int64))[0])
    drawn = measure(weights)
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    numbers = {"value": value, "low": float(low), "high": float(high)}
    return {
        **{name: None if np.isnan(number) else number for name, number in numbers.items()},
        "undefined": 1 - len(known) / len(drawn),
    }


def ratio(numerators: Array, denominators: Array) -> Array:
    """Quotients float64 [R], NaN where the denominator is 0."""
    quotients: Array = np.divide(
        numerators, denominators, out=np.full(len(numerators), np.nan), where=denominators != 0
    )
    return quotients
