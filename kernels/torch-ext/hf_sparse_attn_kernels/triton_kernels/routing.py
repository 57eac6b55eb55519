"""Features, tile scores and block mass in Triton; each has the result of its plain torch counterpart."""

# Shape legend: B batch, G KV heads, Hg query heads of one, N keys, D head dim, nb blocks, m query tiles, r sampled
# queries of a tile, R router_dim, E width of stage 2, L listed blocks.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..selection import TileGrid
from ..tiles import to_tiles, unit_stride
from .launch import SIMPLE, padded, scoring_launch
from .scoring import coarse_kernel, features_kernel, mass_kernel, row_lse_kernel


@torch.library.custom_op("hf_sparse_attn_kernels::pooled_features", mutates_args=())
def pooled_features(k: Tensor, block_size: int) -> Tensor:
    """Max, min and mean over each whole block: ``k`` [B, G, N, D] -> [B, G, N // block_size, 3·D], in one pass over
    ``k``.
    """
    k = unit_stride(k)
    b, groups, n, d = k.shape
    blocks = n // block_size
    out = torch.empty((b, groups, blocks, 3 * d), dtype=k.dtype, device=k.device)
    if blocks:
        features_kernel[(blocks, groups, b)](
            k, out, *k.stride()[:3], groups, blocks, D=d, DP=padded(d), S=block_size, **SIMPLE.options
        )
    return out


@pooled_features.register_fake
def _(k: Tensor, block_size: int) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[1], k.shape[2] // block_size, 3 * k.shape[3]))


@torch.library.custom_op("hf_sparse_attn_kernels::coarse_scores", mutates_args=())
def coarse_scores(queries: Tensor, real: Tensor, router_keys: Tensor, scale: float) -> Tensor:
    """Log-sum-exp over a tile's runs of the scaled scores: float32 [B, G, m, nb].

    ``queries`` [B, G, m, runs, R] float32, runs a power of two up to 16; ``real`` boolean [m, runs], runs that have
    tokens (a single run always has); ``router_keys`` [B, G, nb, R] float32.
    """
    queries, real, router_keys = queries.contiguous(), real.contiguous(), unit_stride(router_keys)
    b, groups, tiles, runs, d = queries.shape
    blocks = router_keys.shape[2]
    out = torch.empty((b, groups, tiles, blocks), dtype=torch.float32, device=queries.device)
    launch = scoring_launch(queries.dtype, d)
    # a program's rows are the runs of whole tiles, so that it can sum over them
    block_t = max(1, launch.block_m // runs)
    if out.numel():
        coarse_kernel[(-(-tiles // block_t), -(-blocks // launch.block_n), b * groups)](
            *(queries, real, router_keys, out, *router_keys.stride()[:3], groups, tiles, blocks, scale),
            D=d,
            DP=padded(d),
            RUNS=runs,
            BLOCK_T=block_t,
            BLOCK_N=launch.block_n,
            **launch.options,
        )
    return out


@coarse_scores.register_fake
def _(queries: Tensor, real: Tensor, router_keys: Tensor, scale: float) -> Tensor:
    return queries.new_empty((*queries.shape[:3], router_keys.shape[2]))


@torch.library.custom_op("hf_sparse_attn_kernels::candidate_mass", mutates_args=())
def candidate_mass(
    queries: Tensor,
    keys: Tensor,
    blocks: Tensor | None,
    tiles: Tensor,
    reps: Tensor,
    q_len: int,
    query_tile: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """Causal softmax mass by candidate block: float32 [B·G, m, L], the mean over the real queries of a tile.

    ``queries`` [B·G, m, Hg·r, E] at the tokens ``reps`` (int64 [Hg·r]) of the tiles ``tiles`` (int64 [m]), ``keys``
    [B, G, N, E]. ``blocks`` int64 [B·G, m, L] lists the candidates, −1 = empty; None: every block is one (L = nb).
    """
    queries, keys = queries.contiguous(), unit_stride(keys)
    rows, m, count, d = queries.shape
    groups, kv_len = keys.shape[1:3]
    width = -(-kv_len // block_size) if blocks is None else blocks.shape[2]
    mass = torch.empty((rows, m, width), dtype=torch.float32, device=queries.device)
    lse = torch.empty((rows, m, count), dtype=torch.float32, device=queries.device)
    launch = scoring_launch(queries.dtype, d)
    # a key tile holds whole blocks, so that it can sum over each
    block_n = max(block_size, launch.block_n)
    lists = (tiles if blocks is None else blocks.contiguous(), tiles.contiguous(), reps.contiguous())
    sizes = (*keys.stride()[:3], groups, m, count, kv_len - q_len, kv_len, width, scale)
    shape = {"D": d, "DP": padded(d), "T": query_tile, "S": block_size, "BLOCK_M": launch.block_m, "BLOCK_N": block_n}
    if mass.numel():
        row_parts, block_parts = -(-count // launch.block_m), -(-width * block_size // block_n)
        flags = {**shape, "LISTED": blocks is not None, **launch.options}
        # two passes: a block's mass needs the log-sum-exp over all candidates
        row_lse_kernel[(row_parts, m, rows)](queries, keys, lse, *lists, *sizes, **flags)
        mass_kernel[(block_parts, m, rows)](queries, keys, lse, mass, *lists, *sizes, **flags)
    return mass


@candidate_mass.register_fake
def _(queries: Tensor, keys: Tensor, blocks: Tensor | None, *args: Any) -> Tensor:
    width = -(-keys.shape[2] // args[4]) if blocks is None else blocks.shape[2]
    return queries.new_empty((queries.shape[0], queries.shape[1], width), dtype=torch.float32)


def fine_mass(queries: Tensor, keys: Tensor, grid: TileGrid, tiles: Tensor, blocks: Tensor, reps: Tensor) -> Tensor:
    """Stage-2 mass of ``blocks`` [B·G, m, L] (−1 = empty, the tile's own among them): float32 [B·G, m, L], sums to 1.

    ``queries`` [B·G, m, Hg, r, E], scaled, and ``keys`` [B·G, N, E] have one dtype; ``reps`` int64 [Hg, r].
    """
    options = (grid.q_len, grid.query_tile, grid.block_size, 1.0)
    mass: Tensor = candidate_mass(queries.flatten(2, 3), keys[None], blocks.long(), tiles, reps.flatten(), *options)
    return mass


def block_mass(q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor, scale: float) -> Tensor:
    """The teacher: `hf_sparse_attn_kernels.block_mass` for the tiles ``tiles`` (int64 [m]), float32 [B, G, m, nb]."""
    b, groups = k.shape[:2]
    chosen = to_tiles(q, grid, groups)[:, tiles].flatten(2, 3)
    reps = torch.arange(grid.query_tile, device=q.device, dtype=torch.int64).repeat(q.shape[1] // groups)
    mass: Tensor = candidate_mass(chosen, k, None, tiles, reps, grid.q_len, grid.query_tile, grid.block_size, scale)
    return mass.view(b, groups, *mass.shape[1:])
