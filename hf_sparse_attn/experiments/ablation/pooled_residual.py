"""Attention that replaces each cut block by one pooled key and value, a naive residual."""

from __future__ import annotations

import math

import torch
from hf_sparse_attn_kernels import BlockSelection, block_sparse_attention, to_tiles
from hf_sparse_attn_kernels.tiles import from_tiles
from torch import Tensor

from ...router.budget import make_plan
from ...router.module import RoutingInputs, SparseRouter

RESIDUAL_SCORES = 1 << 22  # that exist at a time, 16 MB


@torch.no_grad()
def attend_with_residual(router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> Tensor:
    """Softmax over the kept keys and the mean key of every cut block, which counts as many times as the block has keys: [B, H, Q, D].

    An ``attention`` of a `SparseCall`. Plain torch on top of the kernel: right, not fast.
    """
    assert inputs.v is not None
    grid, size = selection.grid, router.config.block_size
    out, lse = block_sparse_attention(inputs.q, inputs.k, inputs.v, selection, scale=inputs.scale, return_lse=True)
    assert lse is not None
    whole = grid.kv_len // size
    keys, values = (x[:, :, : whole * size].float().unflatten(2, (whole, size)).mean(3).flatten(0, 1) for x in (inputs.k, inputs.v))
    tiles = torch.arange(grid.tiles, device=inputs.q.device, dtype=torch.int64)
    kept = torch.zeros(*selection.indices.shape[:3], grid.blocks + 1, dtype=torch.bool, device=tiles.device)
    kept.scatter_(-1, selection.indices.long() + 1, True)
    plan = make_plan(router.config, grid, inputs.q.device)
    cut = (plan.eligible_mask(tiles) & ~kept[..., 1:])[..., :whole].flatten(0, 1)  # [B·G, n, blocks]
    rows = to_tiles(inputs.q, grid, router.groups)  # [B·G, n, Hg, T, D]
    step = max(1, RESIDUAL_SCORES // (len(rows) * rows.shape[2] * rows.shape[3] * max(whole, 1)))
    parts = [_pooled(rows[:, run], keys, values, cut[:, run], inputs.scale, size) for run in tiles.split(step)]
    rest, rest_lse = (from_tiles(torch.cat(tensors, 1), grid, len(inputs.q)) for tensors in zip(*parts, strict=True))
    share = torch.sigmoid(rest_lse - lse)[..., None]  # of the softmax that the cut blocks get
    return torch.lerp(out.float(), rest, share).to(out.dtype)


def _pooled(q: Tensor, keys: Tensor, values: Tensor, cut: Tensor, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) over the cut blocks of the tiles ``q`` [B·G, m, Hg, T, D]; (0, −inf) where nothing is cut."""
    scores = torch.einsum("rmhtd,rbd->rmhtb", q.float(), keys) * scale + math.log(size)
    scores = scores.masked_fill(~cut[:, :, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("rmhtb,rbd->rmhtd", weights, values), scores.logsumexp(-1)
