"""torch.compile: no graph breaks in our code, few compilations, the results of the eager model."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny_models
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

from hf_sparse_attn import routers, sparsify

STEPS = 12


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["every_block", "real_budget"])
def model(request, sparse_llama):
    return sparse_llama(request.getfixturevalue(request.param), noise=0.1)


@torch.no_grad()
def test_the_forward_compiles_as_one_graph_with_the_eager_logits(model, token_ids):
    ids, counter = token_ids(2, 200), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )
    for length in (180, 150, 230):  # the second length makes lengths dynamic, the others reuse that graph
        other = token_ids(2, length, seed=length)
        torch.testing.assert_close(
            compiled(other, use_cache=False).logits, model(other, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )
    assert counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize("model", ["real_budget"], indirect=True)  # it compiles for most of a minute
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # inductor's own
def test_inductor_gives_the_eager_logits(model, token_ids):
    ids = token_ids(1, 200)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


def decode(forward, prefill, ids, cache, mask=None):
    """Logits of the steps after an eager prefill of all but the last STEPS tokens."""
    start, parts = ids.shape[1] - STEPS, []
    options = {} if mask is None else {"attention_mask": mask[:, :start]}
    prefill(input_ids=ids[:, :start], past_key_values=cache, **options)
    for at in range(start, ids.shape[1]):
        options = (
            {}
            if mask is None
            else {"attention_mask": mask[:, : at + 1], "position_ids": mask[:, : at + 1].sum(1, keepdim=True) - 1}
        )
        parts.append(forward(input_ids=ids[:, at : at + 1], past_key_values=cache, **options).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_compiles_as_one_graph_and_is_not_compiled_anew_for_every_step(model, kind, padded, token_ids):
    ids = token_ids(2, 190)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def cache():
        return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=256)

    got = decode(compiled, model, ids, cache(), mask)
    assert counter.frame_count <= 3  # with fixed lengths, with growing ones, and for the masks that a batch of rows has
    torch.testing.assert_close(got, decode(model, model, ids, DynamicCache(), mask), rtol=1e-4, atol=1e-4)
    again = decode(compiled, model, ids, cache(), mask)  # another cache
    torch.testing.assert_close(again, got, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3


@torch.no_grad()
def test_compiled_decoding_keeps_summaries_up_to_date(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget, noise=0.1)
    cache, ids = DynamicCache(), token_ids(1, 190)
    decode(torch.compile(model, fullgraph=True, backend="aot_eager"), model, ids, cache)
    for router, layer in zip(routers(model), cache.layers, strict=True):
        want = router.router_keys(layer.keys, torch.arange(190)[None])
        assert layer.summarised == [190 // 16]
        torch.testing.assert_close(layer.router_keys[:, :, : 190 // 16], want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_call_may_fill_a_cache_that_eager_calls_continue(model, token_ids):
    ids = token_ids(1, 180)
    caches = DynamicCache(), DynamicCache()
    for forward, cache in zip((torch.compile(model, fullgraph=True, backend="aot_eager"), model), caches, strict=True):
        forward(input_ids=ids[:, :160], past_key_values=cache)
    steps = [
        torch.cat([model(input_ids=ids[:, at : at + 1], past_key_values=c).logits for at in range(160, 180)], 1)
        for c in caches
    ]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_static_cache_crosses_dense_below(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama({**real_budget, "dense_below": 184}, noise=0.1), token_ids(2, 190)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = decode(compiled, model, ids, StaticCache(config=model.config, max_cache_len=256))
    torch.testing.assert_close(got, decode(model, model, ids, DynamicCache()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma2", "modernbert"])
def test_gradients_of_a_compiled_model_are_the_eager_ones(model_type, real_budget):
    model = sparsify(tiny_models.tiny_model(model_type), {**real_budget, "min_keys": 112})
    ids = torch.randint(3, 95, (2, 200), generator=torch.Generator().manual_seed(0))
    grads = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


@torch.no_grad()
def test_a_copy_of_a_model_compiles_with_its_own_routers(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget, noise=0.1)
    other, ids = copy.deepcopy(model), token_ids(1, 200)
    for router in routers(other):
        router.wq.neg_()
    want = other(ids, use_cache=False).logits
    assert not torch.equal(want, model(ids, use_cache=False).logits)
    got = torch.compile(other, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_call_may_fill_a_static_cache(model, token_ids):
    """Its layer is not adopted inside the graph, but only its filled slots are keys."""
    ids, caches = token_ids(1, 180), [StaticCache(config=model.config, max_cache_len=256) for _ in range(2)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parts = [
        [forward(input_ids=ids[:, :160], past_key_values=cache).logits]
        for forward, cache in zip((compiled, model), caches, strict=True)
    ]
    for at in range(160, 180):
        for cache, part in zip(caches, parts, strict=True):
            part.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits)
    torch.testing.assert_close(*(torch.cat(part, 1) for part in parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "padded"), [("every_block", False), ("real_budget", True)], indirect=["model"])
def test_generate_with_a_compiled_forward_gives_the_eager_tokens(model, padded, token_ids, monkeypatch):
    ids = token_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0 if padded else 1
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    want = model.generate(ids, **options)
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, fullgraph=True, backend=counter))
    for kind, compilations in (("static", 2), ("dynamic", 4)):  # one for the prompt, one for all steps
        assert torch.equal(model.generate(ids, cache_implementation=kind, **options), want)
        assert counter.frame_count <= compilations
