"""Scores of key blocks, each one operation with several implementations: pooled features, both stages' scores, the
teacher.

The `torch` implementation is the specification and the only one with gradients; where no gradient is wanted, `cpp` is
the default on CPUs and `triton` on GPUs.
"""

# Shape legend: B batch, H query heads, G KV heads, Hg query heads of one, N keys, Q queries, D head dim, m query tiles,
# nb blocks, r sampled queries of a tile, R router_dim, E width of stage 2, L listed blocks.

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from .checking import check_block_mass, check_coarse_scores, check_fine_mass, check_pooled_features
from .cpp_kernels.support import unsupported_scores as unsupported_by_cpp
from .implementations import SCORE_IMPLEMENTATIONS, choose, only_causal
from .selection import TileGrid
from .tiles import Scratch
from .torch_kernels.scoring import block_mass_torch, coarse_scores_torch, fine_mass_torch, pooled_features_torch
from .triton_kernels.support import unsupported_scores as unsupported_by_triton


class _Backend(Protocol):
    """What an implementation beside `torch` offers."""

    def pooled_features(self, k: Tensor, block_size: int) -> Tensor: ...
    def coarse_scores(self, queries: Tensor, real: Tensor, router_keys: Tensor, scale: float) -> Tensor: ...
    def fine_mass(
        self, queries: Tensor, keys: Tensor, grid: TileGrid, tiles: Tensor, blocks: Tensor, reps: Tensor
    ) -> Tensor: ...
    def block_mass(self, q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor, scale: float) -> Tensor: ...


def _backend(impl: str | None, *inputs: Tensor, causal: bool = True, **sizes: int) -> _Backend | None:
    """The compiled implementation that runs the operation, None for `torch`."""
    lacking = {
        "triton": lambda: unsupported_by_triton(inputs, **sizes) if causal else only_causal("triton"),
        "cpp": lambda: unsupported_by_cpp(inputs, **sizes) if causal else only_causal("cpp"),
    }
    chosen = choose(impl, SCORE_IMPLEMENTATIONS, inputs[0].device.type, lacking)
    return None if chosen == "torch" else cast(_Backend, import_module(f".{chosen}_kernels.routing", __package__))


# f_b = [max_j k_j ; min_j k_j ; mean_j k_j] over the keys j of block b (SeerAttention, arXiv 2410.13276).
def pooled_features(k: Tensor, block_size: int, *, impl: str | None = None) -> Tensor:
    """Max, min and mean over each whole block: ``k`` [B, G, N, D] -> [B, G, N // block_size, 3·D].

    Raises:
        ValueError: ``impl`` is unknown, or was named and does not support the inputs, or these do not fit each other
            (so for all operations here).
    """
    check_pooled_features(k, block_size)
    backend = _backend(impl, k, block_size=block_size)
    return pooled_features_torch(k, block_size) if backend is None else backend.pooled_features(k, block_size)


# s_b = log Σ_r exp(scale · ρ_r · κ_b) over the runs r of a tile that have tokens.
def coarse_scores(
    queries: Tensor, real: Tensor, router_keys: Tensor, scale: float, *, impl: str | None = None
) -> Tensor:
    """Stage 1: log-sum-exp over a tile's runs of the scaled products with every block's key: float32 [B, G, m, nb].

    ``queries`` [B, G, m, runs, R], runs a power of two up to 16; ``real`` boolean [m, runs]: the run has tokens (a
    single run always has); ``router_keys`` [B, G, nb, R] in the dtype of the queries.
    """
    check_coarse_scores(queries, real, router_keys)
    backend = _backend(impl, queries, router_keys)
    return (coarse_scores_torch if backend is None else backend.coarse_scores)(queries, real, router_keys, scale)


# m_b = mean over sampled queries i of Σ_{j ∈ b} softmax_j(q_i · k_j); the softmax runs over all listed keys.
def fine_mass(
    queries: Tensor,
    keys: Tensor,
    grid: TileGrid,
    tiles: Tensor,
    blocks: Tensor,
    reps: Tensor,
    *,
    scratch: Scratch | None = None,
    impl: str | None = None,
) -> Tensor:
    """Stage 2: softmax mass of ``blocks`` [B·G, m, L] (int64, −1 = empty): float32 [B·G, m, L], each row sums to 1.

    ``queries`` [B·G, m, Hg, r, E] at the tokens ``reps`` (int64 [Hg, r]) of the tiles ``tiles`` (int64 [m], ascending),
    and ``keys`` [B·G, N, E], live in one space and dtype, scaled. The last columns of ``blocks`` are the tile's own
    blocks; only there can a key be later than a query. Without causality (`torch` only) a partial last block may stand
    in the last column only. Averaged over the queries that are tokens of the call. ``scratch`` lends the `torch`
    implementation memory where no gradient is wanted.
    """
    check_fine_mass(queries, keys, grid, tiles, blocks, reps)
    if not blocks.numel():
        return queries.new_zeros(blocks.shape, dtype=torch.float32)
    backend = _backend(impl, queries, keys, causal=grid.causal, query_tile=grid.query_tile, block_size=grid.block_size)
    if backend is None:
        return fine_mass_torch(queries, keys, grid, tiles, blocks, reps, scratch)
    return backend.fine_mass(queries, keys, grid, tiles, blocks, reps)


# p_b = mean over queries i and heads of Σ_{j ∈ b} softmax_j(scale · q_i · k_j); the softmax runs over all visible keys.
# That routers learn from the model's own attention, pooled by block, follows SeerAttention, arXiv 2410.13276.
def block_mass(q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor, scale: float, *, impl: str | None = None) -> Tensor:
    """The teacher: softmax mass of dense attention per block, for the query tiles ``tiles`` (int64 [m], ascending) of
    ``grid``.

    Causal unless ``grid`` says otherwise, then `torch` only.

    Averaged over a tile's tokens and over the query heads of a KV group; every row sums to 1. ``q`` [B, H, Q, D],
    ``k`` [B, G, N, D] -> float32 [B, G, m, nb]. Memory is linear in N.
    """
    check_block_mass(q, k, grid, tiles)
    if not q.shape[:2].numel() or not len(tiles):
        return k.new_zeros((*k.shape[:2], len(tiles), grid.blocks), dtype=torch.float32)
    backend = _backend(impl, q, k, causal=grid.causal, query_tile=grid.query_tile, block_size=grid.block_size)
    return (block_mass_torch if backend is None else backend.block_mass)(q, k, grid, tiles, scale)
