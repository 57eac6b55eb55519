"""Maths on tensors for two-stage sparse attention: attention over a selection, pooled features, block mass, top-k.

Imports only the standard library, torch and itself.
"""

from .attention import block_sparse_attention
from .implementations import IMPLEMENTATIONS, default_choice
from .plan import TileBudget, TilePlan
from .routing import TileFeatures, by_block, mass_of_blocks, select_blocks, stage_one_scores
from .scoring import block_mass, coarse_scores, fine_mass, pooled_features
from .selection import BlockSelection, TileGrid, join_documents, ordered_topk
from .tiles import Scratch, to_tiles

__all__ = [
    "IMPLEMENTATIONS",
    "BlockSelection",
    "Scratch",
    "TileBudget",
    "TileFeatures",
    "TileGrid",
    "TilePlan",
    "block_mass",
    "block_sparse_attention",
    "by_block",
    "coarse_scores",
    "default_choice",
    "fine_mass",
    "join_documents",
    "mass_of_blocks",
    "ordered_topk",
    "pooled_features",
    "select_blocks",
    "stage_one_scores",
    "to_tiles",
]
