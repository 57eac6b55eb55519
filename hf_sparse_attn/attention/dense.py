"""Dense attention: as the stock model computes it, and causal or bidirectional over whole documents."""

# Shape legend: B batch, H query heads, G KV heads, N keys, Q queries, D head dim.

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .call import Attention, is_causal
from .documents import Layout
from .segments import Segment

DENSE_TILE = 64  # queries and keys of the tiles of dense attention with a cap or sinks


def stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the stock model computes: SDPA, or the model's own eager function where SDPA knows no soft cap or sinks.

    ``attention_mask`` is None, boolean or additive, 4-dimensional.
    """
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # SDPA knows causal calls without a mask, eager functions add what mask they are given
    if attention_mask is None and is_causal(module, kwargs):
        q_len, kv_len = query.shape[2], key.shape[2]
        attention_mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # the dtype's least value, as in Transformers' masks: a row of −inf alone would give NaN
        zeros = query.new_zeros(())
        attention_mask = torch.where(attention_mask, zeros, torch.finfo(query.dtype).min)
    out, _ = _eager(module)(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return out, None


def stock_attention_of_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    segments: list[Segment] | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`stock_attention` of every packed document by itself:
    stock SDPA has no other way to tell them apart than a mask.
    """
    if segments is None:
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for segment in segments:
        mask = None if attention_mask is None else segment.links(attention_mask)
        q, k, v = (segment.keys(x) for x in (query, key, value))
        at = slice(None) if segment.slots is None else segment.slots
        out[segment.rows, at] = stock_attention(module, q, k, v, mask, scaling, dropout, **kwargs)[0]
    return out, None


def attend_without_router(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The local attention of a layer that has no router, as the stock model computes it;
    packed documents do not see each other.
    """
    layout = Layout(
        query.shape[0],
        query.shape[2],
        key.shape[2],
        attention_mask,
        is_causal(module, kwargs),
        kwargs.get("position_ids"),
        kwargs.get("cu_seq_lens_q"),
    )
    if torch.compiler.is_compiling():  # a graph must not depend on where documents start
        attention_mask, segments = layout.mask_of_documents(), None
    else:
        segments = layout.packed()
    return stock_attention_of_documents(module, query, key, value, attention_mask, scaling, dropout, segments, **kwargs)


def stock_mask(
    mask: Tensor | None, q_len: int, kv_len: int, slots: int, causal: bool, device: torch.device
) -> Tensor | None:
    """The boolean mask [B or 1, 1, Q, slots] of a call whose last Q of N filled slots are queries, by its padding
    ``mask`` [B, at least N].

    None where there is nothing to hide.
    """
    if mask is None and slots == kv_len:
        return None
    slot = torch.arange(slots, device=device, dtype=torch.int64)
    last = (
        torch.arange(kv_len - q_len, kv_len, device=device, dtype=torch.int64)
        if causal
        else torch.full((q_len,), kv_len - 1, device=device, dtype=torch.int64)
    )
    # also hides a static cache's slots behind the N that are filled
    visible = (slot <= last[:, None])[None, None]
    return (
        visible
        if mask is None
        else visible & F.pad(mask[:, :slots].bool(), (0, max(slots - mask.shape[1], 0)))[:, None, None]
    )


def attend_as_stock(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, request: Attention, layout: Layout
) -> Tensor:
    """Attention [B, Q, H, D] of a layer as the stock model computes it; packed documents do not see each other."""
    mask = request.attention_mask
    if mask is None or mask.ndim == 2:
        mask = stock_mask(mask, layout.q_len, layout.kv_len, key.shape[2], request.causal, key.device)
    options = {"softcap": request.softcap, "s_aux": request.sinks, "is_causal": request.causal}
    return stock_attention_of_documents(
        module, query, key, value, mask, request.scale, 0.0, layout.packed(), **options
    )[0]


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The eager attention function beside the stock class of an attention module."""
    # the sparse class stands in a module of this package, the stock class further down its MRO
    beside = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    eager: Callable[..., tuple[Tensor, Any]] = next(
        m.eager_attention_forward for m in beside if hasattr(m, "eager_attention_forward")
    )
    return eager


# out_i = Σ_j softmax_j(scale · q_i · k_j) · v_j over all visible keys j (arXiv 1706.03762, eq. 1).
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Dense attention of ``q`` [B, H, Q, D], the last Q of the N tokens of ``k`` and ``v`` [B, G, N, D]."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if softcap is not None or sinks is not None:
        # SDPA has neither cap nor sinks; block-sparse attention over all blocks is the same sum
        selection = _every_block(TileGrid(q_len, kv_len, 1 if q_len == 1 else DENSE_TILE, DENSE_TILE, causal), k)
        return block_sparse_attention(q, k, v, selection, scale=scale, softcap=softcap, sinks=sinks)[0]
    hg = q.shape[1] // k.shape[1]
    if q_len == 1:  # the heads of a KV group are the rows of one matmul
        out = F.scaled_dot_product_attention(q.reshape(q.shape[0], k.shape[1], hg, -1), k, v, scale=scale)
        return out.reshape(q.shape)
    if not causal:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=hg > 1)
    # SDPA's `is_causal` lines up the first query with the first key, which is wrong after a past
    mask = (
        None if q_len == kv_len else torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
    )
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=hg > 1
    )


def _every_block(grid: TileGrid, k: Tensor) -> BlockSelection:
    """All blocks that each tile sees."""
    return BlockSelection(grid.visible_blocks(k.device).expand(*k.shape[:2], -1, -1).contiguous(), grid)
