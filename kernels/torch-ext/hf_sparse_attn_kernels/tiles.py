"""Gathering the key blocks of query tiles into contiguous memory."""

# Shape legend: B batch, H query heads, G KV heads, Hg query heads of one, N keys, Q queries, D head dim, T query tile,
# S block size, n query tiles, nb blocks, K listed blocks of a tile; BG = B · G.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import TileGrid


class Scratch:
    """Memory that the chunks of a loop use again: the system maps and clears a large new tensor page by page, every
    time.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised contiguous memory of ``shape`` in ``like``'s dtype; valid until ``name`` is taken again."""
        count = math.prod(shape)
        held = self._flat.get(name)
        if held is None or held.numel() < count:
            self._flat.pop(name, None)
            held = self._flat[name] = like.new_empty(count)
        return held[:count].view(shape)


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself if its last dimension is contiguous, as the kernels need; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite (and no sum of them leaves the range of float32)."""
    # a sum hides neither NaN nor infinity, and needs no boolean tensor as large as x
    return bool(torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))))


def wide(x: Tensor) -> Tensor:
    """``x`` in the widest dtype of its device: for the few chunks in which a product left the range of its own."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def as_rows(x: Tensor) -> Tensor:
    """[B, G, N, D] -> [B·G, N, D] whose rows are contiguous;
    a copy only where they are not (a cache with room to grow is a view).
    """
    return (x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()).flatten(0, 1)


def _as_blocks(x: Tensor, count: int, block_size: int) -> tuple[Tensor, int] | None:
    """All of ``x`` [BG, N, D] as one matrix of blocks and its blocks per row, if memory holds ``count`` blocks of every
    row so.

    A cache with room to grow has memory behind a partial last block; what stands there is not part of ``x``.
    """
    rows, _, d = x.shape
    width = block_size * d
    if not width:
        return None
    per_row = x.stride(0) // width
    # blocks from the first row's first to the last row's last must lie inside the storage
    need = (rows - 1) * per_row + count
    held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if x.stride(2) != 1 or x.stride(1) != d or x.stride(0) % width or need * width > held:
        return None
    return x.as_strided((need, width), (width, 1)), per_row


def gather_visible(x: Tensor, index: Tensor, block_size: int) -> Tensor:
    """Rows of ``x`` [B, G, N, D] in the blocks ``index`` [B·G, K], for a query at N − 1: [B·G, K·block_size, D].

    The last column must name the block of that query; the last ``-N % block_size`` rows, which come after it, are
    zeros.
    """
    d, n = x.shape[-1], x.shape[2]
    rows = as_rows(x)
    cut = _as_blocks(rows, -(-n // block_size), block_size)
    if cut is None:
        return gather_blocks(rows, index, block_size)
    blocks, per_row = cut
    first = torch.arange(0, len(index) * per_row, per_row, device=index.device, dtype=torch.int64)
    gathered = blocks.index_select(0, (index + first[:, None]).view(-1)).view(len(index), -1, d)
    if n % block_size:
        gathered[:, n % block_size - block_size :] = 0
    return gathered


def gather_blocks(x: Tensor, index: Tensor, block_size: int, out: Tensor | None = None) -> Tensor:
    """Rows of ``x`` [BG, N, D] (see `as_rows`) in blocks ``index`` [BG, ..., K] -> [BG, ..., K·block_size, D].

    Entries below 0 read block 0, the missing rows of a partial last block are zeros: the caller masks both. A partial
    last block may stand in the last column only, as it does in ascending lists. ``out`` is memory for the result.
    """
    rows, n, d = x.shape
    full = n // block_size
    flat = index.clamp(0, max(full - 1, 0)).long().reshape(rows, -1)
    shape = (rows, flat.shape[1], block_size * d)
    out = x.new_empty(shape) if out is None else out.view(shape)
    # one index a block, not one a key: whole blocks are the rows of a matrix
    cut = _as_blocks(x, full, block_size)
    if not full:
        out.zero_()
    elif cut is not None:
        blocks, per_row = cut
        flat += torch.arange(0, rows * per_row, per_row, device=flat.device, dtype=torch.int64)[:, None]
        torch.index_select(blocks, 0, flat.view(-1), out=out.view(-1, block_size * d))
    else:
        for row in range(rows):
            torch.index_select(x[row, : full * block_size].view(full, block_size * d), 0, flat[row], out=out[row])
    if n % block_size:
        # the partial last block, filled up with zeros, goes over the entries that name it
        tail = F.pad(x[:, full * block_size :], (0, 0, 0, (full + 1) * block_size - n)).reshape(rows, 1, block_size * d)
        lists = math.prod(index.shape[1:-1])
        last = out.view(rows, lists, index.shape[-1], block_size * d)[:, :, -1]
        partial = (index[..., -1:] == full).reshape(rows, lists, 1)
        last.copy_(torch.where(partial, tail, last))
    return out.view(*index.shape[:-1], index.shape[-1] * block_size, d)


def scatter_blocks(into: Tensor, index: Tensor, grad: Tensor, block_size: int) -> None:
    """Add ``grad`` [BG, n, K·S, D] to the blocks ``index`` [BG, n, K] of ``into`` [BG, nb·S, D], of the same dtype."""
    d = into.shape[-1]
    for row in range(into.shape[0]):
        target = into[row].view(-1, block_size * d)
        # empty entries add zeros to block 0, as their weights are zero
        target.index_add_(0, index[row].clamp(min=0).long().reshape(-1), grad[row].reshape(-1, block_size * d))


def to_tiles(x: Tensor, grid: TileGrid, groups: int) -> Tensor:
    """[B, H, Q, D] -> [B·G, n, Hg, T, D], zero rows before and after the call's queries."""
    after = grid.tiles * grid.query_tile - grid.lead - x.shape[2]
    if grid.lead or after:  # F.pad copies even when there is nothing to pad
        x = F.pad(x, (0, 0, grid.lead, after))
    return as_tiles(x, grid, groups)


def as_tiles(x: Tensor, grid: TileGrid, groups: int) -> Tensor:
    """[B, H, n·T, D] -> [B·G, n, Hg, T, D], a view where ``x`` is contiguous."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, grid.tiles, grid.query_tile, x.shape[3]).transpose(1, 2)


def from_tiles(x: Tensor, grid: TileGrid, b: int) -> Tensor:
    """Inverse of `to_tiles`: [B·G, n, Hg, T, ...] -> [B, H, Q, ...]."""
    x = x.transpose(1, 2)
    x = x.reshape(b, -1, grid.tiles * grid.query_tile, *x.shape[4:])
    return x[:, :, grid.lead : grid.lead + grid.q_len]
