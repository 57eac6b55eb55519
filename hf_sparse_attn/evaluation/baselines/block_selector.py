"""The base of selectors that score blocks: a class says how, the budget and the forced links are shared.

Shape legend: B batch, H query heads, G KV heads, Hg = H/G, N keys, D head dim, m some of a call's query tiles,
T query tile, S block size, nb key blocks, of which w = N // S are whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from hf_sparse_attn_kernels import BlockSelection, TilePlan, to_tiles
from torch import Tensor

from ...router.budget import make_plan, select_by_scores
from ...router.module import RoutingInputs, SparseRouter
from ...router.selection import everything

TILES = 64  # that are scored at a time, unless a selector says otherwise


class SelectorError(ValueError):
    """A selector that cannot be registered, found or used; the message names it and says what to do."""


@dataclass(frozen=True)
class ScoringCall:
    """One call of a layer's attention, as `BlockSelector.scores` sees it.

    Attributes:
        router: the layer's router: its number ``layer``, its weights, its settings ``config``.
        inputs: queries and keys after RoPE, positions and the scale of q·k.
        plan: the budget of every tile, and which blocks are forced.
    """

    router: SparseRouter
    inputs: RoutingInputs
    plan: TilePlan

    @cached_property
    def blocks(self) -> Tensor:
        """Keys of the whole blocks: float32 [B, G, w, S, D]. A partial last block is forced and needs no score."""
        size, whole = self.plan.grid.block_size, self.plan.grid.kv_len // self.plan.grid.block_size
        blocks: Tensor = self.inputs.k[:, :, : whole * size].float().unflatten(2, (whole, size))
        return blocks

    def queries(self, tiles: Tensor) -> Tensor:
        """Scaled queries of the tiles (int64 [m]): float32 [B, G, m, Hg, T, D], zero where a tile has no token."""
        groups = self.inputs.k.shape[1]
        rows = to_tiles(self.inputs.q, self.plan.grid, groups)[:, tiles]
        queries: Tensor = rows.float().unflatten(0, (-1, groups)) * self.inputs.scale
        return queries

    def is_token(self, tiles: Tensor) -> Tensor:
        """Which places of the tiles (int64 [m]) are queries of the call: boolean [m, T]."""
        grid = self.plan.grid
        first = grid.first_positions(tiles.device)[tiles]
        # tiles are counted from content position 0: a call that continues a cache may begin within one
        content = first[:, None] + torch.arange(grid.query_tile, device=tiles.device, dtype=torch.int64)
        return (content >= grid.q_offset) & (content < grid.kv_len)


class BlockSelector(ABC):
    """A selector made of scores: a subclass has a ``name`` and `scores`.

    Budget, forced links (sink, local and own blocks) and the choice of the best blocks are the router's, too.
    An instance is what ``SparseCall(selector=...)`` takes; `register_selector` makes the class known by its name.
    """

    name: ClassVar[str]

    @abstractmethod
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        """Scores of the blocks for the tiles (int64 [m], ascending), larger is better: float32 [B, G, m, nb or w]."""

    def tiles_at_a_time(self, call: ScoringCall) -> int:
        """For how many tiles `scores` is asked at once: fewer take less memory."""
        return TILES

    @torch.no_grad()
    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
        """The selection: forced links, and the best of the other blocks up to the budget.

        Raises:
            SelectorError: the scores have another shape, dtype or device than they must, or are NaN.
        """
        plan = make_plan(router.config, inputs.grid(query_tile, router.config.block_size), inputs.q.device)
        # budgets hold all that is visible: nothing to score
        if not plan.any_open:
            return everything(plan, inputs)
        call = ScoringCall(router, inputs, plan)
        tiles = torch.arange(plan.grid.tiles, device=plan.device, dtype=torch.int64)
        runs = tiles.split(self.tiles_at_a_time(call))
        return select_by_scores(plan, torch.cat([self._checked(self.scores(call, run), call, run) for run in runs], 2))

    def _checked(self, scores: Tensor, call: ScoringCall, tiles: Tensor) -> Tensor:
        """The scores with a column for every block, −inf where there was none."""
        who, grid, keys = f"selector {self.name!r}", call.plan.grid, call.inputs.k
        if not isinstance(scores, Tensor):
            raise SelectorError(f"{who} gave scores of type {type(scores).__name__}: scores() must return a tensor")
        want, whole = (*keys.shape[:2], len(tiles), grid.blocks), grid.kv_len // grid.block_size
        if scores.shape not in (want, (*want[:3], whole)):
            raise SelectorError(
                f"{who} gave scores of shape {list(scores.shape)}: must be {list(want)} (batch, KV heads, tiles, "
                "blocks), "
                f"or {whole} in the last place, the whole blocks"
            )
        if scores.dtype != torch.float32 or scores.device != keys.device:
            raise SelectorError(
                f"{who} gave scores in {scores.dtype} on {scores.device}: must be torch.float32 on {keys.device}"
            )
        if bool(scores.isnan().any()):
            row, head, tile, block = scores.isnan().nonzero()[0].tolist()
            raise SelectorError(
                f"{who} gave NaN as the score of block {block} for tile {int(tiles[tile])} of KV head {head} in row "
                f"{row} of "
                f"layer {call.router.layer}: must be a number; a block that is worth nothing gets -inf"
            )
        return torch.nn.functional.pad(scores, (0, grid.blocks - scores.shape[-1]), value=-torch.inf)
