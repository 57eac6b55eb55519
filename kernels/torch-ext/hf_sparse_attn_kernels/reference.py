"""The specification: attention over a selection by a dense mask, in any dtype. Slow, and meant to be read."""

# Shape legend: B batch, G KV heads, N keys, Q queries.

from __future__ import annotations

import torch
from torch import Tensor

from .options import ScoreOptions
from .selection import BlockSelection


def visible_mask(selection: BlockSelection) -> Tensor:
    """Boolean ``[B, G, Q, N]``: True where a query may read a key:
    the link is kept and, if causal, the key is not later.
    """
    grid = selection.grid
    device = selection.indices.device
    q_pos = torch.arange(grid.q_offset, grid.kv_len, device=device, dtype=torch.int64)
    k_pos = torch.arange(grid.kv_len, device=device, dtype=torch.int64)
    tile = q_pos // grid.query_tile - grid.q_offset // grid.query_tile
    kept = selection.kept()[:, :, tile][..., k_pos // grid.block_size]
    return kept & (k_pos[None, :] <= q_pos[:, None]) if grid.causal else kept


def weighted_values(p: Tensor, v: Tensor) -> Tensor:
    """``p @ v`` in which a weight of exactly zero hides even a NaN or infinite value."""
    out = p @ v
    if bool(torch.isfinite(out.sum())):  # 0 · NaN and 0 · inf are NaN: the plain product would show them
        return out
    bad = ~torch.isfinite(v)
    touched = (p > 0).to(p.dtype) @ bad.to(p.dtype)
    return (p @ v.masked_fill(bad, 0)).masked_fill(touched > 0, torch.nan)


# out = softmax(mask(cap(scale · Q Kᵀ))) V, as in arXiv 1706.03762, eq. 1, with a mask from the selection.
def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: ScoreOptions, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `block_sparse_attention`; the lse is float32 or float64."""
    selection.check_blocks()
    heads_per_group = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(heads_per_group, 1)
    values = v.repeat_interleave(heads_per_group, 1)
    mask = visible_mask(selection).repeat_interleave(heads_per_group, 1)
    accum = torch.promote_types(q.dtype, torch.float32)
    scores = options.cap((q @ keys.transpose(-1, -2) * options.scale).to(accum)).masked_fill(~mask, -torch.inf)
    if options.sinks is not None:  # one more column that every query sees and that has no value
        scores = torch.cat([scores, options.sinks.to(accum)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    # the softmax of a row that sees nothing is NaN; its weights are zero
    p = torch.softmax(scores, -1)[..., : k.shape[2]].masked_fill(~mask, 0)
    return weighted_values(p.to(q.dtype), values), scores.logsumexp(-1) if return_lse else None
