"""A layer is known by its module: copies of layers, repeated layers, copied and rebuilt caches, programs
for elsewhere.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_sparse_attn import SparseObjective, SparseTrainingConfig, lora_config, routers
from hf_sparse_attn.models.adapters import active_routers

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
N = 200


def stacked(model, places, how=copy.deepcopy):
    """Depth up-scaling: the layers at ``places``, each a copy numbered as a cache needs it."""
    layers = [how(model.model.layers[place]) for place in places]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


def replicated(model, places):
    torch.manual_seed(3)
    config = lora_config(model, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    config.layer_replication = places
    return get_peft_model(model, config)


COPIED = {
    "peft": lambda model: replicated(model, [(0, 2), (1, 3)]),
    "deepcopy": lambda model: stacked(model, (0, 1, 1, 2)),
    "pickle": lambda model: stacked(model, (0, 1, 1, 2), lambda layer: pickle.loads(pickle.dumps(layer))),
    "same_number": lambda model: numbered_alike(stacked(model, (0, 1, 1, 2))),
    "same_module": lambda model: stacked(model, (0, 1, 1, 2), lambda layer: layer),
}


def numbered_alike(model):
    model.model.layers[2].self_attn.layer_idx = 1
    return model


def gradients(model, ids, checkpointing):
    model.train()
    if checkpointing:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        base.enable_input_require_grads()
    forward = SparseObjective(model, SparseTrainingConfig(dense_every=0)).forward(0, 1)
    loss = model(input_ids=ids, labels=ids, use_cache=False, sparse_call=forward.call).loss
    (loss + forward.kl_loss()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", COPIED)
def test_copied_layers_learn_and_checkpointing_changes_no_gradient(way, sparse_llama, real_budget, token_ids):
    plain, repeated = (
        gradients(COPIED[way](sparse_llama(real_budget, noise=0.1, num_hidden_layers=3)), token_ids(1, N), on)
        for on in (0, 1)
    )
    assert sum(".router." in name for name in plain) >= 12 and not [
        name for name, grad in plain.items() if grad is None
    ]
    for name, grad in plain.items():
        torch.testing.assert_close(repeated[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)
        assert ".router." not in name or grad.abs().max() > 0


@pytest.mark.parametrize("way", ["peft", "deepcopy", "pickle", "same_number"])
def test_copies_have_numbers_of_their_own_and_stay_dense(way, sparse_llama, real_budget, token_ids, tmp_path):
    settings = {**real_budget, "dense_layers": [1], "retrieval_heads": [[1, 0], [2, 1]]}
    model = COPIED[way](sparse_llama(settings, noise=0.1, num_hidden_layers=3))
    with torch.no_grad():
        want = model(token_ids(1, N), use_cache=False).logits
    result = active_routers(model)
    assert [router.layer for router in result] == [0, 1, 2, 3] and {
        router.config.dense_layers for router in result
    } == {(1, 2)}
    assert model.config.sparse_attention["dense_layers"] == [1, 2]
    assert model.config.sparse_attention["retrieval_heads"] == [[1, 0], [2, 0], [3, 1]]
    with torch.no_grad():
        assert torch.equal(model(token_ids(1, N), use_cache=False).logits, want)
    if way != "peft":
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(token_ids(1, N), use_cache=False).logits
        torch.testing.assert_close(loaded, want)


@torch.no_grad()
@pytest.mark.parametrize("way", ["peft", "deepcopy"])
def test_what_is_set_for_the_model_holds_for_copies(way, sparse_llama, real_budget, token_ids, count_calls):
    model = COPIED[way](sparse_llama(real_budget, noise=0.1, num_hidden_layers=3)).eval()
    (model.get_base_model() if way == "peft" else model).set_attn_implementation("sdpa")
    model(token_ids(1, N), use_cache=False)
    assert not count_calls


def test_layers_that_would_share_a_cache_entry_are_refused(sparse_llama, real_budget, token_ids):
    model = COPIED["same_number"](sparse_llama(real_budget, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"several layers have layer_idx 1.*use_cache=False"):
        model.generate(token_ids(1, N), max_new_tokens=2)
    stacked_well = COPIED["deepcopy"](sparse_llama(real_budget, noise=0.1, num_hidden_layers=3))
    options = {"max_new_tokens": 4, "do_sample": False}
    got, want = (stacked_well.generate(token_ids(1, N), **options, use_cache=use) for use in (True, True))
    assert torch.equal(got, want)


@torch.no_grad()
def test_summaries_of_another_models_routers_are_made_anew(sparse_llama, real_budget, token_ids):
    model, ids, cache = sparse_llama(real_budget, noise=0.1), token_ids(1, N), DynamicCache()
    other = copy.deepcopy(model)
    for router in routers(other):
        router.wk.neg_()
    model(ids[:, :180], past_key_values=cache)
    other(ids[:, 180:190], past_key_values=cache)
    for router, layer in zip(routers(other), cache.layers, strict=True):
        want = router.router_keys(layer.keys, torch.arange(190)[None])
        torch.testing.assert_close(layer.router_keys[:, :, : 190 // 16], want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_that_was_rebuilt_by_its_attributes_has_a_number_of_its_own(sparse_llama, real_budget, token_ids):
    model, ids, cache = sparse_llama(real_budget), token_ids(1, N), DynamicCache()
    model(ids[:, :180], past_key_values=cache)
    twin = DynamicCache()
    for layer in cache.layers:
        created = type(layer).__new__(type(layer))
        created.__dict__.update(layer.__dict__)
        twin.layers.append(created)
    model(ids[:, 180:190], past_key_values=twin)
    numbers = [int(layer.number) for layer in (*cache.layers, *twin.layers)]
    assert len(set(numbers)) == 4


@torch.no_grad()
def test_a_static_cache_gets_masks_of_its_length(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget, noise=0.1), token_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = StaticCache(config=model.config, max_cache_len=128)
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, attention_mask=mask)
    assert inputs["attention_mask"].shape == (2, 128) and int(inputs["attention_mask"].sum()) == int(mask.sum())
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=DynamicCache(), attention_mask=mask)
    assert inputs["attention_mask"].shape == (2, 60)


WAY_OUT = r"(?s)sparse attention cannot be exported.*to_dense\(model\)"
EXPORTS = {
    "export": lambda model, ids: torch.export.export(model, (), {"input_ids": ids, "use_cache": False}),
    "trace": lambda model, ids: torch.jit.trace(model, (ids,), strict=False),
    "script": lambda model, ids: torch.jit.script(model),
    "onnx": lambda model, ids: torch.onnx.export(model, (ids,), "unused.onnx", dynamo=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", EXPORTS)
def test_export_is_refused_with_the_way_out(way, sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget), token_ids(1, N)
    with pytest.raises(ValueError, match=WAY_OUT):
        EXPORTS[way](model, ids)
    assert model(ids, use_cache=False).logits.shape == (1, N, 97)  # and the model runs as before


def test_the_dense_model_exports(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget), token_ids(1, 40)
    model.set_attn_implementation("sdpa")
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}).module()
    torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)
