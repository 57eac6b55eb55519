"""What tests of caches share: feeding a model in pieces, and holding cached summaries against recomputed ones."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from hf_sparse_attn import routers
from hf_sparse_attn.attention.cache import SparseCacheLayerMixin


@torch.no_grad()
def fed(model, ids, cache, **options):
    """Logits of one call that continues a cache."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits


def cached_logits(model, ids, cuts, cache=None):
    """Logits of ``ids`` fed through a cache in pieces that end at ``cuts``, and the cache."""
    cache = DynamicCache() if cache is None else cache
    parts = [fed(model, ids[:, start:stop], cache) for start, stop in itertools.pairwise([0, *cuts])]
    return torch.cat(parts, 1), cache


def assert_summaries_are_those_of_the_keys(model, cache, pads=None):
    """Every valid summary equals the one computed anew from the cached keys and their positions;
    returns how many there are.
    """
    checked = 0
    for router in routers(model):
        layer = cache.layers[router.layer]
        assert isinstance(layer, SparseCacheLayerMixin)
        for row, blocks in enumerate(layer.summarised):
            start = 0 if pads is None else pads[row]
            keys = layer.keys[row : row + 1, :, start : int(layer.get_seq_length())]
            want = router.router_keys(keys, torch.arange(keys.shape[2])[None])
            torch.testing.assert_close(layer.router_keys[row, :, :blocks], want[0, :, :blocks], rtol=1e-4, atol=1e-4)
            checked += blocks
    return checked


@contextmanager
def summaries_checked():
    """Every summary that a call reads is held against one that is computed anew;
    gives the list of how many were read.
    """
    read, original = [], SparseCacheLayerMixin.summaries

    def checked(self, router, batch, rows, slots, keys, positions):
        got = original(self, router, batch, rows, slots, keys, positions)
        torch.testing.assert_close(got, router.router_keys(keys, positions), rtol=1e-4, atol=1e-4)
        read.append(got.shape[2])
        return got

    SparseCacheLayerMixin.summaries = checked
    try:
        yield read
    finally:
        SparseCacheLayerMixin.summaries = original
