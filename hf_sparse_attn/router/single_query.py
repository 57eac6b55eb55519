"""Features of one query per row, the decode step, in as few tensor operations as it takes.

A tile of 64 spreads the cost of many small operations over 64 queries; a decode step cannot. What all layers of a step
share is computed once.
"""

# Shape legend: B batch, G KV heads, Hg query heads of one, D head dim, R router_dim.

from __future__ import annotations

from functools import lru_cache

import torch
from hf_sparse_attn_kernels import TileFeatures
from torch import Tensor

from .module import RoutingInputs, SparseRouter


def single_features(router: SparseRouter, inputs: RoutingInputs) -> TileFeatures:
    """What the stages score for the one query per row of ``inputs``:
    `FeatureMaker.features` for a call with one tile of 1.
    """
    heads, keys = router.heads // router.groups, inputs.k
    real, reps = _constants(heads, keys.device)
    queries = (mapped_queries(router, inputs) * inputs.scale).to(keys.dtype)
    coarse = (coarse_queries(router, inputs) * inputs.scale).to(keys.dtype)
    summaries, queries = router.stage_one_keys(inputs), queries[:, :, None, :, None]
    return TileFeatures(coarse[:, :, None], real, summaries, queries, reps, keys, router.retrieval_heads)


@lru_cache(maxsize=16)
def _constants(heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # the only run holds a token, and every head samples token 0 of the tile
    return torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(heads, 1, dtype=torch.int64, device=device)


# ρ = R(p) · W_q [R(p)⁻¹ q, heads of the KV group side by side], R(p) the rotary rotation at position p.
def coarse_queries(router: SparseRouter, inputs: RoutingInputs) -> Tensor:
    """The stage-1 query of every KV head: float32 [B, G, 1, R]."""
    batch, groups = inputs.k.shape[:2]
    q = inputs.q[:, :, 0].float()
    at = inputs.positions[:, -1:]
    # rotations as matrices: one product each, and on a CPU all layers of a step share them
    if router.rotary is not None:
        q = q @ router.rotary.unrotation(at, router.head_dim)
    queries = torch.bmm(q.view(batch, groups, -1).transpose(0, 1), router.wq.float().transpose(1, 2)).transpose(0, 1)
    if router.rotary is not None:
        queries = queries @ router.rotary.rotation(at, queries.shape[-1])
    return queries[:, :, None]


# (U q) · (V k) = (Vᵀ U q) · k with U = wq_index and V = wk_index: cached keys are read as they are.
def mapped_queries(router: SparseRouter, inputs: RoutingInputs) -> Tensor:
    """The query of every head, mapped into index space and back so that it meets keys themselves:
    float32 [B, G, Hg, D].
    """
    q = inputs.q.float().view(*inputs.k.shape[:2], -1, inputs.q.shape[-1])
    return q @ router.wq_index.float().transpose(1, 2) @ router.wk_index.float()
