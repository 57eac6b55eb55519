"""`block_sparse_attention`: one operation, several implementations."""

# Shape legend: B batch, H query heads, G KV heads, N keys, Q queries, D head dim.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .checking import check_attention
from .cpp_kernels.attention import block_sparse_attention_cpp
from .cpp_kernels.support import unsupported as unsupported_by_cpp
from .implementations import IMPLEMENTATIONS, choose
from .options import ScoreOptions
from .reference import block_sparse_attention_reference
from .selection import BlockSelection
from .torch_kernels.attention import block_sparse_attention_torch
from .triton_kernels.support import unsupported as unsupported_by_triton

Attend = Callable[[Tensor, Tensor, Tensor, BlockSelection, ScoreOptions, bool], tuple[Tensor, Tensor | None]]

ATTEND: dict[str, Attend] = {
    "reference": block_sparse_attention_reference,
    "torch": block_sparse_attention_torch,
    "cpp": block_sparse_attention_cpp,
}


# s_ij = scale · q_i · k_j, capped; lse_i = log(Σ_{j ∈ N(i)} exp s_ij [+ exp sink_h]);
# out_i = Σ_{j ∈ N(i)} exp(s_ij − lse_i) · v_j over N(i), the visible keys of the blocks that the tile of i keeps.
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact softmax attention over the keys of the kept blocks, causal unless ``selection.grid`` says otherwise.

    Args:
        q: queries ``[B, H, Q, D]``, the last Q of the N tokens.
        k, v: keys and values ``[B, G, N, D]``; H must be a multiple of G. Same dtype as ``q``.
        selection: kept blocks per query tile, see `BlockSelection`.
        scale: multiplies q·k; ``D ** -0.5`` if None.
        softcap: if given, a score s becomes ``softcap · tanh(s / softcap)`` before masking.
        sinks: ``[H]``, one more logit per head in the denominator of the softmax, without a value.
        impl: "reference" (dense mask, any dtype: the specification), "torch" (gathered, bounded memory, any torch
            device), "cpp" (compiled at first use, CPU), "triton" (GPU) or None for the default. A named implementation
            never falls back to another.
        return_lse: also return the log-sum-exp of the scores (sinks included), ``[B, H, Q]``, −inf for a row that sees
            nothing.

    Returns:
        (out ``[B, H, Q, D]``, lse or None). A row that sees no key, or belongs to no document, is all zeros.

    Raises:
        ValueError: unknown ``impl``, inputs that it does not support, tensors whose shapes, dtypes or devices do not
            fit each other, or a selection that does not fit (on a CPU also one whose lists are not ascending or name
            blocks that their tile does not see).
    """
    check_attention(q, k, v, sinks)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no cap")
    selection.check(q, k)
    options = ScoreOptions(max(q.shape[-1], 1) ** -0.5 if scale is None else scale, softcap, sinks)
    grid = selection.grid
    if not selection.indices.shape[-1]:  # empty lists are lists of one empty entry
        selection = replace(selection, indices=selection.indices.new_full((*selection.indices.shape[:3], 1), -1))
    lacking = {
        "triton": lambda: unsupported_by_triton(q, grid.query_tile, grid.block_size),
        "cpp": lambda: unsupported_by_cpp(q, v, block_size=grid.block_size),
    }
    chosen = choose(impl, IMPLEMENTATIONS, q.device.type, lacking)
    if not q.numel():
        return _nothing(q, k, v, sinks, return_lse)
    if chosen == "triton":
        from .triton_kernels.attention import block_sparse_attention_triton

        return block_sparse_attention_triton(q, k, v, selection, options, return_lse)
    attend = ATTEND[chosen]
    if selection.documents is not None and chosen != "cpp":
        return _by_document(attend, q, k, v, selection, options, return_lse)
    return attend(q, k, v, selection, options, return_lse)


def _nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The results of a call without queries, heads or columns; the gradients of what it was given are zero."""
    # sums times zero keep the inputs in the graph, so that each of them gets a gradient
    zero = sum((x.sum() * 0 for x in (q, k, v, sinks) if x is not None and x.requires_grad), start=q.new_zeros(()))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    return zero.expand(q.shape).clone(), lse if return_lse else None


def _by_document(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: ScoreOptions, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Each document by itself; queries of no document keep zeros and an lse of −inf."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)) if return_lse else None
    for row, first, part in selection.by_document(q.shape[0]):
        # the document's keys are a run of slots; its queries are the last of these
        slots = slice(first, first + part.grid.kv_len)
        end = slots.stop - selection.grid.q_offset
        at = (slice(row, row + 1), slice(None), slice(end - part.grid.q_len, end))
        part_out, part_lse = attend(
            q[at], k[row : row + 1, :, slots], v[row : row + 1, :, slots], part, options, return_lse
        )
        out[at] = part_out
        if lse is not None and part_lse is not None:
            lse[at] = part_lse
    return out, lse
