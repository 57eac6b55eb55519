"""`block_sparse_attention` in C++: fake results and gradients of the operators in ``source/binding.cpp``."""

# Shape legend: B batch, H query heads, Q queries.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import ScoreOptions
from ..selection import BlockSelection
from ..tiles import unit_stride


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(q.shape[:3], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, documents, sinks, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, indices, documents, sinks, *output)
    # None for an output that no loss used, instead of a tensor of zeros
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, indices, documents, sinks, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else unit_stride(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    operands = (grad_out, grad_lse, q, k, v, out, lse, indices, documents)
    dq, dk, dv, delta = torch.ops.hf_sparse_attn_cpp.backward(*operands, *ctx.options)
    # dsink_h = −Σ_i exp(sink_h − lse_i) · δ_i with δ_i = out_i · dout_i − dlse_i
    dsinks = None
    if sinks is not None:
        weight = torch.exp(sinks[:, None] - lse)
        if documents is not None:
            weight = weight.masked_fill(lse == -torch.inf, 0)  # of a query of no document
        dsinks = -(weight * delta).sum((0, 2))
    return dq, dk, dv, None, None, dsinks, *(None for _ in ctx.options)


def register() -> None:
    """Tell torch about the operators, once the library is loaded."""
    torch.library.register_fake("hf_sparse_attn_cpp::forward", _fake_forward)
    torch.library.register_fake("hf_sparse_attn_cpp::backward", _fake_backward)
    torch.library.register_autograd("hf_sparse_attn_cpp::forward", _backward, setup_context=_setup_context)


def block_sparse_attention_cpp(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, options: ScoreOptions, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `block_sparse_attention`."""
    grid = selection.grid
    q, k, v = (unit_stride(x) for x in (q, k, v))
    documents = None if selection.documents is None else selection.documents.contiguous()
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    out, lse = torch.ops.hf_sparse_attn_cpp.forward(
        *(q, k, v, selection.indices.contiguous(), documents, sinks, grid.query_tile, grid.block_size, grid.causal),
        *(options.scale, options.softcap or 0.0),
    )
    return out, lse if return_lse else None
