"""One average number of keys, shared out over layers and KV heads: what one threshold on the estimated mass keeps of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hf_sparse_attn_kernels import BlockSelection
from transformers import PreTrainedModel

from ..attending import SparseCall
from ..budgets import fit_threshold, run_sparse
from ..conversion import sparse_attention_as
from ..data.windows import Window, batches
from ..router import RoutingInputs, SparseRouter
from .allocations import AtThreshold
from .needs import TileFigures, tile_figures


class ShareObserver:
    """Share of the visible keys that each tile keeps; an ``on_selection`` of a `SparseCall`."""

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.shares = tile_figures(ends)

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        grid, device = selection.grid, selection.indices.device
        visible = grid.last_positions(device) + 1 if grid.causal else torch.full((grid.tiles,), grid.kv_len, device=device)
        self.shares.add(router.layer, visible, selection.kept_keys() / visible)


def shared_out(model: PreTrainedModel, windows: Sequence[Window], keys: int, ends: tuple[int, ...]) -> TileFigures:
    """What tiles keep of their visible keys under the one threshold that keeps ``keys`` on average, by layer, KV head and bucket.

    A block costs every head the same, so a total of kept keys holds most mass where all stop at the same mass of their next block.

    Raises:
        ValueError: ``keys`` is no possible budget, or the windows have nothing to select.
    """
    with sparse_attention_as(model, min_keys=keys, max_keys=keys, mass_threshold=None):
        threshold, _ = fit_threshold(model, batches(windows))
        observer = ShareObserver(ends)
        run_sparse(model, batches(windows), SparseCall(selector=AtThreshold(threshold), on_selection=observer))
    return observer.shares
