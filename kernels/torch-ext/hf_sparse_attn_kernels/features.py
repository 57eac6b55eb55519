"""Scores of key blocks in plain torch, the specification of what `scoring` offers; differentiable where the inputs are."""

from __future__ import annotations

import torch
from torch import Tensor

from .gathering import Scratch, gather_blocks, to_tiles
from .selection import TileGrid

MASS_SCORES = 1 << 22  # scores of one chunk of the teacher: 16 MB in float32


def pooled_features_torch(k: Tensor, block_size: int) -> Tensor:
    """See `pooled_features`."""
    b, g, n, d = k.shape
    blocks = k[:, :, : n // block_size * block_size].reshape(b, g, -1, block_size, d)
    return torch.cat([blocks.amax(3), blocks.amin(3), blocks.mean(3)], -1)


def coarse_scores_torch(queries: Tensor, real: Tensor, router_keys: Tensor, scale: float) -> Tensor:
    """See `coarse_scores`."""
    scores = torch.einsum("bgmrf,bgnf->bgmrn", queries * scale, router_keys)
    if scores.shape[3] == 1:
        return scores[:, :, :, 0]
    if not bool(real.all()):
        scores.masked_fill_(~real[..., None], -torch.inf)
    return scores.logsumexp(3)


def fine_mass_torch(
    queries: Tensor, keys: Tensor, grid: TileGrid, tiles: Tensor, blocks: Tensor, reps: Tensor, scratch: Scratch | None = None
) -> Tensor:
    """See `fine_mass`."""
    size = grid.block_size
    rows, m, hg, r, e = queries.shape
    width = blocks.shape[-1] * size
    memory = None if scratch is None else scratch.take("keys", (rows, m, width, e), keys)
    gathered = gather_blocks(keys, blocks, size, memory).flatten(0, 1)
    memory = None if scratch is None else scratch.take("scores", (rows * m, hg * r, width), keys)
    scores = torch.bmm(queries.reshape(rows * m, hg * r, e), gathered.transpose(1, 2), out=memory).view(rows, m, hg, r, -1)
    q_pos = grid.first_positions(blocks.device)[tiles][:, None, None] + reps
    own = blocks[..., -grid.own_blocks :]
    k_pos = (own[..., None] * size + torch.arange(size, device=blocks.device)).flatten(2)
    scores[..., -k_pos.shape[-1] :].masked_fill_(k_pos[:, :, None, None] > q_pos[None, ..., None], -torch.inf)
    if bool((blocks < 0).any()):
        scores.masked_fill_((blocks < 0).repeat_interleave(size, -1)[:, :, None, None], -torch.inf)
    p = torch.softmax(scores, -1, out=None if scratch is None else scores).flatten(2, 3)
    if grid.query_tile == 1:  # every tile is one real query
        return p.sum(2).float().view(*blocks.shape, size).sum(-1) / (hg * r)
    real = ((q_pos >= grid.q_offset) & (q_pos < grid.kv_len)).flatten(1)
    total = p.sum(2) if bool(real.all()) else p.masked_fill(~real[..., None], 0).sum(2)
    return total.float().view(*blocks.shape, size).sum(-1) / real.sum(-1)[:, None]


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
    step = max(1, MASS_SCORES // (b * groups * hg * t * n))
    for start in range(0, len(tiles), step):
        chosen = tiles[start : start + step]
        visible = min(n, int(first[chosen].max()) + t)
        rows = q_tiles[:, chosen].flatten(1, 3)
        scores = (torch.bmm(rows, keys[:, :visible].transpose(1, 2)).float() * scale).view(b * groups, len(chosen), hg, t, visible)
        q_pos = first[chosen][:, None] + torch.arange(t, device=q.device)
        future = torch.arange(visible, device=q.device) > q_pos[..., None]
        scores.masked_fill_(future[None, :, None], -torch.inf)
        real = ((q_pos >= grid.q_offset) & (q_pos < grid.kv_len)).float()
        p = torch.softmax(scores, -1).mean(2)
        weights = real / real.sum(-1, keepdim=True)
        out[:, start : start + step, :visible] = torch.einsum("rmtv,mt->rmv", p, weights)
    return out.view(b, groups, len(tiles), grid.blocks, grid.block_size).sum(-1)
