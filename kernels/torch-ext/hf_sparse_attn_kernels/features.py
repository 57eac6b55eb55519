"""Pooled features of key blocks, and the mass that dense attention gives to each block (the teacher)."""

from __future__ import annotations

import torch
from torch import Tensor

from .gathering import to_tiles
from .selection import TileGrid

MASS_SCORES = 1 << 22  # scores of one chunk of `block_mass`: 16 MB in float32


def pooled_features(k: Tensor, block_size: int) -> Tensor:
    """Max, min and mean over each whole block: ``k`` [B, G, N, D] -> [B, G, N // block_size, 3·D]."""
    b, g, n, d = k.shape
    blocks = k[:, :, : n // block_size * block_size].reshape(b, g, -1, block_size, d)
    return torch.cat([blocks.amax(3), blocks.amin(3), blocks.mean(3)], -1)


def block_mass(q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor, scale: float) -> Tensor:
    """Softmax mass of dense causal attention per block, for the query tiles ``tiles`` (int64 [m]) of ``grid``.

    Averaged over a tile's tokens and over the query heads of a KV group; every row sums to 1. ``q`` [B, H, Q, D],
    ``k`` [B, G, N, D] -> float32 [B, G, m, nb]. Works on a few tiles at a time: memory is linear in N. Each chunk is
    normalised by its own float32 log-sum-exp, so no N×N matrix and no separate pass for it is needed.
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
