"""Sparse models as Transformers sees them: loading, saving, masks, packing, gradients, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.calls import Watching
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    StableLmConfig,
    StableLmForCausalLM,
)

import hf_sparse_attn
from hf_sparse_attn import (
    SparseAttentionConfig,
    SparseCall,
    routers,
    set_sparse_attention,
    sparse_attention_as,
    sparse_class,
    sparse_config,
    sparsify,
    to_dense,
)
from hf_sparse_attn.models.convert import mark_trained


@pytest.fixture(scope="module")
def stock_folder(stock_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock") / "model"
    stock_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def sparse_folder(sparse_llama, real_budget, tmp_path):
    """A saved sparse model whose routers are marked as trained."""
    model = sparse_llama(real_budget, noise=0.1)
    mark_trained(model)
    model.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


# -- loading and converting -----------------------------------------------------------------------------------------


def test_from_pretrained_takes_a_dict_or_a_config(stock_folder, real_budget, token_ids):
    ids = token_ids(1, 200)
    models = [
        AutoModelForCausalLM.from_pretrained(stock_folder, sparse_attention=s)
        for s in (real_budget, SparseAttentionConfig(**real_budget))
    ]
    for model in models:
        assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "SparseLlamaForCausalLM"
        assert model.config._attn_implementation == "hf_sparse"
        assert len(routers(model)) == 2 and routers(model)[0].config == SparseAttentionConfig(**real_budget)
    sparsified = sparsify(AutoModelForCausalLM.from_pretrained(stock_folder), real_budget)
    assert torch.equal(logits(models[0], ids), logits(models[1], ids))
    assert torch.equal(logits(models[0], ids), logits(sparsified, ids))


def test_from_config_through_auto_config(stock_folder, real_budget, token_ids):
    config = AutoConfig.from_pretrained(stock_folder, sparse_attention=real_budget)
    assert config.sparse_attention == SparseAttentionConfig(**real_budget).to_dict()
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "SparseLlamaForCausalLM" and len(routers(model)) == 2
    assert bool(torch.isfinite(logits(model.eval(), token_ids(1, 150))).all())
    assert all(router.fresh for router in routers(model))


def test_sparse_class_serves_a_named_class(stock_folder, real_budget):
    config = sparse_config(LlamaConfig.from_pretrained(stock_folder), real_budget)
    model = sparse_class(LlamaModel).from_pretrained(stock_folder, config=config)
    assert type(model).__name__ == "SparseLlamaModel" and len(routers(model)) == 2
    assert sparse_class(LlamaForSequenceClassification) is sparse_class(LlamaForSequenceClassification)


def test_stock_checkpoints_still_give_the_identical_stock_classes(stock_folder):
    assert type(AutoConfig.from_pretrained(stock_folder)) is LlamaConfig
    assert type(AutoConfig.for_model("llama")) is LlamaConfig
    model = AutoModelForCausalLM.from_pretrained(stock_folder)
    assert type(model) is LlamaForCausalLM and type(model.config) is LlamaConfig
    assert not hasattr(model.config, "sparse_attention") and model.config._attn_implementation == "sdpa"
    assert not any("router" in name for name in model.state_dict())
    assert type(AutoModelForCausalLM.from_config(LlamaConfig(**model.config.to_diff_dict()))) is LlamaForCausalLM


def test_a_config_class_that_somebody_else_registered_stays():
    code = """
from transformers import AutoConfig, LlamaConfig
class Own(LlamaConfig): pass
AutoConfig.register("llama", Own, exist_ok=True)
import hf_sparse_attn
assert type(AutoConfig.for_model("llama")) is Own
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_again_changes_nothing(stock_folder):
    hf_sparse_attn.register()
    hf_sparse_attn.register()
    assert type(AutoConfig.from_pretrained(stock_folder)) is LlamaConfig


def test_to_dense_undoes_sparsify(stock_llama, real_budget, token_ids):
    stock, model = stock_llama(), stock_llama()
    before, ids = model.config.to_dict(), token_ids(1, 200)
    assert sparsify(model, real_budget) is model and not torch.equal(logits(model, ids), logits(stock, ids))
    assert to_dense(model) is model
    assert type(model) is LlamaForCausalLM and type(model.config) is LlamaConfig
    assert model.config.to_dict() == before
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(logits(model, ids), logits(stock, ids))
    assert [type(a) for a in model.modules()] == [type(b) for b in stock.modules()]
    sparsify(model, real_budget)
    assert len(routers(model)) == 2


def test_a_loaded_sparse_model_becomes_dense_again(sparse_folder, stock_llama, token_ids, tmp_path):
    model = to_dense(AutoModelForCausalLM.from_pretrained(sparse_folder))
    assert type(model) is LlamaForCausalLM
    assert torch.equal(logits(model, token_ids(1, 100)), logits(stock_llama(), token_ids(1, 100)))
    model.save_pretrained(tmp_path / "dense")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is LlamaForCausalLM


def test_converting_twice_or_back_without_need_is_refused(stock_llama, sparse_llama, real_budget):
    with pytest.raises(ValueError, match="SparseLlamaForCausalLM is sparse already"):
        sparsify(sparse_llama(real_budget), real_budget)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a sparse model"):
        to_dense(stock_llama())
    with pytest.raises(ValueError, match=r"dense_layers is \(2,\).*layers that can be sparse are \[0, 1\]"):
        sparsify(stock_llama(), {**real_budget, "dense_layers": [2]})


@pytest.mark.parametrize(("head", "has"), [([0, 2], "layer 0 has KV heads 0 to 1"), ([2, 0], r"layers are \[0, 1\]")])
def test_retrieval_heads_of_another_model_are_refused(stock_llama, sparse_llama, real_budget, head, has):
    with pytest.raises(ValueError, match=rf"KV head {head[1]} of layer {head[0]}: this model's {has}.*leave the sett"):
        sparsify(stock_llama(), {**real_budget, "retrieval_heads": [head]})
    model = sparse_llama(real_budget)
    with pytest.raises(ValueError, match=has):
        set_sparse_attention(model, retrieval_heads=[head])
    assert model.config.sparse_attention["retrieval_heads"] == []


def test_a_refused_conversion_leaves_the_model_as_it_was(stock_llama, real_budget, token_ids):
    model, ids = stock_llama(), token_ids(1, 100)
    before = logits(model, ids)
    for impossible in ({"dense_layers": [2]}, {"router_dim": 2}, {"index_dim": 512}):
        with pytest.raises(ValueError, match=next(iter(impossible))):
            sparsify(model, {**real_budget, **impossible})
        assert not routers(model) and type(model) is LlamaForCausalLM
    assert torch.equal(logits(model, ids), before)


# -- saving ---------------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_identical_logits(sparse_llama, real_budget, token_ids, tmp_path):
    model = sparse_llama(real_budget, noise=0.1)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is type(model)
    assert again.config.sparse_attention == model.config.sparse_attention
    assert not any(router.fresh for router in routers(again))
    assert torch.equal(logits(again, token_ids(2, 200)), logits(model, token_ids(2, 200)))
    again.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "a/model.safetensors").keys() == load_file(tmp_path / "b/model.safetensors").keys()


def test_saved_files_name_only_stock_classes(sparse_folder):
    config = json.loads((sparse_folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert SparseAttentionConfig.from_dict(config["sparse_attention"]).bookkeeping.trained
    assert not [key for key in config if "attn_implementation" in key]


def test_the_stock_class_loads_a_sparse_folder_densely(sparse_folder, stock_llama, token_ids):
    config = LlamaConfig.from_pretrained(sparse_folder)
    assert type(config) is LlamaConfig
    model = LlamaForCausalLM.from_pretrained(sparse_folder)
    assert type(model) is LlamaForCausalLM and model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, token_ids(1, 100)), logits(stock_llama(), token_ids(1, 100)))


def test_router_weights_stay_in_float32_in_a_bfloat16_model(sparse_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(sparse_folder, dtype=torch.bfloat16)
    assert {p.dtype for r in routers(model) for p in r.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits(model, token_ids(1, 200))).all())
    assert {p.dtype for r in routers(sparsify(to_dense(model), {"min_keys": 512})) for p in r.parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize("lost", [".router.", "layers.1.self_attn.router.", "layers.1.self_attn.router.wk_index"])
def test_a_trained_checkpoint_that_lost_router_weights_is_refused(sparse_folder, lost):
    path = sparse_folder / "model.safetensors"
    save_file({name: w for name, w in load_file(path).items() if lost not in name}, path, metadata={"format": "pt"})
    layers = r"\[1\]" if "layers.1" in lost else r"\[0, 1\]"
    with pytest.raises(ValueError, match=f"trained.*layers {layers}"):
        AutoModelForCausalLM.from_pretrained(sparse_folder)


def test_a_trained_checkpoint_saved_again_by_the_stock_class_is_refused(sparse_folder, real_budget, tmp_path):
    LlamaForCausalLM.from_pretrained(sparse_folder).save_pretrained(tmp_path / "again")
    shutil.copy(sparse_folder / "config.json", tmp_path / "again/config.json")
    with pytest.raises(ValueError, match="routers were trained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", sparse_attention=real_budget)
    assert all(router.fresh for router in routers(model))


@pytest.mark.parametrize(("field", "value"), [("block_size", 32), ("router_dim", 64), ("index_dim", 4)])
def test_settings_that_ask_for_other_routers_than_the_checkpoint_holds_are_refused(
    sparse_folder, real_budget, field, value
):
    settings = {**real_budget, "min_keys": 160, field: value}
    with pytest.raises(ValueError, match=rf"sparse_attention.{field} {value} was asked for, but .* holds routers for"):
        AutoModelForCausalLM.from_pretrained(sparse_folder, sparse_attention=settings)
    fits = {**real_budget, "router_dim": 32, "min_keys": 160}  # 32 is what None stands for here
    assert routers(AutoModelForCausalLM.from_pretrained(sparse_folder, sparse_attention=fits))[0].config.min_keys == 160


# -- what the attention computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 100, 233])
def test_every_block_kept_equals_dense_through_the_sparse_path(
    stock_llama, sparse_llama, every_block, token_ids, count_calls, length
):
    stock, model = stock_llama(), sparse_llama(every_block, noise=0.1)
    ids = token_ids(2, length)
    torch.testing.assert_close(logits(model, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)
    assert len(count_calls) == 2  # one per layer: no dense shortcut
    assert all(selection.kept().sum(-1).max() == -(-length // 16) for selection in count_calls)


def test_a_real_budget_cuts_links_and_changes_the_logits(
    stock_llama, sparse_llama, real_budget, token_ids, count_calls
):
    stock, model = stock_llama(), sparse_llama(real_budget)
    ids = token_ids(1, 200)
    assert (logits(model, ids) - logits(stock, ids)).abs().max() > 0.05
    assert all(selection.kept().sum(-1).max() == 5 for selection in count_calls)
    different = count_calls[0].kept()
    assert not torch.equal(different[:, 0], different[:, 1])  # each KV head has its own links


@pytest.mark.parametrize("padded", [False, True])
def test_below_dense_below_the_logits_are_bitwise_those_of_the_stock_model(
    stock_llama, sparse_llama, real_budget, token_ids, left_padded, count_calls, padded
):
    stock, model = stock_llama(), sparse_llama({**real_budget, "dense_below": 201}, noise=0.1)
    ids, mask = left_padded([token_ids(1, n, seed=n)[0] for n in ((200, 77) if padded else (200, 200))])
    options = {"attention_mask": mask} if padded else {}
    assert torch.equal(logits(model, ids, **options), logits(stock, ids, **options))
    assert not count_calls
    logits(model, token_ids(1, 201))
    assert len(count_calls) == 2


def test_dense_layers_stay_dense(stock_llama, sparse_llama, real_budget, token_ids, count_calls):
    ids = token_ids(1, 200)
    half = sparse_llama({**real_budget, "dense_layers": [0]})
    with torch.no_grad():
        first = [
            m.model(ids, output_hidden_states=True, use_cache=False).hidden_states[1] for m in (half, stock_llama())
        ]
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)
    assert len(count_calls) == 1
    both = sparse_llama({**real_budget, "dense_layers": [0, 1]})
    torch.testing.assert_close(logits(both, ids), logits(stock_llama(), ids), rtol=1e-4, atol=1e-4)
    assert len(count_calls) == 1


def test_a_dense_call_is_dense_and_still_observed(stock_llama, sparse_llama, real_budget, token_ids):
    ids, seen = token_ids(1, 200), []
    model = sparse_llama(real_budget)
    out = logits(
        model,
        ids,
        sparse_call=Watching(dense=True, document=lambda router, inputs: seen.append((router.layer, inputs.q.shape))),
    )
    torch.testing.assert_close(out, logits(stock_llama(), ids), rtol=1e-4, atol=1e-4)
    assert seen == [(0, (1, 4, 200, 16)), (1, (1, 4, 200, 16))]


def test_a_later_token_never_changes_an_earlier_tile(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget, noise=0.1)
    ids = token_ids(1, 200)
    changed = ids.clone()
    changed[:, 112:] = token_ids(1, 88, seed=9)
    assert torch.equal(logits(model, ids)[:, :112], logits(model, changed)[:, :112])


# -- padding and packing --------------------------------------------------------------------------------------------


@pytest.fixture(params=["every_block", "real_budget"])
def sparse(request, sparse_llama):
    return sparse_llama(request.getfixturevalue(request.param), noise=0.1)


LENGTHS = (200, 131, 90)


@pytest.fixture
def documents(token_ids):
    return [token_ids(1, n, seed=n) for n in LENGTHS]


def test_padded_rows_equal_unpadded_ones(sparse, documents, left_padded):
    ids, mask = left_padded([d[0] for d in documents])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = logits(sparse, ids, attention_mask=mask, position_ids=positions)
    right_ids = torch.stack([row.roll(n) for row, n in zip(ids, LENGTHS, strict=True)])  # the pads go behind
    right = logits(sparse, right_ids, attention_mask=mask.flip(1))
    for i, document in enumerate(documents):
        alone = logits(sparse, document)[0]
        torch.testing.assert_close(left[i, -LENGTHS[i] :], alone, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(right[i, : LENGTHS[i]], alone, rtol=1e-3, atol=1e-3)


def test_left_padding_without_position_ids_equals_stock(stock_llama, sparse_llama, every_block, documents, left_padded):
    """Positions then count the pads, too: rotary positions and content positions differ."""
    ids, mask = left_padded([d[0] for d in documents])
    got, want = (logits(m, ids, attention_mask=mask) for m in (sparse_llama(every_block, noise=0.1), stock_llama()))
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close(got[i, -n:], want[i, -n:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_equal_separate_ones(sparse, documents, by, use_cache):
    ids = torch.cat(documents, 1)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    options = {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if by == "cu_seq_lens":
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 200, "max_length_k": 200}
    packed = logits(sparse, ids, use_cache=use_cache, **options)
    for document, start, end in zip(documents, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        torch.testing.assert_close(packed[:, start:end], logits(sparse, document), rtol=1e-3, atol=1e-3)


def test_packed_rows_of_a_batch_may_be_cut_differently(sparse, documents, token_ids):
    ids = torch.cat([torch.cat([documents[0], documents[2]], 1), token_ids(1, 290)], 0)
    positions = torch.stack([torch.cat([torch.arange(200), torch.arange(90)]), torch.arange(290)])
    packed = logits(sparse, ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed[0, :200], logits(sparse, documents[0])[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(packed[0, 200:], logits(sparse, documents[2])[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(packed[1], logits(sparse, ids[1:])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_cache", [False, True])
def test_nan_in_padding_does_not_leak(sparse, documents, left_padded, use_cache):
    ids, mask = left_padded([d[0] for d in documents])
    embeddings = sparse.get_input_embeddings()(ids).detach()
    clean = sparse(inputs_embeds=embeddings, attention_mask=mask, use_cache=use_cache).logits.detach()
    poisoned = embeddings.masked_fill(mask[..., None] == 0, torch.nan)
    out = sparse(inputs_embeds=poisoned, attention_mask=mask, use_cache=use_cache).logits.detach()
    assert torch.equal(out[mask.bool()], clean[mask.bool()])


# -- gradients ------------------------------------------------------------------------------------------------------


def gradients(model, ids, labels, **options):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_block_kept_has_the_gradients_of_the_stock_model(
    stock_llama, sparse_llama, every_block, documents, left_padded
):
    ids, mask = left_padded([d[0] for d in documents])
    labels = ids.masked_fill(mask == 0, -100)
    loss, grads = gradients(sparse_llama(every_block, noise=0.1).train(), ids, labels, attention_mask=mask)
    want_loss, want = gradients(stock_llama().train(), ids, labels, attention_mask=mask)
    torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-4)
    assert grads.keys() == want.keys()  # routers get none from the task
    for name in want:
        torch.testing.assert_close(
            grads[name], want[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget, noise=0.1).train(), token_ids(2, 200)
    loss, grads = gradients(model, ids, ids, use_cache=False)
    # renamed within the supported range of versions; the old name warns in the newer ones
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again_loss, again = gradients(model, ids, ids, use_cache=False)
    assert torch.equal(loss, again_loss) and grads.keys() == again.keys()
    for name in grads:
        torch.testing.assert_close(again[name], grads[name], rtol=1e-5, atol=1e-6)


# -- changing the budget --------------------------------------------------------------------------------------------


def test_the_budget_of_a_model_can_change(sparse_llama, real_budget, stock_llama, token_ids):
    model, ids = sparse_llama(real_budget), token_ids(1, 200)
    before = logits(model, ids)
    with sparse_attention_as(model, min_keys=10**6) as config:
        assert config.min_keys == 10**6 == model.config.sparse_attention["min_keys"]
        torch.testing.assert_close(logits(model, ids), logits(stock_llama(), ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), before) and model.config.sparse_attention["min_keys"] == 80
    set_sparse_attention(model, dense_below=1000)
    assert torch.equal(logits(model, ids), logits(stock_llama(), ids))


def _edits():
    return {
        "a field": lambda config: config.sparse_attention.__setitem__("density", 0.5),
        "update": lambda config: config.sparse_attention.update(density=0.5),
        "in-place or": lambda config: config.sparse_attention.__ior__({"density": 0.5}),
        "a field is deleted": lambda config: config.sparse_attention.pop("density"),
        "a nested field": lambda config: config.sparse_attention["bookkeeping"].update(trained=True),
        "a nested list": lambda config: config.sparse_attention["dense_layers"].append(1),
        "another dict": lambda config: setattr(config, "sparse_attention", {"density": 0.5}),
        "none": lambda config: setattr(config, "sparse_attention", None),
        "the config's update": lambda config: config.update({"sparse_attention": {"density": 0.5}}),
    }


@pytest.mark.parametrize("edit", _edits().values(), ids=_edits())
def test_the_settings_of_a_model_cannot_be_edited_behind_its_back(
    sparse_llama, real_budget, sparse_folder, edit, tmp_path
):
    """Routers hold their settings: what is written into the config only would change nothing."""
    loaded = AutoModelForCausalLM.from_pretrained(sparse_folder)
    for model in (sparse_llama(real_budget), loaded, copy.deepcopy(loaded)):
        before = dict(model.config.sparse_attention)
        with pytest.raises(ValueError, match=r"hf_sparse_attn\.set_sparse_attention\(model"):
            edit(model.config)
        assert model.config.sparse_attention == before
    assert pickle.loads(pickle.dumps(loaded.config)) == loaded.config
    json.dumps(loaded.config.to_dict()["sparse_attention"]) and loaded.config.to_dict()["sparse_attention"].update(
        density=0.5
    )


def test_the_settings_of_a_config_without_a_model_are_replaced_whole(sparse_folder):
    config = AutoConfig.from_pretrained(sparse_folder)
    with pytest.raises(ValueError, match="replace it whole"):
        config.sparse_attention["min_keys"] = 112
    with pytest.raises(ValueError, match="has no field 'min_key'"):
        config.sparse_attention = {**config.sparse_attention, "min_key": 112}
    for keys in (112, 128):  # a model that was made from it does not bind it
        config.sparse_attention = {**config.sparse_attention, "min_keys": keys}
        model = AutoModelForCausalLM.from_pretrained(sparse_folder, config=config)
        assert (
            {router.config.min_keys for router in routers(model)}
            == {keys}
            == {model.config.sparse_attention["min_keys"]}
        )


def test_fields_that_the_weights_depend_on_cannot_change(sparse_llama, stock_llama, real_budget):
    model = sparse_llama(real_budget)
    for name, value in (("block_size", 32), ("router_dim", 64), ("index_dim", 4)):
        with pytest.raises(ValueError, match=f"{name} cannot change from .* to {value}"):
            set_sparse_attention(model, **{name: value}, min_keys=512)
    assert routers(model)[0].config == SparseAttentionConfig(**real_budget)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routers"):
        set_sparse_attention(stock_llama(), min_keys=512)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_the_implementation_on_a_stock_model_is_refused(stock_llama, token_ids):
    model = stock_llama()
    model.set_attn_implementation("hf_sparse")
    with pytest.raises(ValueError, match=r"LlamaAttention has none.*sparsify"):
        logits(model, token_ids(1, 50))


def test_attention_dropout_in_training_is_refused(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget, attention_dropout=0.25)
    assert bool(torch.isfinite(logits(model, token_ids(1, 100))).all())  # not in evaluation
    with pytest.raises(
        ValueError, match=r"no attention dropout, got 0\.25 from SparseLlamaAttention.*attention_dropout=0\.0"
    ):
        logits(model.train(), token_ids(1, 100))


def test_output_attentions_is_refused(sparse_llama, real_budget, token_ids):
    with pytest.raises(ValueError, match=r"output_attentions=True.*eager"):
        logits(sparse_llama(real_budget), token_ids(1, 100), output_attentions=True)


def test_a_sparse_call_on_a_model_that_runs_dense_is_refused(sparse_llama, real_budget, stock_llama, token_ids):
    model, ids = sparse_llama(real_budget), token_ids(1, 200)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, ids), logits(stock_llama(), ids))
    with pytest.raises(ValueError, match=r"sparse_call.*'sdpa'.*hf_sparse"):
        logits(model, ids, sparse_call=SparseCall())


def test_unsupported_architectures_are_refused_by_name(real_budget):
    neo = GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])
    )
    with pytest.raises(ValueError, match=r"'gpt_neo' does not route.*supports: .*llama"):
        sparsify(neo, real_budget)
    stablelm = StableLmForCausalLM(
        StableLmConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    with pytest.raises(ValueError, match=r"'stablelm' does not pass keyword arguments.*supports: .*llama"):
        sparsify(stablelm, real_budget)
    assert type(stablelm) is StableLmForCausalLM and not routers(stablelm)
