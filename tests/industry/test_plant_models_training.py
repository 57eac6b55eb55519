"""Training on what comes next: deterministic, resumed with the same result, and never half written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.event_folders import byte_tokenizer, log_lines, write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.plant_models.event_training import EventTraining, learn_events, save_events
from hf_sparse_attn.industry.representation.log_tokens import log_rows, token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import LogVocabulary
from hf_sparse_attn.industry.representation.token_embeddings import extend_model
from hf_sparse_attn.models.attach import routers
from hf_sparse_attn.training.config import AdaptationConfig, DistillationConfig

# PEFT asks models by a name that Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EOS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("plant") / "data", log_lines(300))


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def training():
    return EventTraining(
        distillation=DistillationConfig(steps_per_batch=2, warmup_steps=1, retrieval_windows=0),
        distilled=2,
        adaptation=AdaptationConfig(rank=2, lr=1e-2, save_every=1, training_arguments={"use_cpu": True}),
        steps=2,
    )


@pytest.fixture
def extended(sparse_llama, real_budget, plant, tmp_path):
    """Makes (model, tokenizer, new tokens, rows), the same each time."""
    vocabulary = LogVocabulary.fit(plant)

    def make(**changes):
        tokenizer = byte_tokenizer()
        model = sparse_llama(real_budget, vocab_size=len(tokenizer), **EOS, **changes)
        tokens = extend_model(model, tokenizer, vocabulary)
        rows = log_rows(token_streams(plant, tokenizer, vocabulary, cache=tmp_path / "cache"), 160)
        return model, tokenizer, tokens, rows

    return make, vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_routers_lora_and_the_new_embeddings_learn_and_all_is_saved_together(extended, training, tmp_path, tied):
    make, vocabulary = extended
    model, tokenizer, tokens, rows = make(tie_word_embeddings=tied)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [layer.weight.detach().clone() for layer in layers]
    trained = learn_events(model, rows, tokens, training, progress=False)
    assert trained.distillation.batches == 2 and len(trained.log) == 2 and routers(model)[0].config.bookkeeping.trained
    saved = save_events(trained, tokenizer, vocabulary, tmp_path / "model")
    used = sorted(set(np.concatenate(rows["input_ids"][:])))
    for old, layer in zip(before, (saved.get_input_embeddings(), saved.get_output_embeddings()), strict=True):
        assert torch.equal(layer.weight[: tokens[0]], old[: tokens[0]])  # the old tokens' rows
        assert not torch.equal(layer.weight[used], old[used])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, saved.eval()(ids).logits, atol=1e-5)
    assert (
        LogVocabulary.load(tmp_path / "model").ids(AutoTokenizer.from_pretrained(tmp_path / "model")).tolist() == tokens
    )


def test_a_finished_run_of_a_folder_is_taken_up_with_the_same_weights(extended, training, tmp_path):
    make, _ = extended
    found = []
    for _ in range(2):
        model, _, tokens, rows = make()
        trained = learn_events(model, rows, tokens, training, folder=tmp_path / "run", progress=False)
        found.append({name: weight.clone() for name, weight in trained.model.merge_and_unload().state_dict().items()})
    assert same(*found)


def test_rows_and_models_that_cannot_learn_are_refused(extended, training, stock_llama):
    make, _ = extended
    model, _, tokens, rows = make()
    with pytest.raises(PlantDataError, match=r"sparsify\(model"):
        learn_events(stock_llama(), rows, tokens, training)
    with pytest.raises(PlantDataError, match="no row to learn from"):
        learn_events(model, rows.select([]), tokens, training)
    uneven = [{"input_ids": [5] * size, "labels": [5] * size} for size in (160, 150)]
    with pytest.raises(PlantDataError, match="rows of 150 to 160 tokens"):
        learn_events(model, uneven, tokens, training)
