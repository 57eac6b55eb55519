"""A whole tiny model on the Triton kernels: against dense attention, compiled, generating, and without waiting for a
GPU.
"""

from __future__ import annotations

import pytest
import torch
from hf_sparse_attn_kernels.implementations import preferred
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_sparse_attn import sparsify
from hf_sparse_attn.models.convert import sparse_attention_as

SETTINGS = {
    "block_size": 16,
    "query_tile": 64,
    "sink": 16,
    "local": 16,
    "dense_below": 0,
    "min_keys": 112,
    "max_keys": 112,
}


@pytest.fixture(autouse=True)
def on_triton():
    with preferred("triton"):
        yield


@pytest.fixture
def model(device):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return sparsify(LlamaForCausalLM(config), SETTINGS).eval().to(device)


@pytest.fixture
def ids(device):
    return torch.randint(3, 97, (1, 200), generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def test_with_every_block_kept_the_logits_are_those_of_dense_attention(model, ids):
    sparse = model(ids).logits
    with sparse_attention_as(model, min_keys=300, max_keys=None):
        every = model(ids).logits
    model.set_attn_implementation("sdpa")
    dense = model(ids).logits
    torch.testing.assert_close(every, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, dense, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_compiled_model_gives_the_eager_logits(model, ids):
    want = model(ids, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if torch.cuda.is_available() else "eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"] if torch.cuda.is_available() else ["static"])
def test_what_is_generated_is_what_forward_passes_without_a_cache_say(cache, model, ids):
    # whole tiles: without a cache the last tile is routed as a whole, so each token is one of its own
    prompt, count = ids[:, :192], 3
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
    )
    step, held = prompt, DynamicCache(config=model.config)
    for _ in range(count):
        logits = model(step, past_key_values=held).logits[:, -1]
        step = logits.argmax(-1, keepdim=True)
        prompt = torch.cat([prompt, step], 1)
    assert torch.equal(out, prompt)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: test_device_syncs counts without one")
@torch.no_grad()
def test_a_decode_step_waits_for_nothing_on_the_device(model, ids):
    held = DynamicCache(config=model.config)
    model(ids, past_key_values=held)
    model(ids[:, :1], past_key_values=held)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            model(ids[:, :1], past_key_values=held)
    finally:
        torch.cuda.set_sync_debug_mode("default")
