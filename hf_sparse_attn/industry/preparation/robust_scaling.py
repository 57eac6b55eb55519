"""Center and scale of a channel that single faults do not move, taken from the training period only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .channel_series import Bools, Floats, Ints

NORMAL_MAD = 1.4826  # 1 / 0.6745: of a normal distribution this is its standard deviation
NORMAL_IQR = 1.349
NORMAL_MEAN_DEVIATION = float(np.sqrt(np.pi / 2))

Method = Literal["mad", "iqr", "mean deviation", "constant", "no training data"]


@dataclass(frozen=True)
class RobustScale:
    """``(value - center) / scale`` is about standard; ``method`` says what the scale was taken from."""

    center: float
    scale: float
    method: Method


def robust_scale(values: Floats) -> RobustScale:
    """Median and 1.4826 * median absolute deviation of ``values`` (n,), finite.

    Where more than half of the values are equal that deviation is 0. Then the scale is the distance of the quartiles
    / 1.349; if that is 0 too, sqrt(pi / 2) * mean absolute deviation; of a constant channel, 1. Without values center 0
    and scale 1.
    """
    if len(values) == 0:
        return RobustScale(0.0, 1.0, "no training data")
    center = float(np.median(values))
    deviations = np.abs(values - center)
    # what rounding of equal numbers leaves is no scale
    least = 1e-12 * max(1.0, abs(center))
    if (scale := NORMAL_MAD * float(np.median(deviations))) > least:
        return RobustScale(center, scale, "mad")
    low, high = np.quantile(values, [0.25, 0.75])
    if (scale := float(high - low) / NORMAL_IQR) > least:
        return RobustScale(center, scale, "iqr")
    if (scale := NORMAL_MEAN_DEVIATION * float(deviations.mean())) > least:
        return RobustScale(center, scale, "mean deviation")
    return RobustScale(center, 1.0, "constant")


def training_scale(times: Ints, values: Floats, train_end: int, left_out: Bools) -> RobustScale:
    """`robust_scale` of the readings up to ``train_end``, without those that a check flagged.

    Args:
        times: (n,) nanoseconds.
        values: (n,)
        train_end: nanoseconds, the last that counts.
        left_out: (n,) True for readings known to be wrong.
    """
    return robust_scale(values[(times <= train_end) & ~left_out])
