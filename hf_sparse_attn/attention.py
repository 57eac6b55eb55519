"""The attention function and the mask function that Transformers calls: the only place that knows both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from hf_sparse_attn_kernels import BlockSelection, block_sparse_attention
from torch import Tensor, nn

from .cache import SparseCacheLayerMixin, adopt
from .checks import ATTN_IMPLEMENTATION, check_call, refuse_without_router
from .dense import dense_attention, is_causal, stock_attention
from .router import RoutingInputs, SparseRouter
from .segments import Segment, cut_documents, find_segments, read_mask
from .selecting import select_blocks

CACHE_ARGUMENTS = ("past_key_values", "layer_past")  # what attention modules call their cache


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
        cache = next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        if self.config._attn_implementation == ATTN_IMPLEMENTATION:  # type: ignore[attr-defined]
            if cache is not None:
                kwargs["sparse_cache_layer"] = adopt(cache, self.layer_idx)  # type: ignore[attr-defined]
        elif kwargs.pop("sparse_call", None) is not None:
            raise ValueError(
                f"sparse_call was passed, but attn_implementation is {self.config._attn_implementation!r}: "  # type: ignore[attr-defined]
                f'call model.set_attn_implementation("{ATTN_IMPLEMENTATION}") first'
            )
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class _Layer:
    """What a call and its layer add to queries and keys."""

    router: SparseRouter
    call: SparseCall
    scale: float
    causal: bool
    softcap: float | None
    sinks: Tensor | None
    cache: SparseCacheLayerMixin | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Tensor:
        return block_sparse_attention(q, k, v, selection, scale=self.scale, softcap=self.softcap, sinks=self.sinks)[0]


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
    router = getattr(module, "router", None)
    if router is None:
        refuse_without_router(module, kwargs)
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    check_call(router, module, query, key, value, dropout, kwargs)
    q_len = query.shape[2]
    kv_len = key.shape[2] if sparse_cache_layer is None else sparse_cache_layer.filled(key.shape[2])
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(kv_len - q_len, kv_len, device=key.device)[None]
    positions = position_ids if sparse_cache_layer is None else sparse_cache_layer.record_positions(position_ids, kv_len)
    if kv_len < router.config.dense_below:
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    layer = _Layer(
        router,
        sparse_call or SparseCall(),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal(module, kwargs),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
        sparse_cache_layer,
    )
    segments = _segments(query.shape[0], q_len, kv_len, attention_mask, layer.causal, kwargs)
    return _attend_segments(layer, segments, query, key[:, :, :kv_len], value[:, :, :kv_len], positions), None


def _segments(batch: int, q_len: int, kv_len: int, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]) -> list[Segment]:
    if mask is not None and mask.ndim == 4:
        real, starts = read_mask(mask[..., :kv_len], q_len, causal)
        return cut_documents(batch, q_len, kv_len, real.expand(batch, -1), starts)
    if mask is not None and (mask.ndim != 2 or mask.shape[1] < kv_len):
        raise ValueError(
            f"sparse attention got an attention mask {tuple(mask.shape)} for {kv_len} keys; supported: None, a padding mask "
            '[batch, keys] or a 4D mask [batch, 1, queries, keys]. Or run dense with model.set_attn_implementation("sdpa")'
        )
    mask = None if mask is None else mask[:, :kv_len].bool()
    # stock bidirectional attention takes position_ids as they are: they do not cut documents
    position_ids = kwargs.get("position_ids") if causal else None
    return find_segments(batch, q_len, kv_len, mask, position_ids, kwargs.get("cu_seq_lens_q"))


def _attend_segments(layer: _Layer, segments: list[Segment], query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Attention of every document: [B, Q, H, D]; queries that are padding get zeros."""
    if len(segments) == 1 and segments[0].slots is None:
        out = _attend(layer, _inputs(layer, segments[0], query, key, positions), value)
        return out.transpose(1, 2).contiguous()
    out = query.new_zeros(query.shape)
    for segment in segments:
        at = segment.query_slots(query.shape[2], key.shape[2])
        inputs = _inputs(layer, segment, query[:, :, at], key, positions)
        out[segment.rows, :, at] = _attend(layer, inputs, segment.keys(value))
    return out.transpose(1, 2).contiguous()


def _inputs(layer: _Layer, segment: Segment, query: Tensor, key: Tensor, positions: Tensor) -> RoutingInputs:
    k, pos = segment.keys(key), segment.positions(positions)
    summaries = None
    if layer.cache is not None:
        summaries = layer.cache.summaries(layer.router, segment.rows, segment.slots, k.detach(), pos)
    return RoutingInputs(query[segment.rows], k, pos, layer.scale, summaries, layer.causal)


def _attend(layer: _Layer, inputs: RoutingInputs, value: Tensor) -> Tensor:
    """Attention of one document: [b, H, Q, D]."""
    router, call = layer.router, layer.call
    detached = replace(inputs, q=inputs.q.detach(), k=inputs.k.detach())
    if call.observer is not None:
        call.observer(router, detached)
    if call.dense or router.layer in router.config.dense_layers:
        return dense_attention(inputs.q, inputs.k, value, layer.scale, layer.causal, layer.softcap, layer.sinks)
    outputs = []
    for start, stop, query_tile in query_spans(router, inputs, call.decode_from):
        span = detached.span(start, stop)
        selection = call.selector(router, span, query_tile)
        if call.on_selection is not None:
            call.on_selection(router, span, selection)
        kv_len = span.k.shape[2]
        outputs.append(layer.attend(inputs.q[:, :, start:stop], inputs.k[:, :, :kv_len], value[:, :, :kv_len], selection))
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
