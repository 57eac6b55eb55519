"""The summaries in a cache: right at every step, and after whatever changes the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.agreement import assert_close_to_largest as close
from helpers.summaries import assert_summaries_are_those_of_the_keys, cached_logits, fed
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_sparse_attn import SparseCall, routers, set_sparse_attention, sparsify
from hf_sparse_attn.benchmarks.generation import cache_sizes

NEW = 20


@pytest.fixture(scope="module")
def sparse(sparse_llama, real_budget):
    """A real budget, routers away from their untrained start; stage 1 passes no more than the budget on."""
    return sparse_llama({**real_budget, "candidate_factor": 1.0}, noise=0.1)


# -- a real budget: cached equals uncached --------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(), (16,), (32, 64, 128), tuple(range(16, 145, 16))])
@pytest.mark.parametrize("prompt", [160, 171])
def test_cached_decoding_equals_the_uncached_forward(sparse, token_ids, chunks, prompt):
    ids = token_ids(2, prompt + NEW, seed=3)
    got, _ = cached_logits(sparse, ids, [*chunks, prompt, *range(prompt + 1, prompt + NEW + 1)])
    with torch.no_grad():
        want = sparse(ids, sparse_call=SparseCall(decode_from=prompt)).logits
        dense = sparse(ids, sparse_call=SparseCall(dense=True)).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (want - dense).abs().max() > 0.05, "the budget cuts nothing: this test would prove nothing"


def test_several_new_tokens_at_once_are_decoded_like_single_ones(sparse, token_ids):
    """Assisted decoding checks a few guesses in one call."""
    ids = token_ids(1, 180, seed=4)
    singly, _ = cached_logits(sparse, ids, [160, *range(161, 181)])
    together, _ = cached_logits(sparse, ids, [160, 165, 172, 180])
    torch.testing.assert_close(together, singly, rtol=1e-3, atol=1e-3)


def test_a_cache_that_was_filled_densely_crosses_into_sparse_decoding(sparse_llama, real_budget, token_ids):
    """The first tokens are attended below dense_below;
    from there on, calls equal those of a model that was always sparse.
    """
    model = sparse_llama({**real_budget, "dense_below": 170}, noise=0.1)
    ids = token_ids(2, 190, seed=5)
    got, cache = cached_logits(model, ids, [100, 160, *range(161, 191)])
    assert_summaries_are_those_of_the_keys(model, cache)
    # the same keys, but the summaries are made from scratch at every step
    cache = DynamicCache()
    parts = [fed(model, ids[:, :160], cache)]
    for i in range(160, 190):
        for layer in cache.layers:
            if layer.summarised:
                layer.summarised, layer.summarised_slots = [0, 0], [-1, -1]
        parts.append(fed(model, ids[:, i : i + 1], cache))
    torch.testing.assert_close(got[:, 160:], torch.cat(parts, 1)[:, 160:], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        dense = model(ids, sparse_call=SparseCall(dense=True)).logits
    torch.testing.assert_close(got[:, :169], dense[:, :169], rtol=1e-3, atol=1e-3)
    assert (got[:, 169:] - dense[:, 169:]).abs().max() > 0.05


# -- summaries ------------------------------------------------------------------------------------------------------


def test_summaries_equal_recomputed_ones_in_every_step(sparse, token_ids, left_padded):
    rows = [token_ids(1, n, seed=n)[0] for n in (150, 121)]
    ids, mask = left_padded(rows)
    cache, positions = DynamicCache(), (mask.cumsum(1) - 1).clamp(min=0)
    fed(sparse, ids, cache, attention_mask=mask, position_ids=positions)
    counts = [assert_summaries_are_those_of_the_keys(sparse, cache, pads=[0, 29])]
    for step in range(NEW):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        new = token_ids(2, 1, seed=step)
        fed(sparse, new, cache, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1)
        counts.append(assert_summaries_are_those_of_the_keys(sparse, cache, pads=[0, 29]))
    assert counts[0] == 2 * (150 // 16 + 121 // 16) and counts[-1] == 2 * ((150 + NEW) // 16 + (121 + NEW) // 16)


def continue_with(model, cache, new, upto=30):
    return torch.cat([fed(model, new[:, i : i + 1], cache) for i in range(upto)], 1)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
    ids=["reorder", "repeat", "select"],
)
@pytest.mark.parametrize("steps", [0, 5])
def test_batch_operations_keep_summaries_with_their_rows(sparse, token_ids, change, rows, steps):
    ids, more = token_ids(3, 150, seed=6), token_ids(3, 5, seed=7)
    cache = DynamicCache()
    fed(sparse, ids, cache)
    for i in range(steps):
        fed(sparse, more[:, i : i + 1], cache)
    change(cache)
    assert assert_summaries_are_those_of_the_keys(sparse, cache) == 2 * len(rows) * ((150 + steps) // 16)
    fresh = DynamicCache()
    fed(sparse, ids[rows], fresh)
    for i in range(steps):
        fed(sparse, more[rows][:, i : i + 1], fresh)
    new = token_ids(len(rows), 30, seed=8)
    torch.testing.assert_close(
        continue_with(sparse, cache, new), continue_with(sparse, fresh, new), rtol=1e-3, atol=1e-3
    )
    assert_summaries_are_those_of_the_keys(sparse, cache)


@pytest.mark.parametrize("drop", [1, 7, 22, 48])
def test_a_cropped_cache_decodes_other_tokens_like_a_fresh_one(sparse, token_ids, drop):
    """Blocks that lost a key must be summarised anew: the new tokens differ from those that were dropped."""
    ids, new = token_ids(2, 160, seed=9), token_ids(2, 30, seed=10)
    cache = DynamicCache()
    fed(sparse, ids[:, :128], cache)
    for i in range(128, 160):
        fed(sparse, ids[:, i : i + 1], cache)
    cache.crop(-drop)
    got = continue_with(sparse, cache, new)
    assert_summaries_are_those_of_the_keys(sparse, cache)
    with torch.no_grad():
        both = torch.cat([ids[:, : 160 - drop], new], 1)
        want = sparse(both, sparse_call=SparseCall(decode_from=min(128, 160 - drop))).logits[:, -30:]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif("reset" not in vars(DynamicLayer), reason="stock layers keep zeros, before Transformers 5.23")
def test_a_reset_cache_is_as_good_as_a_new_one(sparse, token_ids):
    ids, other = token_ids(1, 150, seed=11), token_ids(1, 140, seed=12)
    want, _ = cached_logits(sparse, other, [120, *range(121, 141)])
    cache = DynamicCache()
    fed(sparse, ids, cache)
    cache.reset()
    got = torch.cat([fed(sparse, other[:, :120], cache), continue_with(sparse, cache, other[:, 120:], 20)], 1)
    assert torch.equal(got, want)
    assert_summaries_are_those_of_the_keys(sparse, cache)


def test_a_copied_cache_and_its_original_do_not_touch_each_other(sparse, token_ids):
    """A prompt's cache is copied and continued in two ways: in-place appending must not leak from one to the other."""
    ids = token_ids(1, 150, seed=15)
    cache = DynamicCache()
    fed(sparse, ids, cache)
    fed(sparse, token_ids(1, 1, seed=1), cache)
    copied = copy.deepcopy(cache)
    one, two = token_ids(1, 12, seed=16), token_ids(1, 12, seed=17)
    want = continue_with(sparse, copy.deepcopy(cache), one, 12)
    got = []
    for i in range(12):
        got.append(fed(sparse, one[:, i : i + 1], cache))
        fed(sparse, two[:, i : i + 1], copied)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)
    assert_summaries_are_those_of_the_keys(sparse, copied)


def test_a_cache_that_was_taken_apart_into_keys_and_values_is_summarised_anew(sparse, token_ids):
    """As data-parallel training does to gather one from all processes."""
    ids, more = token_ids(2, 150, seed=16), token_ids(2, 20, seed=17)
    _, cache = cached_logits(sparse, ids, [120, *range(121, 151)])
    again = DynamicCache(list(cache))
    torch.testing.assert_close(
        continue_with(sparse, again, more, 20), continue_with(sparse, cache, more, 20), rtol=1e-4, atol=1e-4
    )
    assert assert_summaries_are_those_of_the_keys(sparse, again) == 2 * 2 * 10


def test_keys_that_were_read_before_a_crop_stay_as_they_were(sparse, token_ids):
    """Stock caches never write into tensors they gave out; appending in place after a crop must not either."""
    cache = DynamicCache()
    fed(sparse, token_ids(1, 150, seed=18), cache)
    fed(sparse, token_ids(1, 1, seed=18), cache)
    held = cache.layers[0].keys
    before = held.clone()
    cache.crop(-20)
    fed(sparse, token_ids(1, 1, seed=19), cache)
    assert torch.equal(held, before)


def test_a_cache_filled_in_inference_mode_can_be_continued_outside_of_it(sparse, token_ids):
    ids = token_ids(1, 160, seed=20)
    cache = DynamicCache()
    with torch.inference_mode():
        sparse(input_ids=ids[:, :150], past_key_values=cache)
        sparse(input_ids=ids[:, 150:151], past_key_values=cache)
    got = fed(sparse, ids[:, 151:152], cache)
    want, _ = cached_logits(sparse, ids[:, :152], [150, 151, 152])
    torch.testing.assert_close(got, want[:, -1:], rtol=1e-4, atol=1e-4)


def test_the_budget_can_change_between_calls_with_one_cache(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget, noise=0.1)
    ids = token_ids(1, 170, seed=21)
    _, cache = cached_logits(model, ids, [160, *range(161, 170)])
    set_sparse_attention(model, min_keys=10**6)
    got = fed(model, ids[:, 169:], cache)
    fresh = copy.deepcopy(cache)
    for layer in fresh.layers:
        layer.summarised, layer.summarised_slots = [0], [-1]
    fresh.crop(-1)
    torch.testing.assert_close(fed(model, ids[:, 169:], fresh), got, rtol=1e-4, atol=1e-4)


def test_summaries_take_less_than_a_tenth_of_the_keys_and_values(stock_llama, token_ids):
    """With the default settings, in bfloat16: blocks of 16 keys of 64 dims, two router keys of 64 dims each, and the
    positions.
    """
    model = sparsify(stock_llama(hidden_size=256, head_dim=64).bfloat16(), {"dense_below": 0})
    cache = DynamicCache()
    fed(model, token_ids(1, 512), cache)
    sizes = cache_sizes(cache)
    # layers, keys and values, KV heads, tokens, dims, bytes
    assert sizes["keys_values_bytes"] == 2 * 2 * 2 * 512 * 64 * 2
    assert sizes["summaries_bytes"] == 2 * (2 * 512 // 16 * 128 * 2 + 512 * 8)
    assert sizes["summaries_share"] < 0.1


# -- gradients ------------------------------------------------------------------------------------------------------


def test_a_trainable_prefix_has_the_gradients_of_the_stock_model(stock_llama, sparse_llama, every_block, token_ids):
    """The model is frozen, so a new key needs no gradient, and is read again in the backward pass of both calls."""
    ids, gradients = token_ids(2, 150), []
    for model in (stock_llama(), sparse_llama(every_block, noise=0.1)):
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        prefix = [
            tuple(torch.randn(2, 2, 64, 16, generator=generator).requires_grad_() for _ in "kv") for _ in range(2)
        ]
        cache = DynamicCache(prefix)
        parts = [model(input_ids=ids[:, at], past_key_values=cache).logits for at in (slice(0, 149), slice(149, 150))]
        torch.cat(parts, 1).square().mean().backward()
        gradients.append(torch.stack([x.grad for pair in prefix for x in pair]))
    close(gradients[1], gradients[0], 1e-4)


def test_summaries_hold_no_graph(sparse_llama, real_budget, token_ids):
    model = sparse_llama({**real_budget, "candidate_factor": 1.0}, noise=0.1)
    model.requires_grad_(False)
    for router in routers(model):
        router.requires_grad_(True)
    cache = model(input_ids=token_ids(2, 150), use_cache=True).past_key_values
    assert not any(layer.router_keys.requires_grad for layer in cache.layers)
    copied = copy.deepcopy(cache)
    assert torch.equal(fed(model, token_ids(2, 1), cache), fed(model, token_ids(2, 1), copied))
