"""One average number of keys, shared out over layers and KV heads:
what one threshold on the estimated mass keeps of each.
"""

# Shapes: G KV heads of a layer.

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..config import fixed_budget
from ..data.windows import Window, batches
from ..models.convert import sparse_attention_as
from ..training.mass_threshold import AtThreshold, KeptKeys, fit_threshold
from ..training.passes import run_sparse


def shared_out(model: PreTrainedModel, windows: Sequence[Window], keys: int) -> dict[int, Tensor]:
    """What tiles keep on average under the one threshold that keeps ``keys`` of all, by layer: float64 [G], forced keys
    included.

    A block costs every head the same, so a total of kept keys holds most mass where all stop at the same mass of their
    next block. Tiles count from the middle of the windows on, as in a recipe's fit.

    Raises:
        ValueError: ``keys`` is no possible budget, or the windows have nothing to select.
    """
    middle = windows[0].ids.shape[1] // 2
    with sparse_attention_as(model, **fixed_budget(keys)):
        threshold, _ = fit_threshold(model, batches(windows), middle)
        # the histogram of the fit counts all layers and heads together: what each keeps takes a pass of its own
        kept = KeptKeys(middle, selector=AtThreshold(threshold))
        run_sparse(model, batches(windows), kept)
    return kept.by_layer()
