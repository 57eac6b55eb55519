"""Selections to compare the router with, all at equal budget and with the same forced links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from hf_sparse_attn_kernels import BlockSelection, TilePlan, block_mass, stage_one_scores, to_tiles
from torch import Tensor, nn

from ...attention.call import Selector, SparseCall, learned_selector
from ...models.attach import routers
from ...router.budget import make_plan, select_by_scores
from ...router.module import RoutingInputs, SparseRouter
from ...router.selection import FeatureMaker, select_blocks

ORACLE_TILES = 64  # tiles whose dense mass is computed at a time
BOUND_SCORES = 1 << 22  # of min-max that exist at a time, 16 MB
LAYER_STRIDE = 1_000_003  # a prime: seeds of (layer, position) stay apart


def _plan(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> TilePlan:
    return make_plan(router.config, inputs.grid(query_tile, router.config.block_size), inputs.q.device)


def _all_tiles(plan: TilePlan) -> torch.Tensor:
    return torch.arange(plan.grid.tiles, device=plan.near.device, dtype=torch.int64)


@torch.no_grad()
def window(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """Window + sink: the forced links, then the nearest blocks."""
    plan = _plan(router, inputs, query_tile)
    return select_by_scores(plan, plan.nearness(_all_tiles(plan)).expand(*inputs.k.shape[:2], -1, -1))


@torch.no_grad()
def oracle(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """The blocks with the most dense softmax mass."""
    plan = _plan(router, inputs, query_tile)
    mass = [block_mass(inputs.q, inputs.k, plan.grid, tiles, inputs.scale) for tiles in _all_tiles(plan).split(ORACLE_TILES)]
    return select_by_scores(plan, torch.cat(mass, 2))


@torch.no_grad()
def stage_one(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """Stage 1 alone decides."""
    plan = _plan(router, inputs, query_tile)
    if not plan.any_open:
        return select_blocks(router, inputs, query_tile)
    maker = FeatureMaker(router, inputs, plan.grid)
    parts = [stage_one_scores(maker.features(tiles), plan, tiles) for tiles in maker.runs(_all_tiles(plan))]
    blocks = plan.grid.blocks
    scores = torch.cat([torch.nn.functional.pad(part, (0, blocks - part.shape[-1]), value=-torch.inf) for part in parts], 2)
    return select_by_scores(plan, scores)


@torch.no_grad()
def min_max(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """The blocks with the largest upper bound of q·k by their keys' elementwise minimum and maximum, without any weights.

    The bound of Quest (Tang et al. 2024, arXiv:2406.10774), which scores single queries; here the log-sum-exp over a tile's queries
    and the heads of a KV group, as in stage 1.
    """
    plan = _plan(router, inputs, query_tile)
    size, whole = plan.grid.block_size, plan.grid.kv_len // plan.grid.block_size
    if not whole:
        return window(router, inputs, query_tile)
    blocks = inputs.k[:, :, : whole * size].float().unflatten(2, (whole, size))
    most, least = blocks.amax(3).flatten(0, 1).mT, blocks.amin(3).flatten(0, 1).mT  # [B·G, D, blocks]
    rows = to_tiles(inputs.q, plan.grid, router.groups)  # [B·G, n, Hg, T, D]
    real = _real_tokens(plan)
    step = max(1, BOUND_SCORES // (len(rows) * rows.shape[2] * rows.shape[3] * whole))
    parts = []
    for tiles in _all_tiles(plan).split(step):
        q = rows[:, tiles].float() * inputs.scale
        flat = q.flatten(1, 3)
        bound = (flat.clamp(min=0) @ most + flat.clamp(max=0) @ least).unflatten(1, q.shape[1:4])
        parts.append(bound.masked_fill(~real[tiles][:, None, :, None], -torch.inf).logsumexp((2, 3)))
    scores = torch.cat(parts, 1).unflatten(0, inputs.k.shape[:2])
    return select_by_scores(plan, torch.nn.functional.pad(scores, (0, plan.grid.blocks - whole), value=-torch.inf))


def _real_tokens(plan: TilePlan) -> Tensor:
    """Which tokens of each tile are queries of the call: boolean [n, T]."""
    content = plan.grid.first_positions(plan.device)[:, None] + torch.arange(plan.grid.query_tile, device=plan.device, dtype=torch.int64)
    return (content >= plan.grid.q_offset) & (content < plan.grid.kv_len)


@torch.no_grad()
def random_blocks(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """The forced links and random others, the same ones for the same layer and position."""
    plan = _plan(router, inputs, query_tile)
    generator = torch.Generator(device="cpu").manual_seed(router.layer * LAYER_STRIDE + plan.grid.q_offset)
    scores = torch.rand(*inputs.k.shape[:2], plan.grid.tiles, plan.grid.blocks, generator=generator, dtype=torch.float32, device="cpu")
    return select_by_scores(plan, scores.to(inputs.q.device))


class ByOtherRouters:
    """``selector`` with other routers in place of the model's own, by layer: the untrained start."""

    def __init__(self, others: Mapping[int, SparseRouter], selector: Selector) -> None:
        self.others, self.selector = others, selector

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        other = self.others[router.layer]
        other.config = router.config  # at the model's present budget
        # summaries in the cache were made with the model's own weights
        return self.selector(other, replace(inputs, router_keys=None), query_tile)


def fresh_routers(model: nn.Module) -> dict[int, SparseRouter]:
    """Untrained routers like those of ``model``, by layer."""
    fresh: dict[int, SparseRouter] = {}
    for own in routers(model):
        router = SparseRouter(own.config, own.heads, own.groups, own.head_dim, own.rotary, own.layer, own.wq.device)
        router.init_weights()
        fresh[own.layer] = router
    return fresh


def standard_selectors(untrained: Mapping[int, SparseRouter]) -> dict[str, Selector]:
    """The rows of the quality table below "dense": name -> selector."""
    return {
        "oracle": oracle,
        "two stages": learned_selector,
        "stage 1 alone": stage_one,
        "untrained": ByOtherRouters(untrained, learned_selector),
        "mean-pool": ByOtherRouters(untrained, stage_one),
        "min-max": min_max,
        "window + sink": window,
        "random": random_blocks,
    }


def selection_calls(budgets: Sequence[int], selectors: Mapping[str, Selector]) -> list[tuple[int | None, str, SparseCall]]:
    """Dense attention (keys None), then every selection at every budget: (keys, name, call)."""
    sparse = [(keys, name, SparseCall(selector=selector)) for keys in budgets for name, selector in selectors.items()]
    return [(None, "dense", SparseCall(dense=True)), *sparse]
