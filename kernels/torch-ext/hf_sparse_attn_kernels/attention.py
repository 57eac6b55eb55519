"""`block_sparse_attention`: one operation, several implementations."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from .gathered import block_sparse_attention_torch
from .reference import block_sparse_attention_reference
from .selection import BlockSelection

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "torch")


@cache
def default_implementation(device_type: str) -> str:
    """The implementation used when none is named, logged once per kind of device."""
    logger.info("block_sparse_attention on %s: implementation 'torch' (gathered, chunked)", device_type)
    return "torch"


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact causal softmax attention over the keys of the kept blocks.

    Args:
        q: queries ``[B, H, Q, D]``, the last Q of the N tokens.
        k, v: keys and values ``[B, G, N, D]``; H must be a multiple of G. Same dtype as ``q``.
        selection: kept blocks per query tile, see `BlockSelection`.
        scale: multiplies q·k; ``D ** -0.5`` if None.
        impl: "reference" (dense mask, any dtype: the specification), "torch" (gathered, bounded memory, any torch
            device) or None for the default. A named implementation never falls back to another.
        return_lse: also return the log-sum-exp of the scaled scores, ``[B, H, Q]``, −inf for a row that sees nothing.

    Returns:
        (out ``[B, H, Q, D]``, lse or None). A row that sees no key is all zeros.

    Raises:
        ValueError: unknown ``impl``, a dtype mismatch, or a selection that does not fit the shapes.
    """
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not an implementation of block_sparse_attention; supported: {', '.join(IMPLEMENTATIONS)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    selection.check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (impl or default_implementation(q.device.type)) == "reference":
        out, lse = block_sparse_attention_reference(q, k, v, selection, scale)
        return out, lse if return_lse else None
    return block_sparse_attention_torch(q, k, v, selection, scale, return_lse)
