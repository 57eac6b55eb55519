"""Which blocks each query tile must keep, may keep, and how many: what every way to select is told."""

# Shape legend: B batch, G KV heads, n query tiles, m some of them, nb key blocks, F forced blocks, C chosen ones.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import TileGrid, ordered_topk

# times as large are chunks on an accelerator, where a launch costs more than memory that leaves the caches
LAUNCH_CHUNKS = 64


def chunk_of(size: int, device: torch.device) -> int:
    """The ``size`` of a chunk of a loop (bytes or entries), made for a processor's caches, on ``device``."""
    return size if device.type == "cpu" else LAUNCH_CHUNKS * size


def largest(counts: Tensor, bound: int) -> int:
    """The largest of ``counts``; on an accelerator, which reading it would wait for, the ``bound`` on it
    that is known.
    """
    return int(counts.max()) if counts.device.type == "cpu" else bound


class TileBudget(NamedTuple):
    """Budget of one query tile, in blocks: ``[0, sink)`` and ``[near, last]`` are forced, ``free`` of the others may be
    kept.

    The others are the ``eligible`` blocks; stage 1 passes ``candidates`` of them on. A causal tile sees nothing after
    ``last``: they are ``[sink, near)``. Without causality they lie on both sides, and a partial last block of the whole
    call, which has no summary, is forced for every tile.
    """

    sink: int
    near: int
    last: int
    eligible: int
    free: int
    candidates: int


@dataclass(frozen=True)
class TilePlan:
    """The budgets of the ``n`` query tiles of one call; every tensor is int64 ``[n]`` and counts or indexes blocks.

    ``sink`` is the number of blocks that hold sink tokens, of a tile near the start more than it may see.

    With a ``threshold`` (a share of the softmax mass) stage 2 keeps of an open tile's candidates those whose estimated
    mass is at least as large, however many these are; ``free`` is then what a tile keeps on average.
    """

    grid: TileGrid
    sink: int
    budgets: tuple[TileBudget, ...]
    device: torch.device | str = "cpu"
    threshold: float | None = None

    @cached_property
    def columns(self) -> Tensor:
        """The budgets, one field in each row: int64 [6, n]."""
        return torch.tensor(self.budgets, dtype=torch.int64, device=self.device).view(-1, 6).T.contiguous()

    @property
    def near(self) -> Tensor:
        return self.columns[1]

    @property
    def last(self) -> Tensor:
        return self.columns[2]

    @property
    def eligible(self) -> Tensor:
        return self.columns[3]

    @property
    def free(self) -> Tensor:
        return self.columns[4]

    @property
    def candidates(self) -> Tensor:
        return self.columns[5]

    @cached_property
    def any_open(self) -> bool:
        """Some tile has more eligible blocks than it may keep, so that there is something to select."""
        return any(budget.eligible > budget.free for budget in self.budgets)

    @cached_property
    def width(self) -> int:
        """Most blocks that a tile may keep."""
        # kept = seen − eligible (the forced ones) + what is chosen, at most all candidates with a threshold
        seen = (budget.last + 1 if self.grid.causal else self.grid.blocks for budget in self.budgets)
        most = (budget.free if self.threshold is None else budget.candidates for budget in self.budgets)
        return max(
            (blocks - budget.eligible + more for blocks, budget, more in zip(seen, self.budgets, most, strict=True)),
            default=0,
        )

    def most(self, field: str) -> int:
        """The largest ``field`` of a tile's budget."""
        return max((getattr(budget, field) for budget in self.budgets), default=0)

    @property
    def open(self) -> Tensor:
        """Boolean [n]: tiles that have more eligible blocks than they may keep, so that there is something
        to select.
        """
        return self.eligible > self.free

    def forced_blocks(self, tiles: Tensor) -> Tensor:
        """Forced blocks of the tiles (int64 [m]): int64 [m, F], −1 = empty; a tile's own blocks are the last columns.

        Without causality the last column is the partial last block of the call, if there is one.
        """
        near, last = self.near[tiles][:, None], self.last[tiles][:, None]
        width = largest(last - near, max((budget.last - budget.near for budget in self.budgets), default=0)) + 1
        close = last - torch.arange(width - 1, -1, -1, device=near.device, dtype=torch.int64)
        close = torch.where(close >= near, close, -1)
        sink = torch.arange(self.sink, device=near.device, dtype=torch.int64).expand(len(tiles), -1)
        if self.grid.causal:
            return torch.cat([torch.where(sink < near, sink, -1), close], 1)
        # a sink block that is also near is listed once, among the near ones
        sink = torch.where((sink < near) | (sink > last), sink, -1)
        whole = self.grid.kv_len // self.grid.block_size
        columns = [torch.where(part < whole, part, -1) for part in (sink, close)]
        return torch.cat(
            [
                *columns,
                torch.arange(whole, self.grid.blocks, device=near.device, dtype=torch.int64).expand(len(tiles), -1),
            ],
            1,
        )

    def eligible_mask(self, tiles: Tensor) -> Tensor:
        """Boolean [m, nb]: blocks that may be selected."""
        block = torch.arange(self.grid.blocks, device=tiles.device, dtype=torch.int64)
        before = block < self.near[tiles][:, None]
        if self.grid.causal:
            return (block >= self.sink) & before
        return (
            (block >= self.sink)
            & (before | (block > self.last[tiles][:, None]))
            & (block < self.grid.kv_len // self.grid.block_size)
        )

    def nearness(self, tiles: Tensor) -> Tensor:
        """float32 [m, nb]: the higher, the nearer a block is to the tile."""
        block = torch.arange(self.grid.blocks, device=tiles.device, dtype=torch.float32)
        return -((self.near[tiles] + self.last[tiles])[:, None].float() / 2 - block).abs()

    def best(self, scores: Tensor, tiles: Tensor, count: Tensor, most: int | None = None) -> Tensor:
        """The ``count`` [m] best eligible blocks by ``scores`` [B, G, m, nb or fewer]: int64 [B, G, m, max count], −1 =
        empty.

        A block without a score (NaN) counts as 0. ``most`` bounds ``count``, None: it is at most the number of
        candidates. On an accelerator the result has so many columns.
        """
        mask = self.eligible_mask(tiles)[:, : scores.shape[-1]]
        width = min(largest(count, self.most("candidates") if most is None else most), scores.shape[-1])
        # an eligible block has to win over all that are not, also without a score
        index = ordered_topk(torch.where(scores.isnan(), 0.0, scores).masked_fill(~mask, -torch.inf), width)
        return torch.where(torch.arange(width, device=tiles.device, dtype=torch.int64) < count[:, None], index, -1)

    def chosen(self, mass: Tensor, tiles: Tensor) -> Tensor:
        """Blocks that stage 2 decides for by its ``mass`` [B, G, m, nb] of the candidates, −inf elsewhere;
        as `best` gives them.
        """
        if self.threshold is None:
            return self.best(mass, tiles, self.free[tiles], self.most("free"))
        # {b : m_b ≥ threshold}; a tile that may keep all its blocks keeps them
        best = self.best(mass, tiles, self.candidates[tiles])
        enough = mass.gather(-1, best.clamp(min=0)) >= self.threshold
        return torch.where(enough | ~self.open[tiles][:, None], best, -1)

    def assemble(self, chosen: Tensor, tiles: Tensor) -> Tensor:
        """Kept blocks: ``chosen`` [B, G, m, C] and the forced ones, int32 [B, G, m, width], ascending, −1 first."""
        forced = self.forced_blocks(tiles).expand(*chosen.shape[:2], -1, -1)
        # sorting also brings the empty entries (−1) to the front, where surplus columns are cut off
        kept = torch.cat([chosen, forced], -1).sort(-1).values.int()
        missing = self.width - kept.shape[-1]
        return torch.nn.functional.pad(kept, (missing, 0), value=-1) if missing > 0 else kept[..., -missing:]
