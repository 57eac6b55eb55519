"""The distillation loss: KL from the teacher's block mass to the router, for both stages, on a few tiles."""

# Shapes: B batch, G KV heads, m some of a call's query tiles, nb key blocks, n of them or of listed ones,
# K kept blocks, L blocks that stage 2 is trained on.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import (
    TileFeatures,
    TilePlan,
    block_mass,
    by_block,
    mass_of_blocks,
    ordered_topk,
    stage_one_scores,
)
from torch import Tensor

from ..attention.gradients import Carried, carry
from ..router.budget import make_plan
from ..router.module import RoutingInputs, SparseRouter
from ..router.selection import FeatureMaker

SCORE_BYTES = 1 << 22  # of the stage-2 scores that exist at a time


@dataclass(frozen=True)
class TileLoss:
    """Losses of one layer on a few tiles, and what the router would have kept there.

    ``coarse`` and ``fine`` are scalar float32 KL divergences with gradient; ``kept``, ``window`` and ``oracle`` are
    the mean softmax mass of the selections at equal budget (every tile its own, whatever ``mass_threshold`` is).
    """

    coarse: Tensor
    fine: Tensor
    kept: float
    window: float
    oracle: float
    entropy: float  # of stage 1's distribution over the eligible blocks, nats, mean over rows


def sample_tiles(plan: TilePlan, count: int, generator: torch.Generator) -> Tensor:
    """Up to ``count`` random tiles that have something to select (int64, sorted)."""
    open_tiles = plan.open.cpu().nonzero()[:, 0]
    picked = torch.randperm(len(open_tiles), generator=generator, dtype=torch.int64, device="cpu")[:count]
    return open_tiles[picked].sort().values.to(plan.near.device)


# p_b = mean over the tile's queries and the group's heads of Σ_{j∈b} softmax_j(scale · q·k_j), over all visible keys;
# both losses then normalise it over the blocks that they cover
# loss = KL(p ‖ softmax(s)) over eligible blocks + KL(p ‖ m / Σ m) over candidates and the teacher's best blocks,
# s the scores of stage 1 and m the masses of stage 2.
# Distilling a block map of the model's own attention: SeerAttention, Gao et al. 2024, arXiv:2410.13276.
def tile_loss(
    router: SparseRouter, inputs: RoutingInputs, query_tile: int, count: int, generator: torch.Generator
) -> TileLoss | None:
    """KL(teacher ‖ router) of both stages on ``count`` random tiles; None if no tile has anything to select.

    Gradient flows to the router's weights only. The teacher is the dense softmax mass per block over all visible keys,
    averaged over a tile's tokens and the group's heads, without the forced blocks and renormalised.
    Stage 1 is trained over all eligible blocks, stage 2 over its candidates and the teacher's best; its softmax
    includes the forced keys.
    """
    plan = make_plan(router.config, inputs.grid(query_tile, router.config.block_size), inputs.q.device)
    tiles = sample_tiles(plan, count, generator)
    if not len(tiles):
        return None
    mass = block_mass(inputs.q, inputs.k, plan.grid, tiles, inputs.scale)
    # the features of inference, in float32; stage 2 meets the keys themselves, so that its gradient is that of a few
    # queries
    plain = replace(inputs, k=inputs.k.float(), router_keys=None)
    features = FeatureMaker(router, plain, plan.grid, fold=True).features(tiles)
    scores = stage_one_scores(features, plan, tiles)
    whole = scores.shape[-1]  # an eligible block is never partial, and none is beyond
    eligible = plan.eligible_mask(tiles)[:, :whole]
    coarse = masked_kl(mass[..., :whole], scores, eligible)

    # stage 2 also learns on the teacher's best blocks that stage 1 misses: a better stage 1 will pass them on
    candidates = plan.best(scores.detach(), tiles, plan.candidates[tiles])
    # forced blocks are in neither list: `_fine_loss` adds them to the softmax
    chosen = _union(candidates, plan.best(mass, tiles, plan.free[tiles]), plan.grid.blocks)
    fine, estimate = _fine_loss(features, plan, tiles, chosen, mass)

    # from here on only measures of the selections, without gradient
    seen = by_block(estimate, chosen, plan.grid.blocks)
    passed = _members(candidates, plan.grid.blocks)  # inference sees the candidates only
    kept = _mean_kept(
        mass, plan.assemble(plan.best(seen.masked_fill(~passed, -torch.inf), tiles, plan.free[tiles]), tiles)
    )
    oracle = _mean_kept(mass, plan.assemble(plan.best(mass, tiles, plan.free[tiles]), tiles))
    entropy = _entropy(scores.detach().masked_fill(~eligible, -torch.inf))
    return TileLoss(coarse, fine, kept, _mean_kept(mass, window_blocks(plan, tiles, mass)), oracle, entropy)


def recovered_share(kept: float, window: float, oracle: float) -> float:
    """(kept − window) / (oracle − window) of kept masses: how far the router comes from window + sink (0) to the oracle
    (1).

    0 where the oracle keeps no more than the window.
    """
    return (kept - window) / (oracle - window) if oracle > window else 0.0


# H = −Σ_b p_b log p_b, in nats
def _entropy(logits: Tensor) -> float:
    log_p = F.log_softmax(logits.float(), -1)
    # log 0 is clamped: 0 · ∞ is NaN
    return float(-(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1).mean())


# KL(p ‖ q) = Σ_b p_b (log p_b − log q_b), with 0 log 0 = 0
def masked_kl(teacher: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Mean KL(teacher ‖ softmax(logits)) over rows, both restricted to ``mask`` and renormalised.

    ``teacher`` >= 0 and ``logits`` are [..., n]; rows whose teacher has no mass inside the mask are left out.
    """
    weight = teacher.float() * mask
    total = weight.sum(-1, keepdim=True)
    p = weight / total.clamp(min=1e-20)
    # zeros outside of the mask, where p is 0 and 0 · ∞ is NaN
    log_q = F.log_softmax(logits.float().masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.0)
    kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
    rows = _taught(teacher, mask)[..., 0]
    return (kl * rows).sum() / rows.sum().clamp(min=1)


def _taught(teacher: Tensor, mask: Tensor) -> Tensor:
    """1 for the rows whose teacher has mass inside ``mask``, else 0: float32 [..., 1]."""
    return ((teacher.float() * mask).sum(-1, keepdim=True) > 1e-12).float()


def window_blocks(plan: TilePlan, tiles: Tensor, mass: Tensor) -> Tensor:
    """Blocks that window + sink keeps at equal budget: the forced ones and the nearest of the others."""
    return plan.assemble(plan.best(plan.nearness(tiles).expand_as(mass), tiles, plan.free[tiles]), tiles)


def _mean_kept(mass: Tensor, kept: Tensor) -> float:
    return float(kept_mass(mass, kept).mean())


def kept_mass(mass: Tensor, kept: Tensor) -> Tensor:
    """Mass [B, G, m, nb] that the blocks ``kept`` [B, G, m, K] (−1 = empty) hold: [B, G, m]."""
    return mass.gather(-1, kept.long().clamp(min=0)).masked_fill(kept < 0, 0.0).sum(-1)


def _members(index: Tensor, blocks: int) -> Tensor:
    """Boolean [..., blocks]: which blocks ``index`` [..., n] (−1 = empty) names."""
    # column 0 takes the empty entries and is cut off
    member = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device)
    return member.scatter_(-1, index + 1, True)[..., 1:]


def _union(a: Tensor, b: Tensor, blocks: int) -> Tensor:
    """Distinct blocks of ``a`` and ``b`` [..., n] (−1 = empty): [..., width], ascending, −1 last."""
    member = (_members(a, blocks) | _members(b, blocks)).float()
    # among equals the earlier block comes first, so members come out ascending
    # as wide as the row with the most members; shorter rows end in blocks that are none, which become −1
    index = ordered_topk(member, int(member.sum(-1).max()))
    return torch.where(member.gather(-1, index) > 0, index, -1)


# m_b = mean over the sampled queries i and heads of Σ_{j∈b} a_ij, a_ij = softmax_j(scale · (U q_i)·(V k_j))
# over the keys of the chosen and the forced blocks; U, V = wq_index, wk_index.
def _fine_loss(
    features: TileFeatures, plan: TilePlan, tiles: Tensor, chosen: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """(stage 2's KL from ``teacher`` [B, G, m, nb] over the blocks ``chosen`` [B, G, m, L], its estimate of their mass,
    of the same shape).

    A few tiles at a time, each with its gradient: the scores of all tiles would take memory that grows with the square
    of the length at a fixed density.
    """
    width, queries = chosen.shape[-1], features.queries
    blocks = torch.cat([chosen, plan.forced_blocks(tiles).expand(*chosen.shape[:2], -1, -1)], -1)
    taught, valid = teacher.gather(-1, chosen.clamp(min=0)), chosen >= 0
    rows = _taught(taught, valid).sum((0, 1, 3))  # of each tile
    # 4 bytes a score: a tile has one for each block, key of it and sampled query
    step = max(1, SCORE_BYTES // (4 * blocks[:, :, 0].numel() * plan.grid.block_size * features.reps.numel()))
    learns = torch.is_grad_enabled() and queries.requires_grad
    total, carried, parts, of_queries = queries.new_zeros(()), Carried(rows.sum().clamp(min=1)), [], []
    for at in range(0, len(tiles), step):
        part = slice(at, at + step)
        # folded features: both U and V are in the queries, so their gradient is all that stage 2 learns from
        leaf = queries[:, :, part].detach().requires_grad_(learns)
        estimate = mass_of_blocks(replace(features.part(part), queries=leaf), plan, tiles[part], blocks[:, :, part])[
            ..., :width
        ]
        # times the rows that the mean was over: parts add up, and their number divides at the end
        loss = masked_kl(taught[:, :, part], estimate.clamp(min=1e-20).log(), valid[:, :, part]) * rows[part].sum()
        if learns:
            of_queries.append(torch.autograd.grad(loss, leaf)[0])
        total += loss.detach()
        parts.append(estimate.detach())
    mean = total / carried.weight
    if learns:
        carried.grads = [torch.cat(of_queries, 2)]
        mean = carry(mean, carried, [queries])
    return mean, torch.cat(parts, 2)
