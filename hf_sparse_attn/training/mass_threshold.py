"""Budgets that vary by tile, KV head and layer: one threshold for all of them, fitted to an average number of keys.

A block of keys costs every tile the same, so a total of kept keys holds the most softmax mass where every tile stops at
the same mass of its next block: one threshold, and nothing to learn by layer or head.
"""

# Shapes: B batch, N tokens, G KV heads, n query tiles, K listed blocks of a tile (candidates and forced ones).

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection
from torch import Tensor, nn

from ..attention.call import SparseCall
from ..config import fixed_budget
from ..data.model_inputs import check_finite
from ..models.adapters import active_routers
from ..models.attach import no_routers
from ..models.convert import set_sparse_attention, sparse_attention_as
from ..router.budget import make_plan
from ..router.module import RoutingInputs, SparseRouter
from ..router.selection import select_blocks
from .passes import run_sparse

LEAST = 1e-37  # as a threshold: every candidate is kept
# positive floats sort as their bits do, so the upper bits of a mass are the number of its bin
BITS = 12  # bits of a float32 that a histogram leaves out: its bins are 0.1 % wide or less
BINS = (0x3F800000 >> BITS) + 1  # of the values from 0 to 1
# cutting links changes queries and keys of later layers, so the second fit is made under the first one's cuts
PASSES = 2  # the first keeps every candidate, each other one what its predecessor found


@dataclass(frozen=True)
class Candidates:
    """All candidates and forced links of a call's tiles: ``every`` holds them, ``free`` boolean [B, G, n, K] says which
    may be cut.

    ``counted`` boolean [n]: the tiles that have more eligible blocks than their uniform budget; the others keep all
    they see.
    """

    every: BlockSelection
    free: Tensor
    counted: Tensor
    asked: Tensor  # int64 [n], blocks of the uniform budget beside the forced ones

    @property
    def mass(self) -> Tensor:
        """Estimated softmax mass float32 [B, G, n, K], 0 for what may not be cut."""
        assert self.every.scores is not None
        return self.every.scores.masked_fill(~self.free, 0.0).nan_to_num(0.0)

    def keep(self, chosen: Tensor) -> BlockSelection:
        """The selection of the candidates that are ``chosen`` (boolean [B, G, n, K]) and of all that may not be cut."""
        assert self.every.scores is not None
        # links that are cut become −1, which sorting puts first; blocks stay ascending behind them
        indices, order = torch.where(chosen | ~self.free, self.every.indices, -1).sort(dim=-1, stable=True)
        scores = self.every.scores.gather(-1, order).masked_fill(indices < 0, torch.nan)
        return BlockSelection(indices.contiguous(), self.every.grid, scores)


def select_above(router: SparseRouter, inputs: RoutingInputs, query_tile: int, threshold: float) -> BlockSelection:
    """The router's selection with ``threshold`` in place of its ``mass_threshold``."""
    alike = copy.copy(router)  # the same weights, with settings of its own
    alike.config = router.config.changed(mass_threshold=threshold)
    return select_blocks(alike, inputs, query_tile)


@dataclass(frozen=True)
class AtThreshold:
    """The router's own selection at a ``mass_threshold``."""

    threshold: float

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        return select_above(router, inputs, query_tile, self.threshold)


def candidates(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> Candidates:
    """What stage 1 passes on, with the mass that stage 2 estimates for it."""
    every = select_above(router, inputs, query_tile, LEAST)
    plan = make_plan(router.config, every.grid, inputs.q.device)
    eligible = plan.eligible_mask(torch.arange(every.grid.tiles, device=inputs.q.device, dtype=torch.int64)).expand(
        *every.indices.shape[:2], -1, -1
    )
    free = (every.indices >= 0) & eligible.gather(-1, every.indices.clamp(min=0).long()) & plan.open[:, None]
    return Candidates(every, free, plan.open, plan.free)


class Histogram:
    """How many candidates have how large a value in [0, 1], in all calls so far; memory does not grow with them.

    ``first`` is the content position from which tiles count; only those that have something to select ever do.
    """

    def __init__(self, first: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.first = first
        self.counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self.tiles = self.forced = self.asked = self.block_size = 0  # tiles of a KV head; blocks

    def add(self, scored: Candidates, values: Tensor) -> None:
        """Count the ``values`` [B, G, n, K] of ``scored``."""
        grid = scored.every.grid
        counted = scored.counted & (grid.first_positions(values.device) >= self.first)
        rows = values.shape[0] * values.shape[1]
        listed = (scored.every.indices >= 0) & counted[:, None]
        free = scored.free & counted[:, None]
        # the masses that may be cut are counted by value, all that is kept at any threshold only by number
        bins = values[free].contiguous().view(torch.int32) >> BITS
        self.counts += torch.bincount(bins.clamp(0, BINS - 1), minlength=BINS).cpu()
        self.tiles += rows * int(counted.sum())
        self.forced += int(listed.sum()) - int(free.sum())
        self.asked += rows * int(scored.asked[counted].sum())
        self.block_size = grid.block_size

    def asked_keys(self) -> float:
        """Mean keys of the uniform budget."""
        return self.block_size * (self.forced + self.asked) / self.tiles

    # least t with S · (forced + number of masses ≥ t) / tiles ≤ keys, S the block size; exact to the width of a bin
    def threshold(self, keys: float) -> float:
        """The least value at which at most ``keys`` a tile are kept on average, forced ones included."""
        most = keys * self.tiles / self.block_size - self.forced
        kept = self.counts.flip(0).cumsum(0).flip(0)  # at or above the lower edge of each bin
        # not bin 0: it holds the mass 0, and a threshold must be above that
        at = max(int((kept > most).sum()), 1)
        return float(torch.tensor(at << BITS, dtype=torch.int32, device="cpu").view(torch.float32))

    def kept_keys(self, threshold: float) -> float:
        """Mean keys that a threshold which `threshold` returned keeps, forced ones included."""
        at = int(torch.tensor(threshold, dtype=torch.float32, device="cpu").view(torch.int32)) >> BITS
        return self.block_size * (self.forced + int(self.counts[at:].sum())) / self.tiles


class KeptKeys(SparseCall):
    """A pass that measures the mean keys that tiles keep, forced ones included.

    Counts the tiles from content position ``first`` on that see more keys than their uniform budget. ``sums`` and
    ``tiles`` hold keys (float64 [G]) and tiles by layer.
    """

    def __init__(self, first: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.first = first
        self.sums: dict[int, Tensor] = {}
        self.tiles: dict[int, int] = {}

    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        plan = make_plan(router.config, selection.grid, inputs.q.device)
        counted = plan.open & (selection.grid.first_positions(plan.device) >= self.first)
        keys = selection.kept_keys()[:, :, counted].double()
        layer = router.layer
        self.sums[layer] = (
            self.sums.get(layer, torch.zeros(keys.shape[1], dtype=torch.float64, device="cpu")) + keys.sum((0, 2)).cpu()
        )
        self.tiles[layer] = self.tiles.get(layer, 0) + keys.shape[0] * keys.shape[2]

    def by_layer(self) -> dict[int, Tensor]:
        """Mean keys of every KV head, float64 [G] each; layers without a counted tile are left out."""
        return {layer: self.sums[layer] / tiles for layer, tiles in self.tiles.items() if tiles}

    def mean(self) -> float | None:
        """Mean keys over layers and KV heads, None before any tile was counted."""
        thresholds = list(self.by_layer().values())
        return float(torch.cat(thresholds).mean()) if thresholds else None


@dataclass(frozen=True)
class MassFit:
    """A fitted threshold, and the mean keys a tile that were ``asked`` for and ``kept`` on the fitting batches (over
    ``tiles``).
    """

    threshold: float
    asked: float
    kept: float
    tiles: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Source = Callable[[SparseRouter, RoutingInputs, int], Candidates]


@dataclass
class ByThreshold:
    """A selector that keeps the candidates whose mass reaches a threshold, and notes all masses in a histogram if it
    has one.

    A threshold of None keeps every candidate.
    """

    threshold: float | None
    source: Source = candidates
    histogram: Histogram | None = None

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        check_finite(router.layer, queries=inputs.q, keys=inputs.k)  # the histogram would count NaN as no mass
        scored = self.source(router, inputs, query_tile)
        mass = scored.mass
        if self.histogram is not None:
            self.histogram.add(scored, mass)
        return scored.every if self.threshold is None else scored.keep(mass >= self.threshold)


# The largest Σ mass_b − t · (number of kept blocks) keeps exactly the blocks with mass_b ≥ t:
# t is the price of a block, the same for all tiles, heads and layers.
def fit_threshold(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], first: int = 0, source: Source = candidates
) -> tuple[float, Histogram]:
    """The threshold on the mass that keeps the model's present budget on average, and what was counted in the last
    pass.

    Raises:
        ValueError: no batch has a tile to count.
    """
    todo, threshold, histogram = list(batches), None, Histogram(first)
    for _ in range(PASSES):
        histogram = Histogram(first)
        run_sparse(model, todo, SparseCall(selector=ByThreshold(threshold, source, histogram)))
        if not histogram.tiles:
            least = active_routers(model)[0].config
            raise ValueError(
                f"the batches have nothing to select from position {first} on: texts must be longer than that, than "
                f"dense_below ({least.dense_below}) and than min_keys ({least.min_keys})"
            )
        threshold = histogram.threshold(histogram.asked_keys())
    assert threshold is not None
    return threshold, histogram


def fit_mass_threshold(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, keys: int | None = None, first: int = 0
) -> MassFit:
    """Let budgets vary: fit ``mass_threshold`` so that tiles keep as many keys on average as now, and store it in the
    config.

    Args:
        model: a sparse model, whose routers should be trained. Its weights are not changed; no labels are needed.
        batches: mappings with ``input_ids`` [B, N] (and ``attention_mask``, ``position_ids`` if any) of the kind of
            text and the lengths that the model is meant for: on other text the average is another.
        keys: the average, forced keys included; None for the average that density, min_keys and max_keys give now. A
            number replaces these.
        first: content position from which tiles count. Tiles whose visible keys fit the budget keep all of them and
            never count.

    Returns:
        The threshold with the averages that were asked for and kept on ``batches``, which differ by less than 1 %,
        unless stage 1 passes too few candidates (``candidate_factor``).

    Raises:
        ValueError: no batch is long enough to have something to select, ``keys`` is impossible, the model has no
            routers, or a batch holds something else than the model's inputs.
        NonFiniteError: queries or keys are NaN or infinite.
    """
    if not active_routers(model):
        raise ValueError(no_routers(model))
    fixed = fixed_budget(keys)
    with sparse_attention_as(model, **{**fixed, "mass_threshold": None}):
        threshold, counted = fit_threshold(model, batches, first)
    set_sparse_attention(model, **{**fixed, "mass_threshold": threshold})
    return MassFit(threshold, counted.asked_keys(), counted.kept_keys(threshold), counted.tiles)
