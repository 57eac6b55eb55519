"""Both stages of the router in C++, tile by tile: no score leaves the processor's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..planning import TilePlan
from .attention import unit_stride

if TYPE_CHECKING:
    from ..routing import TileFeatures


def select_blocks_cpp(features: TileFeatures, plan: TilePlan, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """See `select_blocks`."""
    grid = plan.grid
    indices, scores = torch.ops.hf_sparse_attn_cpp.select(
        features.coarse_queries.contiguous(),
        features.real.contiguous(),
        unit_stride(features.router_keys),
        features.queries.contiguous(),
        features.reps.contiguous(),
        unit_stride(features.keys),
        *(grid.q_len, grid.query_tile, grid.block_size, tiles.contiguous(), plan.sink),
        *(plan.near[tiles], plan.last[tiles], plan.free[tiles], plan.candidates[tiles], plan.width),
    )
    return indices, scores
