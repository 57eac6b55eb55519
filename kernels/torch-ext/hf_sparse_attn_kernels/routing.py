"""`select_blocks`: both stages of the router on features that were made for them, one operation with several
implementations.
"""

# Shape legend: B batch, G KV heads, Hg query heads of one, N keys, S block size, nb blocks, m query tiles, r sampled
# queries of a tile, R router_dim, E width of stage 2, L listed blocks.

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .checking import check_features
from .cpp_kernels.support import unsupported as unsupported_by_cpp
from .implementations import SCORE_IMPLEMENTATIONS, choose, only_causal
from .plan import TileBudget, TilePlan, chunk_of, largest
from .scoring import coarse_scores, fine_mass
from .selection import ordered_topk
from .tiles import Scratch, as_rows, gather_visible
from .torch_kernels.attention import hide_after

COARSE_SCORES = 1 << 20  # stage-1 scores of one chunk of tiles, 4 MB
FINE_BYTES = 1 << 22  # memory for the stage-2 scores of one chunk


@dataclass(frozen=True)
class TileFeatures:
    """What the two stages score, for m of a call's query tiles. Queries are scaled; all is in the dtype of the keys.

    Stage 1: ``coarse_queries`` [B, G, m, runs, R], of which ``real`` boolean [m, runs] have tokens; ``router_keys``
    [B, G, at least N // S, R]. Stage 2: ``queries`` [B, G, m, Hg, r, E], the tokens ``reps`` (int64 [Hg, r]) of the
    tiles; ``keys`` [B, G, N, E]. ``exhaustive``: ascending KV heads without stage 1, whose candidates are all blocks.
    """

    coarse_queries: Tensor
    real: Tensor
    router_keys: Tensor
    queries: Tensor
    reps: Tensor
    keys: Tensor
    exhaustive: tuple[int, ...] = ()

    def part(self, which: slice) -> TileFeatures:
        """Those of some of the tiles."""
        return replace(
            self,
            coarse_queries=self.coarse_queries[:, :, which],
            real=self.real[which],
            queries=self.queries[:, :, which],
        )

    def of_head(self, head: int) -> TileFeatures:
        """What stage 2 scores of one KV head: views."""
        which = slice(head, head + 1)
        return replace(self, queries=self.queries[:, which], keys=self.keys[:, which], exhaustive=())


# s_b = log Σ_r exp(ρ_r · κ_b) chooses the candidates; m_b = mean_i Σ_{j ∈ b} softmax_j(q_i · k_j) over
# candidates and forced blocks chooses what is kept. Queries are scaled.
def select_blocks(
    features: TileFeatures, plan: TilePlan, tiles: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Coarse scores -> candidates -> softmax mass of their keys and the forced ones -> the best blocks within the
    budget. In exhaustive heads all blocks are candidates, of which a threshold keeps no more than of other heads.

    Args:
        features: of the tiles ``tiles``.
        plan: budgets of all tiles of the call.
        tiles: int64 [m], ascending.
        impl: "torch" or "triton" (their scores, top-k by torch), "cpp" (all of it in one pass, CPU), None for the
            default.

    Returns:
        (kept blocks int32 [B, G, m, width of the plan], ascending, −1 = empty; float32 scores of the same shape: the
        mass estimated for each, NaN for an empty entry and for a tile that keeps all its blocks without scoring them.)

    Raises:
        ValueError: ``impl`` is unknown, or was named and does not support the inputs, or these fit neither each other
            nor the plan.
    """
    inputs = (features.keys, features.router_keys)
    causal = plan.grid.causal
    lacking = {
        "cpp": lambda: unsupported_by_cpp(*inputs, block_size=plan.grid.block_size) if causal else only_causal("cpp"),
        "triton": lambda: None if causal else only_causal("triton"),
    }
    if choose(impl, SCORE_IMPLEMENTATIONS, features.keys.device.type, lacking) == "cpp":
        from .cpp_kernels import routing

        return routing.select_blocks(features, plan, tiles)  # which compares what `check_features` compares
    check_features(features, plan, tiles)
    if not len(tiles) or not features.keys.shape[:2].numel():
        shape = (*features.keys.shape[:2], len(tiles), plan.width)
        return tiles.new_empty(shape, dtype=torch.int32), tiles.new_empty(shape, dtype=torch.float32)
    if plan.grid.query_tile == plan.grid.q_len == 1 and impl != "triton" and causal and not features.exhaustive:
        return _select_single(features, plan)
    return _select_tiles(features, plan, tiles, impl)


def stage_one_scores(features: TileFeatures, plan: TilePlan, tiles: Tensor, impl: str | None = None) -> Tensor:
    """Stage-1 scores of the blocks that any of the tiles may select: float32 [B, G, m, most near or all]."""
    # blocks from the largest `near` on are forced or unseen in every tile: they need no score
    router_keys = features.router_keys[
        :, :, : largest(plan.near[tiles], plan.most("near")) if plan.grid.causal else None
    ]
    return coarse_scores(features.coarse_queries, features.real, router_keys, 1.0, impl=impl)


def stage_two_mass(
    features: TileFeatures,
    plan: TilePlan,
    tiles: Tensor,
    coarse: Tensor,
    scratch: Scratch | None = None,
    impl: str | None = None,
) -> Tensor:
    """Mass of each tile's candidates by the scores ``coarse`` and of its forced blocks, of all that it sees in
    exhaustive heads: float32 [B, G, m, nb], −inf for other blocks.
    """

    def mass_of(features: TileFeatures, candidates: Tensor) -> Tensor:
        forced = plan.forced_blocks(tiles).expand(*candidates.shape[:2], -1, -1)
        blocks = torch.cat([candidates, forced], -1)
        return by_block(mass_of_blocks(features, plan, tiles, blocks, scratch, impl), blocks, plan.grid.blocks)

    mass = mass_of(features, plan.best(coarse, tiles, plan.candidates[tiles]))
    for head in features.exhaustive:
        mask = plan.eligible_mask(tiles)[:, : coarse.shape[-1]]
        block = torch.arange(mask.shape[1], device=tiles.device, dtype=torch.int64)
        every = torch.where(mask, block, -1).expand(len(coarse), 1, -1, -1)
        mass[:, head : head + 1] = mass_of(features.of_head(head), every)
    return mass


def by_block(values: Tensor, index: Tensor, blocks: int) -> Tensor:
    """``values`` of the blocks ``index`` [..., L] (−1 = empty) as [..., blocks], −inf elsewhere."""
    out = values.new_full((*index.shape[:-1], blocks + 1), -torch.inf)
    # column 0 collects the empty entries (−1), which are no block
    return out.scatter_(-1, index + 1, values)[..., 1:]


def mass_of_blocks(
    features: TileFeatures,
    plan: TilePlan,
    tiles: Tensor,
    blocks: Tensor,
    scratch: Scratch | None = None,
    impl: str | None = None,
) -> Tensor:
    """Stage-2 softmax mass of ``blocks`` int64 [B, G, m, L] (−1 = empty, a tile's own last): float32 of that shape,
    rows sum to 1.

    With `torch` it has a gradient with respect to ``features.queries``.
    """
    keys, queries = as_rows(features.keys), features.queries.flatten(0, 1)
    # scores of one tile: listed keys × sampled queries
    scores = blocks[:, :, 0].numel() * features.reps.numel() * plan.grid.block_size
    step = max(1, chunk_of(FINE_BYTES, keys.device) // (scores * keys.element_size()))
    parts = [
        fine_mass(q, keys, plan.grid, part, index, features.reps, scratch=scratch, impl=impl)
        for part, index, q in zip(
            tiles.split(step), blocks.flatten(0, 1).split(step, 1), queries.split(step, 1), strict=True
        )
    ]
    return torch.cat(parts, 1).view_as(blocks)


def _select_tiles(features: TileFeatures, plan: TilePlan, tiles: Tensor, impl: str | None) -> tuple[Tensor, Tensor]:
    b, groups, m, runs = features.coarse_queries.shape[:4]
    scratch = Scratch()
    step = max(1, chunk_of(COARSE_SCORES, tiles.device) // (b * groups * runs * plan.grid.blocks))
    kept, scores = [], []
    for start in range(0, m, step):
        which = slice(start, min(start + step, m))
        part, some = tiles[which], features.part(which)
        # a tile that may keep all its blocks is not scored: its mass stays NaN
        scored = plan.open[part][:, None]
        mass = torch.full((b, groups, len(part), plan.grid.blocks), torch.nan, device=part.device, dtype=torch.float32)
        if scored.device.type != "cpu" or bool(scored.any()):  # reading a value would wait for an accelerator
            masses = stage_two_mass(some, plan, part, stage_one_scores(some, plan, part, impl), scratch, impl)
            mass = torch.where(scored, masses, mass)
        indices = plan.assemble(plan.chosen(mass, part), part)
        kept.append(indices)
        scores.append(mass.gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, torch.nan))
    return torch.cat(kept, 2), torch.cat(scores, 2)


# -- one query per row: a tile of 64 spreads the cost of many small operations over 64 queries, a decode step cannot ---


def _select_single(features: TileFeatures, plan: TilePlan) -> tuple[Tensor, Tensor]:
    """The same stages in as few tensor operations as it takes:
    nothing is masked, what does not depend on data is plain integers.
    """
    budget = plan.budgets[0]
    rows = (*features.keys.shape[:2], 1)
    device = features.keys.device
    if budget.eligible <= budget.free:
        every = torch.arange(budget.last + 1, device=device, dtype=torch.int32).expand(*rows, -1)
        return every.contiguous(), torch.full(every.shape, torch.nan, device=device, dtype=torch.float32)
    # stage 1: candidates in ascending order, as ties go to the earlier block
    coarse = _coarse_single(features, budget)
    candidates = (ordered_topk(coarse, budget.candidates) + budget.sink).sort(-1).values
    forced, always = _constants(budget, len(candidates), device)
    blocks = torch.cat([candidates, forced], -1)
    # stage 2: forced blocks stay in the softmax, or weak candidates would look strong
    mass = _mass_single(features, blocks, plan.grid.block_size)
    if plan.threshold is not None:
        return _above(plan.threshold, blocks, mass, budget.candidates, rows)
    chosen = ordered_topk(mass[:, : budget.candidates], budget.free)
    kept = torch.cat([chosen, always], -1)
    indices, order = blocks.gather(-1, kept).sort(-1)
    scores = mass.gather(-1, kept.gather(-1, order))
    return indices.int().view(*rows, -1), scores.view(*rows, -1)


def _above(
    threshold: float, blocks: Tensor, mass: Tensor, candidates: int, rows: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Of ``blocks`` [B·G, L] the candidates (the first ones) with at least ``threshold`` of the mass, and
    all others.
    """
    cut = ~(mass >= threshold)  # NaN is not enough
    cut[:, candidates:] = False
    indices, order = torch.where(cut, -1, blocks).sort(-1)
    scores = mass.gather(-1, order).masked_fill(indices < 0, torch.nan)
    return indices.int().view(*rows, -1), scores.view(*rows, -1)


@lru_cache(maxsize=16)  # every layer of a step asks for the same ones
def _constants(budget: TileBudget, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The forced blocks, and the columns where they stand behind the candidates: int64 [rows, forced] each."""
    forced = torch.cat(
        [
            torch.arange(budget.sink, device=device, dtype=torch.int64),
            torch.arange(budget.near, budget.last + 1, device=device, dtype=torch.int64),
        ]
    )
    columns = torch.arange(len(forced), device=device, dtype=torch.int64) + budget.candidates
    return forced.expand(rows, -1), columns.expand(rows, -1)


# s_b = ρ · κ_b: the log-sum-exp over a single run is its product.
def _coarse_single(features: TileFeatures, budget: TileBudget) -> Tensor:
    """Stage-1 scores of the eligible blocks: float32 [B·G, eligible]."""
    queries = features.coarse_queries[:, :, 0].flatten(0, 1)
    eligible = features.router_keys.flatten(0, 1)[:, budget.sink : budget.near]
    # a vector times a matrix is fast from the left in float32, from the right in bfloat16
    if eligible.dtype == torch.float32:
        return torch.bmm(queries, eligible.transpose(1, 2))[:, 0]
    return torch.bmm(eligible, queries.transpose(1, 2))[..., 0]


# m_b = mean over the heads of Σ_{j ∈ b} softmax_j(q · k_j).
def _mass_single(features: TileFeatures, blocks: Tensor, block_size: int) -> Tensor:
    """Stage-2 mass of ``blocks`` [B·G, L], the last of which is the query's own: float32 [B·G, L], sums to 1."""
    keys = gather_visible(features.keys, blocks, block_size)
    scores = torch.bmm(features.queries[:, :, 0].reshape(len(blocks), -1, keys.shape[-1]), keys.transpose(1, 2))
    hide_after(scores, features.keys.shape[2], block_size)
    return torch.softmax(scores, -1, dtype=torch.float32).mean(1).view(*blocks.shape, block_size).sum(-1)
