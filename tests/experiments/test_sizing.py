"""A run's size by the rates of its machine: what is left out, said, and kept when the run is continued."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.paths import RECIPES
from transformers import LlamaConfig

from hf_sparse_attn.benchmarks.planner.devices import Device
from hf_sparse_attn.experiments import sizing
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.experiments.sizing import MARGIN, Work, at_size, fitted, seconds, size_of
from hf_sparse_attn.experiments.tasks import language_model
from hf_sparse_attn.system.terminal import Terminal

SMOLLM2 = {
    **{
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    **{"vocab_size": 49152, "tie_word_embeddings": True},
}


def device(products, attention, sparse, routing):
    """Rates as they were measured, in GFLOP/s."""
    rates = [rate * 1e9 for rate in (attention, sparse)]
    products = dict.fromkeys((torch.bfloat16, torch.float32), products * 1000000000.0)
    return Device("cpu", 24 << 30, products, 2e9, (rates[0],) * 2, (rates[1],) * 2, routing * 1e9, 20e9, 5e-6)


@pytest.fixture(scope="module")
def demo():
    return load_recipe(RECIPES / "demo.yaml")


def work_on(recipe, device, dtype, joint):
    return Work(LlamaConfig(**SMOLLM2), 134_515_008, recipe.sparse_attention, device, dtype, joint)


@pytest.fixture(scope="module")
def fast(demo):
    """The two AVX-512 cores of `recipes/results/demo.json`: rates by its speed step."""
    return work_on(demo, device(650, 165, 559, 342), torch.bfloat16, 14.0)


@pytest.fixture(scope="module")
def slow(demo):
    """Two AVX2 cores, float32."""
    return work_on(demo, device(56, 40, 100, 40), torch.float32, 40.0)


def test_predictions_are_near_what_the_demo_took(demo, fast):
    took = json.loads((RECIPES / "results" / "demo.json").read_text())
    for step, predicted in seconds(demo, fast).items():
        if step != "other":
            assert took[step]["seconds"] == pytest.approx(predicted, rel=0.35), step


def test_a_fast_machine_runs_all_and_a_slow_one_what_fits(demo, fast, slow):
    assert fitted(demo, fast, demo.minutes)[:2] == (demo, [])
    recipe, left_out, predicted = fitted(demo, slow, demo.minutes)
    assert MARGIN * sum(predicted.values()) <= 60 * demo.minutes < MARGIN * sum(seconds(demo, slow).values())
    assert recipe.distill["batches"] >= 8 and recipe.lora["steps"] == 4 and recipe.speed["length"] >= 4096
    assert [entry.length for entry in recipe.quality] == [4096] and "quality at 8192 tokens" in left_out
    assert "speed at 4096 tokens in place of 16384" in left_out and len({text.split()[0] for text in left_out}) == len(
        left_out
    )
    assert at_size(demo, json.loads(json.dumps(size_of(recipe)))) == recipe


def test_less_time_leaves_out_more_down_to_the_least(demo, slow):
    sizes = [fitted(demo, slow, minutes) for minutes in (60, 30, 15, 8, 1)]
    assert [len(left_out) for _, left_out, _ in sizes] == sorted(len(left_out) for _, left_out, _ in sizes)
    taken = [sum(predicted.values()) for *_, predicted in sizes]
    assert taken == sorted(taken, reverse=True)
    least = sizes[-1][0]
    assert (least.distill["batches"], least.lora["steps"], least.speed["length"]) == (4, 2, 0)
    assert least.quality[0].selections == sizing.CORE_SELECTIONS and least.quality[0].budgets == (1024,)


@pytest.fixture
def tiny(llama_folder, random_words, real_budget, tmp_path):
    for name, count, seed in (("train", 1800, 0), ("eval", 1200, 1)):
        (tmp_path / f"{name}.txt").write_text(random_words(count, seed=seed))
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    values = {
        **{
            "name": "tiny",
            "minutes": 5,
            "model": {"source": str(llama_folder), "dtype": "float32"},
            "sparse_attention": real_budget,
        },
        "data": {"train": [str(tmp_path / "train.txt")], "eval": [str(tmp_path / "eval.txt")]},
        **{"distill": {"context": 256, "batches": 6}, "lora": {"steps": 0}, "speed": {"length": 0}},
        "quality": [
            {
                "length": 256,
                "windows": 2,
                "budgets": [80],
                "decode_tokens": 0,
                "selections": ["oracle", "two stages", "window + sink"],
            }
        ],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "tiny.yaml"


def test_a_run_says_what_it_left_out_and_goes_on_at_its_size(tiny, tmp_path, monkeypatch):
    measured = []

    def slowed(*arguments):
        measured.append(1)
        work = sizing.measured_work(*arguments)
        crawling = replace(work.device, products=dict.fromkeys(work.device.products, 100000.0))
        return replace(work, device=crawling)

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(language_model, "measured_work", slowed)
    said = Terminal(io.StringIO())
    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageRun, "_quality", stop)
        with pytest.raises(InterruptedError):
            run_recipe(load_recipe(tiny), tmp_path / "run", said)
    results = run_recipe(load_recipe(tiny), tmp_path / "run", said)
    assert measured == [1] and results["distill"]["batches"] == 4 and len(results["quality"]["windows"]) == 4
    assert results["size"]["left_out"] == ["2 of 6 windows of distilling", "1 of 2 windows of 256 tokens of quality"]
    assert results["size"]["whole_minutes"] > 5 and results["recipe"]["distill"]["batches"] == 6
    assert "2 of 6 windows of distilling" in said.file.getvalue()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<b>Left out</b>" in report and "2 of 6 windows of distilling; 1 of 2 windows" in report
    assert results["environment"]["instruction_set"] in report


def test_impossible_times_are_refused(tiny):
    for value, message in ((0, "minutes is 0.0: must be a number > 0"), ("soon", "minutes is 'soon'")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(tiny, changes=[f"minutes={value}"])
    with pytest.raises(
        RecipeError,
        match=r"minutes is 5(\.0)?: only runs of task causal_lm are sized by time, this is of task questions",
    ):
        load_recipe(tiny, changes=["task=questions"])
