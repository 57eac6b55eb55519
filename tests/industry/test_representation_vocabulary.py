"""A model and its tokenizer take the tokens of logs, keep them when saved, and refuse those of another plant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.event_folders import byte_tokenizer, event, log_lines, write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn import routers
from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.representation.log_templates import MinerSettings
from hf_sparse_attn.industry.representation.log_tokens import log_rows, token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import FILE, LogVocabulary, VocabularySettings
from hf_sparse_attn.industry.representation.token_embeddings import extend_model

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# PEFT asks stock models by a name that Transformers has renamed
peft_on_stock = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("plant") / "data", log_lines(400))


@pytest.fixture(scope="module")
def vocabulary(plant):
    return LogVocabulary.fit(plant, VocabularySettings(sensor_bins=16))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def make_model(stock_llama, sparse_llama, real_budget, tokenizer):
    def make(sparse=False, **changes):
        values = {"vocab_size": len(tokenizer), **IDS, **changes}
        return sparse_llama(real_budget, noise=0.1, **values) if sparse else stock_llama(**values)

    return make


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def mean_rows(weight, tokenizer, text):
    return weight[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)


def test_the_bias_of_tied_output_embeddings_starts_from_the_mean_too(tokenizer, vocabulary, make_model):
    model = make_model(tie_word_embeddings=True)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(len(tokenizer), dtype=torch.float32))
    ids = extend_model(model, tokenizer, vocabulary)
    at = vocabulary.descriptions.index("missing")
    old = byte_tokenizer()("missing", add_special_tokens=False)["input_ids"]
    assert model.lm_head.bias[ids[at]].item() == pytest.approx(np.mean(old))


@pytest.mark.parametrize("tied", [True, False])
def test_new_embeddings_start_from_the_mean_of_their_text_and_old_ones_stay(make_model, tokenizer, vocabulary, tied):
    model = make_model(tie_word_embeddings=tied)
    before = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = extend_model(model, tokenizer, vocabulary)
    assert ids == list(range(len(before[0]), len(before[0]) + len(vocabulary)))
    for old, layer in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(layer.weight[: len(old)], old)
        text = "pressure of pump   is   bar"  # a wildcard is no text
        at = ids[vocabulary.descriptions.index(text)]
        assert torch.allclose(layer.weight[at], mean_rows(old, byte_tokenizer(), text), atol=1e-6)
        assert layer.weight.shape[0] == len(tokenizer) == model.config.vocab_size
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("sparse", [False, True])
def test_an_extended_model_learns_logs_and_is_reloaded_with_the_same_logits(
    make_model, tokenizer, vocabulary, plant, tmp_path, sparse
):
    model = make_model(sparse)
    extend_model(model, tokenizer, vocabulary)
    rows = log_rows(token_streams(plant, tokenizer, vocabulary, cache=tmp_path / "cache"), 256)
    batch = torch.tensor(rows[:2]["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    vocabulary.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert sparse == bool(hasattr(loaded.config, "sparse_attention") and routers(loaded))
    again, words = LogVocabulary.load(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.digest == vocabulary.digest
    # nothing is added twice
    assert extend_model(loaded, words, again) == again.ids(tokenizer).tolist()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    same = token_streams(plant, words, again, cache=tmp_path / "other")["press"]
    assert np.array_equal(same.ids, token_streams(plant, tokenizer, vocabulary, cache=tmp_path / "cache")["press"].ids)


def test_spare_rows_of_a_padded_vocabulary_are_used(make_model, tokenizer, vocabulary):
    room = 20
    model = make_model(vocab_size=len(tokenizer) + room)
    extend_model(model, tokenizer, vocabulary)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    few = LogVocabulary(vocabulary.miner, vocabulary.parameters, (), 0)
    model, words = make_model(vocab_size=len(byte_tokenizer()) + 30), byte_tokenizer()
    if len(few) <= 30:
        extend_model(model, words, few)
        assert model.get_input_embeddings().weight.shape[0] == len(byte_tokenizer()) + 30


@peft_on_stock
def test_an_adapter_is_added_to_an_extended_model_and_trains_its_new_rows(make_model, tokenizer, vocabulary, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_model()
    ids = extend_model(base, tokenizer, vocabulary)
    base.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids})
    model = get_peft_model(base, settings)
    batch = torch.tensor([ids[:32]])
    model(input_ids=batch, labels=batch).loss.backward()
    assert any("embed_tokens" in name and w.grad is not None and w.grad.any() for name, w in model.named_parameters())
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1.0).step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(logits(loaded.eval(), batch), logits(model.eval(), batch), atol=1e-5)


@peft_on_stock
def test_the_base_of_a_peft_model_is_extended_but_not_one_with_an_adapter_on_its_embeddings(
    make_model, tokenizer, vocabulary
):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    ids = extend_model(model, tokenizer, vocabulary)
    assert logits(model, torch.tensor([ids[:8]])).shape[-1] == len(tokenizer)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora" in name for name in trained)
    for settings in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}):
        other = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], **settings))
        with pytest.raises(PlantDataError, match="extend the base model first"):
            extend_model(other, byte_tokenizer(), vocabulary)


def test_another_vocabulary_is_refused_by_model_and_by_tokenizer(make_model, tokenizer, vocabulary, tmp_path):
    other = LogVocabulary.fit(write_folder(tmp_path / "other", [event(n, "another log", n + 1) for n in range(9)]))
    model = make_model()
    extend_model(model, tokenizer, vocabulary)
    with pytest.raises(PlantDataError, match="the model holds another vocabulary"):
        extend_model(model, tokenizer, other)
    with pytest.raises(PlantDataError, match="the tokenizer holds a vocabulary of logs, the model does not"):
        extend_model(make_model(), tokenizer, vocabulary)
    with pytest.raises(PlantDataError, match="does not hold this vocabulary"):
        extend_model(model, byte_tokenizer(), vocabulary)
    with pytest.raises(PlantDataError, match="the tokenizer holds another vocabulary"):
        other.add_to(tokenizer)


def test_the_tokenizer_of_another_model_is_refused_and_nothing_is_changed(make_model, tokenizer, vocabulary):
    size = len(tokenizer)
    for changes, message in (
        ({"vocab_size": 97}, "model embeddings for 97"),
        ({"vocab_size": 2 * size}, f"the tokenizer has {size} tokens"),
        ({"eos_token_id": 77}, "eos_token_id 77 of the model is the token"),
    ):
        model = make_model(**changes)
        with pytest.raises(PlantDataError, match=message):
            extend_model(model, tokenizer, vocabulary)
        assert len(tokenizer) == size and not hasattr(model.config, "log_vocabulary")


def test_a_model_without_a_head_and_quantised_embeddings_are_refused(make_model, tokenizer, vocabulary):
    with pytest.raises(PlantDataError, match="no language model head"):
        extend_model(make_model().model, tokenizer, vocabulary)
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(PlantDataError, match="int8"):
        extend_model(model, tokenizer, vocabulary)


def test_a_vocabulary_is_saved_as_it_is_and_a_changed_one_is_refused(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert LogVocabulary.load(tmp_path) == vocabulary
    assert len(vocabulary) == len(vocabulary.names) == len(vocabulary.descriptions) == len(set(vocabulary.names))
    path = tmp_path / FILE
    path.write_text(path.read_text().replace('"plc"', '"plx"'))
    with pytest.raises(PlantDataError, match="was changed"):
        LogVocabulary.load(tmp_path)


def test_only_the_training_period_is_fitted(tmp_path):
    lines = [event(n, "early line", n + 1) for n in range(50)] + [event(n, "late line", n + 1) for n in range(90, 99)]
    data = write_folder(tmp_path / "a", lines, split=(60, 80))
    assert [t.text for t in LogVocabulary.fit(data).miner.templates] == ["early line"]
    settings = VocabularySettings(miner=MinerSettings(max_templates=0), max_origins=0)
    none = LogVocabulary.fit(data, settings)
    assert none.miner.templates == [] and none.origins == () and none.miner.dropped == 50
    tokens, _ = none.line_tokens(data.events("press").collect())
    assert (tokens == [none.other_origin, 0, -1]).all()


def test_gaps_are_binned_by_powers_of_four_with_bins_for_none_and_for_the_first(vocabulary):
    gaps = np.array([np.nan, 0.0, 1e-9, 1e-3, 3.9e-3, 4e-3, 1.0, 4e6, 1e9])
    bins = vocabulary.gap_tokens(gaps) - vocabulary.gaps
    assert bins.tolist() == [0, 1, 2, 3, 3, 4, 7, 18, 19]
    assert vocabulary.names[vocabulary.gaps + 19].startswith("<|log:gap:19") and vocabulary.gaps + 20 == (
        vocabulary.other_origin
    )


def test_origins_beyond_the_limit_unseen_ones_and_none_share_a_token(tmp_path):
    lines = [event(n, "a line", n + 1, origin=name) for n, name in enumerate("aaabbc")]
    vocabulary = LogVocabulary.fit(write_folder(tmp_path / "a", lines), VocabularySettings(max_origins=2))
    later = [event(n, "a line", n + 1, origin=name) for n, name in enumerate(["a", "b", "c", "z", None])]
    events = write_folder(tmp_path / "b", later).events("press").collect()
    assert (vocabulary.origin_tokens(events) - vocabulary.other_origin).tolist() == [1, 2, 0, 0, 0]
