"""Making a selection with a router: coarse scores -> candidates -> fine scores -> BlockSelection."""

from __future__ import annotations

import torch
from hf_sparse_attn_kernels import BlockSelection, Scratch, as_rows, coarse_scores, fine_mass, to_tiles
from torch import Tensor

from .plan import TilePlan, join
from .router import QUERY_RUNS, RoutingInputs, SparseRouter
from .single import select_single

COARSE_SCORES = 1 << 20  # stage-1 scores of one chunk of tiles, 4 MB
FINE_BYTES = 1 << 23  # memory for the stage-2 scores of one chunk


@torch.no_grad()
def select_blocks(router: SparseRouter, inputs: RoutingInputs, query_tile: int | None = None) -> BlockSelection:
    """Kept blocks for every query tile of the call. Deterministic; no gradient flows through it."""
    grid = inputs.grid(query_tile or router.config.query_tile, router.config.block_size)
    if grid.query_tile == grid.q_len == 1:
        return select_single(router, inputs, grid)
    return select_tiles(router, inputs, TilePlan.make(router.config, grid, inputs.q.device))


@torch.no_grad()
def select_tiles(router: SparseRouter, inputs: RoutingInputs, plan: TilePlan) -> BlockSelection:
    """`select_blocks` for any number of tiles of any size."""
    grid = plan.grid
    scorer = TwoStageScorer(router, inputs, plan) if bool(plan.open.any()) else None
    kept, masses = [], []
    for tiles in tile_chunks(inputs, plan):
        if scorer is None or not bool(plan.open[tiles].any()):
            mass = inputs.q.new_full((*inputs.k.shape[:2], len(tiles), grid.blocks), torch.nan, dtype=torch.float32)
        else:
            mass = scorer.block_mass(tiles)
        indices = plan.assemble(plan.best(mass, tiles, plan.free[tiles]), tiles)
        kept.append(indices)
        masses.append(mass.gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, torch.nan))
    return join(plan, kept, masses)


def tile_chunks(inputs: RoutingInputs, plan: TilePlan) -> list[Tensor]:
    """The tiles of a call (int64 [m] each) in runs whose stage-1 scores take COARSE_SCORES entries."""
    rows = inputs.k.shape[0] * inputs.k.shape[1] * min(QUERY_RUNS, plan.grid.query_tile)
    return list(torch.arange(plan.grid.tiles, device=inputs.q.device).split(max(1, COARSE_SCORES // (rows * plan.grid.blocks))))


class TwoStageScorer:
    """Both stages for the tiles of one call; holds what all chunks of tiles share."""

    def __init__(self, router: SparseRouter, inputs: RoutingInputs, plan: TilePlan) -> None:
        self.router, self.inputs, self.plan = router, inputs, plan
        whole = inputs.k.shape[2] // router.config.block_size
        cached = inputs.router_keys
        made = router.router_keys(inputs.k, inputs.positions) if cached is None else cached[:, :, :whole]
        self.router_keys = made.to(inputs.k.dtype)
        # a single query is cheaper mapped back into key space than all keys mapped into index space
        self.fold = plan.grid.query_tile == 1
        self.keys = as_rows(inputs.k) if self.fold else router.index_keys(inputs.k)
        self.q_tiles = to_tiles(inputs.q, plan.grid, router.groups)
        self.scratch = Scratch()
        self.reps = router.representatives(plan.grid, inputs.q.device)

    def coarse(self, tiles: Tensor) -> Tensor:
        """Stage-1 scores of the blocks that any of the tiles (int64 [m]) may select: float32 [B, G, m, most near]."""
        queries, real = self.router.query_features(self.q_tiles[:, tiles], self.inputs.positions, self.plan.grid, tiles)
        keys = self.router_keys[:, :, : int(self.plan.near[tiles].max())]
        return coarse_scores((queries * self.inputs.scale).to(keys.dtype), real, keys, 1.0)

    def candidates(self, coarse: Tensor, tiles: Tensor) -> Tensor:
        """What stage 2 scores for the tiles: their best blocks by ``coarse``, then the forced ones, int64 [B, G, m, L], −1 = empty."""
        found = self.plan.best(coarse, tiles, self.plan.candidates[tiles])
        return torch.cat([found, self.plan.forced_blocks(tiles).expand(*found.shape[:2], -1, -1)], -1)

    def fine(self, tiles: Tensor, blocks: Tensor) -> Tensor:
        """Stage-2 mass of ``blocks`` [B, G, m, L] for the tiles (int64 [m]): float32 [B, G, m, L]."""
        heads = torch.arange(self.reps.shape[0], device=tiles.device)[:, None]
        scores = blocks[:, :, 0].numel() * self.reps.numel() * self.router.config.block_size
        step = max(1, FINE_BYTES // (scores * self.keys.element_size()))
        parts = []
        for part, index in zip(tiles.split(step), blocks.flatten(0, 1).split(step, 1), strict=True):
            sampled = self.q_tiles[:, part[:, None, None], heads, self.reps]
            queries = (self.router.index_queries(sampled, self.fold) * self.inputs.scale).to(self.keys.dtype)
            parts.append(fine_mass(queries, self.keys, self.plan.grid, part, index, self.reps, scratch=self.scratch))
        return torch.cat(parts, 1).view_as(blocks)

    def block_mass(self, tiles: Tensor) -> Tensor:
        """Estimated mass by block for the tiles: float32 [B, G, m, nb], −inf for blocks that are no candidates."""
        plan = self.plan
        blocks = self.candidates(self.coarse(tiles), tiles)
        by_block = torch.full((*blocks.shape[:3], plan.grid.blocks + 1), -torch.inf, device=blocks.device)
        # column 0 collects the empty entries (−1), which are no block
        return by_block.scatter_(3, blocks + 1, self.fine(tiles, blocks))[..., 1:]
