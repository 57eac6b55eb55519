"""The attention function and the mask function that Transformers calls: the only place that knows both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import BlockSelection, block_sparse_attention
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import SparseCacheLayerMixin, adopt
from .router import RoutingInputs, SparseRouter
from .segments import Segment, find_segments
from .selecting import select_blocks

ATTN_IMPLEMENTATION = "hf_sparse"


class Selector(Protocol):
    """Makes a selection: a `SparseRouter` wrapped by `learned_selector`, or a baseline."""

    def __call__(self, router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection: ...


def learned_selector(router: SparseRouter, inputs: RoutingInputs, query_tile: int) -> BlockSelection:
    """The layer's own two-stage router."""
    return select_blocks(router, inputs, query_tile)


@dataclass(frozen=True)
class SparseCall:
    """Options of one forward call, passed as ``model(..., sparse_call=SparseCall(...))``.

    Attributes:
        dense: attend densely in every layer (observers still see every layer's queries and keys).
        selector: makes the selection instead of the layer's router.
        observer: called as ``observer(router, inputs)`` for every document of every sparse layer.
        on_selection: called as ``on_selection(router, inputs, selection)`` for every selection that is used.
        decode_from: content position from which queries are routed singly (tiles of 1), as cached decoding does.
    """

    dense: bool = False
    selector: Selector = learned_selector
    observer: Callable[[SparseRouter, RoutingInputs], None] | None = None
    on_selection: Callable[[SparseRouter, RoutingInputs, BlockSelection], None] | None = None
    decode_from: int | None = None


class SparseAttentionMixin:
    """In front of a stock attention class: hands the layer's cache on to the attention function, nothing else."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self.config._attn_implementation == ATTN_IMPLEMENTATION:  # type: ignore[attr-defined]
            if cache is not None:
                kwargs["sparse_cache_layer"] = adopt(cache, self.layer_idx)  # type: ignore[attr-defined]
        elif kwargs.pop("sparse_call", None) is not None:
            raise ValueError(
                f"sparse_call was passed, but attn_implementation is {self.config._attn_implementation!r}: "  # type: ignore[attr-defined]
                f'call model.set_attn_implementation("{ATTN_IMPLEMENTATION}") first'
            )
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparse_call: SparseCall | None = None,
    sparse_cache_layer: SparseCacheLayerMixin | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered as ``attn_implementation="hf_sparse"``.

    ``query`` [B, H, Q, D], ``key`` and ``value`` [B, G, N, D] after RoPE and cache update; returns ([B, Q, H, D], None).

    Raises:
        ValueError: the layer has no router, or something is asked for that sparse attention cannot give.
    """
    router = _checked_router(module, dropout, kwargs)
    call = sparse_call or SparseCall()
    q_len, kv_len = query.shape[2], key.shape[2]
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(kv_len - q_len, kv_len, device=key.device)[None]
    positions = position_ids if sparse_cache_layer is None else sparse_cache_layer.record_positions(position_ids, kv_len)
    if kv_len < router.config.dense_below:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"sparse attention got a {attention_mask.ndim}-dimensional attention mask {tuple(attention_mask.shape)}; supported: None or a "
            'padding mask [batch, keys]. Pass the 2D mask, or run dense with model.set_attn_implementation("sdpa")'
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    segments = find_segments(query.shape[0], q_len, kv_len, attention_mask, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"))
    if len(segments) == 1 and segments[0].slots is None:
        out = _attend(router, _inputs(router, segments[0], query, key, positions, scale, sparse_cache_layer), value, call)
        return out.transpose(1, 2).contiguous(), None
    out = query.new_zeros(query.shape)
    for segment in segments:
        at = segment.query_slots(q_len, kv_len)
        inputs = _inputs(router, segment, query[:, :, at], key, positions, scale, sparse_cache_layer)
        out[segment.rows, :, at] = _attend(router, inputs, segment.keys(value), call)
    return out.transpose(1, 2).contiguous(), None


def _checked_router(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> SparseRouter:
    """The layer's router, or a ValueError that says what sparse attention cannot give."""
    router = getattr(module, "router", None)
    if router is None:
        raise ValueError(
            f'attn_implementation="{ATTN_IMPLEMENTATION}" needs a model with routers, and {type(module).__name__} has none: load it with '
            "from_pretrained(..., sparse_attention={...}) or convert it with hf_sparse_attn.sparsify(model, {...})"
        )
    if dropout:
        raise ValueError(
            f"sparse attention has no attention dropout, got attention_dropout={dropout}: set model.config.attention_dropout = 0.0"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "sparse attention never forms the attention matrix, so output_attentions=True cannot be answered: "
            'use model.set_attn_implementation("eager") for that call'
        )
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"sparse attention does not support {name} (asked for by {type(module).__name__}); supported: plain causal attention"
            )
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"sparse attention is causal, but {type(module).__name__} asks for bidirectional attention")
    return router  # type: ignore[no-any-return]


def _inputs(
    router: SparseRouter,
    segment: Segment,
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    scale: float,
    layer: SparseCacheLayerMixin | None,
) -> RoutingInputs:
    k, pos = segment.keys(key), segment.positions(positions)
    summaries = None if layer is None else layer.summaries(router, segment.rows, segment.slots, k.detach(), pos)
    return RoutingInputs(query[segment.rows], k, pos, scale, summaries)


def _attend(router: SparseRouter, inputs: RoutingInputs, value: Tensor, call: SparseCall) -> Tensor:
    """Attention of one document: [b, H, Q, D]."""
    detached = replace(inputs, q=inputs.q.detach(), k=inputs.k.detach())
    if call.observer is not None:
        call.observer(router, detached)
    if call.dense or router.layer in router.config.dense_layers:
        return dense_attention(inputs.q, inputs.k, value, inputs.scale)
    outputs = []
    for start, stop, query_tile in query_spans(router, inputs, call.decode_from):
        span = detached.span(start, stop)
        selection = call.selector(router, span, query_tile)
        if call.on_selection is not None:
            call.on_selection(router, span, selection)
        kv_len = span.k.shape[2]
        out, _ = block_sparse_attention(
            inputs.q[:, :, start:stop], inputs.k[:, :, :kv_len], value[:, :, :kv_len], selection, scale=inputs.scale
        )
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def query_spans(router: SparseRouter, inputs: RoutingInputs, decode_from: int | None) -> list[tuple[int, int, int]]:
    """Runs of queries that are routed alike: (start, stop, query tile).

    A call that continues a cache with fewer than ``query_tile`` new tokens decodes: tiles of 1.
    """
    q_len, kv_len = inputs.q.shape[2], inputs.k.shape[2]
    tile = router.config.query_tile
    if q_len < kv_len and q_len < tile:
        return [(0, q_len, 1)]
    cut = q_len if decode_from is None else min(max(decode_from - (kv_len - q_len), 0), q_len)
    return [span for span in ((0, cut, tile), (cut, q_len, 1)) if span[0] < span[1]]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Stock causal attention of ``q`` [B, H, Q, D], the last Q of the N tokens of ``k`` and ``v`` [B, G, N, D]."""
    q_len, kv_len = q.shape[2], k.shape[2]
    hg = q.shape[1] // k.shape[1]
    if q_len == 1:  # the heads of a KV group are the rows of one matmul
        out = F.scaled_dot_product_attention(q.reshape(q.shape[0], k.shape[1], hg, -1), k, v, scale=scale)
        return out.reshape(q.shape)
    mask = None if q_len == kv_len else torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=hg > 1)


def sparse_attention_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, config: Any = None, **kwargs: Any
) -> Tensor | None:
    """Mask function registered beside the attention function.

    Below ``dense_below`` keys the stock SDPA mask; above, None or the 2D padding mask. Packed documents are recognised
    by the attention function from ``position_ids`` or ``cu_seq_lens_q``.

    Raises:
        ValueError: the model overlays a mask of its own that sparse attention cannot honour.
    """
    sparse = getattr(config, "sparse_attention", None)
    if sparse is None or kv_length < sparse["dense_below"]:
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, config=config, **kwargs)
    if kwargs.get("use_vmap"):
        raise ValueError(
            "sparse attention supports causal attention with padding and packed documents; this model or call overlays another mask. "
            'Run it dense with model.set_attn_implementation("sdpa")'
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask
