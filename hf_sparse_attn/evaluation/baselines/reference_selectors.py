"""Selections that bound what a router can do: the best by the dense softmax, the nearest blocks, random ones."""

from __future__ import annotations

import torch
from hf_sparse_attn_kernels import block_mass
from torch import Tensor

from .block_selector import BlockSelector, ScoringCall

ORACLE_TILES = 64  # tiles whose dense mass is computed at a time
LAYER_STRIDE = 1_000_003  # a prime: seeds of (layer, position) stay apart


class Oracle(BlockSelector):
    """The blocks with the most dense softmax mass: no selection at this budget keeps more."""

    name = "oracle"

    # mass_b = mean over tokens and heads of Σ_{j∈b} exp(s·q·k_j) / Σ_{j visible} exp(s·q·k_j)
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        return block_mass(call.inputs.q, call.inputs.k, call.plan.grid, tiles, call.inputs.scale)

    def tiles_at_a_time(self, call: ScoringCall) -> int:
        return ORACLE_TILES


class WindowAndSink(BlockSelector):
    """The forced links, then the nearest blocks."""

    name = "window + sink"

    # score_b = −|b − middle of the tile's own and local blocks|
    # sink tokens and a sliding window: StreamingLLM, Xiao et al. 2023, arXiv:2309.17453
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        return call.plan.nearness(tiles).expand(*call.inputs.k.shape[:2], -1, -1)


class RandomBlocks(BlockSelector):
    """The forced links and random others, the same ones for the same layer and position."""

    name = "random"

    # score_b ~ U(0, 1)
    def scores(self, call: ScoringCall, tiles: Tensor) -> Tensor:
        grid = call.plan.grid
        generator = torch.Generator(device="cpu").manual_seed(call.router.layer * LAYER_STRIDE + grid.q_offset)
        shape = (*call.inputs.k.shape[:2], grid.tiles, grid.blocks)
        scores = torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return scores.to(tiles.device)[:, :, tiles]

    def tiles_at_a_time(self, call: ScoringCall) -> int:
        return call.plan.grid.tiles  # what is drawn for a tile must not depend on how tiles are split
