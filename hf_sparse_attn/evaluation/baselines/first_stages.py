"""Other first stages, each before the router's own second stage: what passes candidates on is all that differs.

Shape legend: see `block_selector`; r sampled queries of a head, P parts that a block is summed up by.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from hf_sparse_attn_kernels import stage_one_scores
from hf_sparse_attn_kernels.routing import stage_two_mass
from torch import Tensor

from ...router.selection import FeatureMaker
from .block_selector import BlockSelector, ScoringCall
from .key_bounds import MeanStd

SCORES = 1 << 24  # of queries and parts that exist at a time, 64 MB


class FirstStage(BlockSelector):
    """Candidates by a first stage of one's own, for every KV head; the router's second stage decides among them."""

    on_request: ClassVar[bool] = True

    @abstractmethod
    def candidate_scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        """First-stage scores of the whole blocks for the tiles (int64 [m]): float32 [B, G, m, w]."""

    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        features = FeatureMaker(call.router, call.inputs, call.plan.grid).features(tiles)
        return stage_two_mass(replace(features, exhaustive=()), call.plan, tiles, self.candidate_scores(call, tiles))


class PooledStage(FirstStage):
    """The router's own first stage for every KV head: retrieval heads have none of their own."""

    name = "stage 1: pooled"

    def candidate_scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        features = FeatureMaker(call.router, call.inputs, call.plan.grid).features(tiles)
        return stage_one_scores(features, call.plan, tiles)


class SampledQueries(FirstStage):
    """A first stage whose parts of blocks are scored by the queries that the second stage samples."""

    @abstractmethod
    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        """Scores of the parts of blocks [B, G, w, S, D] for scaled queries [B, G, L, D]: float32 [B, G, L, w, P]."""

    # score_b = max_{p ∈ b} Σ_i softmax_p(s_ip), the softmax over the parts of all blocks that the tile may select:
    # a query that looks nowhere in particular counts as much as one that looks at a single token
    def candidate_scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        q = call.queries(tiles)  # [B, G, m, Hg, T, D]
        reps = call.router.representatives(call.plan.grid, q.device)
        heads = torch.arange(len(reps), device=q.device, dtype=torch.int64)[:, None]
        real = call.is_token(tiles)[:, reps].flatten(1)  # [m, Hg·r]
        sampled = q[:, :, :, heads, reps].flatten(3, 4)
        # later blocks are forced or unseen in all of these tiles
        seen = int(call.plan.near[tiles].max()) if call.plan.grid.causal else None
        parts = self.of_queries(sampled.flatten(2, 3), call.blocks[:, :, :seen]).unflatten(2, sampled.shape[2:4])
        hidden = ~call.plan.eligible_mask(tiles)[:, None, : parts.shape[-2], None]
        share = parts.masked_fill_(hidden, -torch.inf).flatten(-2).softmax(-1).nan_to_num_(0.0)
        return torch.einsum("bgmip,mi->bgmp", share, real.float()).view(*parts.shape[:3], *parts.shape[4:]).amax(-1)

    def tiles_at_a_time(self, call: ScoringCall) -> int:
        grid, config = call.plan.grid, call.router.config
        queries = call.inputs.q.shape[0] * call.inputs.q.shape[1] * min(config.query_samples, grid.query_tile)
        return max(1, SCORES // (queries * grid.kv_len))


class MeansOfFour(SampledQueries):
    """Means of four keys, of which a block's largest counts: 16 bytes a token in int8 at D = 64."""

    name = "stage 1: means of 4"

    # s_ip = q_i · mean of the four keys of part p
    # four keys a summary: QSA, and GLM-5.3 with a learned gate in place of the mean
    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        means = _int8(blocks.unflatten(3, (-1, 4)).mean(4))
        return torch.einsum("bgld,bgwpd->bglwp", q, means)


class MeanAndSpread(SampledQueries):
    """A block's mean and how far its keys lie apart: 8 bytes a token at D = 64 in bfloat16."""

    name = "stage 1: mean-std"

    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        return MeanStd().of_queries(q, blocks)[..., None]


class SignBits(SampledQueries):
    """The signs of every key and its mean size: 10 bytes a token at D = 64."""

    name = "stage 1: sign bits"

    # s_ij = (mean_d |k_jd|) · q_i · sign(k_j)
    # Self-Indexing KV cache, RaBitQCache: signs of the keys as their index
    def of_queries(self, q: Tensor, blocks: Tensor) -> Tensor:
        return torch.einsum("bgld,bgwsd->bglws", q, blocks.sign() * blocks.abs().mean(-1, keepdim=True))


class NoFirstStage(FirstStage):
    """All blocks are candidates of every KV head: what a first stage can reach at most."""

    name = "stage 1: all"

    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        features = FeatureMaker(call.router, call.inputs, call.plan.grid).features(tiles)
        groups = tuple(range(call.inputs.k.shape[1]))
        return stage_two_mass(
            replace(features, exhaustive=groups), call.plan, tiles, self.candidate_scores(call, tiles)
        )

    def candidate_scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        keys = call.inputs.k
        return torch.zeros(*keys.shape[:2], len(tiles), call.blocks.shape[2], device=keys.device, dtype=torch.float32)


def _int8(x: Tensor) -> Tensor:
    """``x`` [..., D] as int8 with one scale a vector would give it back."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round() * scale
