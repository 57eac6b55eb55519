"""Adapters of sparse models: training, saving, loading, merging; wrong pairs of adapter and model."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_sparse_attn import distill, load_adapter, lora_config, routers, sparsify, to_dense
from hf_sparse_attn.models.adapters import active_routers
from hf_sparse_attn.training.router_state import backbone_hash, router_state

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
NO_ROUTERS = (
    r"adapter 'default' has no routers, but SparseLlamaForCausalLM runs sparse.*lora_config.*to_dense.*\"sdpa\""
)
ON_DENSE = (
    r"adapter of a sparse model: load its base with sparse_attention=\{.*'density': 0\.05, .*'query_tile': 16.*\}"
)


@pytest.fixture
def ids(token_ids):
    return token_ids(2, 200)


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


@pytest.fixture(scope="module")
def dense_folder(stock_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model"
    stock_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sparse_folder(sparse_llama, real_budget, tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "model"
    sparse_llama(real_budget, noise=0.1).save_pretrained(path)
    return path


@pytest.fixture
def sparse(sparse_folder):
    return AutoModelForCausalLM.from_pretrained(sparse_folder)


@pytest.fixture
def dense(dense_folder):
    return AutoModelForCausalLM.from_pretrained(dense_folder)


@pytest.fixture(scope="module")
def adapters(sparse_folder, dense_folder, tmp_path_factory, shift):
    """Folders of an adapter of the sparse and one of the dense model."""
    folder = tmp_path_factory.mktemp("adapters")
    base = AutoModelForCausalLM.from_pretrained(sparse_folder)
    shift(get_peft_model(base, lora_config(base, **LORA))).save_pretrained(folder / "sparse")
    shift(get_peft_model(AutoModelForCausalLM.from_pretrained(dense_folder), LoraConfig(**LORA))).save_pretrained(
        folder / "dense"
    )
    return folder


# -- the life of an adapter -----------------------------------------------------------------------------------------

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_loaded_merged_and_unloaded(kind, sparse, sparse_folder, ids, tmp_path, shift):
    before, base = logits(sparse, ids), router_state(sparse)
    peft_model = shift(get_peft_model(sparse, lora_config(sparse, **{**LORA, **KINDS[kind]})))
    adapted = logits(peft_model, ids)
    assert not torch.allclose(adapted, before, atol=0.1)
    linear = 7 if kind == "all-linear" else 2
    names = [name for name, weight in peft_model.named_parameters() if weight.requires_grad]
    assert sum(".lora_B." in name for name in names) == 2 * linear and sum(".router." in name for name in names) == len(
        base
    )
    peft_model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(".router." in name for name in saved) == len(base) and all(
        ".router." in name or "lora_" in name for name in saved
    )

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sparse_folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), adapted)
    again.delete_adapter("default")
    assert torch.equal(logits(again.unload(), ids), before)

    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-3, atol=1e-3)
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), logits(merged, ids))
    assert not hasattr(merged, "peft_config") and not merged._forward_pre_hooks


def test_a_classifier_takes_an_adapter(stock_llama, real_budget, ids, tmp_path, shift):
    """PEFT adds the head to what is saved."""
    torch.manual_seed(0)
    stock = LlamaForSequenceClassification(stock_llama().config)
    stock.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", sparse_attention=real_budget)
    peft_model = shift(get_peft_model(base, lora_config(base, **{**LORA, "task_type": "SEQ_CLS"})))
    peft_model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", sparse_attention=real_budget)
    assert torch.equal(logits(again, ids), logits(peft_model, ids)) and len(active_routers(again)) == 2
    with pytest.raises(ValueError, match=ON_DENSE):
        load_adapter(stock, tmp_path / "adapter")


def test_unloading_alone_leaves_the_routers_of_the_adapter(adapters, sparse, sparse_folder):
    """As PEFT does with all `modules_to_save`."""
    peft_model = PeftModel.from_pretrained(sparse, adapters / "sparse")
    trained = [router.wq for router in active_routers(peft_model)]
    unloaded = peft_model.unload()
    assert backbone_hash(unloaded) == backbone_hash(AutoModelForCausalLM.from_pretrained(sparse_folder))
    assert [router.wq for router in routers(unloaded)] == trained


def test_an_adapter_may_be_loaded_onto_empty_weights(adapters, sparse, sparse_folder, ids):
    want = logits(PeftModel.from_pretrained(sparse, adapters / "sparse"), ids)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(sparse_folder), adapters / "sparse", low_cpu_mem_usage=True
    )
    assert torch.equal(logits(again, ids), want)


def test_auto_peft_reloads_a_sparse_model(adapters, sparse, ids):
    want = logits(PeftModel.from_pretrained(sparse, adapters / "sparse"), ids)
    for again in (
        AutoPeftModelForCausalLM.from_pretrained(adapters / "sparse"),
        AutoModelForCausalLM.from_pretrained(adapters / "sparse"),  # Transformers' own way to load an adapter
    ):
        assert type(active_routers(again)[0]) is type(routers(sparse)[0])
        assert torch.equal(logits(again, ids), want)


def test_a_base_that_was_a_dense_folder_is_named_with_its_settings(dense_folder, real_budget, ids, tmp_path, shift):
    base = AutoModelForCausalLM.from_pretrained(dense_folder, sparse_attention=real_budget)
    peft_model = shift(get_peft_model(base, lora_config(base, **LORA)))
    peft_model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, sparse_attention=real_budget)
    assert torch.equal(logits(again, ids), logits(peft_model, ids))
    with pytest.raises(ValueError, match=ON_DENSE):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_the_base_runs_while_adapters_are_disabled(adapters, sparse, ids):
    before, base = logits(sparse, ids), active_routers(sparse)
    peft_model = PeftModel.from_pretrained(sparse, adapters / "sparse")
    adapted = logits(peft_model, ids)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, ids), before) and active_routers(peft_model) == base
    assert torch.equal(logits(peft_model, ids), adapted) and active_routers(peft_model) != base


def test_each_of_several_adapters_has_its_routers(sparse, sparse_folder, ids, tmp_path, shift):
    peft_model = shift(get_peft_model(sparse, lora_config(sparse, **LORA)))
    peft_model.add_adapter("other", lora_config(peft_model, **{**LORA, "r": 2}))
    first = logits(peft_model, ids)
    peft_model.set_adapter("other")
    shift(peft_model, seed=1)
    second = logits(peft_model, ids)
    assert not torch.equal(first, second)
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model, ids), first)
    peft_model.save_pretrained(tmp_path)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(sparse_folder), tmp_path)
    assert load_adapter(again, tmp_path / "other", "other") is again
    assert torch.equal(logits(again, ids), first)
    again.set_adapter("other")
    assert torch.equal(logits(again, ids), second)
    again.set_adapter("default")
    again.delete_adapter("other")
    assert torch.equal(logits(again, ids), first)


def test_rows_of_a_batch_cannot_choose_their_adapters(adapters, sparse, ids):
    peft_model = PeftModel.from_pretrained(sparse, adapters / "sparse")
    with pytest.raises(ValueError, match=r"adapter_names was passed.*once for each adapter"):
        logits(peft_model, ids, adapter_names=["default", "__base__"])
    sparse.set_attn_implementation("sdpa")
    assert logits(peft_model, ids, adapter_names=["default", "__base__"]).shape == (2, 200, 97)


def test_an_adapters_router_reads_the_rotary_embedding_of_the_model(adapters, sparse):
    """A copy of the embedding would keep its dtype and device when the model's change."""
    peft_model = PeftModel.from_pretrained(sparse, adapters / "sparse").to(torch.bfloat16)
    for router in routers(peft_model):
        assert router.rotary.module is sparse.model.rotary_emb and router.wq.dtype == torch.bfloat16
    assert sparse.model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_distillation_trains_the_routers_of_the_active_adapter(sparse, token_ids):
    peft_model = get_peft_model(sparse, lora_config(sparse, **LORA))
    before = {name: weight.clone() for name, weight in peft_model.state_dict().items()}
    distill(peft_model, [{"input_ids": token_ids(1, 200, seed=seed)} for seed in range(2)], progress=False)
    changed = {name for name, weight in peft_model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".router.modules_to_save.default." in name} and len(changed) == 2 * 4


# -- the config -----------------------------------------------------------------------------------------------------


def test_the_config_adds_to_what_the_user_chose(sparse):
    config = lora_config(sparse, modules_to_save=["lm_head"], exclude_modules=["layers.1.self_attn.v_proj"], **LORA)
    assert config.modules_to_save == ["lm_head", "router"] and config.r == 4
    peft_model = get_peft_model(sparse, config)
    targets = [name for name, _ in peft_model.named_modules() if name.endswith("_proj.lora_A.default")]
    assert len(targets) == 3 and not any("layers.1.self_attn.v_proj" in name for name in targets)
    assert config.exclude_modules == {"layers.1.self_attn.v_proj"} and config.sparse_attention["min_keys"] == 80
    regex = lora_config(peft_model.unload(), exclude_modules=r".*layers\.1\..*", **LORA)
    assert regex.exclude_modules == r".*layers\.1\..*"
    assert lora_config(sparse, modules_to_save=["self_attn.router"], **LORA).modules_to_save == ["self_attn.router"]


@pytest.mark.parametrize(
    ("options", "hit"),
    [
        ({"target_modules": ["q_proj", "router"]}, "router"),
        ({"target_modules": ["self_attn.router"]}, "router"),
        ({"target_modules": r".*\.(q_proj|router)"}, "router"),
        ({"target_modules": ["q_proj"], "target_parameters": ["router.wq"]}, r"router\.wq"),
        ({"target_modules": ["q_proj"], "target_parameters": ["wk_index"]}, r"router\.wk_index"),
    ],
)
def test_targets_that_take_in_a_router_are_refused(sparse, options, hit):
    with pytest.raises(
        ValueError, match=rf"target_\w+ .* takes in model\.layers\.0\.self_attn\.{hit}: routers are trained whole"
    ):
        lora_config(sparse, **options)


def test_a_config_for_a_dense_model_is_refused(dense):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no routers.*sparsify.*peft\.LoraConfig"):
        lora_config(dense, **LORA)


def test_an_adapter_of_plain_peft_names_the_settings_too(sparse, tmp_path):
    settings = lora_config(sparse, **LORA).sparse_attention
    get_peft_model(sparse, LoraConfig(modules_to_save=["router"], **LORA)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["sparse_attention"] == settings and config["exclude_modules"] is None
    assert PeftConfig.from_pretrained(tmp_path).sparse_attention == settings


# -- an adapter of a sparse model on a dense one --------------------------------------------------------------------


def test_a_sparse_adapter_on_a_dense_model_is_refused(adapters, dense):
    with pytest.raises(ValueError, match=rf"cannot go on the dense LlamaForCausalLM.*{ON_DENSE}"):
        load_adapter(dense, adapters / "sparse")
    assert not any("lora" in name for name, _ in dense.named_modules())
    peft_model = PeftModel.from_pretrained(dense, adapters / "dense")
    with pytest.raises(ValueError, match=ON_DENSE):
        load_adapter(peft_model, adapters / "sparse", "other")
    assert list(peft_model.peft_config) == ["default"]


def test_the_helper_refuses_where_plain_peft_stays_silent(sparse, dense, tmp_path):
    """A plain config that was never on a sparse model names no settings."""
    get_peft_model(sparse, lora_config(sparse, modules_to_save=["lm_head"], **LORA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=ON_DENSE):
        load_adapter(dense, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "sparse_attention": None}))
    with pytest.raises(ValueError, match=r"adapter of a sparse model: load its base with sparse_attention=\{\.\.\.\}"):
        load_adapter(dense, tmp_path)
    # what the helper is for
    assert type(PeftModel.from_pretrained(dense, tmp_path).get_base_model()) is LlamaForCausalLM


WAYS = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(base, adapter),
    "Transformers": lambda base, adapter: base.load_adapter(adapter),
}


@pytest.mark.parametrize("way", WAYS)
def test_plain_peft_refuses_too_and_leaves_the_model_as_it_was(way, adapters, dense, dense_folder, ids):
    with pytest.raises(ValueError, match=rf"adapter 'default' cannot go on the dense LlamaForCausalLM: {ON_DENSE}"):
        WAYS[way](dense, adapters / "sparse")
    assert not any("lora" in name for name, _ in dense.named_modules())
    assert torch.equal(logits(dense, ids), logits(AutoModelForCausalLM.from_pretrained(dense_folder), ids))


LATER = """
import sys, warnings
import hf_sparse_attn
before = list(warnings.filters)
assert "peft" not in sys.modules
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert not any("exclude_modules" in str(entry) for entry in before)
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
except ValueError as error:
    print(error)
"""
WITHOUT = """
import sys, warnings
from peft import PeftModel
from transformers import AutoModelForCausalLM
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print(*[warning.message for warning in caught])
"""


@pytest.mark.parametrize(
    ("code", "said"), [(LATER, ON_DENSE), (WITHOUT, r"Unexpected keyword arguments \['sparse_attention'\]")]
)
def test_peft_that_is_imported_after_the_package_refuses_and_without_it_names_the_key(
    code, said, adapters, dense_folder
):
    command = [sys.executable, "-c", code, str(dense_folder), str(adapters / "sparse")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(said, run.stdout)


def test_settings_in_a_file_that_are_no_mapping_are_refused(adapters, sparse, tmp_path):
    config = json.loads((adapters / "sparse/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "sparse_attention": [1]}))
    with pytest.raises(ValueError, match=r"sparse_attention in adapter_config\.json is \[1\]: must be a mapping"):
        load_adapter(sparse, tmp_path)


# -- an adapter of a dense model on a sparse one --------------------------------------------------------------------


def as_it_was(model, folder, ids):
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    return (
        [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
        and not hasattr(model, "peft_config")
        and torch.equal(logits(model, ids), logits(fresh, ids))
    )


@pytest.mark.parametrize("way", [*WAYS, "load_adapter"])
def test_a_dense_adapter_on_a_sparse_model_is_refused(way, adapters, sparse, sparse_folder, ids):
    with pytest.raises(ValueError, match=NO_ROUTERS):
        {**WAYS, "load_adapter": load_adapter}[way](sparse, adapters / "dense")
    assert as_it_was(sparse, sparse_folder, ids)
    peft_model = WAYS["PeftModel"](sparse, adapters / "sparse")  # and still takes one of its own
    assert not torch.equal(logits(peft_model, ids), logits(AutoModelForCausalLM.from_pretrained(sparse_folder), ids))


def test_training_an_adapter_without_routers_is_refused(sparse, sparse_folder, ids):
    for wrap in (lambda config: get_peft_model(sparse, config), sparse.add_adapter):
        with pytest.raises(ValueError, match=NO_ROUTERS):
            wrap(LoraConfig(modules_to_save=["lm_head"], **LORA))
        assert as_it_was(sparse, sparse_folder, ids)
    get_peft_model(sparse, lora_config(sparse, **LORA))


def test_a_model_that_runs_dense_takes_a_dense_adapter(adapters, sparse, dense, ids):
    want = logits(PeftModel.from_pretrained(dense, adapters / "dense"), ids)
    sparse.set_attn_implementation("sdpa")
    peft_model = PeftModel.from_pretrained(sparse, adapters / "dense")
    assert torch.equal(logits(peft_model, ids), want)
    sparse.set_attn_implementation("hf_sparse")
    with pytest.raises(ValueError, match=NO_ROUTERS):
        logits(peft_model, ids)
    with peft_model.disable_adapter():
        logits(peft_model, ids)
    peft_model = PeftModel.from_pretrained(to_dense(peft_model.unload()), adapters / "dense")
    assert torch.equal(logits(peft_model, ids), want)


def test_a_second_adapter_without_routers_is_refused(adapters, sparse, ids):
    peft_model = load_adapter(sparse, adapters / "sparse")
    want = logits(peft_model, ids)
    with pytest.raises(ValueError, match="adapter 'other' has no routers"):
        load_adapter(peft_model, adapters / "dense", "other")
    peft_model.load_adapter(adapters / "dense", "other")  # plain PEFT asks the model nothing
    assert torch.equal(logits(peft_model, ids), want)
    peft_model.set_adapter("other")
    with pytest.raises(ValueError, match="adapter 'other' has no routers"):
        logits(peft_model, ids)


def test_routers_for_other_blocks_are_refused(adapters, dense_folder, real_budget, ids):
    base = AutoModelForCausalLM.from_pretrained(
        dense_folder, sparse_attention={**real_budget, "block_size": 32, "min_keys": 128}
    )
    for load in (PeftModel.from_pretrained, load_adapter):
        with pytest.raises(
            ValueError,
            match=r"trained for block_size 16, those of the model are for 32.*sparse_attention=\{.*'query_tile': 16",
        ):
            load(base, adapters / "sparse")
    assert not hasattr(base, "peft_config") and not any("lora" in name for name, _ in base.named_modules())


def test_prompt_tuning_needs_no_routers(sparse, ids):
    peft_model = get_peft_model(sparse, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    assert logits(peft_model, ids).shape == (2, 208, 97)


def test_a_model_with_adapters_is_not_converted(adapters, sparse, dense, real_budget):
    peft_model = PeftModel.from_pretrained(dense, adapters / "dense")
    for model in (dense, peft_model):
        with pytest.raises(
            ValueError, match=r"sparsify cannot change a model with adapters \(default\): merge or unload"
        ):
            sparsify(model, real_budget)
    with pytest.raises(ValueError, match=r"to_dense cannot change a model with adapters \(default\)"):
        to_dense(PeftModel.from_pretrained(sparse, adapters / "sparse").get_base_model())
    assert type(dense) is LlamaForCausalLM
    sparsify(peft_model.merge_and_unload(), real_budget)
