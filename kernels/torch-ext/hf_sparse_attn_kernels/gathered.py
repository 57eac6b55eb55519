"""`torch` implementation: gather the kept blocks of a few tiles, two batched matmuls, next tiles.

Memory beyond the inputs and outputs is one chunk (``CHUNK_SCORES`` scores and the keys and values they need), whatever
N is. The query heads of a KV group are packed into the rows of one matmul. The backward pass gathers again and
recomputes the probabilities. Mask work is done only on a tile's own blocks and on chunks with empty entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import weighted_values
from .selection import BlockSelection, TileGrid

CHUNK_SCORES = 1 << 21  # scores of one chunk: 4 MB in bf16, 8 MB in float32; of 2^20 to 2^24 the fastest or close to it


def as_rows(x: Tensor) -> Tensor:
    """[B, G, N, D] -> [B·G, N, D] whose rows are contiguous; a copy only where they are not (a cache with room to grow is a view)."""
    return (x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()).flatten(0, 1)


def gather_blocks(x: Tensor, index: Tensor, block_size: int) -> Tensor:
    """Rows of ``x`` [BG, N, D] (see `as_rows`) in blocks ``index`` [BG, ..., K] -> [BG, ..., K·block_size, D].

    Entries below 0 read block 0, the missing rows of a partial last block are zeros: the caller masks both. A partial
    last block may stand in the last column only, as it does in ascending lists.
    """
    rows, n, d = x.shape
    full = n // block_size
    flat = index.clamp(0, max(full - 1, 0)).long().reshape(rows, -1)
    shape = (rows, flat.shape[1], block_size * d)
    out = x.new_empty(shape) if full else x.new_zeros(shape)
    if full:
        for row in range(rows):
            torch.index_select(x[row, : full * block_size].view(full, block_size * d), 0, flat[row], out=out[row])
    if n % block_size:
        tail = F.pad(x[:, full * block_size :], (0, 0, 0, (full + 1) * block_size - n)).reshape(rows, 1, -1)
        last = out.view(rows, -1, index.shape[-1], block_size * d)[:, :, -1]
        partial = (index[..., -1:] == full).reshape(rows, -1, 1)
        last.copy_(torch.where(partial, tail, last))
    return out.view(*index.shape[:-1], index.shape[-1] * block_size, d)


def scatter_blocks(into: Tensor, index: Tensor, grad: Tensor, block_size: int) -> None:
    """Add ``grad`` [BG, n, K·S, D] to the blocks ``index`` [BG, n, K] of ``into`` [BG, nb·S, D] (float32)."""
    d = into.shape[-1]
    for row in range(into.shape[0]):
        target = into[row].view(-1, block_size * d)
        target.index_add_(0, index[row].clamp(min=0).long().reshape(-1), grad[row].reshape(-1, block_size * d).to(into.dtype))


def tile_chunks(index: Tensor, grid: TileGrid, rows_per_tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut the tiles so that a chunk has about CHUNK_SCORES scores: (tiles, their block lists without the empty columns)."""
    per_tile = index.shape[0] * rows_per_tile * index.shape[-1] * grid.block_size
    step = max(1, CHUNK_SCORES // max(per_tile, 1))
    for start in range(0, grid.tiles, step):
        tiles = slice(start, min(start + step, grid.tiles))
        part = index[:, tiles]
        empty = int((part < 0).sum(-1).min())
        yield tiles, part[..., min(empty, part.shape[-1] - 1) :]


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


def chunk_scores(q: Tensor, keys: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Scaled, masked scores [BG, n, Hg, T, K·S] of ``q`` [BG, n, Hg, T, D] and ``keys`` [BG, n, K·S, D]."""
    rows, n, hg, t, d = q.shape
    scores = torch.bmm((q * scale).reshape(rows * n, hg * t, d), keys.flatten(0, 1).transpose(1, 2))
    scores = scores.view(rows, n, hg, t, -1)
    scores[..., -hidden.shape[-1] :].masked_fill_(hidden[:, :, None], -torch.inf)
    return scores


def probabilities(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the last dimension in which a row that sees nothing is all zeros."""
    p = torch.softmax(scores, -1)
    if hidden.shape[-1] < scores.shape[-1]:
        return p  # some columns are visible to every row
    return p.masked_fill_(hidden.all(-1)[:, :, None, :, None], 0)


def to_tiles(x: Tensor, grid: TileGrid, groups: int) -> Tensor:
    """[B, H, Q, D] -> [B·G, n, Hg, T, D], zero rows before and after the call's queries."""
    b, h, q_len, d = x.shape
    after = grid.tiles * grid.query_tile - grid.lead - q_len
    if grid.lead or after:  # F.pad copies even when there is nothing to pad
        x = F.pad(x, (0, 0, grid.lead, after))
    return x.reshape(b * groups, h // groups, grid.tiles, grid.query_tile, d).transpose(1, 2)


def from_tiles(x: Tensor, grid: TileGrid, b: int) -> Tensor:
    """Inverse of `to_tiles`: [B·G, n, Hg, T, ...] -> [B, H, Q, ...]."""
    x = x.transpose(1, 2)
    x = x.reshape(b, -1, grid.tiles * grid.query_tile, *x.shape[4:])
    return x[:, :, grid.lead : grid.lead + grid.q_len]


class GatheredAttention(torch.autograd.Function):
    """Forward and backward of `block_sparse_attention` by gathering; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, grid: TileGrid, scale: float, need_lse: bool
    ) -> tuple[Tensor, Tensor]:
        b, groups = k.shape[:2]
        q_tiles = to_tiles(q, grid, groups)
        keys, values = as_rows(k), as_rows(v)
        index = indices.flatten(0, 1)
        out = torch.empty_like(q_tiles)
        lse = q.new_empty(q_tiles.shape[:4] if need_lse else (0,), dtype=torch.float32)
        for tiles, part in tile_chunks(index, grid, q_tiles.shape[2] * grid.query_tile):
            chunk_k = gather_blocks(keys, part, grid.block_size)
            chunk_v = gather_blocks(values, part, grid.block_size)
            hidden = chunk_mask(part, grid, tiles)
            scores = chunk_scores(q_tiles[:, tiles], chunk_k, hidden, scale)
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
        index = indices.flatten(0, 1)
        dq = torch.empty_like(q_tiles)
        accum = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (x.new_zeros(b * groups, grid.blocks * grid.block_size, x.shape[-1], dtype=accum) for x in (keys, values))
        for tiles, part in tile_chunks(index, grid, q_tiles.shape[2] * grid.query_tile):
            chunk_k = gather_blocks(keys, part, grid.block_size)
            chunk_v = gather_blocks(values, part, grid.block_size)
            hidden = chunk_mask(part, grid, tiles)
            scores = chunk_scores(q_tiles[:, tiles], chunk_k, hidden, scale)
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
    if softcap is not None or sinks is not None or not selection.grid.causal:
        raise NotImplementedError("impl='torch' has no softcap, sinks or bidirectional attention")
    out, lse = GatheredAttention.apply(q, k, v, selection.indices, selection.grid, scale, return_lse)
    return out, lse if return_lse else None
