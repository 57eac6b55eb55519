"""Which blocks a tile must keep, may keep, and how many: the budget arithmetic that every selector shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, ordered_topk
from torch import Tensor

from .config import SparseAttentionConfig


class TileBudget(NamedTuple):
    """Budget of one query tile, in blocks: ``[0, sink)`` and ``[near, last]`` are forced, ``free`` of the others may be kept."""

    sink: int
    near: int
    last: int
    eligible: int
    free: int
    candidates: int


def tile_budget(config: SparseAttentionConfig, first_pos: int, last_pos: int) -> TileBudget:
    """Budget of the tile whose queries start at content position ``first_pos`` and end at ``last_pos``."""
    size = config.block_size
    near = max(first_pos - config.local, 0) // size
    last = last_pos // size
    sink = min(-(-config.sink // size), last + 1)
    eligible = max(near - sink, 0)
    budget = config.budget_blocks(last_pos + 1)
    free = min(eligible, max(budget - (last + 1 - eligible), 0))
    return TileBudget(sink, near, last, eligible, free, min(eligible, math.ceil(config.candidate_factor * budget)))


@dataclass(frozen=True)
class TilePlan:
    """Budget of the ``n`` query tiles of one call; every tensor is int64 ``[n]`` and counts or indexes blocks.

    Blocks ``[0, sink)`` and ``[near, last]`` are forced; blocks ``[sink, near)`` are eligible, and ``free`` of them
    may be kept; stage 1 passes ``candidates`` of them on.
    """

    grid: TileGrid
    sink: int
    near: Tensor
    last: Tensor
    eligible: Tensor
    free: Tensor
    candidates: Tensor

    @classmethod
    @lru_cache(maxsize=8)  # every layer of a model asks for the same one
    def make(cls, config: SparseAttentionConfig, grid: TileGrid, device: torch.device | None = None) -> TilePlan:
        positions = zip(grid.first_positions().tolist(), grid.last_positions().tolist(), strict=True)
        budgets = [tile_budget(config, first, last) for first, last in positions]
        columns = torch.tensor(budgets, device=device).unbind(1)
        return cls(grid, min(-(-config.sink // config.block_size), grid.blocks), *columns[1:])

    @property
    def open(self) -> Tensor:
        """Boolean [n]: tiles that have more eligible blocks than they may keep, so that there is something to select."""
        return self.eligible > self.free

    def forced_blocks(self, tiles: Tensor) -> Tensor:
        """Forced blocks of the tiles (int64 [m]): int64 [m, F], −1 = empty; a tile's own blocks are the last columns."""
        near, last = self.near[tiles][:, None], self.last[tiles][:, None]
        width = int((last - near).max()) + 1
        close = last - torch.arange(width - 1, -1, -1, device=near.device)
        close = torch.where(close >= near, close, -1)
        sink = torch.arange(self.sink, device=near.device).expand(len(tiles), -1)
        return torch.cat([torch.where(sink < near, sink, -1), close], 1)

    def eligible_mask(self, tiles: Tensor) -> Tensor:
        """Boolean [m, nb]: blocks that may be selected."""
        block = torch.arange(self.grid.blocks, device=tiles.device)
        return (block >= self.sink) & (block < self.near[tiles][:, None])

    def best(self, scores: Tensor, tiles: Tensor, count: Tensor) -> Tensor:
        """The ``count`` [m] best eligible blocks by ``scores`` [B, G, m, nb or fewer]: int64 [B, G, m, max count], −1 = empty.

        A block without a score (NaN) counts as 0.
        """
        mask = self.eligible_mask(tiles)[:, : scores.shape[-1]]
        width = int(count.max())
        index = ordered_topk(torch.where(scores.isnan(), 0.0, scores).masked_fill(~mask, -torch.inf), width)
        return torch.where(torch.arange(width, device=tiles.device) < count[:, None], index, -1)

    def assemble(self, chosen: Tensor, tiles: Tensor) -> Tensor:
        """Kept blocks: ``chosen`` [B, G, m, C] and the forced ones, int32 [B, G, m, K], ascending, −1 first."""
        forced = self.forced_blocks(tiles).expand(*chosen.shape[:2], -1, -1)
        return torch.cat([chosen, forced], -1).sort(-1).values.int()


def join(plan: TilePlan, parts: list[Tensor], scores: list[Tensor] | None = None) -> BlockSelection:
    """One selection from the kept blocks ``[B, G, m, K_i]`` of consecutive runs of tiles."""
    width = max(part.shape[-1] for part in parts)

    def stack(tensors: list[Tensor], fill: float) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (width - t.shape[-1], 0), value=fill) for t in tensors], 2)

    indices = stack(parts, -1)
    empty = int((indices < 0).sum(-1).min())
    kept = None if scores is None else stack(scores, torch.nan)[..., empty:]
    return BlockSelection(indices[..., empty:].contiguous(), plan.grid, kept)


def select_by_scores(plan: TilePlan, scores: Tensor) -> BlockSelection:
    """Keep each tile's best eligible blocks by ``scores`` [B, G, n, nb]: oracle, random and single-stage selections."""
    tiles = torch.arange(plan.grid.tiles, device=scores.device)
    kept = plan.assemble(plan.best(scores, tiles, plan.free), tiles).long()
    mass = scores.float().gather(-1, kept.clamp(min=0, max=scores.shape[-1] - 1))
    return join(plan, [kept.int()], [mass.masked_fill(kept < 0, torch.nan)])
