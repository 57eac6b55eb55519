"""What the tiles of a text need and keep, by layer, KV head and length: what a calibration is made of."""

# Shapes: B batch, G KV heads, m query tiles that are read, nb key blocks, S keys of a block.

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from hf_sparse_attn_kernels import TileGrid, block_mass
from torch import Tensor

from ..attention.call import SparseCall
from ..data.model_inputs import check_finite
from ..router.module import RoutingInputs, SparseRouter
from ..router.selection import select_blocks
from ..training.mass_threshold import Candidates, candidates
from ..training.router_loss import kept_mass

STRIDE = 2  # every second tile is read
FIRST_END = 1024  # keys, of the first length bucket; each other one is twice as long
RESAMPLES = 100
USED = 0.05  # mass of a tile on a link that uses it
Key = tuple[int, int]  # layer, bucket


def length_buckets(length: int) -> tuple[int, ...]:
    """Ends of the length buckets of windows of ``length`` tokens: 1024, 2048, … and the length."""
    # powers of two below the length; the last bucket ends with the windows, and longer inputs belong to it
    ends = [FIRST_END << i for i in range(max(1, math.ceil(math.log2(length / FIRST_END)) + 1))]
    return (*[end for end in ends if end < length], length)


@dataclass
class TileFigures:
    """Figures of tiles by layer and bucket, each float32 [G, tiles]."""

    ends: tuple[int, ...]
    found: dict[Key, list[Tensor]]

    def add(self, layer: int, visible: Tensor, values: Tensor) -> None:
        """Add ``values`` [B, G, m] of tiles that see ``visible`` [m] keys."""
        # as `HeadBudgets.bucket`: a length belongs to the first end that is not below it, else to the last one
        bucket = torch.bucketize(visible.cpu(), torch.tensor(self.ends, dtype=torch.int64, device="cpu")).clamp(
            max=len(self.ends) - 1
        )
        for at in bucket.unique().tolist():
            self.found[layer, at].append(
                values[:, :, (bucket == at).to(values.device)].transpose(0, 1).flatten(1).float().cpu()
            )

    def quantile(self, share: float, method: str) -> dict[Key, Tensor]:
        """Quantile over the tiles of every KV head, float32 [G]."""
        joined = {key: torch.cat(parts, 1) for key, parts in sorted(self.found.items())}
        return {key: values.quantile(share, dim=1, interpolation=method) for key, values in joined.items()}

    # Percentile bootstrap: Efron 1979, "Bootstrap methods: another look at the jackknife".
    def bound(self, share: float, confidence: float) -> dict[Key, Tensor]:
        """What the `quantile` stays below with ``confidence`` if other windows of the same kind are read, float32 [G].

        A bootstrap over calls, each of which is one window: tiles of a window are no independent ones. Never below the
        quantile itself.
        """
        value = self.quantile(share, "higher")
        calls = len(next(iter(self.found.values())))
        # the same windows for every head and layer, and in every run
        picks = torch.randint(
            calls,
            (RESAMPLES, calls),
            generator=torch.Generator(device="cpu").manual_seed(0),
            dtype=torch.int64,
            device="cpu",
        ).tolist()
        for key, parts in self.found.items():
            # whole windows are drawn with all of their tiles; "higher" takes a value that some tile really has
            drawn = [
                torch.cat([parts[at] for at in pick], 1).quantile(share, dim=1, interpolation="higher")
                for pick in picks
            ]
            value[key] = torch.maximum(
                value[key], torch.stack(drawn).quantile(confidence, dim=0, interpolation="higher")
            )
        return value

    def counts(self) -> dict[Key, int]:
        return {key: sum(part.shape[1] for part in parts) for key, parts in self.found.items()}


def tile_figures(ends: tuple[int, ...]) -> TileFigures:
    return TileFigures(ends, defaultdict(list))


def _read_tiles(grid: TileGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """(every second tile, the keys that it sees), int64 [m] each."""
    tiles = torch.arange(0, grid.tiles, STRIDE, device=device, dtype=torch.int64)
    return tiles, grid.last_positions(device)[tiles] + 1 if grid.causal else torch.full_like(tiles, grid.kv_len)


# The pass is dense: what a tile needs is measured on queries and keys that no selection has changed.
class NeedObserver(SparseCall):
    """Share of the visible keys that each tile must keep, in the router's order, for a share ``mass`` of its softmax
    mass.
    """

    def __init__(self, mass: float, ends: tuple[int, ...]) -> None:
        super().__init__(dense=True)
        self.mass, self.needs = mass, tile_figures(ends)

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        check_finite(router.layer, queries=inputs.q, keys=inputs.k)
        scored = candidates(router, inputs, router.config.query_tile)
        grid = scored.every.grid
        tiles, visible = _read_tiles(grid, inputs.q.device)
        teacher = block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale)
        self.needs.add(router.layer, visible, needed_share(scored, tiles, teacher, self.mass, visible))


# need(τ) = S · (forced + least i with Σ_{forced} p + Σ_{first i free ones} p ≥ τ) / visible,
# p the dense softmax mass of a block; free blocks in the order of the mass that stage 2 estimates.
def needed_share(scored: Candidates, tiles: Tensor, teacher: Tensor, mass: float, visible: Tensor) -> Tensor:
    """Least share of the ``visible`` keys [m] at which ``tiles`` [m] keep ``mass`` of the true mass ``teacher`` [B, G,
    m, nb]: [B, G, m].

    A tile that does not reach it with all candidates needs all keys.
    """
    indices, free = scored.every.indices[:, :, tiles], scored.free[:, :, tiles]
    # empty entries (−1) read block 0, and are masked below
    true = teacher.gather(-1, indices.clamp(min=0).long())
    forced = true.masked_fill(free | (indices < 0), 0.0).sum(-1)
    # what may not be cut goes to the end, where it adds no mass
    order = scored.mass[:, :, tiles].masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True)
    kept = forced[..., None] + true.masked_fill(~free, 0.0).gather(-1, order).cumsum(-1)
    # entry i: the forced blocks and the best i of the others reach τ
    enough = torch.cat([forced[..., None], kept], -1) >= mass
    blocks = torch.where(enough.any(-1), enough.int().argmax(-1), indices.shape[-1]) + ((indices >= 0) & ~free).sum(-1)
    share = (blocks * scored.every.grid.block_size).float() / visible
    return torch.where(enough.any(-1), share.clamp(max=1.0), 1.0)


class KeptObserver(SparseCall):
    """Kept mass of the selections of a calibrated model on a dense pass, and the keys they keep of those that tiles
    see.
    """

    def __init__(self, ends: tuple[int, ...]) -> None:
        super().__init__(dense=True)
        self.mass = tile_figures(ends)
        self.kept = self.seen = 0
        self.grid: TileGrid | None = None

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        check_finite(router.layer, queries=inputs.q, keys=inputs.k)
        selection = select_blocks(router, inputs)
        self.grid = selection.grid
        tiles, visible = _read_tiles(self.grid, inputs.q.device)
        # the mass of the dense pass itself: every layer's inputs are those of dense attention
        teacher = block_mass(inputs.q, inputs.k, self.grid, tiles, inputs.scale)
        self.mass.add(router.layer, visible, kept_mass(teacher, selection.indices[:, :, tiles]))
        keys = selection.kept_keys()
        self.kept += int(keys.sum())
        self.seen += keys.shape[0] * keys.shape[1] * visible_keys(self.grid)

    @property
    def density(self) -> float:
        """Kept over visible keys, of all tiles of all layers and KV heads:
        what attention reads, of what it would read densely.
        """
        return self.kept / self.seen


def visible_keys(grid: TileGrid) -> int:
    """Sum over tiles of the keys that they see."""
    return int((grid.last_positions() + 1).sum()) if grid.causal else grid.tiles * grid.kv_len


# recall = uses with at least half of the link's mass kept / uses; chance = mean density of the selection over the uses,
# which is the recall of a selection that knows nothing.
class PlantedObserver(SparseCall):
    """Whether a planted link is kept by the heads that use it: those with 5 % of a tile's mass on its blocks.

    ``source`` are the slots of what is linked to, ``tiles_from`` the first slot of the queries that need it.
    """

    def __init__(self, source: range, tiles_from: int) -> None:
        super().__init__(dense=True)
        self.source, self.tiles_from = source, tiles_from
        self.used = self.kept = 0
        self.chance = 0.0

    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        selection = select_blocks(router, inputs)
        grid, size = selection.grid, selection.grid.block_size
        tiles = torch.arange(self.tiles_from // grid.query_tile, grid.tiles, device=inputs.q.device, dtype=torch.int64)
        blocks = torch.arange(
            self.source.start // size, (self.source.stop - 1) // size + 1, device=tiles.device, dtype=torch.int64
        )
        teacher = block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale)
        member = selection.kept()[:, :, tiles]
        # tiles and blocks are those of slots: questions have no padding
        mass = teacher[..., blocks].sum(-1)
        used = mass >= USED
        kept = (teacher[..., blocks] * member[..., blocks]).sum(-1) / mass.clamp(min=1e-9)
        self.used += int(used.sum())
        self.kept += int((used & (kept >= 0.5)).sum())
        self.chance += float((member.float().mean(-1) * used).sum())
