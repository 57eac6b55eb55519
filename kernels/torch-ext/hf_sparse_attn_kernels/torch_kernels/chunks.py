"""Chunks of tiles with the keys that they keep: gathered, masked, scored, normalised."""

# Shape legend: BG batch rows × KV heads, Hg query heads of a KV head, N keys, D head dim, T query tile, S block size,
# n query tiles, K listed blocks of a tile.

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import ScoreOptions
from ..selection import TileGrid
from ..tiles import (
    Scratch,
    gather_blocks,
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
    together. Others, of budgets that vary, are cut row by row and by length: what fills up the shorter lists of a chunk
    costs as much as keys.
    """
    counts = (index >= 0).sum(-1)
    if bool((counts != counts[:1]).any() | (counts.diff(dim=1) < 0).any()):
        yield from by_length(index, counts.cpu(), rows_per_tile * grid.block_size)
        return
    per_tile = index.shape[0] * rows_per_tile * index.shape[-1] * grid.block_size
    step = max(1, CHUNK_SCORES // max(per_tile, 1))
    for start in range(0, grid.tiles, step):
        tiles = slice(start, min(start + step, grid.tiles))
        part = index[:, tiles]
        empty = index.shape[-1] - int(counts[:, tiles].max())
        yield Chunk(slice(None), tiles, part[..., min(empty, part.shape[-1] - 1) :])


def by_length(index: Tensor, counts: Tensor, per_block: int) -> Iterator[Chunk]:
    """Chunks of one row each, the longest of its lists first; ``counts`` [BG, n], ``per_block`` scores of a block."""
    # the longest list comes first, so its length is the width of the chunk
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


# s_ij = cap(scale · q_i · k_j), −inf where j is hidden from i.
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


# lse_i = log(Σ_j exp s_ij [+ exp sink_h])
def chunk_lse(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exp of each row [BG, n, Hg, T], the ``sinks`` [BG, 1, Hg, 1] included; at least float32."""
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))


# P_ij = exp(s_ij − lse_i)
def probabilities(scores: Tensor, hidden: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension and the ``sinks`` [BG, 1, Hg, 1], in place;
    a row that sees nothing is all zeros.
    """
    p = torch.softmax(scores, -1, out=scores) if sinks is None else scores.sub_(norm_of(scores, sinks)).exp_()
    if hidden.shape[-1] < scores.shape[-1]:
        return p  # some columns are visible to every row
    return p.masked_fill_(hidden.all(-1)[:, :, None, :, None], 0)


def norm_of(scores: Tensor, sinks: Tensor) -> Tensor:
    """What makes of scores the logarithms of weights: NaN beside an infinite score or sink, as in a softmax."""
    lse = chunk_lse(scores, sinks)
    return lse.masked_fill(lse == torch.inf, torch.nan)[..., None]


# dS = scale · P ∘ (dP − δ) ∘ (1 − (s / softcap)²), δ = rowsum(P ∘ dP) − dlse, dsink_h = −Σ_i exp(sink_h − lse_i) · δ_i.
def softmax_backward(
    scores: Tensor, hidden: Tensor, sinks: Tensor | None, dp: Tensor, dlse: Tensor | None, options: ScoreOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the gradient ``dp`` [BG, n, Hg·T, K·S] of the probabilities and ``dlse`` [BG, n, Hg·T, 1] of the
    log-sum-exp.

    Returns the probabilities, the gradient of q·k (both shaped like ``dp``) and that of the sinks [BG, Hg]. All is in
    the dtype of ``scores``, as in eager attention: only what enters a matmul is rounded.
    """
    # clamped: a hidden score is −inf, and would make the slope so
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
