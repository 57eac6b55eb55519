"""Giving the layers of a Transformers cache room for summaries, when a sparse layer first uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from ..architectures.class_factory import make_class
from .cache import AppendingLayerMixin, QuantizedLayerMixin, SparseCacheLayerMixin
from .object_registry import numbered

CACHES = "DynamicCache, StaticCache and QuantizedCache"


def adopt(cache: Any, index: int) -> SparseCacheLayerMixin:
    """The cache layer ``index`` of a Transformers ``cache``, made to hold summaries if it does not yet.

    Raises:
        ValueError: the cache is of a kind that summaries cannot follow.
    """
    if not hasattr(cache, "layers"):
        raise ValueError(f"sparse attention supports caches with layers ({CACHES}), got {type(cache).__name__}")
    if cache.layer_class_to_replicate is not None:
        # Transformers would make them at the layer's first update, which comes after this
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, SparseCacheLayerMixin):
        if numbered(layer.number) is not layer:  # rebuilt from another one's attributes, as Transformers' exporters do
            layer.take_number()
        return layer
    # the ABC base of cache layers has __slots__, which forbids assigning __class__: replace the object, share its state
    cls: Any = make_class(_mixin(layer), type(layer))
    new: SparseCacheLayerMixin = cls.__new__(cls)
    new.__dict__ = layer.__dict__
    new.take_number()
    new.start_summaries()
    cache.layers[index] = new
    return new


def adopt_layers(cache: Any, indices: Sequence[int]) -> None:
    """Adopt the cache layers of attention layers whose ``layer_idx`` are ``indices``.

    Raises:
        ValueError: two of them have the same, or as `adopt`.
    """
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise ValueError(
            f"several layers have layer_idx {', '.join(map(str, twice))}, and a cache keeps one entry for each: "
            "number copied layers anew "
            "(for i, layer in enumerate(layers): layer.self_attn.layer_idx = i), or pass use_cache=False"
        )
    for index in indices:
        adopt(cache, index)


def found(cache: Any, index: int) -> CacheLayerMixin | None:
    """The cache layer ``index``, None if it is yet to be made: a graph that is being compiled cannot replace it, so it
    may not be adopted.

    Raises:
        ValueError: as `adopt`.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is not None and not isinstance(layer, SparseCacheLayerMixin):
        _mixin(layer)
    return layer


def filled(layer: CacheLayerMixin) -> Tensor | None:
    """How many of the slots that the last update of a layer, adopted or not, returned hold keys:
    int64 [], None for all.
    """
    return layer.cumulative_length if isinstance(layer, StaticLayer) else None


def _mixin(layer: CacheLayerMixin) -> type[SparseCacheLayerMixin]:
    if type(layer) is DynamicLayer:
        return AppendingLayerMixin
    if type(layer) is StaticLayer:
        return SparseCacheLayerMixin
    # their common base has other names in older versions
    if any("Quantized" in cls.__name__ for cls in type(layer).__mro__):
        return QuantizedLayerMixin
    raise ValueError(
        f"sparse attention supports the layers of {CACHES}, got {type(layer).__name__}; pass one of these, or run "
        "dense "
        'with model.set_attn_implementation("sdpa")'
    )
