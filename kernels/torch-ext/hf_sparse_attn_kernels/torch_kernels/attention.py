"""`torch` implementation: gather the kept blocks of a few tiles, two batched matmuls, next tiles.

Memory beyond the inputs and outputs is one chunk (``CHUNK_SCORES`` scores and the keys and values they need), whatever
N is. The query heads of a KV group are packed into the rows of one matmul. The backward pass gathers again and
recomputes the probabilities. Mask work is done only on a tile's own blocks and on chunks with empty entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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
    gather_blocks,
    gather_visible,
    scatter_blocks,
    to_tiles,
    wide,
)

CHUNK_SCORES = 1 << 21  # scores of one chunk: 4 MB in bf16, 8 MB in float32; of 2^20 to 2^24 the fastest or close to it


class Chunk(NamedTuple):
    """Query tiles that are attended together: some rows of (batch, group), some tiles, and their ``lists`` of blocks
    [rows, tiles, K].
    """

    rows: slice
    tiles: slice | Tensor
    lists: Tensor


def tile_chunks(index: Tensor, grid: TileGrid, rows_per_tile: int) -> Iterator[Chunk]:
    """Cut the lists ``index`` [BG, n, K] so that a chunk has about CHUNK_SCORES scores, without the empty columns.

    Lists that are as long for every row and never shorter than those before are cut along the sequence, all rows
    together.
    Others, of budgets that vary, are cut row by row and by length: what fills up the shorter lists of a chunk costs as
    much as keys.
    """
    counts = (index >= 0).sum(-1)
    if bool((counts != counts[:1]).any() | (counts.diff(dim=1) < 0).any()):
        yield from _by_length(index, counts.cpu(), rows_per_tile * grid.block_size)
        return
    per_tile = index.shape[0] * rows_per_tile * index.shape[-1] * grid.block_size
    step = max(1, CHUNK_SCORES // max(per_tile, 1))
    for start in range(0, grid.tiles, step):
        tiles = slice(start, min(start + step, grid.tiles))
        part = index[:, tiles]
        empty = index.shape[-1] - int(counts[:, tiles].max())
        yield Chunk(slice(None), tiles, part[..., min(empty, part.shape[-1] - 1) :])


def _by_length(index: Tensor, counts: Tensor, per_block: int) -> Iterator[Chunk]:
    """Chunks of one row each, the longest of its lists first; ``counts`` [BG, n], ``per_block`` scores of a block."""
    for row, lengths in enumerate(counts):
        ordered, order = lengths.sort(descending=True, stable=True)
        start = 0
        while start < len(order):
            width = max(int(ordered[start]), 1)
            tiles = order[start : start + max(1, CHUNK_SCORES // (width * per_block))].to(index.device)
            yield Chunk(slice(row, row + 1), tiles, index[row : row + 1, tiles, -width:])
            start += len(tiles)


def gather_chunk(
    keys: Tensor, values: Tensor, index: Tensor, grid: TileGrid, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Keys and values [BG, N, D] of the blocks ``index`` [BG, n, K]: [BG, n, K·S, D] each."""
    size = grid.block_size
    shape = (*index.shape[:-1], index.shape[-1] * size)
    out_k, out_v = (scratch.take(name, (*shape, x.shape[-1]), x) for name, x in (("keys", keys), ("values", values)))
    return gather_blocks(keys, index, size, out_k), gather_blocks(values, index, size, out_v)


def chunk_mask(index: Tensor, grid: TileGrid, tiles: slice | Tensor) -> Tensor:
    """Where scores of a chunk must be hidden: boolean [BG, n, T or 1, K'·S] over the last K' blocks.

    Blocks are ascending, so only the last ``own_blocks`` columns can hold keys after a query, and only the last one
    keys after the end; if the chunk has empty entries all its columns are masked.
    """
    columns = (
        index.shape[-1] if bool((index < 0).any()) else min(grid.own_blocks if grid.causal else 1, index.shape[-1])
    )
    last = index[..., -columns:]
    offset = torch.arange(grid.block_size, device=index.device, dtype=torch.int64)
    k_pos = (last.long()[..., None] * grid.block_size + offset).flatten(-2)[:, :, None, :]
    if grid.causal:
        q_pos = grid.first_positions(index.device)[tiles][:, None] + torch.arange(
            grid.query_tile, device=index.device, dtype=torch.int64
        )
        hidden = k_pos > q_pos[None, :, :, None]
    else:
        hidden = k_pos >= grid.kv_len
    return hidden | (last < 0).repeat_interleave(grid.block_size, -1)[:, :, None, :]


def chunk_scores(
    q: Tensor, keys: Tensor, hidden: Tensor, options: ScoreOptions, dtype: torch.dtype, scratch: Scratch
) -> Tensor:
    """Masked scores [BG, n, Hg, T, K·S] in ``dtype`` of ``q`` [BG, n, Hg, T, D] and ``keys`` [BG, n, K·S, D]."""
    rows, n, hg, t, d = q.shape
    out = scratch.take("scores", (rows * n, hg * t, keys.shape[2]), q)
    scores = torch.bmm((q * options.scale).reshape(rows * n, hg * t, d), keys.flatten(0, 1).transpose(1, 2), out=out)
    scores = options.cap(scores.view(rows, n, hg, t, -1).to(dtype))
    scores[..., -hidden.shape[-1] :].masked_fill_(hidden[:, :, None], -torch.inf)
    return scores


def chunk_lse(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exp of each row [BG, n, Hg, T], the ``sinks`` [BG, 1, Hg, 1] included; at least float32."""
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))


def probabilities(scores: Tensor, hidden: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension and the ``sinks`` [BG, 1, Hg, 1], in place;
    a row that sees nothing is all zeros.
    """
    p = torch.softmax(scores, -1, out=scores) if sinks is None else scores.sub_(_norm(scores, sinks)).exp_()
    if hidden.shape[-1] < scores.shape[-1]:
        return p  # some columns are visible to every row
    return p.masked_fill_(hidden.all(-1)[:, :, None, :, None], 0)


def _norm(scores: Tensor, sinks: Tensor) -> Tensor:
    """What makes of scores the logarithms of weights: NaN beside an infinite score or sink, as in a softmax."""
    lse = chunk_lse(scores, sinks)
    return lse.masked_fill(lse == torch.inf, torch.nan)[..., None]


def softmax_backward(
    scores: Tensor, hidden: Tensor, sinks: Tensor | None, dp: Tensor, dlse: Tensor | None, options: ScoreOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient ``dp`` [BG, n, Hg·T, K·S] of the probabilities and ``dlse`` [BG, n, Hg·T, 1] of the
    log-sum-exp.

    Returns the probabilities, the gradient of q·k (both shaped like ``dp``) and that of the sinks [BG, Hg]. All is in
    the dtype of ``scores``, as in eager attention: only what enters a matmul is rounded.
    """
    slope = (
        None
        if options.softcap is None
        else 1 - (scores.clamp(-options.softcap, options.softcap) / options.softcap) ** 2
    )
    weight = None if sinks is None else (sinks - chunk_lse(scores, sinks)).exp()
    p = probabilities(scores, hidden, sinks).flatten(2, 3)
    delta = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= dlse
    dsinks = None if weight is None else -(weight * delta.view_as(weight)).sum((1, 3))
    ds = (dp - delta).mul_(p).mul_(options.scale)
    return p, ds if slope is None else ds.mul_(slope.flatten(2, 3)), dsinks


def _attend_widely(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, sinks: Tensor | None, options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """Output [BG, n, Hg·T, D] and log-sum-exp of a chunk whose result was not finite."""
    wide_q = wide(q)
    scores = chunk_scores(wide_q, wide(keys), hidden, options, wide_q.dtype, Scratch())
    lse = chunk_lse(scores, sinks).to(torch.promote_types(q.dtype, torch.float32))
    return weighted_values(probabilities(scores, hidden, sinks).flatten(2, 3), wide(values)).to(q.dtype), lse


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
    p = torch.softmax(scores, -1) if sinks is None else (scores.to(accum) - _norm(scores, sinks)).exp()
    out = torch.bmm(p.to(q.dtype), values)
    if not all_finite(out):
        return None
    return out.view(q.shape), None if lse is None else lse.view(q.shape[:3])
