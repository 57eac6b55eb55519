"""The arithmetic and memory of sparse attention in one layer of a training step, counted from the budgets
of its tiles.
"""

# letters: H query heads, G KV heads, Hg = H / G, N tokens, D head dim, T query tile

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hf_sparse_attn_kernels import TileGrid

from ...config import SparseAttentionConfig
from ...router.budget import make_plan
from ...router.module import QUERY_RUNS
from ...training.router_loss import SCORE_BYTES

KEY_COPIES = 4  # of the gathered keys of the KL's stage 2, in its backward pass


@dataclass(frozen=True)
class AttentionShape:
    """Heads, KV heads and head dim of a layer, with the batch."""

    batch: int
    heads: int
    groups: int
    head_dim: int


@dataclass(frozen=True)
class LayerWork:
    """One layer of one step: operations of pairs and of the router's products, and bytes beside those of dense
    attention.

    Attributes:
        dense_pairs, kept_pairs: pairs of a query and a key per head that attention reads; under a ``mass_threshold``
            the latter on average.
        routing: operations of both stages for all tiles, once.
        teaching: operations of the KL on its tiles: the teacher, and stage 2 forward and backward.
        selection_bytes: of the selection, kept until the backward pass.
        routing_bytes, teaching_bytes: memory that routing or the KL needs while it runs.
    """

    dense_pairs: int
    kept_pairs: int
    routing: int
    teaching: int
    selection_bytes: int
    routing_bytes: int
    teaching_bytes: int


# stage 1: 2 · runs · router_dim operations a block; stage 2: 2 · Hg · samples · index_dim a scored key;
# teacher: 2 · Hg · T · D a key, N / 2 keys a tile on average; the KL's stage 2: three times that of a selection
@lru_cache(maxsize=64)
def layer_work(
    config: SparseAttentionConfig, shape: AttentionShape, length: int, tile_share: int, dtype_bytes: int
) -> LayerWork:
    """The work of a causal layer on rows of ``length`` tokens; the KL is computed on one tile in ``tile_share``."""
    plan = make_plan(config, TileGrid(length, length, config.query_tile, config.block_size))
    rows, hg, d = shape.batch * shape.groups, shape.heads // shape.groups, shape.head_dim
    router_dim, index_dim = config.resolved_router_dim(d), config.resolved_index_dim(d)
    samples = hg * min(config.query_samples, config.query_tile)
    kept_pairs, coarse, fine, open_tiles, widest = 0, 0, 0, 0, 0
    for at, budget in enumerate(plan.budgets):
        first = at * config.query_tile
        tokens = range(first, min(first + config.query_tile, length))
        # of the visible blocks (last + 1) those that are not eligible are forced
        forced = budget.last + 1 - budget.eligible
        kept_keys = (forced + budget.free) * config.block_size
        kept_pairs += sum(min(i + 1, kept_keys) for i in tokens)
        # a tile that may keep all it sees is not scored
        if budget.eligible > budget.free:
            open_tiles += 1
            scored = (min(budget.candidates, budget.eligible) + forced) * config.block_size
            widest = max(widest, scored)
            coarse += 2 * QUERY_RUNS * router_dim * budget.near
            fine += 2 * samples * index_dim * scored
    # rounded up: at least one tile learns where any has to choose
    taught = -(-open_tiles // tile_share) if tile_share else 0
    teacher = taught * 2 * hg * config.query_tile * d * length // 2
    # stage 2 takes as many tiles at a time as SCORE_BYTES of scores allow
    scored_at_a_time = 4 * rows * widest * max(1, min(taught, SCORE_BYTES // max(1, 4 * rows * widest * samples)))
    return LayerWork(
        dense_pairs=length * (length + 1) // 2,
        kept_pairs=kept_pairs,
        routing=rows * (coarse + fine),
        teaching=rows * (teacher + (3 * fine * taught // open_tiles if open_tiles else 0)),
        selection_bytes=rows * len(plan.budgets) * plan.width * 8,  # int32 indices, float32 scores
        # stage-1 keys of every block, in float32 and in the model's dtype; 8 MB for all else
        routing_bytes=rows * (length // config.block_size * router_dim * (4 + dtype_bytes)) + (1 << 23),
        teaching_bytes=rows * length * d * 4 + scored_at_a_time * (index_dim * KEY_COPIES + samples),
    )
