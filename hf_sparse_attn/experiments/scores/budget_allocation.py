"""Ways to share out one average number of keys over tiles, KV heads and layers, fitted on other text than they are
measured on.
"""

# shapes: G KV heads, N tokens

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection, block_mass
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...attention.call import Selector
from ...benchmarks import bench_budgets
from ...config import SparseAttentionConfig, fixed_budget
from ...evaluation.baselines import ORACLE_TILES
from ...models.convert import sparse_attention_as
from ...router.budget import make_plan
from ...router.module import RoutingInputs, SparseRouter
from ...router.selection import ranks
from ...training.mass_threshold import (
    AtThreshold,
    ByThreshold,
    Candidates,
    KeptKeys,
    candidates,
    fit_threshold,
)
from ...training.passes import run_sparse

THRESHOLD, BY_HEAD, ORACLE_THRESHOLD = FITTED = "two stages by threshold", "two stages by head", "oracle by threshold"


@torch.no_grad()
def oracle_candidates(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> Candidates:
    """Every eligible block with its dense softmax mass."""
    plan = make_plan(router.config, inputs.grid(query_tile, router.config.block_size), inputs.q.device)
    tiles = torch.arange(plan.grid.tiles, device=inputs.q.device, dtype=torch.int64)
    # some tiles at a time, as each is compared with every key
    mass = torch.cat(
        [block_mass(inputs.q, inputs.k, plan.grid, part, inputs.scale) for part in tiles.split(ORACLE_TILES)], 2
    )
    indices = plan.grid.visible_blocks(tiles.device).expand(mass.shape)
    order = indices.clamp(min=0).long()
    every = BlockSelection(indices.contiguous(), plan.grid, mass.gather(-1, order).masked_fill(indices < 0, torch.nan))
    # in a tile that may keep all it sees nothing is free
    free = (indices >= 0) & (plan.eligible_mask(tiles) & plan.open[:, None]).expand(mass.shape).gather(-1, order)
    return Candidates(every, free, plan.open, plan.free)


@dataclass(frozen=True)
class ByHead:
    """A fixed budget for every KV head of every layer: ``keys`` float64 [G] by layer."""

    keys: Mapping[int, Tensor]

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        scored = candidates(router, inputs, query_tile)
        forced = ((scored.every.indices >= 0) & ~scored.free).sum(-1)
        # a budget includes the forced blocks, which are kept in any case
        blocks = (self.keys[router.layer] / scored.every.grid.block_size).round().long().to(forced.device)[
            :, None
        ] - forced
        return scored.keep(scored.free & (ranks(scored.mass) < blocks[..., None]))


@dataclass(frozen=True)
class ByBudget:
    """One selector for each budget in keys."""

    selectors: Mapping[int, Selector]

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        # at a fixed budget min_keys is max_keys
        return self.selectors[router.config.min_keys](router, inputs, query_tile)


class Allocations:
    """The `FITTED` selections, each fitted on ``batches`` to keep the uniform budgets (keys) on average.

    Tiles count from content position ``first`` on. ``fits`` says what was found.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], budgets: Sequence[int], first: int = 0
    ) -> None:
        todo = list(batches)
        self.fits: list[dict[str, Any]] = []
        selectors: dict[str, dict[int, Selector]] = {name: {} for name in FITTED}
        for keys in budgets:
            with sparse_attention_as(model, **fixed_budget(keys)):
                for name, selector in self._fit(model, todo, keys, first).items():
                    selectors[name][keys] = selector
        self.selectors: dict[str, Selector] = {name: ByBudget(chosen) for name, chosen in selectors.items()}

    def _fit(self, model: nn.Module, batches: list[Mapping[str, Tensor]], keys: int, first: int) -> dict[str, Selector]:
        threshold, counted = fit_threshold(model, batches, first)
        by_threshold = AtThreshold(threshold)
        meter = KeptKeys(first, selector=by_threshold)
        run_sparse(model, batches, meter)
        true, of_true = fit_threshold(model, batches, first, source=oracle_candidates)
        heads = {layer: kept.tolist() for layer, kept in meter.by_layer().items()}
        self.fits.append(
            {"keys": keys, "tiles": counted.tiles, "asked": counted.asked_keys()}
            | {"threshold": threshold, "kept": meter.mean(), "kept_by_layer_and_head": heads}
            | {"oracle_threshold": true, "oracle_kept": of_true.kept_keys(true)}
        )
        return {
            THRESHOLD: by_threshold,
            BY_HEAD: ByHead(meter.by_layer()),
            ORACLE_THRESHOLD: ByThreshold(true, source=oracle_candidates),
        }

    def times(self, model: PreTrainedModel, ids: Tensor) -> list[dict[str, Any]]:
        """What each threshold costs on the tokens ``ids`` [1, N], see `bench_budgets`."""
        rows = []
        for fit in self.fits:
            with sparse_attention_as(model, **fixed_budget(fit["keys"])):
                rows.append({"budget": fit["keys"], **bench_budgets(model, ids, fit["threshold"])})
        return rows


def fitted_selectors(
    config: SparseAttentionConfig, names: Sequence[str], budgets: Sequence[int]
) -> dict[str, Selector]:
    """Those of the `FITTED` selections ``names`` that a model with this config can show without a fit: its own
    threshold.

    Raises:
        ValueError: another one is named, or the model has no threshold that was fitted for the ``budgets``.
    """
    wanted = [name for name in names if name in FITTED]
    if set(wanted) - {THRESHOLD}:
        raise ValueError(
            f"{', '.join(map(repr, wanted))} must be fitted first: name them in quality.selections of a recipe"
        )
    if not wanted:
        return {}
    if config.mass_threshold is None or config.min_keys != config.max_keys or set(budgets) != {config.min_keys}:
        raise ValueError(
            f"{THRESHOLD!r} shows the model's own mass_threshold at the fixed budget that it was fitted for, but "
            "mass_threshold is "
            f"{config.mass_threshold}, min_keys {config.min_keys}, max_keys {config.max_keys} and the budgets are "
            f"{list(budgets)}: "
            "fit one with hf_sparse_attn.fit_mass_threshold(model, batches, keys=…)"
        )
    return {THRESHOLD: AtThreshold(config.mass_threshold)}
