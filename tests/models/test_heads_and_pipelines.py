"""Heads, pipelines, tokenizers and other kinds of checkpoints:
what people load models for, with sparse attention in them.
"""

from __future__ import annotations

import subprocess
import sys

import gguf
import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.paths import RECIPES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel, pipeline

from hf_sparse_attn import routers, sparse_class, sparsify, to_dense

HEADS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": None,  # Transformers 5 has no pipeline for it
}
WITHOUT = {
    *(("AutoModelForMaskedLM", decoder) for decoder in ("llama", "qwen3")),
    *(("AutoModelForCausalLM", encoder) for encoder in ("bert", "modernbert")),
}
CASES = [
    case
    for auto in HEADS
    for model_type in ("llama", "qwen3", "bert", "modernbert")
    if (case := (auto, model_type)) not in WITHOUT
]


@pytest.fixture(scope="module")
def settings(real_budget):
    return {**real_budget, "min_keys": 112}


@pytest.fixture(scope="module")
def tokenizer(word_tokenizer):
    word_tokenizer.mask_token = "<unk>"
    return word_tokenizer


def first_output(model, ids):
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize(("auto_name", "model_type"), CASES)
def test_every_head_loads_saves_and_runs_in_its_pipeline(
    auto_name, model_type, settings, tokenizer, random_words, token_ids, tmp_path
):
    auto, task = getattr(transformers, auto_name), HEADS[auto_name]
    torch.manual_seed(0)
    stock = auto.from_config(tiny_models.tiny_config(model_type)).eval()
    stock.save_pretrained(tmp_path / "stock")
    model = auto.from_pretrained(tmp_path / "stock", sparse_attention=settings)
    assert isinstance(model, type(stock)) and type(model).__name__ == f"Sparse{type(stock).__name__}"
    model.save_pretrained(tmp_path / "sparse")
    again, ids = auto.from_pretrained(tmp_path / "sparse"), token_ids(2, 200)
    assert type(again) is type(model) and len(routers(again)) == len(routers(model)) > 0
    assert torch.equal(first_output(again, ids), first_output(model, ids))
    assert not torch.equal(first_output(model, ids), first_output(stock, ids))
    if task is not None:
        tokenizer.save_pretrained(tmp_path / "sparse")
        run = pipeline(task, model=str(tmp_path / "sparse"))
        assert type(run.model) is type(model)
        text = random_words(180) + (" <unk>" if task == "fill-mask" else "")
        assert run(text, **({"max_new_tokens": 3} if task == "text-generation" else {}))
    assert type(to_dense(again)) is type(stock)
    torch.testing.assert_close(first_output(again, ids), first_output(stock, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "bert"])
def test_the_tokenizer_of_a_sparse_folder_is_that_of_the_stock_one(model_type, settings, tokenizer, tmp_path):
    """Also where only the model type says which class it is."""
    folders = [tmp_path / "stock", tmp_path / "sparse"]
    stock = tiny_models.tiny_model(model_type)
    stock.save_pretrained(folders[0])
    sparsify(stock, settings).save_pretrained(folders[1])
    for folder in folders:
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer_config.json").unlink()
    created = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    assert type(created[0]) is type(created[1])


def test_a_processor_finds_the_config_of_a_sparse_composite_model(settings):
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = sparsify(tiny_models.tiny_model("gemma3"), settings).config
    assert PROCESSOR_MAPPING[type(config)].__name__ == "Gemma3Processor"


@pytest.mark.parametrize("convert", [False, True])
def test_a_base_model_still_gives_hidden_states(convert, settings, token_ids, tmp_path):
    """Transformers looks up what to record by the class that a model had when it was made."""
    model = LlamaModel(tiny_models.tiny_config("llama"))
    if convert:
        sparsify(model, settings)
    else:
        model.save_pretrained(tmp_path / "stock")
        model = transformers.AutoModel.from_pretrained(tmp_path / "stock", sparse_attention=settings)
    assert len(model(token_ids(1, 150), output_hidden_states=True).hidden_states) == 4
    assert len(to_dense(model)(token_ids(1, 150), output_hidden_states=True).hidden_states) == 4


def test_classes_without_an_auto_class_are_made_by_name(settings):
    created = sparse_class(transformers.PatchTSTForPretraining)
    assert created.__name__ == "SparsePatchTSTForPretraining" and issubclass(
        created, transformers.PatchTSTForPretraining
    )


# -- other kinds of checkpoints -------------------------------------------------------------------------------------


def write_gguf(model, path):
    """A float32 GGUF file of a tiny Llama."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for name, weight in model.state_dict().items():
        target = names[name.removesuffix(".weight")]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            target.rpartition(".")[2]
        )
        if heads:  # GGUF interleaves the rotary halves of each head
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{target}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_sparse(stock_llama, real_budget, every_block, token_ids, tmp_path):
    stock = stock_llama(tie_word_embeddings=False)
    write_gguf(stock, tmp_path / "tiny.gguf")
    ids = token_ids(1, 200)
    for budget in (every_block, real_budget):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", sparse_attention=budget)
        assert type(model).__name__ == "SparseLlamaForCausalLM" and len(routers(model)) == 2
        equal = torch.allclose(first_output(model, ids), first_output(stock, ids), rtol=1e-4, atol=1e-4)
        assert equal == (budget is every_block)


def quantised(kind):
    """A quantisation of the weights, or a skip where its package is missing."""
    pytest.importorskip("bitsandbytes" if kind.startswith("bnb") else kind)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(
        load_in_8bit=kind == "bnb8", load_in_4bit=kind == "bnb4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that do not know the newest torch
@pytest.mark.parametrize("kind", ["torchao", "bnb8", "bnb4"])
def test_a_quantised_base_loads_sparse_and_reloads(kind, stock_llama, every_block, token_ids, tmp_path):
    config, ids = quantised(kind), token_ids(1, 200)
    stock_llama(intermediate_size=128).save_pretrained(tmp_path / "stock")
    options = {"quantization_config": config, "dtype": torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **options, sparse_attention=every_block)
    full, want = first_output(LlamaForCausalLM.from_pretrained(tmp_path / "stock"), ids), first_output(dense, ids)
    quantisation = (want - full).abs().mean()
    # activations are quantised, too: where rounding tips over, a difference in the last bit grows
    assert quantisation > 0.01 and (first_output(model, ids) - want).abs().mean() < 0.02 * quantisation
    assert {p.dtype for router in routers(model) for p in router.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert not any(router.fresh for router in routers(again))
    assert torch.equal(first_output(again, ids), first_output(model, ids))


def test_a_config_alone_says_whether_a_folder_is_sparse(settings, tmp_path):
    sparsify(tiny_models.tiny_model("gemma3"), settings).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "SparseGemma3Config"
    assert config.sparse_attention == config.text_config.sparse_attention
    assert config._attn_implementation != "hf_sparse" and config.text_config._attn_implementation == "hf_sparse"
    assert config.vision_config._attn_implementation != "hf_sparse"


WAYS = {
    "set": lambda model, folder: model.set_attn_implementation("hf_sparse"),
    "set by dict": lambda model, folder: model.set_attn_implementation({"": "hf_sparse"}),
    "config": lambda model, folder: setattr(model.config, "_attn_implementation", "hf_sparse"),
    "loaded": lambda model, folder: type(model).from_pretrained(folder, attn_implementation="hf_sparse"),
    "loaded by an Auto class": lambda model, folder: transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="hf_sparse"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_sparse_attention_of_a_composite_model_is_for_its_text_part(way, settings, tmp_path, count_calls):
    """Our messages say `set_attn_implementation("hf_sparse")`: the vision tower must go on as it is."""
    model = sparsify(tiny_models.tiny_model("gemma3"), settings)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    ids[:, 2:6] = 96  # an image
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        want = model(**inputs).logits
        model.set_attn_implementation("sdpa")
        model = WAYS[way](model, tmp_path) or model
        assert (
            model.config.text_config._attn_implementation
            == "hf_sparse"
            != model.config.vision_config._attn_implementation
        )
        count_calls.clear()
        assert torch.equal(model(**inputs).logits, want) and count_calls
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    assert model.config.text_config._attn_implementation == "eager"


def test_label_smoothing_shifts_the_labels_as_for_the_stock_model(stock_llama, every_block, token_ids, tmp_path):
    """Trainer decides by the class's name whether a model predicts the next token."""
    ids = token_ids(1, 64)
    losses = []
    for model in (stock_llama(), sparsify(stock_llama(), every_block)):
        options = {"label_smoothing_factor": 0.1, "use_cpu": True, "report_to": []}
        trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), **options))
        losses.append(trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


def test_context_parallelism_is_refused(stock_llama, every_block):
    assert (
        stock_llama().supports_context_parallel and not sparsify(stock_llama(), every_block).supports_context_parallel
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_left_padded_chats_on_real_weights_have_the_tokens_of_the_stock_model():
    script = RECIPES / "chats.py"
    done = subprocess.run([sys.executable, script, "--tokens", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "128 of 128 tokens are those of the stock model" in done.stdout
