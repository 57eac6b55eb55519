"""The routers' operations in C++; each has the result of its plain torch counterpart."""

# The operators take no scale: queries are scaled before.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checking import expect_within
from ..plan import TilePlan
from ..selection import TileGrid
from ..tiles import to_tiles, unit_stride

if TYPE_CHECKING:
    from ..routing import TileFeatures


def select_blocks(features: TileFeatures, plan: TilePlan, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """See `hf_sparse_attn_kernels.select_blocks`; both stages tile by tile: no score leaves the processor's cache."""
    grid = plan.grid
    if features.keys.shape[2] != grid.kv_len:
        raise ValueError(f"keys is {tuple(features.keys.shape)}: the plan is one of kv_len={grid.kv_len}")
    # budgets of the tiles that are asked for, in the plan's six rows
    columns = plan.columns
    if len(tiles) != len(plan.budgets):
        expect_within("tiles", tiles, 0, len(plan.budgets))
        columns = columns.index_select(1, tiles)
    indices, scores = torch.ops.hf_sparse_attn_cpp.select(
        features.coarse_queries.contiguous(),
        features.real.contiguous(),
        unit_stride(features.router_keys),
        features.queries.contiguous(),
        features.reps.contiguous(),
        unit_stride(features.keys),
        tiles.contiguous(),
        list(features.exhaustive),
        *(grid.q_len, grid.query_tile, grid.block_size, plan.sink),
        *(columns, plan.width, plan.threshold),
    )
    return indices, scores


def pooled_features(k: Tensor, block_size: int) -> Tensor:
    """See `hf_sparse_attn_kernels.pooled_features`; one pass over ``k``."""
    features: Tensor = torch.ops.hf_sparse_attn_cpp.pooled_features(unit_stride(k), block_size)
    return features


def coarse_scores(queries: Tensor, real: Tensor, router_keys: Tensor, scale: float) -> Tensor:
    """See `hf_sparse_attn_kernels.coarse_scores`."""
    scaled = queries if scale == 1.0 else queries * scale
    scores: Tensor = torch.ops.hf_sparse_attn_cpp.coarse_scores(
        scaled.contiguous(), real.contiguous(), unit_stride(router_keys)
    )
    return scores


def fine_mass(queries: Tensor, keys: Tensor, grid: TileGrid, tiles: Tensor, blocks: Tensor, reps: Tensor) -> Tensor:
    """See `hf_sparse_attn_kernels.fine_mass`."""
    return _mass(queries[None], keys[None], grid, tiles, blocks.long().contiguous(), reps)[0]


def block_mass(q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor, scale: float) -> Tensor:
    """The teacher, see `hf_sparse_attn_kernels.block_mass`."""
    chosen = to_tiles(q, grid, k.shape[1])[:, tiles].unflatten(0, k.shape[:2]) * scale
    reps = torch.arange(grid.query_tile, dtype=torch.int64, device="cpu").repeat(q.shape[1] // k.shape[1], 1)
    return _mass(chosen, k, grid, tiles, None, reps)


def _mass(queries: Tensor, keys: Tensor, grid: TileGrid, tiles: Tensor, blocks: Tensor | None, reps: Tensor) -> Tensor:
    inputs = (queries.contiguous(), reps.contiguous(), unit_stride(keys), tiles.contiguous(), blocks)
    mass: Tensor = torch.ops.hf_sparse_attn_cpp.block_mass(*inputs, grid.q_len, grid.query_tile, grid.block_size)
    return mass


def _fake_select(
    coarse_queries: Tensor, real: Tensor, router_keys: Tensor, queries: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:3], rest[-2])
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.float32)


def _fake_coarse(queries: Tensor, real: Tensor, router_keys: Tensor) -> Tensor:
    return queries.new_empty((*queries.shape[:3], router_keys.shape[2]), dtype=torch.float32)


def _fake_mass(
    queries: Tensor, reps: Tensor, keys: Tensor, tiles: Tensor, blocks: Tensor | None, *sizes: int
) -> Tensor:
    width = -(-keys.shape[2] // sizes[-1]) if blocks is None else blocks.shape[-1]
    return queries.new_empty((*queries.shape[:3], width), dtype=torch.float32)


def _fake_features(k: Tensor, block_size: int) -> Tensor:
    return k.new_empty((*k.shape[:2], k.shape[2] // block_size, 3 * k.shape[3]))


def register() -> None:
    """Tell torch about the operators, once the library is loaded."""
    fakes: dict[str, Callable[..., Any]] = {
        "select": _fake_select,
        "coarse_scores": _fake_coarse,
        "block_mass": _fake_mass,
        "pooled_features": _fake_features,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"hf_sparse_attn_cpp::{name}", fake)
