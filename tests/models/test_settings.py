"""The settings of a model: its routers read them from one holder, and one function writes them."""

from __future__ import annotations

import copy
import pickle
import pickletools

import pytest
import torch
from helpers import tiny_models
from helpers.paths import ROOT
from peft import get_peft_model

from hf_sparse_attn import lora_config, routers, set_sparse_attention, sparse_attention_as, sparsify
from hf_sparse_attn.router.module import SparseRouter

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def all_routers(model):
    """Those of adapters and what they were made from, too."""
    return [module for module in model.modules() if isinstance(module, SparseRouter)]


def holder(model):
    (shared,) = {router.holder for router in all_routers(model)}
    return shared


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_has_a_holder_of_its_own(model, duplicate):
    twin = duplicate(model)
    assert holder(twin) is not holder(model)
    set_sparse_attention(twin, min_keys=112)
    assert (
        [router.config.min_keys for router in routers(model)]
        == [80, 80]
        == 2 * [model.config.sparse_attention["min_keys"]]
    )
    assert (
        [router.config.min_keys for router in routers(twin)]
        == [112, 112]
        == 2 * [twin.config.sparse_attention["min_keys"]]
    )


def test_the_text_part_of_a_composite_model_says_what_its_routers_run_with(real_budget):
    model = sparsify(tiny_models.tiny_model("gemma3"), real_budget)
    with sparse_attention_as(model, min_keys=112):
        assert {router.config.min_keys for router in all_routers(model)} == {112}
        assert model.config.sparse_attention["min_keys"] == model.config.text_config.sparse_attention["min_keys"] == 112
    assert holder(model).settings.min_keys == 80 == model.config.text_config.sparse_attention["min_keys"]


def test_a_layer_that_was_copied_earlier_runs_with_the_settings_of_the_model(model):
    layer = copy.deepcopy(model.model.layers[0])
    set_sparse_attention(model, min_keys=112)
    model.model.layers[0] = layer
    assert {router.config.min_keys for router in routers(model)} == {112} and holder(model).settings.min_keys == 112


def test_the_routers_of_an_adapter_read_the_holder_of_their_model(model):
    peft_model = get_peft_model(model, lora_config(model, r=2, target_modules=["q_proj"]))
    assert len(all_routers(peft_model)) == 4
    before = holder(peft_model)
    set_sparse_attention(peft_model, min_keys=112)
    assert holder(peft_model) is before and before.settings.min_keys == 112


def test_a_router_by_itself_has_settings_of_its_own(make_router):
    router = make_router()
    other = copy.copy(router)
    other.config = router.config.changed(min_keys=112)
    assert (router.config.min_keys, other.config.min_keys) == (80, 112) and other.wq is router.wq


def test_one_function_writes_them():
    writers = [
        path
        for path in (ROOT / "hf_sparse_attn").rglob("*.py")
        for line in path.read_text().splitlines()
        if "in_use=True" in line
    ]
    assert [path.name for path in writers] == ["config_dispatch.py"]


RECORDED = {
    **{"architectures.class_factory": {"_blank"}, "models.model_class": {"SparseModelMixin"}},
    **{"models.config_dispatch": {"SparseConfigMixin"}, "attention.interface": {"SparseAttentionMixin"}},
    **{"router.module": {"SparseRouter"}, "router.rotary": {"Rotary"}},
    "config": {"SettingsHolder", "StoredSettings", "SparseAttentionConfig", "Bookkeeping"},
}


def test_a_pickle_names_what_stays(model):
    """A pickle is read by its names: one that changes makes every pickled model unreadable."""
    names = {}
    for opcode, argument, _ in pickletools.genops(pickle.dumps(model, protocol=2)):
        if opcode.name == "GLOBAL" and argument.startswith("hf_sparse_attn"):
            module, name = argument.split(" ")
            names.setdefault(module.removeprefix("hf_sparse_attn."), set()).add(name)
    assert names == RECORDED
    assert type(model).__module__ == type(model.config).__module__ == "hf_sparse_attn"


@torch.no_grad()
def test_what_is_set_is_what_runs(model, stock_llama, token_ids):
    ids = token_ids(1, 200)
    set_sparse_attention(model, dense_below=1000)
    assert torch.equal(model(ids).logits, stock_llama()(ids).logits)
