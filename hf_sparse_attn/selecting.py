"""Making a selection with a router: its features of each tile -> `select_blocks` of the kernels -> BlockSelection."""

from __future__ import annotations

import hf_sparse_attn_kernels as kernels
import torch
from hf_sparse_attn_kernels import BlockSelection, TileFeatures, TileGrid, TilePlan, to_tiles
from torch import Tensor

from .plan import make_plan
from .router import RoutingInputs, SparseRouter
from .single import single_features

FEATURE_BYTES = 1 << 22  # memory for the features of one run of tiles


@torch.no_grad()
def select_blocks(router: SparseRouter, inputs: RoutingInputs, query_tile: int | None = None, *, impl: str | None = None) -> BlockSelection:
    """Kept blocks for every query tile of the call. Deterministic; no gradient flows through it.

    ``impl`` names an implementation of `hf_sparse_attn_kernels.select_blocks`; None for the default.
    """
    grid = inputs.grid(query_tile or router.config.query_tile, router.config.block_size)
    plan = make_plan(router.config, grid, inputs.q.device)
    if not plan.any_open:
        return everything(plan, inputs)
    tiles = torch.arange(grid.tiles, device=plan.device)
    if grid.query_tile == grid.q_len == 1:
        indices, scores = kernels.select_blocks(single_features(router, inputs), plan, tiles, impl=impl)
        return BlockSelection(indices, grid, scores)
    maker = FeatureMaker(router, inputs, grid)
    parts = [kernels.select_blocks(maker.features(run), plan, run, impl=impl) for run in maker.runs(tiles)]
    indices, scores = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
    return BlockSelection(indices, grid, scores)


def everything(plan: TilePlan, inputs: RoutingInputs) -> BlockSelection:
    """Every block that a tile sees, where no tile has more of them than its budget."""
    block = torch.arange(plan.grid.blocks, device=plan.device, dtype=torch.int32)
    seen = plan.last[:, None] if plan.grid.causal else plan.grid.blocks - 1
    kept = torch.where(block <= seen, block, -1).expand(plan.grid.tiles, -1).sort(-1).values
    indices = kept.expand(*inputs.k.shape[:2], -1, -1).contiguous()
    return BlockSelection(indices, plan.grid, torch.full(indices.shape, torch.nan, device=plan.device))


class FeatureMaker:
    """Features of the tiles of one call; holds what all tiles share."""

    def __init__(self, router: SparseRouter, inputs: RoutingInputs, grid: TileGrid) -> None:
        self.router, self.inputs, self.grid = router, inputs, grid
        self.router_keys = router.stage_one_keys(inputs)
        # queries mapped back into key space meet the keys as they are; keys are mapped only where that makes them narrower
        self.fold = grid.query_tile == 1 or router.wk_index.shape[1] == router.head_dim
        self.keys = inputs.k if self.fold else router.index_keys(inputs.k)
        self.q_tiles = to_tiles(inputs.q, grid, router.groups)
        self.reps = router.representatives(grid, inputs.q.device)

    def runs(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """The tiles (int64 [m]) in runs whose features take about FEATURE_BYTES."""
        rows = self.inputs.k.shape[0] * self.inputs.k.shape[1]
        tokens = self.grid.query_tile * self.q_tiles.shape[2]
        step = max(1, FEATURE_BYTES // (4 * rows * tokens * self.router.head_dim))
        return tuple(tiles[at : at + step] for at in range(0, len(tiles), step))

    def features(self, tiles: Tensor) -> TileFeatures:
        router, scale = self.router, self.inputs.scale
        batch, dtype = (-1, router.groups), self.keys.dtype
        heads = torch.arange(self.reps.shape[0], device=tiles.device)[:, None]
        coarse, real = router.query_features(self.q_tiles[:, tiles], self.inputs.positions, self.grid, tiles)
        sampled = self.q_tiles[:, tiles[:, None, None], heads, self.reps]
        queries = router.index_queries(sampled, self.fold).unflatten(0, batch)
        return TileFeatures((coarse * scale).to(dtype), real, self.router_keys, (queries * scale).to(dtype), self.reps, self.keys)
