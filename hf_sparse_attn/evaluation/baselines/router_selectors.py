"""Selections of routers: the model's own, its first stage alone, and the same with weights that nothing has taught."""

# Letters: s scale of q·k, r runs of a tile's tokens, q̄_r a run's mean query, b key blocks.

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from hf_sparse_attn_kernels import BlockSelection, stage_one_scores
from torch import Tensor

from ...attention.call import learned_selector
from ...router.module import RoutingInputs, SparseRouter, active_router
from ...router.selection import FeatureMaker
from .block_selector import BlockSelector, ScoringCall


class TwoStages:
    """The layer's own router, as the model runs without a selector."""

    name = "two stages"

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        return learned_selector(router, inputs, query_tile)


class StageOne(BlockSelector):
    """Stage 1 of the router decides alone."""

    name = "stage 1 alone"

    # score_b = log Σ_r exp(s · (W_q q̄_r) · (W_k [max, min, mean of b])), over runs r of the tile's tokens:
    # `coarse_scores`
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        maker = FeatureMaker(call.router, call.inputs, call.plan.grid)
        parts = [stage_one_scores(maker.features(run), call.plan, run) for run in maker.runs(tiles)]
        blocks = call.plan.grid.blocks
        widen = torch.nn.functional.pad
        return torch.cat([widen(part, (0, blocks - part.shape[-1]), value=-torch.inf) for part in parts], 2)

    def tiles_at_a_time(self, call: ScoringCall) -> int:
        return call.plan.grid.tiles  # the maker splits them itself, and what all tiles share is made once


class Untrained:
    """Both stages with weights as they start."""

    name = "untrained"

    def __init__(self) -> None:
        self.start = UntrainedRouters()

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        return learned_selector(self.start.of(router), _without_summaries(inputs), query_tile)


class MeanPool(StageOne):
    """The mean of a block's keys against means of a tile's queries: stage 1 as it starts."""

    name = "mean-pool"

    def __init__(self) -> None:
        self.start = UntrainedRouters()

    # score_b = log Σ_r exp(s · q̄_r · mean_b): q̄_r the mean over heads and tokens of a run,
    # both taken without RoPE and turned to their middle positions
    # block means as keys: MoBA, Lu et al. 2025, arXiv:2502.13189
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        router, inputs = self.start.of(call.router), _without_summaries(call.inputs)
        return super().scores(ScoringCall(router, inputs, call.plan), tiles)


def _without_summaries(inputs: RoutingInputs) -> RoutingInputs:
    """Summaries in a cache were made with the model's own weights."""
    return replace(inputs, router_keys=None)


# Keyed weakly: a twin goes with the router that it was made for.
class UntrainedRouters:
    """Routers like those of a model with the weights that they start with, made when a layer first asks for its own."""

    def __init__(self) -> None:
        self._by_router: WeakKeyDictionary[SparseRouter, SparseRouter] = WeakKeyDictionary()

    def of(self, router: SparseRouter) -> SparseRouter:
        """The untrained twin of ``router``, at its present budget."""
        twin = self._by_router.get(router)
        if twin is None:
            twin = self._by_router[router] = untrained_router(active_router(router))
        twin.config = router.config
        return twin


def untrained_router(router: SparseRouter) -> SparseRouter:
    """A router like ``router`` with the weights that it started with."""
    sizes = (router.heads, router.groups, router.head_dim)
    twin = SparseRouter(router.config, *sizes, router.rotary, router.layer, router.wq.device)
    twin.init_weights()
    return twin
