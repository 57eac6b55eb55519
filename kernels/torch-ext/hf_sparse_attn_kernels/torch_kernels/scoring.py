"""Scores of key blocks in plain torch, the specification of what `scoring` offers;
differentiable where the inputs are.
"""

# Shape legend: BG or rows: batch rows × KV heads, Hg query heads of a KV head, D head dim, T query tile, S block size,
# m query tiles, r sampled queries of a tile, L listed blocks, V visible keys.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..selection import TileGrid
from ..tiles import Scratch, all_finite, as_rows, gather_blocks, to_tiles, wide

SMALLEST_TOTAL = 1e-26  # of unshifted exponentials: below it the largest score is under −60
MASS_SCORES = 1 << 22  # scores of one chunk of the teacher: 16 MB in float32


# f_b = [max_j k_j ; min_j k_j ; mean_j k_j]
def pooled_features_torch(k: Tensor, block_size: int) -> Tensor:
    """See `pooled_features`."""
    b, g, n, d = k.shape
    blocks = k[:, :, : n // block_size * block_size].reshape(b, g, n // block_size, block_size, d)
    return torch.cat([blocks.amax(3), blocks.amin(3), blocks.mean(3)], -1)


# s_b = log Σ_r exp(scale · ρ_r · κ_b)
def coarse_scores_torch(queries: Tensor, real: Tensor, router_keys: Tensor, scale: float) -> Tensor:
    """See `coarse_scores`."""
    if queries.dtype == torch.float16:  # whose range products leave
        queries, router_keys = queries.float(), router_keys.float()
    scores = torch.einsum("bgmrf,bgnf->bgmrn", queries * scale, router_keys).float()
    if scores.shape[3] == 1:
        return scores[:, :, :, 0]
    if real.device.type != "cpu" or not bool(real.all()):  # reading a value would wait for an accelerator
        scores.masked_fill_(~real[..., None], -torch.inf)
    return scores.logsumexp(3)


# m_b = Σ_i share_i · Σ_{j ∈ b} softmax_j(q_i · k_j)
def fine_mass_torch(
    queries: Tensor,
    keys: Tensor,
    grid: TileGrid,
    tiles: Tensor,
    blocks: Tensor,
    reps: Tensor,
    scratch: Scratch | None = None,
) -> Tensor:
    """See `fine_mass`."""
    rows, m, e = *queries.shape[:2], queries.shape[-1]
    keys = as_rows(keys[None])
    q_pos = (grid.first_positions(blocks.device)[tiles][:, None, None] + reps).flatten(1)
    real = ((q_pos >= grid.q_offset) & (q_pos < grid.kv_len)).float()
    # of each query in its tile's mean; nothing where none is a token
    share = real / real.sum(-1, keepdim=True).clamp(min=1)
    memory = None if scratch is None else scratch.take("keys", (rows, m, blocks.shape[-1] * grid.block_size, e), keys)
    gathered = gather_blocks(keys, blocks, grid.block_size, memory)
    mass = (
        None
        if scratch is None
        else _unshifted_mass(queries.flatten(2, 3), gathered, grid, blocks, q_pos, share, scratch)
    )
    if torch.is_grad_enabled() and queries.requires_grad and not keys.requires_grad:
        mass = _LearnedMass.apply(queries.flatten(2, 3), gathered, grid, blocks, q_pos, share)
    elif mass is None:
        mass = _shifted_mass(queries.flatten(2, 3), gathered, grid, blocks, q_pos, share)
        if not all_finite(mass):  # a product may have left the range of its dtype
            mass = _shifted_mass(wide(queries.flatten(2, 3)), wide(gathered), grid, blocks, q_pos, share)
    return mass.float().view(*blocks.shape, grid.block_size).sum(-1)


def _shifted_mass(
    queries: Tensor, keys: Tensor, grid: TileGrid, blocks: Tensor, q_pos: Tensor, share: Tensor
) -> Tensor:
    """Mass of every gathered key [rows, m, L·S, 1] by a softmax."""
    scores = torch.matmul(keys, queries.transpose(2, 3))
    _hide(scores, grid, blocks, q_pos)
    p = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), 2)
    return torch.matmul(p, share[..., None].to(p.dtype))


def _hide(scores: Tensor, grid: TileGrid, blocks: Tensor, q_pos: Tensor) -> None:
    """Hide from ``scores`` [rows, m, L·S, Hg·r] what is later than its query [m, Hg·r] or in an empty entry of
    ``blocks``.

    Without causality only what lies behind the last key.
    """
    own_blocks = blocks[..., -(grid.own_blocks if grid.causal else 1) :]
    last = q_pos[:, None] if grid.causal else torch.full_like(q_pos[:, None], grid.kv_len - 1)
    k_pos = (
        own_blocks[..., None] * grid.block_size + torch.arange(grid.block_size, device=blocks.device, dtype=torch.int64)
    ).flatten(2)
    scores[:, :, -k_pos.shape[-1] :].masked_fill_(k_pos[..., None] > last, -torch.inf)
    if blocks.device.type != "cpu" or bool((blocks < 0).any()):
        scores.masked_fill_((blocks < 0).repeat_interleave(grid.block_size, -1)[..., None], -torch.inf)


# m_j = Σ_i (share_i / Σ_l exp s_il) · exp s_ij, without the maximum that a softmax subtracts.
def _unshifted_mass(
    queries: Tensor, keys: Tensor, grid: TileGrid, blocks: Tensor, q_pos: Tensor, share: Tensor, scratch: Scratch
) -> Tensor | None:
    """Mass of every gathered key [rows, m, L·S] by products and one exponential, or None where that would leave the
    range.

    Few queries are thin operands: with the keys as rows the product runs at almost twice the rate, but a softmax over
    rows is slow. So the exponentials are taken as they are; scores beyond ±60 or so need the shifted softmax.
    """
    rows, m, count, e = queries.shape
    scores = scratch.take("scores", (rows * m, keys.shape[2], count), keys)
    torch.bmm(keys.flatten(0, 1), queries.reshape(rows * m, count, e).transpose(1, 2), out=scores)
    _hide(scores.view(rows, m, -1, count), grid, blocks, q_pos)
    weights = scores.exp_()
    total = weights.sum(1, keepdim=True).float()
    if not bool(((total > SMALLEST_TOTAL) & (total < 1 / SMALLEST_TOTAL)).all()):
        return None
    norm = (share.repeat(rows, 1)[:, None] / total).to(weights.dtype)
    return torch.bmm(weights, norm.transpose(1, 2)).view(rows, m, -1)


class _LearnedMass(torch.autograd.Function):
    """Mass of every gathered key with gradient to the queries: of the scores only the exponentials are kept, in place.

    The gradient of a score is weight · norm · (g − the weighted mean of g), so three products of the exponentials with
    narrow matrices give the gradient of the queries, and nothing of the size of the scores is made in the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, grid: TileGrid, blocks: Tensor, q_pos: Tensor, share: Tensor
    ) -> Tensor:
        scores = torch.matmul(keys, queries.transpose(2, 3))
        _hide(scores, grid, blocks, q_pos)
        weights = scores.exp_()
        total = weights.sum(2)
        if not bool(((total > SMALLEST_TOTAL) & (total < 1 / SMALLEST_TOTAL)).all()):
            scores = torch.matmul(wide(keys), wide(queries).transpose(2, 3))
            _hide(scores, grid, blocks, q_pos)
            weights = torch.softmax(scores, 2).to(weights.dtype)
            total = torch.ones_like(total)
        mass = torch.matmul(weights, (share / total)[..., None])
        ctx.save_for_backward(keys, weights, total, share, mass)
        return mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        keys, weights, total, share, mass = ctx.saved_tensors
        g = grads[0] - (grads[0] * mass).sum(2, keepdim=True)  # a constant does not count: near zero less is cancelled
        products = torch.matmul(weights.transpose(2, 3), torch.cat([g * keys, keys, g], -1))
        weighted, plain, mean = products.split((keys.shape[-1], keys.shape[-1], 1), -1)
        of_queries = (weighted - mean / total[..., None] * plain) * (share / total)[..., None]
        return of_queries, None, None, None, None, None


# p_b = mean over queries i and heads of Σ_{j ∈ b} softmax_j(scale · q_i · k_j)
def block_mass_torch(q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor, scale: float) -> Tensor:
    """See `block_mass`. Works on a few tiles at a time: memory is linear in N.

    Each chunk is normalised by its own float32 log-sum-exp, so no N×N matrix and no separate pass for it is needed.
    """
    b, groups, n, d = k.shape
    q_tiles = to_tiles(q, grid, groups)
    hg, t = q_tiles.shape[2:4]
    keys = k.reshape(b * groups, n, d)
    first = grid.first_positions(q.device)
    out = q.new_zeros(b * groups, len(tiles), grid.blocks * grid.block_size, dtype=torch.float32)
    step = max(1, MASS_SCORES // max(1, b * groups * hg * t * n))
    for start in range(0, len(tiles), step):
        chosen = tiles[start : start + step]
        # later keys have no mass for these tiles
        visible = min(n, int(first[chosen].max()) + t) if grid.causal else n
        mass = _mass_of(q_tiles[:, chosen], keys[:, :visible], grid, first[chosen], scale)
        if not all_finite(mass):  # a product may have left the range of its dtype
            mass = _mass_of(wide(q_tiles[:, chosen]), wide(keys[:, :visible]), grid, first[chosen], scale)
        out[:, start : start + step, :visible] = mass
    return out.view(b, groups, len(tiles), grid.blocks, grid.block_size).sum(-1)


def _mass_of(q_tiles: Tensor, keys: Tensor, grid: TileGrid, first: Tensor, scale: float) -> Tensor:
    """Softmax mass of each of the ``keys`` [BG, V, D], averaged over the tokens of each tile of ``q_tiles`` [BG, m, Hg,
    T, D].
    """
    rows, m, hg, t = q_tiles.shape[:4]
    scores = torch.bmm(q_tiles.flatten(1, 3), keys.transpose(1, 2))
    scores = (scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale).view(rows, m, hg, t, keys.shape[1])
    q_pos = first[:, None] + torch.arange(t, dtype=torch.int64, device=keys.device)
    if grid.causal:
        future = torch.arange(keys.shape[1], dtype=torch.int64, device=keys.device) > q_pos[..., None]
        scores.masked_fill_(future[None, :, None], -torch.inf)
    real = ((q_pos >= grid.q_offset) & (q_pos < grid.kv_len)).to(scores.dtype)
    p = torch.softmax(scores, -1).mean(2)
    return torch.einsum("rmtv,mt->rmv", p, real / real.sum(-1, keepdim=True))
