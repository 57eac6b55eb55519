"""`torch` implementation: gather the kept blocks of a few tiles, two batched matmuls, next tiles.

Memory beyond the inputs and outputs is one chunk (``CHUNK_SCORES`` scores and the keys and values they need), whatever
N is. The query heads of a KV group are packed into the rows of one matmul. The backward pass gathers again and
recomputes the probabilities. Mask work is done only on a tile's own blocks and on chunks with empty entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .gathering import Scratch, as_rows, from_tiles, gather_blocks, gather_visible, scatter_blocks, to_tiles
from .reference import weighted_values
from .selection import BlockSelection, TileGrid

CHUNK_SCORES = 1 << 21  # scores of one chunk: 4 MB in bf16, 8 MB in float32; of 2^20 to 2^24 the fastest or close to it


def tile_chunks(index: Tensor, grid: TileGrid, rows_per_tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut the tiles so that a chunk has about CHUNK_SCORES scores: (tiles, their block lists without the empty columns)."""
    per_tile = index.shape[0] * rows_per_tile * index.shape[-1] * grid.block_size
    step = max(1, CHUNK_SCORES // max(per_tile, 1))
    for start in range(0, grid.tiles, step):
        tiles = slice(start, min(start + step, grid.tiles))
        part = index[:, tiles]
        empty = int((part < 0).sum(-1).min())
        yield tiles, part[..., min(empty, part.shape[-1] - 1) :]


def gather_chunk(keys: Tensor, values: Tensor, index: Tensor, grid: TileGrid, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Keys and values [BG, N, D] of the blocks ``index`` [BG, n, K]: [BG, n, K·S, D] each."""
    size = grid.block_size
    shape = (*index.shape[:-1], index.shape[-1] * size)
    out_k, out_v = (scratch.take(name, (*shape, x.shape[-1]), x) for name, x in (("keys", keys), ("values", values)))
    return gather_blocks(keys, index, size, out_k), gather_blocks(values, index, size, out_v)


def chunk_mask(index: Tensor, grid: TileGrid, tiles: slice) -> Tensor:
    """Where scores of a chunk must be hidden: boolean [BG, n, T, K'·S] over the last K' blocks.

    Blocks are ascending, so only the last ``own_blocks`` columns can hold keys after a query; if the chunk has empty
    entries all its columns are masked.
    """
    columns = index.shape[-1] if bool((index < 0).any()) else min(grid.own_blocks, index.shape[-1])
    last = index[..., -columns:]
    first = grid.first_positions(index.device)[tiles]
    q_pos = first[:, None] + torch.arange(grid.query_tile, device=index.device)
    offset = torch.arange(grid.block_size, device=index.device)
    k_pos = (last.long()[..., None] * grid.block_size + offset).flatten(-2)
    hidden = k_pos[:, :, None, :] > q_pos[None, :, :, None]
    return hidden | (last < 0).repeat_interleave(grid.block_size, -1)[:, :, None, :]


def chunk_scores(q: Tensor, keys: Tensor, hidden: Tensor, scale: float, scratch: Scratch) -> Tensor:
    """Scaled, masked scores [BG, n, Hg, T, K·S] of ``q`` [BG, n, Hg, T, D] and ``keys`` [BG, n, K·S, D]."""
    rows, n, hg, t, d = q.shape
    out = scratch.take("scores", (rows * n, hg * t, keys.shape[2]), q)
    scores = torch.bmm((q * scale).reshape(rows * n, hg * t, d), keys.flatten(0, 1).transpose(1, 2), out=out)
    scores = scores.view(rows, n, hg, t, -1)
    scores[..., -hidden.shape[-1] :].masked_fill_(hidden[:, :, None], -torch.inf)
    return scores


def probabilities(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the last dimension, in place, in which a row that sees nothing is all zeros."""
    p = torch.softmax(scores, -1, out=scores)
    if hidden.shape[-1] < scores.shape[-1]:
        return p  # some columns are visible to every row
    return p.masked_fill_(hidden.all(-1)[:, :, None, :, None], 0)


class GatheredAttention(torch.autograd.Function):
    """Forward and backward of `block_sparse_attention` by gathering; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, grid: TileGrid, scale: float, need_lse: bool
    ) -> tuple[Tensor, Tensor]:
        b, groups = k.shape[:2]
        q_tiles = to_tiles(q, grid, groups)
        keys, values = as_rows(k), as_rows(v)
        index, scratch = indices.flatten(0, 1), Scratch()
        out = torch.empty_like(q_tiles)
        lse = q.new_empty(q_tiles.shape[:4] if need_lse else (0,), dtype=torch.float32)
        for tiles, part in tile_chunks(index, grid, q_tiles.shape[2] * grid.query_tile):
            chunk_k, chunk_v = gather_chunk(keys, values, part, grid, scratch)
            hidden = chunk_mask(part, grid, tiles)
            scores = chunk_scores(q_tiles[:, tiles], chunk_k, hidden, scale, scratch)
            if need_lse:
                lse[:, tiles] = scores.float().logsumexp(-1)
            p = probabilities(scores, hidden).flatten(2, 3)
            out[:, tiles] = weighted_values(p, chunk_v).view_as(out[:, tiles])
        ctx.save_for_backward(q, k, v, indices)
        ctx.grid, ctx.scale = grid, scale
        lse_rows = from_tiles(lse, grid, b) if need_lse else lse
        ctx.mark_non_differentiable(lse_rows)
        return from_tiles(out, grid, b).contiguous(), lse_rows

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, indices = ctx.saved_tensors
        grid, scale = ctx.grid, ctx.scale
        b, groups = k.shape[:2]
        q_tiles, do_tiles = to_tiles(q, grid, groups), to_tiles(grad_out, grid, groups)
        keys, values = as_rows(k), as_rows(v)
        index, scratch = indices.flatten(0, 1), Scratch()
        dq = torch.empty_like(q_tiles)
        accum = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (x.new_zeros(b * groups, grid.blocks * grid.block_size, x.shape[-1], dtype=accum) for x in (keys, values))
        for tiles, part in tile_chunks(index, grid, q_tiles.shape[2] * grid.query_tile):
            chunk_k, chunk_v = gather_chunk(keys, values, part, grid, scratch)
            hidden = chunk_mask(part, grid, tiles)
            scores = chunk_scores(q_tiles[:, tiles], chunk_k, hidden, scale, scratch)
            # the softmax backward in `accum`, as eager attention does; only what enters a matmul is rounded
            p = probabilities(scores.to(accum), hidden).flatten(2, 3)
            do = do_tiles[:, tiles].flatten(2, 3)
            dp = (do @ chunk_v.transpose(-1, -2)).to(accum)
            ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
            dq[:, tiles] = (ds @ chunk_k).view_as(dq[:, tiles])
            scatter_blocks(dk, part, ds.transpose(-1, -2) @ q_tiles[:, tiles].flatten(2, 3), grid.block_size)
            scatter_blocks(dv, part, p.to(q.dtype).transpose(-1, -2) @ do, grid.block_size)
        grads = (x[:, : grid.kv_len].to(like.dtype).view_as(like) for x, like in ((dk, k), (dv, v)))
        return from_tiles(dq, grid, b), *grads, None, None, None, None


def block_sparse_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `block_sparse_attention`."""
    grid = selection.grid
    for name, value, only in (("softcap", softcap, "None"), ("sinks", sinks, "None"), ("causal", None if grid.causal else False, "True")):
        if value is not None:
            raise ValueError(
                f"impl='torch' does not support {name}={value!r}, only {only}: use impl='reference', or impl='triton' on a GPU"
            )
    if grid.q_len == grid.query_tile == 1 and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        index = selection.indices.flatten(0, 2)
        if bool(((index[:, 0] >= 0) & (index[:, -1] == grid.blocks - 1)).all()):
            return _attend_single(q, k, v, index, grid.block_size, scale, return_lse)
    out, lse = GatheredAttention.apply(q, k, v, selection.indices, selection.grid, scale, return_lse)
    return out, lse if return_lse else None


def hide_after(scores: Tensor, n: int, block_size: int) -> None:
    """Hide from ``scores`` [..., K·block_size] the rows that `gather_visible` filled up with zeros."""
    if n % block_size:
        scores[..., n % block_size - block_size :] = -torch.inf


def _attend_single(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, block_size: int, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Forward pass of one query per row whose lists ``index`` [B·G, K] have no empty entry and end with its own block: nothing to mask."""
    keys, values = (gather_visible(x, index, block_size) for x in (k, v))
    scores = torch.bmm((q * scale).view(len(index), -1, q.shape[-1]), keys.transpose(1, 2))
    hide_after(scores, k.shape[2], block_size)
    out = torch.bmm(torch.softmax(scores, -1), values).view(q.shape)
    return out, scores.float().logsumexp(-1).view(q.shape[:3]) if return_lse else None
