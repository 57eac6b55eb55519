"""Which tiles kept a key block: the transposed lists that the dK/dV kernel walks, built on the device without a host
sync.
"""

# Shape legend: R documents, G KV heads, n query tiles, K listed blocks of a tile, W work items, P popular blocks.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TILES = 64  # at least this many tiles a work item; blocks that more tiles kept are split


@dataclass(frozen=True)
class InverseIndex:
    """Lists of tiles by bin; a bin is (document, group, key block), numbered in that order.

    tiles: int32 [R·G·n·K], tile indices sorted by bin, ascending within one (entries of no bin come last).
    starts: int32 [bins + 1], where each bin's run starts in ``tiles``.
    work: int32 [W, 2], (bin, number): item ``number`` of a bin covers its tiles from number · chunk on; bin = bins:
    nothing to do.
    slots: int32 [bins], where the partial sums of a bin with several items start in the workspace of ``slot_count``
    blocks.
    popular: int32 [P], the bins with several items, then ``bins``.
    """

    tiles: Tensor
    starts: Tensor
    work: Tensor
    slots: Tensor
    popular: Tensor
    chunk: int
    slot_count: int


def _bins_in_use(
    blocks: int, groups: int, block_size: int, documents: Tensor | None, rows: int, device: torch.device
) -> Tensor:
    """Boolean [bins]: the block has a slot of its document."""
    if documents is None:
        return torch.ones(rows * groups * blocks, dtype=torch.bool, device=device)
    last = (documents[:, 2] - documents[:, 1] + block_size - 1) // block_size
    used = torch.arange(blocks, device=device, dtype=torch.int64) < last[:, None, None]
    return used.expand(rows, groups, blocks).reshape(-1)


def invert(
    indices: Tensor, blocks: int, block_size: int, batch: int, documents: Tensor | None, chunk_tiles: int | None = None
) -> InverseIndex:
    """Transpose ``indices`` [R, G, n, K] by a stable sort;
    shapes depend on shapes only, so the result is graph-safe.
    """
    rows, groups, tiles, width = indices.shape
    bins, device = rows * groups * blocks, indices.device
    bin_of_row = torch.arange(0, bins, blocks, device=device, dtype=torch.int32).view(rows, groups, 1, 1)
    # the bin of every entry; empty ones get a number behind all bins. A stable sort keeps tiles ascending
    keys = torch.where(indices >= 0, indices + bin_of_row, bins).flatten()
    ordered, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(bins + 1, device=device, dtype=torch.int32), out_int32=True)
    counts = starts.diff()
    # four times the tiles that keep a block on average, so that few blocks are split
    chunk = max(chunk_tiles or CHUNK_TILES, -(-4 * tiles * width // blocks) if chunk_tiles is None else 1)
    pieces = torch.where(
        _bins_in_use(blocks, groups, block_size, documents, rows, device), (counts + chunk - 1) // chunk, 0
    )
    # a block that no tile kept has one item, which writes zeros
    items = torch.where(_bins_in_use(blocks, groups, block_size, documents, rows, device), pieces.clamp(min=1), 0)
    ends = items.cumsum(0)
    # at most so many bins have an item, and splits add at most one for each full chunk
    in_use = bins if documents is None else min(bins, groups * (batch * blocks + rows))
    number = torch.arange(in_use + keys.numel() // chunk, device=device, dtype=torch.int64)
    bin = torch.searchsorted(ends, number, right=True)
    before = torch.cat([ends - items, ends[-1:]])
    several = items > 1
    parts = torch.where(several, items, 0)
    # a bin with several items holds more than one chunk of entries, so there are no more of them than chunks
    popular = torch.searchsorted(
        several.cumsum(0), torch.arange(1, keys.numel() // chunk + 1, device=device, dtype=torch.int64), out_int32=True
    )
    return InverseIndex(
        (order // width % tiles).int() if width else order.int(),
        starts,
        torch.stack([bin, number - before[bin]], 1).int(),
        (parts.cumsum(0) - parts).int(),
        popular,
        chunk,
        # ⌈x⌉ ≤ 2 ⌊x⌋ for x > 1, the chunks of a popular bin
        2 * (keys.numel() // chunk),
    )
