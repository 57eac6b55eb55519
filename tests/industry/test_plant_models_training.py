"""Training on what comes next: deterministic, resumed with the same result, and never half written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.event_folders import byte_tokenizer, log_lines, write_folder
from helpers.planted_log import PlantedLog
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.plant_models import scratch_training
from hf_sparse_attn.industry.plant_models.event_training import EventTraining, learn_events, save_events
from hf_sparse_attn.industry.plant_models.next_event import next_events, template_tokens
from hf_sparse_attn.industry.plant_models.scratch_training import train_small_model
from hf_sparse_attn.industry.plant_models.small_model import (
    SmallModelConfig,
    Stage,
    new_model,
    vocabulary_tokenizer,
)
from hf_sparse_attn.industry.plant_models.stream_reading import Reading
from hf_sparse_attn.industry.representation.log_tokens import log_rows, token_streams
from hf_sparse_attn.industry.representation.log_vocabulary import LogVocabulary
from hf_sparse_attn.industry.representation.token_embeddings import extend_model
from hf_sparse_attn.models.attach import routers
from hf_sparse_attn.training.config import AdaptationConfig, DistillationConfig
from hf_sparse_attn.training.trainer import NonFiniteLossError

# PEFT asks models by a name that Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = SmallModelConfig(layers=1, hidden=32, heads=2, groups=1, stages=(Stage(16, 4, 3), Stage(48, 2, 3)))
EOS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAST = 5


class StoppedError(Exception):
    """As a kill: the process ends between two steps."""


@pytest.fixture(scope="module")
def log():
    return PlantedLog(960, 0, units=4, recipes=4, farthest=40)


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("plant") / "data", log_lines(300))


def learn(log, config=TINY, **options):
    model = new_model(log.vocabulary, config)
    losses = train_small_model(model, log.rows(48), config, progress=False, **options)
    return losses, {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- a small model from scratch -------------------------------------------------------------------------------------


def test_the_same_seed_learns_the_same_and_another_one_something_else(log):
    losses, weights = learn(log)
    again, other = learn(log), learn(log, dataclasses.replace(TINY, seed=1))
    assert losses == again[0] and same(weights, again[1])
    assert losses != other[0] and not same(weights, other[1])


def test_a_run_that_was_stopped_ends_as_one_that_was_not_and_a_finished_one_is_loaded(log, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_training, "SAVE_SECONDS", 0.0)
    whole = learn(log)
    step = scratch_training._Run._step

    def stopping(run, at):
        if at == 4:
            raise StoppedError
        return step(run, at)

    monkeypatch.setattr(scratch_training._Run, "_step", stopping)
    with pytest.raises(StoppedError):
        learn(log, folder=tmp_path)
    assert not (tmp_path / "model").exists() and (tmp_path / "training.pt").exists()
    steps = []
    monkeypatch.setattr(scratch_training._Run, "_step", lambda run, at: (steps.append(at), step(run, at))[1])
    resumed = learn(log, folder=tmp_path)
    assert steps == [4, 5] and resumed[0] == whole[0] and same(resumed[1], whole[1])
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["log.json", "model"]
    loaded = learn(log, folder=tmp_path)
    assert steps == [4, 5] and loaded[0] == whole[0] and same(loaded[1], whole[1])


def test_a_folder_with_another_run_is_refused(log, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_training, "SAVE_SECONDS", 0.0)
    learn(log, folder=tmp_path)
    with pytest.raises(PlantDataError, match=r"different in settings\.lr"):
        learn(log, dataclasses.replace(TINY, lr=1e-4), folder=tmp_path)
    with pytest.raises(PlantDataError, match="different in the rows"):
        learn(PlantedLog(960, 1, units=4, recipes=4, farthest=40), folder=tmp_path)


def test_a_loss_that_is_no_number_stops_and_leaves_what_was_saved(log, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_training, "SAVE_SECONDS", 0.0)
    step = scratch_training._Run._step

    def overflowing(run, at):
        if at == LAST:
            with torch.no_grad():
                run.model.lm_head.weight[0] = torch.inf
        return step(run, at)

    monkeypatch.setattr(scratch_training._Run, "_step", overflowing)
    with pytest.raises(NonFiniteLossError, match="step 6 of 6: lower lr"):
        learn(log, folder=tmp_path)
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    assert len(saved["losses"]) == LAST and all(torch.isfinite(weight).all() for weight in saved["model"].values())
    assert not (tmp_path / "model").exists()


def test_rows_shorter_than_the_longest_stage_are_refused(log):
    with pytest.raises(PlantDataError, match="a row has 40 tokens, the longest stage asks for 48"):
        train_small_model(new_model(log.vocabulary, TINY), log.rows(40), TINY, progress=False)
    uneven = [*log.rows(48), *log.rows(40), *log.rows(48)]  # of several assets
    for rows in (uneven, Dataset.from_list(uneven)):
        with pytest.raises(PlantDataError, match="a row has 40 tokens"):
            train_small_model(new_model(log.vocabulary, TINY), rows, TINY, progress=False)
    picked = Dataset.from_list(uneven).select(range(len(log.rows(48))))
    assert len(train_small_model(new_model(log.vocabulary, TINY), picked, TINY, progress=False)) == TINY.steps
    with pytest.raises(PlantDataError, match="no row to learn from"):
        train_small_model(new_model(log.vocabulary, TINY), [], TINY, progress=False)


@pytest.mark.parametrize("length", [64, 128, 512, 600, 4096, 16384])
def test_stages_grow_to_the_length_that_is_asked_for(length):
    config = SmallModelConfig.up_to(length)
    lengths = [stage.length for stage in config.stages]
    assert lengths == sorted(set(lengths)) or length <= 128
    assert lengths[-1] == config.longest == length
    seen = [config.stage_at(step) for step in range(config.steps)]
    assert [seen.count(stage) for stage in dict.fromkeys(config.stages)] == [
        sum(s.steps for s in config.stages if s == stage) for stage in dict.fromkeys(config.stages)
    ]


def test_a_small_model_learns_the_rows_of_a_plant_and_is_one_with_its_vocabulary(plant, tmp_path):
    vocabulary = LogVocabulary.fit(plant)
    tokenizer = vocabulary_tokenizer(vocabulary)
    streams = token_streams(plant, tokenizer, vocabulary, cache=tmp_path / "cache")
    config = dataclasses.replace(TINY, hidden=64, lr=1e-2, stages=(Stage(32, 8, 40), Stage(64, 8, 20)))
    model = new_model(len(tokenizer), config, vocabulary)
    tokens = template_tokens(streams["press"])
    reading = Reading(length=64, past=32)
    before = next_events(model, streams["press"].ids, tokens, reading).summary()
    train_small_model(model, log_rows(streams, 64), config, folder=tmp_path / "run", progress=False)
    after = next_events(model, streams["press"].ids, tokens, reading).summary()
    assert before["top_1"] < 0.5 and after["top_1"] > 0.9 and after["nats"] < 0.4 < before["nats"]  # lines in turn
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert extend_model(saved, tokenizer, vocabulary) == vocabulary.ids(tokenizer).tolist()  # it has it
    assert next_events(saved, streams["press"].ids, tokens, reading).summary() == after


# -- a model of the Hub ---------------------------------------------------------------------------------------------


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
