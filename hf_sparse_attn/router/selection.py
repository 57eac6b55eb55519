"""Making a selection with a router: its features of each tile -> `select_blocks` of the kernels -> BlockSelection."""

# Shape legend: B batch, G KV heads, Hg query heads of one, D head dim, n query tiles, m some of them,
# r sampled queries of a tile, K kept blocks of a tile.

from __future__ import annotations

import hf_sparse_attn_kernels as kernels
import torch
from hf_sparse_attn_kernels import BlockSelection, TileFeatures, TileGrid, TilePlan, to_tiles
from hf_sparse_attn_kernels.plan import chunk_of
from torch import Tensor

from .budget import make_plan
from .head_budgets import HeadBudgets, allowed_blocks
from .module import RoutingInputs, SparseRouter
from .single_query import single_features

FEATURE_BYTES = 1 << 22  # memory for the features of one run of tiles


# Stage 1: s_b = log Σ_r exp(scale · ρ_r · κ_b) picks the candidates among all blocks b.
# Stage 2: m_b = mean_i Σ_{j ∈ b} softmax_j(scale · (U q_i) · (V k_j)) decides which of them are kept.
# Two stages of selection: Native Sparse Attention, arXiv 2502.11089.
@torch.no_grad()
def select_blocks(
    router: SparseRouter, inputs: RoutingInputs, query_tile: int | None = None, *, impl: str | None = None
) -> BlockSelection:
    """Kept blocks for every query tile of the call. Deterministic; no gradient flows through it.

    ``impl`` names an implementation of `hf_sparse_attn_kernels.select_blocks`; None for the default.
    """
    grid = inputs.grid(query_tile or router.config.query_tile, router.config.block_size)
    plan = make_plan(router.config, grid, inputs.q.device, router.budgets)
    if not plan.any_open:
        return everything(plan, inputs)
    selection = _select(router, inputs, plan, impl)
    return selection if router.budgets is None else within_budgets(selection, plan, router.budgets)


def _select(router: SparseRouter, inputs: RoutingInputs, plan: TilePlan, impl: str | None) -> BlockSelection:
    grid = plan.grid
    tiles = torch.arange(grid.tiles, device=plan.device, dtype=torch.int64)
    if grid.query_tile == grid.q_len == 1:
        indices, scores = kernels.select_blocks(single_features(router, inputs), plan, tiles, impl=impl)
        return BlockSelection(indices, grid, scores)
    maker = FeatureMaker(router, inputs, grid)
    parts = [kernels.select_blocks(maker.features(run), plan, run, impl=impl) for run in maker.runs(tiles)]
    indices, scores = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
    return BlockSelection(indices, grid, scores)


def everything(plan: TilePlan, inputs: RoutingInputs) -> BlockSelection:
    """Every block that a tile sees, where no tile has more of them than its budget."""
    indices = plan.grid.visible_blocks(plan.device).expand(*inputs.k.shape[:2], -1, -1).contiguous()
    return BlockSelection(
        indices, plan.grid, torch.full(indices.shape, torch.nan, device=plan.device, dtype=torch.float32)
    )


def ranks(values: Tensor) -> Tensor:
    """Place of each value in its row [..., K] from the largest (0) on, ties to the first."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    # the inverse permutation: place[order[i]] = i
    place = torch.arange(values.shape[-1], device=values.device, dtype=torch.int64).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def within_budgets(selection: BlockSelection, plan: TilePlan, budgets: HeadBudgets) -> BlockSelection:
    """Of a selection at the largest budget what each KV head's own budget allows, best estimated mass first;
    all of it for dense heads.
    """
    visible = (
        plan.grid.last_positions() + 1
        if plan.grid.causal
        else torch.full((plan.grid.tiles,), plan.grid.kv_len, dtype=torch.int64, device="cpu")
    )
    allowed = allowed_blocks(budgets, tuple(visible.tolist()), plan.grid.block_size, plan.device)
    indices, scores = selection.indices, selection.scores
    assert scores is not None
    # forced blocks use up a head's budget first; only the free ones are cut
    eligible = plan.eligible_mask(torch.arange(plan.grid.tiles, device=indices.device, dtype=torch.int64)).expand(
        *indices.shape[:2], -1, -1
    )
    free = (indices >= 0) & eligible.gather(-1, indices.clamp(min=0).long())
    forced = ((indices >= 0) & ~free).sum(-1, keepdim=True)
    place = ranks(scores.masked_fill(~free, -torch.inf))
    # tiles of a block or two are not scored
    kept = ~(free & plan.open[:, None]) | (place < allowed.blocks[..., None] - forced)
    # what was cut is −1, and empty entries stand first in a list
    indices, order = torch.where(kept, indices, -1).sort(dim=-1, stable=True)
    scores = scores.gather(-1, order).masked_fill(indices < 0, torch.nan)
    if allowed.dense is not None:
        indices, scores = _with_dense_heads(indices, scores, plan, allowed.dense)
    return BlockSelection(indices.contiguous(), plan.grid, scores)


def _with_dense_heads(indices: Tensor, scores: Tensor, plan: TilePlan, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and scores [B, G, n, K], with every block that a tile sees where ``dense`` [G, n] says so."""
    # a dense head's lists are longer than the selected ones, which get empty entries in front
    seen = plan.grid.visible_blocks(plan.device).expand(*indices.shape[:3], -1)
    width = max(seen.shape[-1], indices.shape[-1])
    pad = torch.nn.functional.pad
    indices, seen = (pad(x, (width - x.shape[-1], 0), value=-1) for x in (indices, seen))
    scores = pad(scores, (width - scores.shape[-1], 0), value=torch.nan)
    return torch.where(dense[..., None], seen, indices), scores.masked_fill(dense[..., None], torch.nan)


class FeatureMaker:
    """Features of the tiles of one call; holds what all tiles share.

    With ``fold`` stage 2 meets the keys themselves; None: where that is cheaper.
    """

    def __init__(self, router: SparseRouter, inputs: RoutingInputs, grid: TileGrid, fold: bool | None = None) -> None:
        self.router, self.inputs, self.grid = router, inputs, grid
        self.router_keys = router.stage_one_keys(inputs)
        # queries mapped back into key space meet the keys as they are; keys are mapped only where that makes them
        # narrower
        self.fold = grid.query_tile == 1 or router.wk_index.shape[1] == router.head_dim if fold is None else fold
        self.keys = inputs.k if self.fold else router.index_keys(inputs.k)
        self.q_tiles = to_tiles(inputs.q, grid, router.groups)
        self.reps = router.representatives(grid, inputs.q.device)

    def runs(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """The tiles (int64 [m]) in runs whose features take about FEATURE_BYTES on a CPU, more on an accelerator."""
        rows = self.inputs.k.shape[0] * self.inputs.k.shape[1]
        tokens = self.grid.query_tile * self.q_tiles.shape[2]
        # 4 bytes: features are float32 until they are complete
        step = max(1, chunk_of(FEATURE_BYTES, tiles.device) // (4 * rows * tokens * self.router.head_dim))
        return tuple(tiles[at : at + step] for at in range(0, len(tiles), step))

    def features(self, tiles: Tensor) -> TileFeatures:
        router, scale = self.router, self.inputs.scale
        batch, dtype = (-1, router.groups), self.keys.dtype
        heads = torch.arange(self.reps.shape[0], device=tiles.device, dtype=torch.int64)[:, None]
        tile_arguments = (self.inputs.positions, self.grid, tiles, self.inputs.consecutive)
        coarse, real = router.query_features(self.q_tiles[:, tiles], *tile_arguments)
        # [B·G, m, Hg, r, D]: each head samples other tokens of the tile
        sampled = self.q_tiles[:, tiles[:, None, None], heads, self.reps]
        queries = router.index_queries(sampled, self.fold).unflatten(0, batch)
        # scaled here: the kernels compute plain products
        return TileFeatures(
            (coarse * scale).to(dtype),
            real,
            self.router_keys,
            (queries * scale).to(dtype),
            self.reps,
            self.keys,
            router.retrieval_heads,
        )
