"""Kinds of caches: each gives the stock model's tokens with every block kept, and at a real budget what the uncached
forward gives.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models
from helpers.agreement import assert_close_to_largest as close
from helpers.summaries import assert_summaries_are_those_of_the_keys, cached_logits, fed, summaries_checked
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from hf_sparse_attn import SparseCall, routers, sparsify

PROMPT, NEW = 160, 20
WINDOWED = ("qwen2", "gemma3_text", "gpt_oss")  # of their layers, some have a window

MAKERS = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic of the config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=PROMPT + NEW + 17),
}


@pytest.fixture(scope="module")
def settings(every_block, real_budget):
    """Stage 1 passes no more than the budget on, so that its summaries matter."""
    return {"every block": every_block, "real budget": {**real_budget, "candidate_factor": 1.0}}


@pytest.fixture(scope="module")
def model_of(settings):
    created = {}

    def make(model_type, budget):
        if (model_type, budget) not in created:
            created[model_type, budget] = tiny_models.sparse_tiny_model(model_type, settings[budget])
        return created[model_type, budget]

    return make


def ids(rows=2, length=PROMPT + NEW, seed=0):
    return torch.randint(3, 95, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_decodes_like_the_uncached_forward(model, make, cuts=(PROMPT,), tolerance=1e-4):
    tokens = ids()
    with summaries_checked() as read:
        got, cache = cached_logits(model, tokens, [*cuts, *range(PROMPT + 1, PROMPT + NEW + 1)], make(model.config))
    assert len(read) == (NEW + len(cuts)) * len(routers(model)) and max(read) == (PROMPT + NEW) // 16
    with torch.no_grad():
        close(
            got, model(input_ids=tokens, use_cache=False, sparse_call=SparseCall(decode_from=PROMPT)).logits, tolerance
        )
    return cache


@pytest.mark.parametrize("budget", ["every block", "real budget"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("model_type", ["llama", *WINDOWED])
def test_decoding_equals_the_uncached_forward(model_type, make, budget, model_of):
    model = model_of(model_type, budget)
    cache = assert_decodes_like_the_uncached_forward(model, make)
    assert assert_summaries_are_those_of_the_keys(model, cache) == 2 * len(routers(model)) * ((PROMPT + NEW) // 16)
    assert sum(layer.is_sliding for layer in cache.layers) == (make is not MAKERS["dynamic"]) * (
        len(cache.layers) - len(routers(model))
    )


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_prompt_in_chunks_equals_the_uncached_forward(model_type, make, model_of):
    assert_decodes_like_the_uncached_forward(model_of(model_type, "real budget"), make, cuts=(32, 96, 112, PROMPT))


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("model_type", ["llama", *WINDOWED])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_makes_the_cache(model_type, implementation, padded, beams, model_of):
    model, stock = model_of(model_type, "every block"), tiny_models.tiny_model(model_type)
    prompt, mask = ids(length=130), torch.ones(2, 130, dtype=torch.long)
    if padded:
        mask[0, :27] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "do_sample": False,
        "num_beams": beams,
        "cache_implementation": implementation,
    }
    with summaries_checked() as read:
        got = model.generate(prompt, **options, disable_compile=True)
    assert read and torch.equal(got, stock.generate(prompt, **options, disable_compile=True))


@pytest.mark.parametrize("model_type", WINDOWED)
def test_guesses_are_taken_back_in_layers_with_a_window_too(model_type, model_of):
    """They keep what left the window until it is known which guesses were right."""
    model, stock = model_of(model_type, "every block"), tiny_models.tiny_model(model_type)
    prompt, options = ids(rows=1, length=30).repeat(1, 4), {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=5, **options), stock.generate(prompt, **options))


def test_a_static_cache_crosses_dense_below(settings):
    """Below, its whole room is the stock attention's; above, only what is filled is read."""
    stock = tiny_models.tiny_model("llama")
    model = tiny_models.sparse_tiny_model("llama", {**settings["every block"], "dense_below": 140})
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids(length=130), **options), stock.generate(ids(length=130), **options))


def test_a_static_cache_is_reset_and_reordered(model_of):
    model = model_of("llama", "real budget")
    cache = StaticCache(config=model.config, max_cache_len=200)
    cached_logits(model, ids(seed=1), [PROMPT], cache)
    cache.reset()
    cached_logits(model, ids(), [PROMPT, PROMPT + 1], cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    got = fed(model, ids()[:, -1:], cache)
    assert assert_summaries_are_those_of_the_keys(model, cache) == 2 * 3 * 10
    tokens = ids()[[1, 1]]
    _, fresh = cached_logits(model, tokens, [PROMPT, PROMPT + 1])
    close(got, fed(model, ids()[:, -1:], fresh), 1e-5)


# -- offloaded ------------------------------------------------------------------------------------------------------


class OffloadingCache(Cache):
    """What an offloaded cache does to its layers, which Transformers itself does on streams of a GPU only."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        following = self.layers[(layer_idx + 1) % len(self.layers)]
        following.prefetch()
        out = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        self.layers[layer_idx].offload()
        return out


@pytest.mark.parametrize("budget", ["every block", "real budget"])
@pytest.mark.parametrize("kind", ["dynamic of the config", "static"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_offloaded_layers_decode_like_the_uncached_forward(model_type, kind, budget, model_of):
    make = MAKERS[kind]
    assert_decodes_like_the_uncached_forward(
        model_of(model_type, budget), lambda config: OffloadingCache(layers=make(config).layers)
    )


def test_summaries_stay_where_they_are_read(model_of):
    """Keys are offloaded as soon as they are appended, before the attention that reads the summaries."""
    model = model_of("llama", "real budget")
    _, cache = cached_logits(model, ids(), [PROMPT, PROMPT + 1])
    layer = cache.layers[0]
    layer.router_keys = layer.slot_positions = object()  # nothing that could be moved
    layer.offload()
    layer.prefetch()
    assert not layer.buffers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformers offloads caches on streams of a GPU")
@pytest.mark.gpu
def test_an_offloaded_cache_on_a_gpu_gives_the_tokens_of_the_stock_model(settings):
    model, stock = (
        tiny_models.sparse_tiny_model("llama", settings["every block"]).cuda(),
        tiny_models.tiny_model("llama").cuda(),
    )
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "offloaded"}
    assert torch.equal(
        model.generate(ids(length=130).cuda(), **options), stock.generate(ids(length=130).cuda(), **options)
    )


# -- quantised ------------------------------------------------------------------------------------------------------


class RoundingLayer(QuantizedLayer):
    """Keeps eight bits, as the quantised caches do that need packages;
    quantised all at once when the residual is full.
    """

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


def rounding(config):
    return Cache(layers=[RoundingLayer(residual_length=8) for _ in range(config.num_hidden_layers)])


HAS_FP8 = hasattr(cache_utils, "BaseQuantizedLayer")  # came with it
QUANTISED = {
    "fp8": lambda config: QuantizedCache(backend="fp8", config=config),
    "rounding": rounding,
    "quanto": lambda config: QuantizedCache(backend="quanto", config=config, residual_length=16),
    "hqq": lambda config: QuantizedCache(
        backend="hqq", config=config, nbits=4, axis_key=1, axis_value=1, residual_length=16
    ),
}


@pytest.fixture(params=QUANTISED)
def quantised(request):
    present = {"quanto": is_optimum_quanto_available(), "hqq": is_hqq_available(), "fp8": HAS_FP8}
    if not present.get(request.param, True):
        pytest.skip(f"{request.param} is not installed, or not known to this Transformers")
    return QUANTISED[request.param]


def test_a_quantised_cache_gives_the_tokens_of_the_stock_model_with_the_same(quantised, model_of):
    model, stock = model_of("llama", "every block"), tiny_models.tiny_model("llama")
    options = {"max_new_tokens": NEW, "do_sample": False}
    with summaries_checked() as read:
        got = model.generate(ids(length=130), past_key_values=quantised(model.config), **options)
    assert max(read) == (130 + NEW - 1) // 16
    assert torch.equal(got, stock.generate(ids(length=130), past_key_values=quantised(stock.config), **options))


@pytest.mark.skipif(not HAS_FP8, reason="not known to this Transformers")
def test_generate_makes_a_quantised_cache(model_of):
    model, stock = model_of("llama", "every block"), tiny_models.tiny_model("llama")
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "cache_implementation": "quantized",
        "cache_config": {"backend": "fp8"},
    }
    assert torch.equal(model.generate(ids(length=130), **options), stock.generate(ids(length=130), **options))


def test_a_quantised_cache_at_a_real_budget_decodes_over_what_it_returns(model_of):
    """The last step equals that of a cache which holds the keys and values that the quantised one gave back."""
    model, seen = model_of("llama", "real budget"), []
    with summaries_checked():
        _, cache = cached_logits(model, ids(), [PROMPT, *range(PROMPT + 1, PROMPT + NEW)], rounding(model.config))
        for layer in cache.layers:
            layer.update = lambda *args, update=layer.update, **kwargs: seen.append(update(*args, **kwargs)) or seen[-1]
        got = fed(model, ids()[:, -1:], cache)
    plain = DynamicCache([(keys[:, :, :-1], values[:, :, :-1]) for keys, values in seen])
    close(got, fed(model, ids()[:, -1:], plain), 1e-4)
    _, exact = cached_logits(model, ids(), [PROMPT, *range(PROMPT + 1, PROMPT + NEW)])
    assert (got - fed(model, ids()[:, -1:], exact)).abs().max() > 1e-3 * got.abs().max()


@pytest.mark.skipif(
    "reorder_cache" not in vars(QuantizedLayer), reason="stock ones cannot be, before Transformers 5.23"
)
def test_a_quantised_cache_is_reordered_by_beam_search(quantised, model_of):
    model, stock = model_of("llama", "every block"), tiny_models.tiny_model("llama")
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    with summaries_checked():
        got = model.generate(ids(length=100), past_key_values=quantised(model.config), **options)
    assert torch.equal(got, stock.generate(ids(length=100), past_key_values=quantised(stock.config), **options))


# -- refused --------------------------------------------------------------------------------------------------------


def test_encoder_decoders_and_their_caches_are_refused_by_name(model_of, every_block):
    model = model_of("llama", "every block")
    with pytest.raises(
        ValueError,
        match=r"caches with layers \(DynamicCache, StaticCache and QuantizedCache\), got EncoderDecoderCache",
    ):
        fed(model, ids(), EncoderDecoderCache(DynamicCache(), DynamicCache()))
    small = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    bart = BartForConditionalGeneration(BartConfig(vocab_size=50, encoder_ffn_dim=16, decoder_ffn_dim=16, **small))
    with pytest.raises(ValueError, match=r"model type 'bart' is an encoder-decoder.*; sparse attention supports: "):
        sparsify(bart, every_block)
    config = tiny_models.tiny_config("bert")
    config.is_decoder = config.add_cross_attention = True
    with pytest.raises(
        ValueError, match=r"add_cross_attention=True is not supported: sparse attention serves self-attention only"
    ):
        sparsify(tiny_models.transformers.BertLMHeadModel(config), {**every_block, "min_keys": 112})


def test_layers_that_summaries_cannot_follow_are_refused_by_name(model_of):
    model = model_of("llama", "every block")
    windowed = model.config.__class__(**{**model.config.to_dict(), "sliding_window": 40})
    for cache, name in (
        (DynamicCache(config=windowed), "DynamicSlidingWindowLayer"),
        (StaticCache(windowed, 200), "StaticSlidingWindowLayer"),
    ):
        with pytest.raises(
            ValueError, match=rf"layers of DynamicCache, StaticCache and QuantizedCache, got {name}; .*sdpa"
        ):
            fed(model, ids(), cache)


def test_a_paged_cache_is_refused_by_name(model_of):
    """Up to Transformers 5.23 it is an argument beside the layer's own cache, from 5.24 on it is in its place."""

    class Paged:
        def get_seq_length(self, *_):
            return 0

        get_query_offset = get_seq_length

        def get_mask_sizes(self, length, *_):
            return length, 0

    with (
        pytest.raises(ValueError, match=r"cache \(Paged\) under the name 'cache'|caches with layers .*got Paged"),
        torch.no_grad(),
    ):
        model_of("llama", "every block")(input_ids=ids(), use_cache=False, cache=Paged())


def test_continuous_batching_is_refused(model_of):
    """And does not switch to flash attention silently, where that is installed."""
    model = model_of("llama", "every block")
    assert not model._supports_flash_attn
    for call in (
        lambda: model.generate_batch([[3, 4, 5]]),
        lambda: model.generate(ids(), cache_implementation="paged"),
    ):
        with pytest.raises(ValueError, match=r"hf_sparse\W* is not supported.*sdpa"):
            call()
