"""What the tensors of a call must have in common, compared before any of them is read."""

# Shape legend: B batch, H query heads, G KV heads, N keys, Q queries, D head dim, m query tiles.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .selection import TileGrid

if TYPE_CHECKING:
    from .plan import TilePlan
    from .routing import TileFeatures

Sizes = tuple[int | None, ...]  # None: as many as it has


def expect(name: str, x: Tensor, sizes: Sizes, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless ``x`` has these sizes, is on the device of ``like`` and of ``dtype`` or that
    of ``like``.
    """
    wanted = like.dtype if dtype is None else dtype
    fits = x.dtype == wanted and x.device == like.device and len(x.shape) == len(sizes)
    if fits and all(want is None or have == want for have, want in zip(x.shape, sizes, strict=True)):
        return
    listed = ", ".join("*" if size is None else str(size) for size in sizes)
    raise ValueError(
        f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: must be {wanted} ({listed}) on {like.device}"
    )


def expect_within(name: str, x: Tensor, least: int, end: int) -> None:
    """Raise ValueError unless all of ``x`` is in [least, end);
    read on CPUs only, where nothing has to be waited for.
    """
    if x.device.type != "cpu" or not x.numel():
        return
    low, high = (int(value) for value in x.aminmax())
    if low < least or high >= end:
        raise ValueError(f"{name} holds {low if low < least else high}: must be in [{least}, {end})")


def expect_tiles(tiles: Tensor, grid: TileGrid, like: Tensor) -> None:
    """Raise ValueError unless ``tiles`` [m] are numbers of query tiles of a call, ascending."""
    expect("tiles", tiles, (None,), like, torch.int64)
    expect_within("tiles", tiles, 0, grid.tiles)
    if tiles.device.type == "cpu" and bool((tiles[1:] <= tiles[:-1]).any()):
        raise ValueError(f"tiles is {tiles.tolist()}: must be ascending and unique")


def check_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Of ``q`` [B, H, Q, D], ``k`` and ``v`` [B, G, N, D] and ``sinks`` [H] what does not depend on a selection."""
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if not (
        q.dim() == 4 and k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    ):
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: must be [B, H, Q, D] and twice [B, G, "
            "N, D] "
            "with the same B and D"
        )
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks is {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}: must hold one logit per query head, "
            f"floating-point [{q.shape[1]}] on {q.device}"
        )


def check_pooled_features(k: Tensor, block_size: int) -> None:
    """See `pooled_features`."""
    expect("k", k, (None, None, None, None), k)
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be positive")


def check_coarse_scores(queries: Tensor, real: Tensor, router_keys: Tensor, name: str = "queries") -> None:
    """See `coarse_scores`."""
    expect(name, queries, (None, None, None, None, None), queries)
    b, groups, m, runs, width = queries.shape
    if not runs:
        raise ValueError(f"{name} is {tuple(queries.shape)}: must have at least one run of tokens")
    expect("real", real, (m, runs), queries, torch.bool)
    expect("router_keys", router_keys, (b, groups, None, width), queries)


def check_fine_mass(queries: Tensor, keys: Tensor, grid: TileGrid, tiles: Tensor, blocks: Tensor, reps: Tensor) -> None:
    """See `fine_mass`."""
    expect("keys", keys, (None, grid.kv_len, None), keys)
    expect_tiles(tiles, grid, keys)
    expect("reps", reps, (None, None), keys, torch.int64)
    expect("queries", queries, (keys.shape[0], len(tiles), *reps.shape, keys.shape[2]), keys)
    expect("blocks", blocks, (keys.shape[0], len(tiles), None), keys, torch.int64)
    expect_within("reps", reps, 0, grid.query_tile)
    expect_within("blocks", blocks, -1, grid.blocks)


def check_block_mass(q: Tensor, k: Tensor, grid: TileGrid, tiles: Tensor) -> None:
    """See `block_mass`."""
    expect("k", k, (None, None, grid.kv_len, None), k)
    expect("q", q, (k.shape[0], None, grid.q_len, k.shape[3]), k)
    check_heads(q, k)
    expect_tiles(tiles, grid, k)


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless the query heads of ``q`` [B, H, Q, D] share the KV heads of ``k`` [B, G, N, D] evenly."""
    heads, groups = q.shape[1], k.shape[1]
    if heads % groups if groups else heads:
        raise ValueError(
            f"{heads} query heads cannot share {groups} KV heads: the first must be a multiple of the second"
        )


def check_exhaustive(heads: tuple[int, ...], groups: int) -> None:
    """Raise ValueError unless ``heads`` are KV heads, ascending."""
    if list(heads) != sorted(set(heads)) or any(not 0 <= head < groups for head in heads):
        raise ValueError(f"exhaustive is {heads}: must be ascending and unique KV heads in [0, {groups})")


def check_features(features: TileFeatures, plan: TilePlan, tiles: Tensor) -> None:
    """See `select_blocks`."""
    grid, keys = plan.grid, features.keys
    expect("keys", keys, (None, None, grid.kv_len, None), keys)
    expect_tiles(tiles, grid, keys)
    b, groups, _, width = keys.shape
    expect("reps", features.reps, (None, None), keys, torch.int64)
    expect("queries", features.queries, (b, groups, len(tiles), *features.reps.shape, width), keys)
    expect("coarse_queries", features.coarse_queries, (b, groups, len(tiles), None, None), keys)
    check_coarse_scores(features.coarse_queries, features.real, features.router_keys, "coarse_queries")
    expect_within("reps", features.reps, 0, grid.query_tile)
    check_exhaustive(features.exhaustive, groups)
    # blocks that stage 1 scores: none where no tile has more eligible blocks than it may keep
    needed = max(
        (budget.near if grid.causal else grid.kv_len // grid.block_size) * (budget.eligible > budget.free)
        for budget in plan.budgets
    )
    if features.router_keys.shape[2] < needed:
        raise ValueError(f"router_keys is {tuple(features.router_keys.shape)}: must have at least {needed} blocks")
