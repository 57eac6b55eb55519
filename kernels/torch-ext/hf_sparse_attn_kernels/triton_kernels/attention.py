"""`block_sparse_attention` in Triton: custom operators around the forward and backward kernels."""

# Shape legend: B batch, H query heads, G KV heads, N keys, Q queries, D head dim.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import ScoreOptions
from ..selection import BlockSelection
from ..tiles import unit_stride
from .backward_keys import dkv_kernel, reduce_kernel
from .backward_queries import delta_kernel, dq_kernel
from .forward import combine_kernel, forward_kernel
from .inverse import invert
from .launch import SIMPLE, architecture, decode_splits, launches, padded, processors, row_tile


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("hf_sparse_attn_kernels::forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    documents: Tensor | None,
    sinks: Tensor | None,
    query_tile: int,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Q, D] contiguous, lse [B, H, Q] float32);
    softcap 0 = none, splits 0 = as many as the launch table says.
    """
    q, k, v, indices = unit_stride(q), unit_stride(k), unit_stride(v), indices.contiguous()
    b, heads, q_len, d = q.shape
    groups, kv_len = k.shape[1:3]
    rows, tiles, width = indices.shape[0], indices.shape[2], indices.shape[3]
    launch = launches(architecture(q.device.type, q.device.index), q.dtype, d).forward
    block_m = row_tile(launch, query_tile * heads // groups)
    parts = -(-query_tile * (heads // groups) // block_m)
    if splits == 0:
        programs = rows * groups * tiles * parts
        most = processors(q.device.type, q.device.index)
        splits = decode_splits(programs, width, block_size, launch.block_n, most) if query_tile == 1 else 1
    # with documents some slots belong to none, and no program writes them: zeros
    fill = torch.empty if documents is None else torch.zeros
    out = fill(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    # a split list's partial outputs stay float32 until they are merged
    part = out if splits == 1 else out.new_empty((splits, *q.shape), dtype=torch.float32)
    part_lse = lse if splits == 1 else lse.new_full((splits, *q.shape[:3]), -torch.inf)
    if splits > 1 and documents is not None:
        part.zero_()
    if rows and tiles:
        forward_kernel[(tiles * parts * splits, groups, rows)](
            q,
            k,
            v,
            part,
            part_lse,
            indices,
            indices if documents is None else documents.contiguous(),
            lse if sinks is None else sinks.contiguous(),
            *_strides(q, k, v),
            b,
            groups,
            q_len,
            kv_len,
            tiles,
            width,
            scale,
            softcap,
            HG=heads // groups,
            D=d,
            DP=padded(d),
            T=query_tile,
            S=block_size,
            BLOCK_M=block_m,
            BLOCK_N=launch.block_n,
            SPLITS=splits,
            CAUSAL=causal,
            HAS_DOCS=documents is not None,
            HAS_SINKS=sinks is not None,
            SOFTCAP=softcap > 0,
            **launch.options,
        )
    if splits > 1:
        count = lse.numel()
        power = 1 << (splits - 1).bit_length()
        combine_kernel[(count,)](
            part, part_lse, out, lse, count, D=d, DP=padded(d), SPLITS=splits, SP=power, **SIMPLE.options
        )
    return out, lse


@forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_sparse_attn_kernels::backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    documents: Tensor | None,
    query_tile: int,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float,
    chunk_tiles: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq [B, H, Q, D], dk, dv [B, G, N, D], delta [B, H, Q] float32), contiguous; chunk_tiles 0 = the table's."""
    grad_out, q, k, v, indices = *(unit_stride(x) for x in (grad_out, q, k, v)), indices.contiguous()
    b, heads, q_len, d = q.shape
    groups, kv_len = k.shape[1:3]
    rows, tiles, width = indices.shape[0], indices.shape[2], indices.shape[3]
    table = launches(architecture(q.device.type, q.device.index), q.dtype, d)
    shape = {"HG": heads // groups, "D": d, "DP": padded(d), "T": query_tile, "S": block_size}
    flags = {"CAUSAL": causal, "HAS_DOCS": documents is not None, "SOFTCAP": softcap > 0}
    # a pointer that is never read, where there are no documents
    docs = indices if documents is None else documents.contiguous()
    delta = torch.empty_like(lse)
    fill = torch.empty if documents is None else torch.zeros
    dq, dk, dv = (fill(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta_kernel[(-(-q_len // 64), heads, b)](
        out,
        grad_out,
        grad_lse.contiguous(),
        delta,
        *_strides(grad_out),
        heads,
        q_len,
        D=d,
        DP=padded(d),
        BLOCK_M=64,
        **SIMPLE.options,
    )
    if not (rows and tiles):
        return dq, dk, dv, delta

    block_m = row_tile(table.dq, query_tile * heads // groups)
    parts = -(-query_tile * (heads // groups) // block_m)
    dq_kernel[(tiles * parts, groups, rows)](
        *(
            q,
            k,
            v,
            grad_out,
            dq,
            lse,
            delta,
            indices,
            docs,
            *_strides(q, k, v, grad_out),
            groups,
            q_len,
            kv_len,
            tiles,
            width,
        ),
        *(scale, softcap),
        **shape,
        **flags,
        BLOCK_M=block_m,
        BLOCK_N=table.dq.block_n,
        **table.dq.options,
    )
    blocks = -(-kv_len // block_size)
    inverse = invert(indices, blocks, block_size, b, documents, chunk_tiles or None)
    bins, block_n = rows * groups * blocks, min(block_size, table.dkv.block_n)
    part = q.new_empty((2, inverse.slot_count, block_size, d), dtype=torch.float32)
    lists = (inverse.tiles, inverse.starts, inverse.work, inverse.slots)
    sizes = (groups, q_len, kv_len, blocks, bins, inverse.chunk, inverse.slot_count)
    dkv_kernel[(len(inverse.work), block_size // block_n)](
        *(
            q,
            k,
            v,
            grad_out,
            dk,
            dv,
            part,
            lse,
            delta,
            docs,
            *lists,
            *_strides(q, k, v, grad_out),
            *sizes,
            scale,
            softcap,
        ),
        **shape,
        **flags,
        BLOCK_M=table.dkv.block_m,
        BLOCK_N=block_n,
        **table.dkv.options,
    )
    if len(inverse.popular):
        reduce_kernel[(len(inverse.popular), block_size // 16, 2)](
            *(part, dk, dv, docs, inverse.starts, inverse.slots, inverse.popular, *sizes),
            D=d,
            DP=padded(d),
            S=block_size,
            BLOCK_N=16,
            HAS_DOCS=documents is not None,
            **SIMPLE.options,
        )
    return dq, dk, dv, delta


@backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(q.shape[:3], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, documents, sinks, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, indices, documents, sinks, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, documents, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, delta = backward(grad_out, grad_lse, q, k, v, out, lse, indices, documents, *ctx.options, 0)
    # dsink_h = −Σ_i exp(sink_h − lse_i) · δ_i with δ_i = out_i · dout_i − dlse_i
    dsinks = None
    if sinks is not None:
        # −inf: a query of no document
        weight = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0)
        dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, None, None, dsinks, None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)


def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    options: ScoreOptions,
    return_lse: bool = False,
    splits: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """See `block_sparse_attention`; ``splits`` forces the number of programs that share the list of a query (tiles of
    1).

    A key or value that is not finite never reaches a query that does not see it. A query that does see one gets NaN,
    for a value in one of the tile's own blocks in all columns.
    """
    grid = selection.grid
    sizes = (grid.query_tile, grid.block_size, grid.causal)
    scoring = (options.scale, options.softcap or 0.0)
    out, lse = forward(q, k, v, selection.indices, selection.documents, options.sinks, *sizes, *scoring, splits)
    return out, lse if return_lse else None
