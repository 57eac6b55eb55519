"""Selectors without weights, from the literature: a block is summed up by statistics of its keys, a query scores these.

Shape legend: see `block_selector`; L queries.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .block_selector import BlockSelector, ScoringCall

QUERY_SCORES = 1 << 22  # scores of single queries that exist at a time, 16 MB


class QuerySelector(BlockSelector):
    """A published score of one query, brought together over a tile: papers select for each query."""

    @abstractmethod
    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        """Scores of the blocks [B, G, w, S, D] for the scaled queries [B, G, L, D]: float32 [B, G, L, w]."""

    # score of a tile = log Σ exp(score of a query), over the tile's queries and the heads of the KV group,
    # as in stage 1
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        q = call.queries(tiles)
        # [B, G, m, Hg, T, w]
        by_query: Tensor = self.of_queries(q.flatten(2, 4), call.blocks).unflatten(2, q.shape[2:5])
        return by_query.masked_fill(~call.is_token(tiles)[:, None, :, None], -torch.inf).logsumexp((3, 4))

    def tiles_at_a_time(self, call: ScoringCall) -> int:
        batch, heads = call.inputs.q.shape[:2]
        return max(1, QUERY_SCORES // (batch * heads * call.plan.grid.query_tile * call.plan.grid.blocks))


class MinMax(QuerySelector):
    """The blocks with the largest upper bound of q·k."""

    name = "min-max"

    # bound_b(q) = Σ_d max(q_d · max_{k∈b} k_d, q_d · min_{k∈b} k_d) ≥ q·k for every key k of block b
    # Quest, Tang et al. 2024, arXiv:2406.10774
    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        # a positive q_d takes the block's largest k_d, a negative one its smallest: two products, no maximum over d
        return q.clamp(min=0) @ blocks.amax(3).mT + q.clamp(max=0) @ blocks.amin(3).mT


class MeanStd(QuerySelector):
    """The blocks whose keys are near the query on average, or far apart from each other."""

    name = "mean-std"

    # score_b(q) = q·mean_b + ½ ‖q‖₂ · std_b, with mean_b = mean_{k∈b} k and std_b² = mean_{k∈b, d} (k_d − mean_{b,d})²
    # UNIQUE, Deng et al. 2026, arXiv:2605.27740
    # that std_b is over keys and dimensions is our reading of its one number
    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        mean = blocks.mean(3)
        std: Tensor = (blocks - mean[:, :, :, None]).square().mean((3, 4)).sqrt()  # [B, G, w]
        norm: Tensor = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        return q @ mean.mT + 0.5 * norm * std[:, :, None]
