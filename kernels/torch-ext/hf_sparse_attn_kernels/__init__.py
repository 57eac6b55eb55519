"""Maths on tensors for two-stage sparse attention: attention over a selection, pooled features, block mass, top-k.

Imports only the standard library, torch and itself.
"""

from .attention import block_sparse_attention
from .gathered import hide_after
from .gathering import Scratch, as_rows, gather_blocks, gather_visible, to_tiles
from .implementations import IMPLEMENTATIONS, default_implementation
from .scoring import block_mass, coarse_scores, fine_mass, pooled_features
from .selection import BlockSelection, TileGrid, ordered_topk

__all__ = [
    "IMPLEMENTATIONS",
    "BlockSelection",
    "Scratch",
    "TileGrid",
    "as_rows",
    "block_mass",
    "block_sparse_attention",
    "coarse_scores",
    "default_implementation",
    "fine_mass",
    "gather_blocks",
    "gather_visible",
    "hide_after",
    "ordered_topk",
    "pooled_features",
    "to_tiles",
]
