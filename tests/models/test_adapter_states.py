"""Adapters of sparse models that are switched, scaled, mixed and swapped in place:
the routers go with them, or the call is refused.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_sparse_attn import lora_config, routers
from hf_sparse_attn.models.adapters import active_routers

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def ids(token_ids):
    return token_ids(1, 200)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def folder(sparse_llama, real_budget, tmp_path_factory, shift):
    """A folder with a sparse base, adapters ``a`` and ``b`` of it, and ``c`` of another rank and scale."""
    path = tmp_path_factory.mktemp("adapters")
    sparse_llama(real_budget, noise=0.1).save_pretrained(path / "base")
    for seed, (name, options) in enumerate({"a": {}, "b": {}, "c": {"r": 2, "lora_alpha": 16}}.items()):
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        shift(get_peft_model(base, lora_config(base, **{**LORA, **options})), seed).save_pretrained(path / name)
    return path


@pytest.fixture
def sparse(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.fixture
def adapted(sparse, folder):
    return PeftModel.from_pretrained(sparse, folder / "a")


def want(folder, name, ids):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / name), ids)


# -- off and on -----------------------------------------------------------------------------------------------------


def test_transformers_own_methods_turn_routers_off_and_on(sparse, folder, ids):
    before, base = logits(sparse, ids), active_routers(sparse)
    sparse.load_adapter(str(folder / "a"))
    on, trained = logits(sparse, ids), active_routers(sparse)
    assert torch.equal(on, want(folder, "a", ids)) and trained != base
    for _ in range(2):
        sparse.disable_adapters()
        assert torch.equal(logits(sparse, ids), before) and active_routers(sparse) == base
        sparse.enable_adapters()
        assert torch.equal(logits(sparse, ids), on) and active_routers(sparse) == trained


@pytest.mark.parametrize("enabled", [True, False])
def test_a_part_that_is_switched_by_itself_is_refused(adapted, ids, enabled):
    """LoRA without its routers, and routers without their LoRA."""
    on = logits(adapted, ids)
    if enabled:
        adapted.base_model.disable_adapter_layers()
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)
    with pytest.raises(ValueError, match=r"runs with the routers of (the base model|'default')"):
        logits(adapted, ids)
    adapted.set_attn_implementation("sdpa")
    logits(adapted, ids)  # dense attention asks no router
    adapted.set_attn_implementation("hf_sparse")
    adapted.base_model.enable_adapter_layers()
    assert torch.equal(logits(adapted, ids), on)
    with adapted.disable_adapter():
        assert not torch.equal(logits(adapted, ids), on)
    assert torch.equal(logits(adapted, ids), on)


def test_layers_that_are_given_another_adapter_by_themselves_are_refused(adapted, folder, ids):
    adapted.load_adapter(folder / "b", "other")
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter("other")
    with pytest.raises(ValueError, match="adapter 'other' runs with the routers of 'default'"):
        logits(adapted, ids)
    adapted.set_adapter("other")
    assert torch.equal(logits(adapted, ids), want(folder, "b", ids))


def test_an_adapter_that_is_merged_in_place_runs_with_its_routers(adapted, ids):
    on = logits(adapted, ids)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted, ids), on, rtol=1e-3, atol=1e-3)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted, ids), on, rtol=1e-3, atol=1e-3)


# -- scales ---------------------------------------------------------------------------------------------------------

SCALES = {
    "set_scale": lambda layer: layer.set_scale("default", 0.5),
    "scale_layer": lambda layer: layer.scale_layer(0.5),
    "scaling": lambda layer: layer.scaling.update(default=0.5 * layer.scaling["default"]),
}


@pytest.mark.parametrize("way", SCALES)
def test_a_scaled_adapter_is_refused_until_its_scale_is_back(way, adapted, ids):
    on = logits(adapted, ids)
    layers = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    SCALES[way](layers[-1])
    with pytest.raises(ValueError, match=r"adapter 'default' is scaled by 0\.5, but its routers were trained"):
        logits(adapted, ids)
    with adapted.disable_adapter():
        logits(adapted, ids)
    adapted.set_attn_implementation("sdpa")
    logits(adapted, ids)
    adapted.set_attn_implementation("hf_sparse")
    layers[-1].unscale_layer()
    assert torch.equal(logits(adapted, ids), on)


def test_a_scale_for_the_length_of_a_block_is_refused(adapted, ids):
    on = logits(adapted, ids)
    with rescale_adapter_scale(adapted, multiplier=2.0), pytest.raises(ValueError, match="scaled by 2"):
        logits(adapted, ids)
    assert torch.equal(logits(adapted, ids), on)


KINDS = {
    "rslora": lambda: LoraConfig(modules_to_save=["router"], use_rslora=True, lora_alpha=3, **LORA),
    "patterns": lambda: LoraConfig(
        modules_to_save=["router"], rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 5}, **LORA
    ),
    "adalora": lambda: AdaLoraConfig(
        modules_to_save=["router"],
        target_modules=["q_proj"],
        init_r=4,
        target_r=2,
        lora_alpha=3,
        total_step=10,
        task_type="CAUSAL_LM",
    ),
    "loha": lambda: LoHaConfig(modules_to_save=["router"], target_modules=["q_proj"], r=4, alpha=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_that_an_adapter_starts_with_is_no_change(kind, sparse, ids, shift):
    logits(shift(get_peft_model(sparse, KINDS[kind]()), 0), ids)


def test_adapters_cannot_be_mixed(adapted, folder, ids, stock_llama):
    adapted.load_adapter(folder / "b", "other")
    for names in (["default"], ["default", "other"]):
        with pytest.raises(ValueError, match="add_weighted_adapter cannot mix the adapters of a sparse model"):
            adapted.add_weighted_adapter(names, [0.5] * len(names), "mixed")
    assert torch.equal(logits(adapted, ids), want(folder, "a", ids)) and set(adapted.peft_config) == {
        "default",
        "other",
    }
    dense = get_peft_model(stock_llama(), LoraConfig(**LORA))
    dense.add_weighted_adapter(["default"], [0.5], "mixed")  # others are served as before
    assert "mixed" in dense.peft_config


# -- hot-swapped adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b", "c"])
def test_a_hot_swapped_adapter_brings_its_routers(name, adapted, folder, ids):
    hotswap_adapter(adapted, str(folder / name), "default", torch_device="cpu")
    torch.testing.assert_close(logits(adapted, ids), want(folder, name, ids), rtol=0, atol=1e-4)
    hotswap_adapter(adapted, str(folder / "a"), "default", torch_device="cpu")
    torch.testing.assert_close(logits(adapted, ids), want(folder, "a", ids), rtol=0, atol=1e-4)


def test_transformers_swaps_routers_too(sparse, folder, ids):
    sparse.load_adapter(str(folder / "a"))
    sparse.load_adapter(str(folder / "b"), hotswap=True, adapter_name="default")
    assert torch.equal(logits(sparse, ids), want(folder, "b", ids))
    with pytest.raises(ValueError, match=r"has r 2, the old one 4.*hotswap_adapter"):
        sparse.load_adapter(str(folder / "c"), hotswap=True, adapter_name="default")
    assert torch.equal(logits(sparse, ids), want(folder, "b", ids))


def test_what_has_no_routers_is_not_swapped_in(adapted, folder, stock_llama, ids, tmp_path, shift):
    on = logits(adapted, ids)
    shift(get_peft_model(stock_llama(), LoraConfig(**LORA)), 3).save_pretrained(tmp_path / "dense")
    shutil.copytree(folder / "b", tmp_path / "lost")
    weights = load_file(tmp_path / "lost" / "adapter_model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if ".router." not in name},
        tmp_path / "lost" / "adapter_model.safetensors",
    )
    for name, message in {"dense": "do not both have routers", "lost": "lacks routers"}.items():
        with pytest.raises(ValueError, match=message):
            hotswap_adapter(adapted, str(tmp_path / name), "default", torch_device="cpu")
        assert torch.equal(logits(adapted, ids), on)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with pytest.raises(ValueError, match="lacks weights of them"):
        base.load_adapter(str(tmp_path / "lost"))


def test_other_modules_that_an_adapter_saves_whole_cannot_be_swapped(sparse, ids, tmp_path, shift):
    peft_model = shift(get_peft_model(sparse, lora_config(sparse, modules_to_save=["lm_head"], **LORA)), 0)
    peft_model.save_pretrained(tmp_path)
    on = logits(peft_model, ids)
    with pytest.raises(ValueError, match=r"PEFT cannot hot-swap .*lm_head"):
        hotswap_adapter(peft_model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(logits(peft_model, ids), on)


def test_routers_for_other_blocks_are_not_swapped_in(adapted, folder, ids, tmp_path):
    shutil.copytree(folder / "b", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    config["sparse_attention"]["block_size"] = 8
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained for block_size 8"):
        hotswap_adapter(adapted, str(tmp_path / "other"), "default", torch_device="cpu")
    assert len(routers(adapted)) == 4  # the base's and the adapter's
