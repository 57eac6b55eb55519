"""Scaled sensor values as bins, each a token: Chronos's idea (Ansari et al. 2024, "Chronos: Learning the Language of
Time Series", § 3.1) with bins that widen away from the centre.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LIMIT = 15.0  # scaled values beyond it are in the outermost bins, as in Chronos
MISSING = 0  # of a cell without a value; bin i is i + 1


def quantise(values: NDArray[np.floating], observed: NDArray[np.bool_], bins: int) -> NDArray[np.int64]:
    """Numbers of the bins of scaled values x, both of any one shape; `MISSING` where nothing was observed.

    Bins are equally wide in asinh(x) between −asinh(15) and asinh(15): about linear for |x| < 1, logarithmic beyond.
    """
    reach = np.arcsinh(LIMIT)
    at = np.floor((np.arcsinh(values.astype(np.float64)) + reach) * bins / (2 * reach))
    return np.where(observed, 1 + np.clip(at, 0, bins - 1).astype(np.int64), MISSING)


def bin_centers(bins: int) -> NDArray[np.float64]:
    """Scaled values [bins] in the middle of the bins, so that `quantise` gives each its bin."""
    reach = np.arcsinh(LIMIT)
    centers: NDArray[np.float64] = np.sinh(reach * ((2 * np.arange(bins) + 1) / max(bins, 1) - 1))
    return centers
