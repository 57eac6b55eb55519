"""`torch` implementation: gather the kept blocks of a few tiles, two batched matmuls, next tiles.

Memory beyond the inputs and outputs is one chunk (``CHUNK_SCORES`` scores and the keys and values they need), whatever
N is. The query heads of a KV group are packed into the rows of one matmul. The backward pass gathers again and
recomputes the probabilities. Mask work is done only on a tile's own blocks and on chunks with empty entries.
"""

# Shape legend: B batch, H query heads, G KV heads, Hg query heads of one, Q queries, D head dim, T query tile, n query
# tiles, K listed blocks of a tile; BG = B · G.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import ScoreOptions
from ..reference import weighted_values
from ..selection import BlockSelection, TileGrid
from ..tiles import (
    Scratch,
    all_finite,
    as_rows,
    as_tiles,
    from_tiles,
    gather_visible,
    scatter_blocks,
    to_tiles,
    wide,
)
from .chunks import (
    chunk_lse,
    chunk_mask,
    chunk_scores,
    gather_chunk,
    norm_of,
    probabilities,
    softmax_backward,
    tile_chunks,
)


def _attend_widely(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, sinks: Tensor | None, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Output [BG, n, Hg·T, D] and log-sum-exp of a chunk whose result was not finite."""
    wide_q = wide(q)
    scores = chunk_scores(wide_q, wide(keys), hidden, options, wide_q.dtype, Scratch())
    lse = chunk_lse(scores, sinks).to(torch.promote_types(q.dtype, torch.float32))
    return weighted_values(probabilities(scores, hidden, sinks).flatten(2, 3), wide(values)).to(q.dtype), lse


# P = exp(s − lse), out = P V. With dP = dO Vᵀ and δ = rowsum(P ∘ dP) − dlse: dS = scale · P ∘ (dP − δ),
# dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO. Recomputed by chunks, as FlashAttention does (arXiv 2205.14135, appendix B).
class GatheredAttention(torch.autograd.Function):
    """Forward and backward of `block_sparse_attention` by gathering; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        indices: Tensor,
        grid: TileGrid,
        options: ScoreOptions,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        b, groups = k.shape[:2]
        q_tiles = to_tiles(q, grid, groups)
        keys, values = as_rows(k), as_rows(v)
        index, scratch = indices.flatten(0, 1), Scratch()
        accum = torch.promote_types(q.dtype, torch.float32)
        padded = q.new_empty(*q.shape[:2], grid.tiles * grid.query_tile, v.shape[-1])
        out = as_tiles(padded, grid, groups)
        lse = torch.empty(q_tiles.shape[:4] if need_lse else (0,), dtype=accum, device=q.device)
        row_sinks = _row_sinks(sinks, b, groups)
        # what a cap or a sink changes is rounded once, when it enters the next matmul
        dtype = q.dtype if row_sinks is None and options.softcap is None else accum
        for rows, tiles, part in tile_chunks(index, grid, q_tiles.shape[2] * grid.query_tile):
            chunk_k, chunk_v = gather_chunk(keys[rows], values[rows], part, grid, scratch)
            hidden, some = chunk_mask(part, grid, tiles), _of(row_sinks, rows)
            scores = chunk_scores(q_tiles[rows, tiles], chunk_k, hidden, options, dtype, scratch)
            some_lse = chunk_lse(scores, some) if need_lse else None
            product = torch.matmul(probabilities(scores, hidden, some).to(q.dtype).flatten(2, 3), chunk_v)
            # a hidden value that is not finite (0 · NaN is NaN), or a product out of the dtype's range
            if not all_finite(product):
                product, some_lse = _attend_widely(q_tiles[rows, tiles], chunk_k, chunk_v, hidden, some, options)
            out[rows, tiles] = product.view_as(out[rows, tiles])
            if need_lse and some_lse is not None:
                lse[rows, tiles] = some_lse
        ctx.save_for_backward(q, k, v, sinks, indices)
        ctx.set_materialize_grads(False)
        ctx.grid, ctx.options = grid, options
        end = grid.lead + grid.q_len
        return padded[:, :, grid.lead : end].contiguous(), from_tiles(lse, grid, b).contiguous() if need_lse else lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, indices = ctx.saved_tensors
        grid, options = ctx.grid, ctx.options
        b, groups = k.shape[:2]
        accum = torch.promote_types(q.dtype, torch.float32)
        grad_out = torch.zeros_like(q) if grad_out is None else grad_out
        q_tiles, do_tiles = to_tiles(q, grid, groups), to_tiles(grad_out, grid, groups)
        dlse_tiles = None if grad_lse is None else to_tiles(grad_lse[..., None].to(accum), grid, groups)
        keys, values = as_rows(k), as_rows(v)
        index, scratch = indices.flatten(0, 1), Scratch()
        dq = torch.empty_like(q_tiles)
        dk, dv = (
            x.new_zeros(b * groups, grid.blocks * grid.block_size, x.shape[-1], dtype=accum) for x in (keys, values)
        )
        row_sinks = _row_sinks(sinks, b, groups)
        dsinks: list[Tensor] = []
        for rows, tiles, part in tile_chunks(index, grid, q_tiles.shape[2] * grid.query_tile):
            chunk_k, chunk_v = gather_chunk(keys[rows], values[rows], part, grid, scratch)
            hidden = chunk_mask(part, grid, tiles)
            do, some = do_tiles[rows, tiles].flatten(2, 3), _of(row_sinks, rows)
            dlse = None if dlse_tiles is None else dlse_tiles[rows, tiles].flatten(2, 3)
            scores = chunk_scores(q_tiles[rows, tiles], chunk_k, hidden, options, accum, scratch)
            p, ds, dsink = softmax_backward(
                scores, hidden, some, (do @ chunk_v.transpose(-1, -2)).to(accum), dlse, options
            )
            product = ds.to(q.dtype) @ chunk_k
            if not all_finite(product):
                some_q, chunk_k = wide(q_tiles[rows, tiles]), wide(chunk_k)
                scores = chunk_scores(some_q, chunk_k, hidden, options, some_q.dtype, Scratch())
                p, ds, dsink = softmax_backward(
                    scores, hidden, some, wide(do) @ wide(chunk_v).transpose(-1, -2), dlse, options
                )
                product, p, ds = (ds @ chunk_k).to(q.dtype), p.to(accum), ds.to(accum)
            if dsink is not None:
                dsinks.append(dsink.new_zeros(b * groups, dsink.shape[1]))
                dsinks[-1][rows] = dsink
            dq[rows, tiles] = product.view_as(dq[rows, tiles])
            # a key's gradient is the sum of many tiles' products: in low precision each would be rounded
            scatter_blocks(
                dk[rows], part, ds.transpose(-1, -2) @ q_tiles[rows, tiles].flatten(2, 3).to(accum), grid.block_size
            )
            scatter_blocks(dv[rows], part, p.transpose(-1, -2) @ do.to(accum), grid.block_size)
        grads = (x[:, : grid.kv_len].to(like.dtype).view_as(like) for x, like in ((dk, k), (dv, v)))
        sum_sinks = torch.stack(dsinks).sum(0).view(b, -1).sum(0).to(sinks.dtype) if dsinks else None
        return from_tiles(dq, grid, b), *grads, sum_sinks, None, None, None, None


def _row_sinks(sinks: Tensor | None, batch: int, groups: int) -> Tensor | None:
    """``sinks`` [H] beside the rows of scores: [B·G, 1, Hg, 1]."""
    return None if sinks is None else sinks.view(groups, 1, -1, 1).repeat(batch, 1, 1, 1)


def _of(row_sinks: Tensor | None, rows: slice) -> Tensor | None:
    return None if row_sinks is None else row_sinks[rows]


def block_sparse_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: ScoreOptions, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `block_sparse_attention`."""
    grid = selection.grid
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, options.sinks))
    if grid.q_len == grid.query_tile == 1 and grid.causal and not trained:
        result = _attend_single(q, k, v, selection.indices.flatten(0, 2), grid, options, return_lse)
        if result is not None:
            return result
    selection.check_blocks()
    out, lse = GatheredAttention.apply(q, k, v, options.sinks, selection.indices, grid, options, return_lse)
    return out, lse if return_lse else None


def hide_after(scores: Tensor, n: int, block_size: int) -> None:
    """Hide from ``scores`` [..., K·block_size] the rows that `gather_visible` filled up with zeros."""
    if n % block_size:
        scores[..., n % block_size - block_size :] = -torch.inf


def _attend_single(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: TileGrid, options: ScoreOptions, return_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Forward pass of one query per row whose lists ``index`` [B·G, K] end with its own block: nothing to mask but
    empty entries.

    None where it is not as simple as that: another list, or a result that is not finite.
    """
    if not bool(
        ((index[:, -1] == grid.blocks - 1) & ((index[:, 1:] > index[:, :-1]) | (index[:, 1:] < 0)).all(-1)).all()
    ):
        return None
    fewest, width = (int(count) for count in (index >= 0).sum(-1).aminmax())
    # columns that are empty in every row are cut off
    index = index[:, -width:]
    keys, values = (gather_visible(x, index.clamp(min=0), grid.block_size) for x in (k, v))
    scores = torch.bmm((q * options.scale).reshape(len(index), -1, q.shape[-1]), keys.transpose(1, 2))
    accum = torch.promote_types(q.dtype, torch.float32)
    if options.softcap is not None:
        scores = options.cap(scores.to(accum))
    hide_after(scores, k.shape[2], grid.block_size)
    if fewest < width:
        scores.unflatten(-1, (-1, grid.block_size)).masked_fill_((index < 0)[:, None, :, None], -torch.inf)
    sinks = None if options.sinks is None else options.sinks.view(k.shape[1], -1).repeat(q.shape[0], 1)
    lse = chunk_lse(scores, sinks) if return_lse else None
    p = torch.softmax(scores, -1) if sinks is None else (scores.to(accum) - norm_of(scores, sinks)).exp()
    out = torch.bmm(p.to(q.dtype), values)
    if not all_finite(out):
        return None
    return out.view(q.shape), None if lse is None else lse.view(q.shape[:3])
