"""Maths on tensors for two-stage sparse attention: attention over a selection, pooled features, block mass, top-k.

Imports only the standard library, torch and itself.
"""

from .attention import IMPLEMENTATIONS, block_sparse_attention, default_implementation
from .features import block_mass, pooled_features
from .gathered import hide_after
from .gathering import Scratch, as_rows, gather_blocks, gather_visible, to_tiles
from .selection import BlockSelection, TileGrid, ordered_topk

__all__ = [
    "IMPLEMENTATIONS",
    "BlockSelection",
    "Scratch",
    "TileGrid",
    "as_rows",
    "block_mass",
    "block_sparse_attention",
    "default_implementation",
    "gather_blocks",
    "gather_visible",
    "hide_after",
    "ordered_topk",
    "pooled_features",
    "to_tiles",
]
