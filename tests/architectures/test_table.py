"""The table of architectures: complete, the same as the committed page, and true of what is supported and refused."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import transformers
from architectures import test_supported_types
from helpers import tiny_models
from helpers.paths import ROOT
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from hf_sparse_attn import routers, sparse_config, sparsify
from hf_sparse_attn.architectures import SUPPORTED, refuse_unsupported
from hf_sparse_attn.architectures.table import (
    COMMAND,
    STATES,
    as_markdown,
    compatibility,
    compatibility_table,
    count_states,
)
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.models.registration import sparse_config_class

pytestmark = pytest.mark.compat

PAGE = ROOT / "model_cards/architectures.md"
PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
}
MIXED = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}

# types that route through the interface, one or more for each rule, with what makes their models small
ROUTED = {
    "hunyuan_v1_dense": ({}, "norms its keys after rotating them"),
    "nanochat": ({}, "rotates the other way round"),
    "persimmon": ({}, "does not tell its attention function the positions"),
    "stablelm": ({}, "does not pass keyword arguments on"),
    "nemotron": ({}, "does not pass keyword arguments on"),
    "qwen2_vl_text": ({}, "M-RoPE"),
    "llama4_text": ({"num_local_experts": 2, "intermediate_size_mlp": 64}, "attends within chunks"),
    "gemma3n_text": ({"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3}, "shares keys between layers"),
    "olmo_hybrid": (MIXED, "mixes attention with recurrent"),
    "deepseek_v3": (
        {**LATENT, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        "latent keys",
    ),
    "layoutlm": ({}, "builds a mask of its own"),
    "esm": ({}, "names no rope_type"),
    "clip_text_model": ({"projection_dim": 32}, "text_config of clip"),
    "splinter": ({}, "has no class with a language-model head"),
    "vit": (PATCHES, "patches lie in two dimensions"),
    "t5": ({"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}, "encoder-decoder"),
    # not in 5.17
    **({"internlm3": ({}, "runs LlamaForCausalLM|runs LlamaModel")} if "internlm3" in CONFIG_MAPPING else {}),
}


@pytest.fixture(scope="module")
def table():
    return compatibility_table()


def page_version():
    return re.search(r"Transformers (\S+): ", PAGE.read_text())[1]


def needs_the_version_of_the_page():
    if page_version() != transformers.__version__:
        pytest.skip(
            f"{PAGE.name} is of Transformers {page_version()}, installed is {transformers.__version__}: write it anew "
            f"with {COMMAND}"
        )


def test_every_installed_model_type_appears_once(table):
    assert sorted(row.model_type for row in table) == sorted(CONFIG_MAPPING_NAMES)
    assert all(row.state in STATES and (row.note or row.state == "supported") for row in table)


def test_the_committed_page_is_what_the_generator_writes(table):
    needs_the_version_of_the_page()
    assert PAGE.read_text() == as_markdown(table), f"write it anew with {COMMAND}"


def test_the_documentation_has_the_numbers_of_the_table(table):
    needs_the_version_of_the_page()
    supported, limited, refused = count_states(table).values()
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert f"{supported + limited} types are supported, {limited} of them with a limit." in page
    assert supported + limited + refused == len(table)


def test_what_is_called_supported_is_what_the_tests_run_on(table):
    supported = {row.model_type for row in table if row.state != "refused"}
    assert supported == set(SUPPORTED) & set(CONFIG_MAPPING_NAMES)
    for test in (
        "a_stock_checkpoint_with_every_block_kept_gives_the_stock_outputs",
        "a_real_budget_cuts_links_and_a_dense_call_does_not",
    ):
        marks = getattr(test_supported_types, f"test_{test}").pytestmark
        assert {name for mark in marks if mark.name == "parametrize" for name in mark.args[1]} == supported
    for model_type in supported:
        config = tiny_models.tiny_config(model_type)
        assert config.model_type == model_type and tiny_models.model_class(config).__module__.startswith(
            "transformers."
        )


def test_every_refused_type_is_refused_with_its_reason(table):
    built = 0
    for row in table:
        stock = getattr(transformers, CONFIG_MAPPING_NAMES[row.model_type])
        if row.state != "refused":
            assert issubclass(sparse_config_class(stock), stock)
            continue
        expected = re.escape(f"model type {row.model_type!r} {row.note}; sparse attention supports: ")
        with pytest.raises(ValueError, match=expected):
            refuse_unsupported(row.model_type)
        if stock.model_type != row.model_type:  # another name of the type that its class has
            continue
        with pytest.raises(ValueError, match=expected):
            sparse_config_class(stock)
        config = build(stock)
        if config is not None:
            built += 1
            with pytest.raises(ValueError, match=expected):
                sparse_config(config, {"density": 0.5})
    assert built > 0.9 * len(table) - len(SUPPORTED)


def build(stock):
    """A config with its defaults; None for the few types that have no complete ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return stock()
        except Exception:
            return None


def test_a_type_that_transformers_does_not_know_is_refused_by_name():
    for unknown in ("my_private_model", ""):
        with pytest.raises(
            ValueError, match=rf"model type '{unknown}' is not a model type of Transformers {transformers.__version__}"
        ):
            refuse_unsupported(unknown)
    assert compatibility("my_private_model").state == "refused"


@pytest.mark.parametrize("model_type", ROUTED)
def test_a_model_that_routes_through_the_interface_is_refused_before_anything_is_changed(model_type):
    changes, reason = ROUTED[model_type]
    config = AutoConfig.for_model(model_type, **{**tiny_models.BASE, **changes})
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    before = (
        [type(module) for module in model.modules()],
        list(model.state_dict()),
        model.config.to_dict(),
        type(model.config),
    )
    with pytest.raises(ValueError, match=rf"model type '{model_type}' .*(?:{reason}).*supports: ") as refused:
        sparsify(model, {"density": 0.5})
    assert compatibility(model_type).note in str(refused.value)
    after = (
        [type(module) for module in model.modules()],
        list(model.state_dict()),
        model.config.to_dict(),
        type(model.config),
    )
    assert after == before and not routers(model)


def test_the_command_line_writes_the_table_and_explains_one_type(table, tmp_path, capsys):
    run = ["--markdown", str(tmp_path / "page.md"), "--json", str(tmp_path / "table.json")]
    app(["architectures", *run], standalone_mode=False)
    assert (tmp_path / "page.md").read_text() == as_markdown(table)
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["counts"] == count_states(table) and len(written["model_types"]) == len(table)
    app(["architectures", "falcon"], standalone_mode=False)
    assert "falcon: refused. does not route its attention" in capsys.readouterr().err


def test_every_model_type_still_has_its_stock_config_class_and_the_rest_refuse_settings_by_name():
    for model_type, name in CONFIG_MAPPING_NAMES.items():
        stock = CONFIG_MAPPING[model_type].stock
        assert stock.__name__ == name and stock.__module__.startswith("transformers.models.")
        if stock.model_type not in SUPPORTED:
            with pytest.raises(
                ValueError, match=f"model type '{re.escape(stock.model_type)}'.*sparse attention supports: "
            ):
                CONFIG_MAPPING[model_type].from_dict({}, sparse_attention={})


def test_from_pretrained_of_a_refused_type_says_why(tmp_path):
    from transformers import AutoModelForCausalLM, LlavaConfig, MptConfig

    for config, reason in (
        (MptConfig(d_model=16, n_heads=2, n_layers=1), "does not route"),
        (LlavaConfig(), "is a composite"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"model type '{config.model_type}' {reason}"):
            AutoModelForCausalLM.from_pretrained(tmp_path, sparse_attention={})
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
