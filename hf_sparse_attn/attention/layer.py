"""One call of a layer's attention: documents, routing, attention over the selection."""

# Shape legend: B batch, b rows of a document, H query heads, G KV heads, N keys, Q queries, D head dim.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, reduce

import torch
from hf_sparse_attn_kernels import BlockSelection, block_sparse_attention, join_documents
from torch import Tensor, nn

from ..router.module import RoutingInputs, SparseRouter, active_router
from . import static_decode
from .cache import SparseCacheLayerMixin
from .call import Attention, SparseCall
from .checks import refuse_split_sequences
from .dense import attend_as_stock, dense_attention
from .documents import Layout
from .gradients import attach
from .segments import Segment

# so many tiles of documents of all lengths may always be joined: their lists take some megabytes
PADDED_TILES = 1 << 14


class Way(Enum):
    """How a layer answers a call."""

    STOCK = "as the stock model, for short inputs"
    DENSE = "densely, document by document"
    SPARSE = "over the blocks that its router keeps"


@dataclass(frozen=True)
class _Layer:
    """A layer and what is asked of it in a call with ``kv_len`` keys."""

    router: SparseRouter
    cache: SparseCacheLayerMixin | None
    call: SparseCall
    request: Attention
    kv_len: int

    @cached_property
    def way(self) -> Way:
        """The one place where dense or sparse is decided."""
        config, budgets = self.router.config, self.router.budgets
        if self.kv_len < config.dense_below:
            return Way.STOCK
        dense = (
            self.call.dense or self.router.layer in config.dense_layers or (budgets is not None and budgets.is_dense)
        )
        return Way.DENSE if dense else Way.SPARSE


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: Attention,
    cache: SparseCacheLayerMixin | None = None,
    call: SparseCall | None = None,
) -> Tensor:
    """Attention of the layer ``module``: sparse, or as the stock model computes it below ``dense_below`` keys.

    ``query`` [B, H, Q, D], ``key`` and ``value`` [B, G, N, D], of which ``request.filled`` slots hold tokens: [B, Q, H,
    D].
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # its products would round what the router keeps in float32
        with torch.autocast(device, enabled=False):
            return attend(module, query, key, value, request, cache, call)
    refuse_split_sequences()
    attached = None if call is None else call.on_layer(active_router(module.router))
    out = _attend_layer(module, query, key, value, request, cache, call)
    # a frozen backbone needs no graph
    return attach(out, [attached]) if attached is not None and out.requires_grad else out


def _attend_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: Attention,
    cache: SparseCacheLayerMixin | None,
    call: SparseCall | None,
) -> Tensor:
    router: SparseRouter = module.router  # type: ignore[assignment]
    q_len = query.shape[2]
    kv_len = key.shape[2] if request.filled is None else int(request.filled)
    # before any way out: the cache notes the positions of every call
    positions = _positions(request, q_len, kv_len, cache, key.device)
    layout = Layout(
        query.shape[0], q_len, kv_len, request.attention_mask, request.causal, request.position_ids, request.cu_seq_lens
    )
    if q_len > 1 and cache is not None and request.filled is not None and static_decode.wanted(query.device):
        _prepare_steps(cache, router, key, positions, request, layout)
    layer = _Layer(router, cache, call or SparseCall(), request, kv_len)
    if layer.way is Way.STOCK:
        if q_len == 1 and cache is not None:
            cache.steps = cache.steps_by = None  # this step leaves no summary
        return attend_as_stock(module, query, key, value, request, layout)
    return _attend_segments(layer, layout.segments(), query, key[:, :, :kv_len], value[:, :, :kv_len], positions)


def _prepare_steps(
    cache: SparseCacheLayerMixin,
    router: SparseRouter,
    key: Tensor,
    positions: Tensor,
    request: Attention,
    layout: Layout,
) -> None:
    """Let the steps that follow be those of `static_decode`, if it can make them:
    no row is padded, and positions run through.
    """
    running, past = active_router(router), layout.kv_len - layout.q_len
    plain = [(part.slots, part.consecutive) for part in layout.segments()] == [(None, True)]
    goes_on = not past or (cache.steps is not None and bool((positions[:, past - 1 : past + 1].diff() == 1).all()))
    if plain and goes_on and static_decode.supports(running, request):
        table = static_decode.budget_table(running.config, key.shape[2], key.device)
        cache.prepare_steps(router, key[:, :, : layout.kv_len].detach(), positions, key.shape[2], table)
    else:
        cache.steps = cache.steps_by = None


def made_on_the_device(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: Attention,
    cache: SparseCacheLayerMixin | None,
) -> Tensor | None:
    """Attention [B, 1, H, D] of a step after a static cache that waits for nothing, None where it has to be made by
    `attend`.
    """
    if cache is None or cache.steps is None or cache.router_keys is None or query.shape[2] != 1:
        return None
    router = active_router(module.router)
    if (
        cache.steps_by is not router
        or cache.steps_config is not router.config
        or not static_decode.supports(router, request)
    ):
        return None
    return static_decode.decode(router, cache.router_keys, cache.steps, query, key, value, request).transpose(1, 2)


def _positions(
    request: Attention, q_len: int, kv_len: int, cache: SparseCacheLayerMixin | None, device: torch.device
) -> Tensor:
    """Rotary positions [1 or B, N] of all keys."""
    position_ids = request.position_ids
    if position_ids is None:
        position_ids = torch.arange(kv_len - q_len, kv_len, device=device, dtype=torch.int64)[None]
    if cache is not None:
        return cache.record_positions(position_ids, kv_len)
    past = kv_len - position_ids.shape[1]
    before = position_ids[:, :1] + torch.arange(-past, 0, device=device, dtype=torch.int64)
    return torch.cat([before, position_ids], 1) if past else position_ids


def _attend_segments(
    layer: _Layer, segments: list[Segment], query: Tensor, key: Tensor, value: Tensor, positions: Tensor
) -> Tensor:
    """Attention of every document: [B, Q, H, D]; queries that are padding get zeros.

    Each document is routed by itself. All whose slots are a run without holes are then attended in one call.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    # documents with holes, or with none or several selections
    apart: Tensor | None = None
    routed: list[tuple[Tensor, BlockSelection]] = []
    for segment in segments:
        at = segment.query_slots(q_len, kv_len)
        inputs = _inputs(layer, segment, query[segment.rows, :, at], key, value, positions)
        selections = _route(layer, inputs)
        if segment.place is None:  # the only one, which has all slots
            return _attend(layer, inputs, selections).transpose(1, 2).contiguous()
        if segment.extent is not None and len(selections) == 1:
            routed.append((segment.place, selections[0]))
            continue
        apart = query.new_zeros(query.shape) if apart is None else apart
        apart[segment.rows, :, at] = _attend(layer, inputs, selections)
    outputs = [
        _attend_selection(layer, query, key, value, selection) for selection in joint_selections(routed, q_len, kv_len)
    ]
    if apart is not None:
        outputs.append(apart)
    if not outputs:  # only padding
        outputs.append(attach(query.new_zeros(query.shape), (query, key, value)))
    # a query is in one of the outputs, and zero in the others
    return reduce(torch.add, outputs).transpose(1, 2).contiguous()


def _inputs(layer: _Layer, segment: Segment, q: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> RoutingInputs:
    """One document's queries ``q``, and its part of the rest."""
    k, pos = segment.keys(key), segment.positions(positions)
    summaries = None
    if layer.cache is not None:
        summaries = layer.cache.summaries(
            layer.router, key.shape[0], segment.rows, segment.slots_on_host, k.detach(), pos
        )
    request = layer.request
    return RoutingInputs(q, k, pos, request.scale, summaries, request.causal, segment.keys(value), segment.consecutive)


def _route(layer: _Layer, inputs: RoutingInputs) -> list[BlockSelection]:
    """What each span of a document's queries keeps, see `query_spans`; nothing where the layer attends densely."""
    router, call, inputs = layer.router, layer.call, inputs.detached()
    call.on_document(router, inputs)
    if layer.way is Way.DENSE:
        return []
    selections = []
    for start, stop, query_tile in query_spans(router, inputs, call.decode_from):
        span = inputs.span(start, stop)
        selections.append(call.select(router, span, query_tile))
        call.on_selection(router, span, selections[-1])
    return selections


def joint_selections(routed: list[tuple[Tensor, BlockSelection]], q_len: int, kv_len: int) -> Iterator[BlockSelection]:
    """The ``routed`` documents, (place of a `Segment`, selection), of a call, the last Q of N slots, in as few
    selections as may be.

    One selection has one query tile, and its lists are padded to the number of tiles of its longest document: where
    that would be many, the shorter documents are joined apart.
    """
    group: list[tuple[Tensor, BlockSelection]] = []
    tiles = 0
    for place, selection in sorted(
        routed, key=lambda part: (part[1].grid.query_tile, part[1].grid.tiles), reverse=True
    ):
        grid = selection.grid
        if group:
            longest = group[0][1].grid
            padded = longest.tiles * (len(group) + 1)
            if grid.query_tile != longest.query_tile or padded > max(PADDED_TILES, 4 * (tiles + grid.tiles)):
                yield _joined(group, q_len, kv_len)
                group, tiles = [], 0
        group.append((place, selection))
        tiles += grid.tiles
    if group:
        yield _joined(group, q_len, kv_len)


def _joined(group: list[tuple[Tensor, BlockSelection]], q_len: int, kv_len: int) -> BlockSelection:
    places, selections = zip(*group, strict=True)
    return join_documents(selections, torch.stack(places), q_len, kv_len)


def _attend(layer: _Layer, inputs: RoutingInputs, selections: list[BlockSelection]) -> Tensor:
    """Attention of one document over what its spans of queries keep, dense without any: [b, H, Q, D]."""
    assert inputs.v is not None
    if not selections:
        request = layer.request
        return dense_attention(
            inputs.q, inputs.k, inputs.v, request.scale, request.causal, request.softcap, request.sinks
        )
    outputs, start = [], 0
    for selection in selections:
        span = inputs.span(start, start + selection.grid.q_len)
        start += selection.grid.q_len
        assert span.v is not None
        outputs.append(_attend_selection(layer, span.q, span.k, span.v, selection))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


# out_i = Σ_j softmax_j(scale · q_i · k_j) · v_j over the visible keys j of the kept blocks.
def _attend_selection(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection) -> Tensor:
    request = layer.request
    return block_sparse_attention(
        q, k, v, selection, scale=request.scale, softcap=request.softcap, sinks=request.sinks
    )[0]


def query_spans(router: SparseRouter, inputs: RoutingInputs, decode_from: int | None) -> list[tuple[int, int, int]]:
    """Runs of queries that are routed alike: (start, stop, query tile).

    A call that continues a cache with fewer than ``query_tile`` new tokens decodes: tiles of 1.
    """
    q_len, kv_len = inputs.q.shape[2], inputs.k.shape[2]
    tile = router.config.query_tile
    if q_len < kv_len and q_len < tile:
        return [(0, q_len, 1)]
    # decode_from counts from the document's first token, as its keys do
    cut = q_len if decode_from is None else min(max(decode_from - (kv_len - q_len), 0), q_len)
    return [span for span in ((0, cut, tile), (cut, q_len, 1)) if span[0] < span[1]]
