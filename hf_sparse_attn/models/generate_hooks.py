"""What `generate` does otherwise for sparse models: it takes a ``sparse_call``, caches are adopted, and a prompt in
chunks is cut where query tiles end.

So the chunks select what an uncut prompt does.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers import Cache

from ..architectures.cache_arguments import CACHE_ARGUMENTS
from ..attention.cache_adoption import adopt_layers
from ..attention.mask_interface import mask_if_it_hides, of_the_caches_length
from ..config import ATTN_IMPLEMENTATION
from .attach import routers
from .layer_numbers import sparse_sites

logger = logging.getLogger(__name__)


def prepare_with_adopted_cache(prepare: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``prepare_inputs_for_generation`` of a stock model, whose cache is adopted first:
    `generate` calls it outside of what is compiled.
    """
    # the name of the argument differs between versions and models
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    if not caches or model.config.get_text_config()._attn_implementation != ATTN_IMPLEMENTATION:
        return prepare(model, *args, **kwargs)
    adopt_layers(caches[0], [site.layer_idx for site in sparse_sites(model)])
    inputs = prepare(model, *args, **kwargs)
    mask = mask_if_it_hides(inputs.get("attention_mask"), caches[0], kwargs.get("is_first_iteration"))
    inputs["attention_mask"] = of_the_caches_length(mask, caches[0])
    return inputs


def validate_beside_call(validate: Callable[..., Any], model: Any, model_kwargs: dict[str, Any]) -> Any:
    """``_validate_model_kwargs`` of a stock model, which knows of no ``sparse_call``;
    it would take it for a typing error.
    """
    return validate(model, {name: value for name, value in model_kwargs.items() if name != "sparse_call"})


def prefill_whole_tiles(
    prefill: Callable[..., Any],
    model: Any,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``_prefill`` of a stock model with ``prefill_chunk_size`` (tokens) rounded so that no chunk cuts a query tile."""
    size = generation_config.prefill_chunk_size
    sparse = model.config.get_text_config()._attn_implementation == ATTN_IMPLEMENTATION
    if size is not None and sparse and model_kwargs.get("inputs_embeds") is None:
        # the mask covers all slots from the cache's first on, the ids maybe only the new ones
        mask, length = model_kwargs.get("attention_mask"), input_ids.shape[1]
        past = _past(model_kwargs) if _continues(prefill) else 0
        whole = length if mask is None else mask.shape[1]
        start = past if whole == length else whole - length  # else the ids are the new ones
        if start < whole:
            tile = routers(model)[0].config.query_tile
            # the caller's own config stays as it is
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = chunk_lengths(start, whole, size, tile, _first_tile(mask, tile))
    return prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)


@cache
def _continues(prefill: Callable[..., Any]) -> bool:
    """Whether it reads the new tokens only, as newer versions do; older ones read a cached prompt again."""
    return "prefill_ids" in inspect.unwrap(prefill).__code__.co_varnames


def chunk_lengths(start: int, end: int, size: int, tile: int, offset: int = 0) -> list[int]:
    """Lengths of chunks of about ``size`` slots from slot ``start`` to ``end``, cut at ``offset`` plus multiples of
    ``tile`` only.

    A call that continues a cache with fewer than ``tile`` tokens would route them singly, as decoding does: no such
    chunk is made.
    """
    cuts = [start]
    # each chunk ends with the last tile that fits into `size`, or with the first one where none does
    while end - cuts[-1] > size:
        at = cuts[-1]
        cut = at + size - (at + size - offset) % tile
        # a chunk from slot 0 on runs as prefill however short it is; later ones need a whole tile
        while cut < at + (tile if at else 1):
            cut += tile
        if end - cut < tile:  # the rest goes with the last chunk, or with half of it
            cut -= tile
        if cut < at + (tile if at else 1) or cut >= end:
            break
        cuts.append(cut)
    return [stop - first for first, stop in zip(cuts, [*cuts[1:], end], strict=True)]


def _past(model_kwargs: dict[str, Any]) -> int:
    cache = next((model_kwargs[name] for name in CACHE_ARGUMENTS if model_kwargs.get(name) is not None), None)
    return 0 if cache is None else int(cache.get_seq_length())


def _first_tile(mask: Tensor | None, tile: int) -> int:
    """The slot below ``tile`` at which tiles begin and end: they are counted from each row's first token."""
    if mask is None or mask.ndim != 2:
        return 0
    # argmax of zeros and ones is the place of the first one
    offsets = (mask.ne(0).int().argmax(1) % tile).tolist()
    if len(set(offsets)) > 1:
        _say_rows_differ()
    # the place that most rows have
    return int(max(offsets, key=offsets.count))


@cache
def _say_rows_differ() -> None:
    logger.warning(
        "prefill_chunk_size with a padded batch: query tiles begin at each row's first token, so chunks cannot end "
        "with the tiles of all "
        "rows. A tile that is cut selects with a part of its queries. Pad to a multiple of query_tile, or leave "
        "prefill_chunk_size out"
    )
