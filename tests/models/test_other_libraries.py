"""What other libraries do with sparse models: they look classes up by name, load weights from memory, make reference
models.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from helpers import tiny_models
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)
from transformers.models.auto import modeling_auto

from hf_sparse_attn import lora_config, routers, sparsify, to_dense
from hf_sparse_attn.models import calibration
from hf_sparse_attn.models.convert import mark_trained

needs_trl = pytest.mark.skipif(
    not importlib.util.find_spec("trl"), reason="needs trl: pip install 'hf_sparse_attn[trl]'"
)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def by_name(folder):
    """The class that TRL, `transformers serve` and others load."""
    return getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])


@pytest.fixture(scope="module")
def sparse_folder(sparse_llama, real_budget, word_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("libraries") / "sparse"
    sparse_llama(real_budget, noise=0.1).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(sparse_folder):
    return AutoModelForCausalLM.from_pretrained(sparse_folder)


# -- classes by their names -----------------------------------------------------------------------------------------


def test_a_loaded_config_names_the_sparse_class_and_a_saved_one_the_stock_class(
    loaded, sparse_folder, token_ids, tmp_path
):
    ids = token_ids(1, 200)
    result = by_name(sparse_folder)
    assert result is type(loaded) and torch.equal(
        logits(result.from_pretrained(sparse_folder), ids), logits(loaded, ids)
    )
    assert loaded.config.architectures == copy.deepcopy(loaded.config).architectures == ["SparseLlamaForCausalLM"]
    loaded.save_pretrained(tmp_path / "again")
    for folder in (sparse_folder, tmp_path / "again"):
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert to_dense(loaded).config.architectures == ["LlamaForCausalLM"]
    loaded.save_pretrained(tmp_path / "dense")
    assert by_name(tmp_path / "dense") is transformers.LlamaForCausalLM
    assert sparsify(loaded, {}).config.architectures == ["SparseLlamaForCausalLM"]


def test_a_dense_folder_that_is_loaded_sparse_names_the_sparse_class(stock_llama, real_budget, tmp_path):
    stock_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention=real_budget)
    assert (
        model.config.architectures == ["SparseLlamaForCausalLM"] and by_name(tmp_path) is transformers.LlamaForCausalLM
    )


def test_heads_and_classes_without_an_auto_class_are_named(stock_llama, real_budget, tmp_path):
    sparsify(LlamaForSequenceClassification(stock_llama().config), real_budget).save_pretrained(tmp_path / "classifier")
    assert by_name(tmp_path / "classifier") is type(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    )
    for model_type in ("patchtst", "gemma3"):
        model = sparsify(tiny_models.tiny_model(model_type), real_budget)
        model.save_pretrained(tmp_path / model_type)
        assert by_name(tmp_path / model_type) is type(model)


def test_a_name_that_is_no_class_of_transformers_stays(sparse_folder, tmp_path):
    for name in ("MyRemoteForCausalLM", "FalconForCausalLM"):
        config = AutoConfig.from_pretrained(sparse_folder, architectures=[name])
        assert config.architectures == [name]
    with pytest.raises(AttributeError, match="SparseNothingForCausalLM"):
        transformers.SparseNothingForCausalLM  # noqa: B018


FRESH = """
import pickle, sys
# Transformers' own __init__ runs twice: this module object is not the one that is imported later
import transformers as first
import hf_sparse_attn
config = pickle.load(open(sys.argv[1], "rb"))
import transformers as second
from transformers import SparseLlamaForCausalLM
for module in (first, second):
    assert getattr(module, config.architectures[0]) is SparseLlamaForCausalLM, module
assert not hasattr(first, "SparseLlama4ForNothing") and not hasattr(first.utils, "SparseLlamaForCausalLM")
"""


def test_a_process_that_made_no_class_yet_finds_it_in_each_transformers_module(loaded, tmp_path):
    (tmp_path / "config").write_bytes(pickle.dumps(loaded.config))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "config"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "bert", "gemma3", "patchtst"])
def test_every_auto_class_that_takes_a_stock_config_takes_the_sparse_one(model_type, real_budget):
    model = sparsify(tiny_models.tiny_model(model_type), real_budget)
    stock = type(tiny_models.tiny_config(model_type))
    autos = {name: auto._model_mapping for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    result = {
        name for name, mapping in autos.items() if stock in (mapping or ()) and mapping[stock].config_class is stock
    }
    assert "AutoModel" in result and (model_type != "gemma3" or "AutoModelForMultimodalLM" in result)
    for name in result:
        assert autos[name][type(model.config)].__name__ == f"Sparse{autos[name][stock].__name__}", name


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transformers_serve_loads_sparse_models(loaded, sparse_folder, token_ids):
    serving = pytest.importorskip("transformers.cli.serving.model_manager")
    model = serving.ModelManager(device="cpu", dtype="float32")._load_model(f"{sparse_folder}@main")
    # it passes attn_implementation=None, which is no wish for a dense model
    assert type(model) is type(loaded) and torch.equal(
        logits(model, token_ids(1, 200)), logits(loaded, token_ids(1, 200))
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma3"])
def test_no_implementation_asked_for_is_the_sparse_one(model_type, real_budget, tmp_path):
    sparsify(tiny_models.tiny_model(model_type), real_budget).save_pretrained(tmp_path)
    model = by_name(tmp_path).from_pretrained(tmp_path, attn_implementation=None)
    assert model.config.get_text_config()._attn_implementation == "hf_sparse"
    model.set_attn_implementation("sdpa")
    assert (
        by_name(tmp_path)
        .from_pretrained(tmp_path, attn_implementation="sdpa")
        .config.get_text_config()
        ._attn_implementation
        == "sdpa"
    )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_peft_finds_the_class_of_an_adapter_without_a_task(loaded, sparse_folder, token_ids, tmp_path):
    """The adapter's config names class and module, which PEFT wants to be allowed by the user."""
    from peft import AutoPeftModel, get_peft_model

    created = get_peft_model(loaded, lora_config(loaded, r=2, target_modules=["q_proj"]))
    created.save_pretrained(tmp_path)
    again = AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["hf_sparse_attn"])
    assert type(again.get_base_model()) is by_name(sparse_folder) and torch.equal(
        logits(again, token_ids(1, 200)), logits(created, token_ids(1, 200))
    )


# -- weights from memory --------------------------------------------------------------------------------------------


def test_a_model_is_made_from_a_config_and_weights(loaded, token_ids):
    again = type(loaded).from_pretrained(None, config=loaded.config, state_dict=loaded.state_dict())
    assert torch.equal(logits(again, token_ids(1, 200)), logits(loaded, token_ids(1, 200)))


def test_weights_without_trained_routers_and_a_calibration_without_a_file_are_refused(loaded):
    mark_trained(loaded)
    dense = {name: weight for name, weight in loaded.state_dict().items() if ".router." not in name}
    with pytest.raises(
        ValueError,
        match=r"the config says that its routers were trained, but state_dict holds none for layers \[0, 1\]",
    ):
        type(loaded).from_pretrained(None, config=loaded.config, state_dict=dense)
    calibration._refer(loaded, calibration.FILE)
    with pytest.raises(calibration.CalibrationError, match=r"loaded from a state_dict.*use_calibration"):
        type(loaded).from_pretrained(None, config=loaded.config, state_dict=loaded.state_dict())


# -- gradient checkpointing -----------------------------------------------------------------------------------------


def enable(model, options):
    # renamed within the supported range of versions; the old name warns in the newer ones
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)


def asked_for(model):
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers
    return {layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers}


@pytest.mark.parametrize(
    "options", [None, {}, {"preserve_rng_state": False}, {"use_reentrant": False}, {"use_reentrant": None}]
)
def test_checkpointing_is_never_reentrant_where_nobody_asked_for_it(loaded, options):
    enable(loaded, options)
    assert asked_for(loaded) == {False}


def test_reentrant_checkpointing_stays_refused(loaded):
    with pytest.raises(ValueError, match="needs use_reentrant=False"):
        enable(loaded, {"use_reentrant": True})
    with pytest.raises(ValueError, match="needs use_reentrant=False"):  # as DeepSpeed's, which knows no other kind
        loaded._set_gradient_checkpointing(True, lambda function, *arguments: function(*arguments))
    loaded._set_gradient_checkpointing(True)
    assert asked_for(loaded) == {False}
    loaded._set_gradient_checkpointing(True, functools.partial(checkpoint, preserve_rng_state=False))
    assert asked_for(loaded) == {False}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_peft_prepares_a_quantised_model(loaded, token_ids):
    from peft import prepare_model_for_kbit_training

    loaded.is_loaded_in_8bit = True  # what PEFT looks at
    prepare_model_for_kbit_training(loaded)
    assert asked_for(loaded) == {False}
    ids = token_ids(1, 64)
    loaded.train()(input_ids=ids, labels=ids).loss.backward()


# -- TRL ------------------------------------------------------------------------------------------------------------


def test_what_a_reference_model_lacks_is_said_with_its_name(stock_llama, token_ids, tmp_path):
    stock_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hf_sparse")
    with pytest.raises(
        ValueError, match=rf"model loaded from '{tmp_path}' has none.*reference model.*SparseTrainerMixin.*ref_model="
    ):
        logits(model, token_ids(1, 200))


@needs_trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", ["sparse", "dense"])
def test_trl_trains_sparse_models_against_sparse_references(
    folder, loaded, sparse_folder, real_budget, stock_llama, word_tokenizer, tmp_path
):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from hf_sparse_attn import SparseTrainerMixin

    options = {
        "use_cpu": True,
        "report_to": [],
        "max_steps": 1,
        "bf16": False,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
    }
    arguments = {"processing_class": copy.deepcopy(word_tokenizer)}
    arguments["processing_class"].eos_token = "<bos>"  # TRL ends its texts with it
    texts = [" ".join(f"w{3 + (7 * i + 11 * row) % 90}" for i in range(150)) for row in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = Dataset.from_dict({"text": texts})
        sft = SFTTrainer(
            str(sparse_folder), SFTConfig(str(tmp_path / "sft"), **options), train_dataset=rows, **arguments
        )
        assert len(routers(sft.model)) == 2
        sft.train()
        policy = loaded
        if folder == "dense":
            stock_llama().save_pretrained(tmp_path / "dense")
            policy = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparse_attention=real_budget)
            for router in routers(policy):
                router.wq.data += 0.1
        pairs = Dataset.from_dict({"prompt": texts, "chosen": ["w5 w6 w7"] * 3, "rejected": ["w9 w8"] * 3})
        trainer = type("Mine", (SparseTrainerMixin, DPOTrainer), {})(
            policy, args=DPOConfig(str(tmp_path / "dpo"), logging_steps=1, **options), train_dataset=pairs, **arguments
        )
        for ours, theirs in zip(routers(trainer.model), routers(trainer.ref_model), strict=True):
            assert torch.equal(ours.wq, theirs.wq) and not theirs.wq.requires_grad and ours.wq.requires_grad
        trainer.train()
    first = trainer.state.log_history[0]
    # log 2: the reference says what the policy says
    assert first["task_loss"] == pytest.approx(0.6931, abs=1e-3) and first["kl"] > 0
