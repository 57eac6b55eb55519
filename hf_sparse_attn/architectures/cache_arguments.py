"""Under which name a module of the installed Transformers takes its cache, and how to tell a cache under any other
name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from .class_factory import accepted_names

# "cache" from Transformers 5.24 on, "past_key_values" before; GPT-NeoX and its like have a name of their own
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


# what models and Transformers' mask functions call it
MODEL_ARGUMENT = next(name for name in accepted_names(masking_utils.create_causal_mask) if name in CACHE_ARGUMENTS)


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument is a cache: an object of Transformers, one that behaves like it, pairs of tensors by layer,
    or by its name.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return False
    if isinstance(value, Tensor):  # `cache_position` and the like are integers
        return _named(name) and value.is_floating_point()
    if isinstance(value, (tuple, list)):  # position embeddings are a pair of tensors, too
        return _named(name) or ("position" not in name and any(_is_layer(inner) for inner in value))
    if isinstance(value, dict):
        return _named(name) or any(isinstance(inner, (Cache, CacheLayerMixin)) for inner in value.values())
    # attention calls `update` of a cache; a set has a method of that name, too
    return _named(name) or (hasattr(value, "update") and not isinstance(value, set))


def _is_layer(value: Any) -> bool:
    """Whether an item of a list is what a layer keeps:
    its object, or a tuple of tensors as caches were before they were objects.
    """
    if isinstance(value, (tuple, list)):
        return any(isinstance(inner, Tensor) and inner.is_floating_point() for inner in value)
    return isinstance(value, (Cache, CacheLayerMixin))


def _named(name: str) -> bool:
    return "cache" in name or "past" in name
