"""The budget arithmetic that every selector shares: from a config to a plan."""

# Shape legend: B batch, G KV heads, S block size, n query tiles, nb key blocks.

from __future__ import annotations

import math
from functools import lru_cache

import torch
from hf_sparse_attn_kernels import BlockSelection, TileBudget, TileGrid, TilePlan
from torch import Tensor

from ..config import SparseAttentionConfig
from .head_budgets import HeadBudgets


# budget = ⌈clamp(⌈density · visible keys⌉, min_keys, max_keys) / S⌉ blocks, forced ones included.
# free = min(eligible, budget − forced), candidates = min(eligible, ⌈candidate_factor · budget⌉).
def tile_budget(
    config: SparseAttentionConfig,
    first_pos: int,
    last_pos: int,
    bidirectional: int | None = None,
    heads: HeadBudgets | None = None,
) -> TileBudget:
    """Budget of the tile whose queries start at content position ``first_pos`` and end at ``last_pos``.

    ``bidirectional`` is the number of tokens of a call whose tiles see all of them, None for a causal call. With
    ``heads`` it is the largest budget of a head that is not dense.
    """
    size = config.block_size
    # rounded down: a block is forced as a whole if one local token lies in it
    near = max(first_pos - config.local, 0) // size
    if bidirectional is not None:
        return _two_sided_budget(config, near, last_pos, bidirectional, heads)
    last = last_pos // size
    # a tile near the start sees fewer blocks than hold sink tokens
    sink = min(-(-config.sink // size), last + 1)
    eligible = max(near - sink, 0)
    budget = _budget_blocks(config, last_pos + 1, heads)
    free = min(eligible, max(budget - (last + 1 - eligible), 0))
    return TileBudget(sink, near, last, eligible, free, min(eligible, math.ceil(config.candidate_factor * budget)))


def _budget_blocks(config: SparseAttentionConfig, visible: int, heads: HeadBudgets | None) -> int:
    return config.budget_blocks(visible) if heads is None else heads.most_blocks(visible, config.block_size)


def _two_sided_budget(
    config: SparseAttentionConfig, near: int, last_pos: int, tokens: int, heads: HeadBudgets | None
) -> TileBudget:
    # as of a causal tile, but local tokens are forced and blocks are eligible on both sides of it
    size, whole = config.block_size, tokens // config.block_size
    last = min(last_pos + config.local, tokens - 1) // size
    sink = min(-(-config.sink // size), -(-tokens // size))
    # a partial last block has no summary by which it could be scored, so it is forced
    eligible = max(near - sink, 0) + max(whole - max(last + 1, sink), 0)
    budget = _budget_blocks(config, tokens, heads)
    free = min(eligible, max(budget - (-(-tokens // size) - eligible), 0))
    return TileBudget(sink, near, last, eligible, free, min(eligible, math.ceil(config.candidate_factor * budget)))


def check_two_sided(config: SparseAttentionConfig) -> None:
    """Raise ValueError if ``min_keys`` is less than the keys that a bidirectional layer forces: ``local`` on both
    sides.
    """
    size, tile = config.block_size, config.query_tile
    forced = size * (-(-config.sink // size) + 2 * config.near_blocks(tile) - tile // size + 1)
    if config.min_keys < forced:
        raise ValueError(
            f"sparse_attention.min_keys is {config.min_keys}: must be >= {forced} for a bidirectional model, whose "
            "local keys are forced on both sides"
        )


@lru_cache(maxsize=256)  # every layer of a model asks for the same one, unless each has its own ``heads``
def make_plan(
    config: SparseAttentionConfig, grid: TileGrid, device: torch.device | str = "cpu", heads: HeadBudgets | None = None
) -> TilePlan:
    """Budgets of all tiles of a call; its tensors are on ``device``.
    With ``heads`` the largest ones of heads that are not dense.
    """
    bidirectional = None if grid.causal else grid.kv_len
    # tiles are counted from content position 0: a call that continues a cache may start inside one
    start = grid.q_offset // grid.query_tile * grid.query_tile
    budgets = tuple(
        tile_budget(config, first, min(first + grid.query_tile, grid.kv_len) - 1, bidirectional, heads)
        for first in range(start, start + grid.tiles * grid.query_tile, grid.query_tile)
    )
    # budgets by head take the place of a threshold
    threshold = config.mass_threshold if heads is None else None
    return TilePlan(grid, min(-(-config.sink // config.block_size), grid.blocks), budgets, device, threshold)


def select_by_scores(plan: TilePlan, scores: Tensor) -> BlockSelection:
    """Keep each tile's best eligible blocks by ``scores`` [B, G, n, nb]: oracle, random and single-stage selections."""
    tiles = torch.arange(plan.grid.tiles, device=scores.device, dtype=torch.int64)
    kept = plan.assemble(plan.best(scores, tiles, plan.free, plan.most("free")), tiles)
    mass = scores.float().gather(-1, kept.clamp(min=0, max=scores.shape[-1] - 1).long())
    return BlockSelection(kept.contiguous(), plan.grid, mass.masked_fill(kept < 0, torch.nan))
