"""The main job end to end on a tiny model: files of a run, reloading, continuing, refusals."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.paths import RECIPES
from hf_sparse_attn_kernels.caching import cache_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn import SparseAttentionConfig, routers
from hf_sparse_attn.benchmarks.planner.fit import NotEnoughMemoryError
from hf_sparse_attn.experiments import steps
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.experiments.tasks import distil_and_adapt, language_model
from hf_sparse_attn.experiments.tasks.language_model import LanguageRun
from hf_sparse_attn.system.terminal import Terminal

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = ("convert", "distill", "lora", "quality", "speed", "answer")


class Stopped(Exception):
    """Stands for a kill."""


def quiet():
    return Terminal(io.StringIO())


@pytest.fixture(scope="module")
def recipe_values(llama_folder, random_words, real_budget, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, count in enumerate((600, 600, 2300, 2300)):
        (folder / f"{'train' if i < 2 else 'eval'}{i}.txt").write_text(random_words(count, seed=i))
    return {
        "name": "tiny",
        "model": {"source": str(llama_folder), "name": "tiny Llama", "license": "apache-2.0", "dtype": "float32"},
        "sparse_attention": real_budget,
        "data": {"train": [str(folder / "train*.txt")], "eval": [str(folder / "eval*.txt")]},
        "distill": {"context": 256, "batches": 2},
        "lora": {"context": 256, "steps": 2, "settings": {"rank": 2, "kl_tile_share": 4}},
        "quality": [{"length": 256, "windows": 2, "budgets": [80, 128], "decode_tokens": 16}],
        "speed": {"length": 512, "keys": 256, "decode_tokens": 3, "repeats": 1, "attention_repeats": 1},
        "prompt": "w5 w6 w7",
        "max_new_tokens": 4,
    }


@pytest.fixture(scope="module")
def write_recipe(recipe_values, tmp_path_factory):
    """A recipe file with some changes, beside a copy of the defaults."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("recipes")
        shutil.copy(RECIPES / "defaults.yaml", folder)
        (folder / "tiny.yaml").write_text(yaml.safe_dump({**recipe_values, **changes}))
        return folder / "tiny.yaml"

    return make


@pytest.fixture(scope="module")
def done(write_recipe, tmp_path_factory):
    """A run that was stopped between distillation and LoRA and in the middle of the quality step, then continued."""
    recipe, folder = load_recipe(write_recipe()), tmp_path_factory.mktemp("run") / "tiny"
    distilled, evaluated = [], []
    distill, losses = distil_and_adapt.distill, language_model.evaluate_windows

    def counted(*args, **options):
        distilled.append(1)
        return distill(*args, **options)

    def stop(*_):
        raise Stopped

    def stop_in_the_middle(*args, on_result, **options):
        def note(result):
            on_result(result)
            if len(evaluated) == 5:
                raise Stopped
            evaluated.append((result.document, result.keys, result.selection))

        return losses(*args, on_result=note, **options)

    def note_all(*args, on_result, **options):
        def note(result):
            on_result(result)
            evaluated.append((result.document, result.keys, result.selection))

        return losses(*args, on_result=note, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil_and_adapt, "distill", counted)
        patch.setattr(LanguageRun, "_lora", stop)
        with pytest.raises(Stopped):
            run_recipe(recipe, folder, quiet())
        after_stop = sorted(p.name for p in (folder / "state").glob("*.json"))
        patch.undo()
        patch.setattr(distil_and_adapt, "distill", counted)
        patch.setattr(language_model, "evaluate_windows", stop_in_the_middle)
        with pytest.raises(Stopped):
            run_recipe(recipe, folder, quiet())
        patch.setattr(language_model, "evaluate_windows", note_all)
        results = run_recipe(recipe, folder, quiet())
    return SimpleNamespace(
        recipe=recipe,
        folder=folder,
        results=results,
        after_stop=after_stop,
        distilled=len(distilled),
        evaluated=evaluated,
    )


def test_an_interrupted_run_continues_where_it_stopped(done):
    assert done.after_stop == ["convert.json", "distill.json", "recipe.json"]
    assert done.distilled == 1
    # dense and 2 budgets x 9 selections for 2 windows; the one that was being noted at the kill was kept
    assert len(done.evaluated) == len(set(done.evaluated)) == 38 - 1
    assert len(done.results["quality"]["windows"]) == 38


def test_results_json_holds_every_step(done):
    written = json.loads((done.folder / "results.json").read_text())
    assert written == json.loads(json.dumps(done.results))
    for name in STEPS:
        assert written[name]["seconds"] >= 0 and written[name]["peak_process_bytes"] > 0
    assert written["convert"]["license"] == "apache-2.0"
    assert written["recipe"]["name"] == "tiny" and written["recipe"]["max_new_tokens"] == 4
    assert written["environment"]["packages"]["torch"] == torch.__version__
    assert [row["batch"] for row in written["distill"]["log"]] == [1, 2]
    assert [row["step"] for row in written["lora"]["log"]] == [1, 2]
    assert written["speed"]["model"]["length"] == 512 and written["speed"]["attention"]["keys"] == 256
    assert written["answer"]["class"] == "SparseLlamaForCausalLM" and written["answer"]["prompt"] == "w5 w6 w7"


def test_training_and_evaluation_texts_are_apart(done):
    seen = {name.split("[")[0] for name in done.results["distill"]["documents"]}
    unseen = {row["document"].split("[")[0] for row in done.results["quality"]["windows"]}
    assert seen == {"train0.txt", "train1.txt"} and unseen == {"eval2.txt", "eval3.txt"}


def test_the_quality_table_is_complete_and_ordered(done):
    table = done.results["quality"]["table"]
    assert [(r["keys"], r["n"]) for r in table] == [(None, 2), *[(80, 2)] * 9, (None, 2), *[(128, 2)] * 9]
    by_name = {r["selection"]: r for r in table if r["keys"] == 80}
    assert list(by_name) == [
        "oracle",
        "two stages",
        "stage 1 alone",
        "untrained",
        "mean-pool",
        "min-max",
        "mean-std",
        "window + sink",
        "random",
    ]
    assert (
        by_name["oracle"]["recovered_share"]["share"] == pytest.approx(1)
        and by_name["window + sink"]["recovered_share"]["share"] == 0
    )
    assert all(by_name["oracle"]["kept_mass"]["mean"] >= r["kept_mass"]["mean"] - 1e-6 for r in by_name.values())
    assert all("kept_mass" not in r for r in table if r["keys"] != 80) and all("decode" in r for r in table)


def test_the_report_is_self_contained_and_holds_the_figures(done):
    html = (done.folder / "report.html").read_text()
    assert (
        not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", html)
        and "@import" not in html
        and "url(" not in html
    )
    assert html.count('<img alt="') == html.count('src="data:image/svg+xml;base64,') == 6
    assert html.count("<head>") == html.count("</head>") == 1
    for row in done.results["quality"]["table"]:
        assert f"<td>{row['prefill']:.4f}</td>" in html and f"<td>{row['decode']:.4f}</td>" in html
        budget = f", {row['keys']} keys" if row["keys"] else ""
        assert f'<th scope="row">{row["selection"]}{budget}</th>' in html
        if "prefill_share" in row:
            share = row["prefill_share"]
            assert f"{share['share']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" in html
    assert f"{done.results['speed']['attention']['speedup']['median']:.2f}×" in html
    assert '<th scope="rowgroup" colspan="9"><span>256 tokens</span></th>' in html and "built-in method" not in html
    assert "Only n = 2 window(s)" in html and done.results["answer"]["answer"] in html


def test_the_card_is_made_from_the_results(done):
    card = (done.folder / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (
        head["license"] == "apache-2.0"
        and head["tags"] == ["hf-sparse-attn", "sparse-attention"]
        and "base_model" not in head
    )
    assert {result["dataset"]["config"] for result in head["model-index"][0]["results"]} == {"256 tokens"}
    assert "# tiny: tiny Llama with learnable two-stage sparse attention" in card
    for row in done.results["quality"]["table"]:
        assert f"| {row['keys'] or 'all'} | {row['selection']} | 2 | {row['prefill']:.4f} |" in card
    assert (
        f"Prefill {done.results['speed']['model']['prefill_speedup']:.2f}×" in card
        and "2 joint LoRA steps (merged)" in card
    )


def test_the_model_reloads_through_the_plain_auto_class(done, recipe_values):
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model")
    assert type(model).__name__ == "SparseLlamaForCausalLM" and len(routers(model)) == 2
    assert model.config.sparse_attention["bookkeeping"]["trained"] is True and model.dtype == torch.float32
    want = SparseAttentionConfig(**recipe_values["sparse_attention"]).mark_trained()
    assert SparseAttentionConfig.coerce(model.config.sparse_attention) == want
    assert not any("lora" in name or "modules_to_save" in name for name in model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[5, 6, 7]]
    out = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0, 3:], skip_special_tokens=True) == done.results["answer"]["answer"]


def test_no_leftovers_of_interrupted_writes(done):
    hidden = list(done.folder.rglob(".*"))
    assert not hidden, hidden
    assert sorted(p.name for p in done.folder.iterdir()) == ["adapter", "model", "report.html", "results.json", "state"]


def test_a_second_call_does_nothing_again(done, monkeypatch):
    for name in STEPS:
        monkeypatch.setattr(LanguageRun, f"_{name}", lambda self, name=name: pytest.fail(f"{name} ran again"))
    again = run_recipe(done.recipe, done.folder, quiet())
    assert {k: v for k, v in again.items() if k != "environment"} == {
        k: v for k, v in done.results.items() if k != "environment"
    }


def test_a_changed_recipe_is_refused_for_the_same_folder(done, write_recipe):
    before = (done.folder / "results.json").read_bytes()
    changed = load_recipe(write_recipe(seed=1))
    with pytest.raises(RecipeError, match=r"holds a run of another recipe.*--out"):
        run_recipe(changed, done.folder, quiet())
    assert (done.folder / "results.json").read_bytes() == before


def test_a_nearly_full_disk_is_refused_before_any_work(done, monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(RecipeError, match="less than 3 GB are free"):
        run_recipe(done.recipe, tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prompt", ["w5 [/INST] w6", "w5 [bold] w6"])
def test_square_brackets_in_a_prompt_are_text(done, prompt):
    console = quiet()
    result = LanguageRun(replace(done.recipe, prompt=prompt), done.folder, console)._answer()
    assert result["prompt"] == prompt and prompt in console.file.getvalue()


def test_without_lora_and_speed_the_report_leaves_them_out(done, write_recipe, tmp_path):
    selections = ("oracle", "two stages by threshold", "window + sink")
    recipe = load_recipe(
        write_recipe(
            distill={"context": 256, "batches": 1},
            lora={"steps": 0},
            speed={"length": 0},
            prompt=None,
            quality=[
                {
                    "length": 256,
                    "windows": 1,
                    "budgets": [80],
                    "decode_tokens": 0,
                    "selections": list(selections),
                    "fit_windows": 1,
                }
            ],
        )
    )
    results = run_recipe(recipe, tmp_path / "run", quiet())
    html, card = (tmp_path / "run" / "report.html").read_text(), (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Speed and memory" not in html and "LoRA:" not in html and "answers" not in html and "## Speed" not in card
    assert "LoRA" not in card and not (tmp_path / "run" / "adapter").exists()
    assert all("decode" not in row for row in results["quality"]["table"])
    assert [row["selection"] for row in results["quality"]["table"]] == ["dense", *selections]
    (varying,) = results["quality"]["varying"]
    assert varying["length"] == 256 and varying["fits"][0]["kept"] == pytest.approx(80, rel=0.03)  # of few tiles
    assert varying["times"][0]["budget"] == 80 and varying["times"][0]["over_uniform"]["select + attend"]["median"] > 0
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.sparse_attention["bookkeeping"][
            "trained"
        ]
        is True
    )


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_published_recipes_load(path):
    if path.stem == "defaults":
        with pytest.raises(RecipeError, match=r"model\.source is missing"):
            load_recipe(path)
        return
    changes = ["data.train=[my.log]"] if path.stem == "logs_text" else []  # whose users name their log
    for smoke in (False, True):
        recipe = load_recipe(path, smoke=smoke, changes=changes)
        assert recipe.name == path.stem and recipe.smoke_run is smoke
        stages = ((recipe.distill, "distillation"), (recipe.lora, "adaptation"))
        assert all(getattr(recipe, name).seed == recipe.seed for stage, name in stages if "settings" in stage)
        # a task has the keys that it reads
        assert not {*recipe.data.get("train", ()), *recipe.data.get("fit", ())} & {*recipe.data.get("eval", ())}


def test_a_recipe_for_more_memory_than_there_is_stops_before_it_trains(write_recipe, tmp_path, monkeypatch):
    device_at = language_model.device_at
    monkeypatch.setattr(
        language_model, "device_at", lambda *args: replace(device_at(*args), name="H100-80GB", memory_bytes=1 << 20)
    )
    monkeypatch.setattr(distil_and_adapt, "distill", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(
        NotEnoughMemoryError,
        match=r"a sparse step on 1 × 256 tokens needs .* GB, H100-80GB has 0\.0 GB: .*shorter rows",
    ):
        run_recipe(load_recipe(write_recipe()), tmp_path / "run", quiet())


def test_a_model_that_cannot_be_planned_runs_without_a_plan(done, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("cannot be planned, its forward pass depends on values")

    monkeypatch.setattr(language_model, "plan_training", refuse)
    console = quiet()
    assert LanguageRun(done.recipe, done.folder, console)._plan() == {
        "unplanned": "cannot be planned, its forward pass depends on values"
    }
    assert "no plan of the memory: cannot be planned" in console.file.getvalue()


def test_a_run_killed_in_training_has_the_loss_curve_of_one_that_was_not(write_recipe, recipe_values, tmp_path):
    changes = {
        "data": {**recipe_values["data"], "end_of_text": False},  # the test's tokenizer has no such token
        "distill": {"context": 256, "batches": 1},
        "lora": {
            "context": 256,
            "steps": 10,
            "packed": True,
            "settings": {"rank": 2, "kl_tile_share": 4, "lr": 0.005, "save_every": 2},
        },
        "quality": [
            {
                "length": 256,
                "windows": 1,
                "budgets": [80],
                "decode_tokens": 0,
                "selections": ["oracle", "window + sink"],
            }
        ],
        "speed": {"length": 0},
        "prompt": None,
    }
    path, killed = write_recipe(**changes), tmp_path / "killed"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(cache_folder() / "kernels")  # compiled once
    environment = {**os.environ, "HF_SPARSE_ATTN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW_STEPS, "run", str(path), "--out", str(killed)]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors)
    deadline = time.monotonic() + 120
    while not list(killed.glob("state/lora/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "state" / "lora.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
        recipe = load_recipe(path)
        resumed, whole = run_recipe(recipe, killed, quiet()), run_recipe(recipe, tmp_path / "whole", quiet())
    curves = [
        [(row["step"], row["loss"], row["kl"], row["grad_norm"]) for row in results["lora"]["log"]]
        for results in (resumed, whole)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 10
    assert resumed["quality"]["table"] == whole["quality"]["table"]


SLOW_STEPS = """
import time
import torch
from hf_sparse_attn import SparseTrainer, cli

torch.set_num_threads(1)
step = SparseTrainer.training_step
SparseTrainer.training_step = lambda *args, **kwargs: time.sleep(0.3) or step(*args, **kwargs)
cli.main()
"""


def test_before_and_reference_become_a_comparison(write_recipe, tmp_path):
    results = run_recipe(
        load_recipe(
            write_recipe(
                distill={"context": 256, "batches": 1},
                lora={"context": 256, "steps": 3, "settings": {"rank": 2, "kl_tile_share": 4, "lr": 0.01}},
                compare={"before": True, "dense_lora": True},
                quality=[
                    {
                        "length": 256,
                        "windows": 2,
                        "budgets": [80],
                        "decode_tokens": 16,
                        "selections": ["oracle", "window + sink"],
                    }
                ],
                speed={"length": 0},
                prompt=None,
            )
        ),
        tmp_path / "run",
        quiet(),
    )
    rows = results["comparison"]
    assert [(row["keys"], row["selection"]) for row in rows] == [(None, "dense"), (80, "oracle"), (80, "window + sink")]
    for row, after, before in zip(rows, results["quality"]["table"], results["before"]["table"], strict=True):
        assert row["after"] == pytest.approx(after["prefill"]) and row["before"] == pytest.approx(before["prefill"])
        assert (
            row["after"] != row["before"]
            and row["over_reference"]["low"] <= row["over_reference"]["ratio"] <= row["over_reference"]["high"]
        )
        assert after["decode_over_prefill"] > 0 and row["decode_over_reference"]["ratio"] > 0
    first = {name: results[name]["log"][0] for name in ("reference", "lora")}  # the same rows, one read densely
    assert (
        first["reference"]["loss"] == pytest.approx(first["lora"]["loss"], abs=0.3)
        and first["reference"]["loss"] != first["lora"]["loss"]
    )
    assert all(row["dense"] and row["kl"] == 0 for row in results["reference"]["log"])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    html = (tmp_path / "run" / "report.html").read_text()
    assert "## Before and after fine-tuning" in card and f"{rows[1]['over_reference']['ratio']:.4f}" in card
    assert "over dense LoRA" in html and f"{rows[1]['perplexity_before']:.3f}" in html


def test_questions_are_a_task(write_recipe, tmp_path):
    results = run_recipe(
        load_recipe(
            write_recipe(
                task="questions",
                distill={"context": 256, "batches": 1},
                lora={"context": 256, "steps": 2, "settings": {"rank": 2, "kl_tile_share": 4}},
                compare={"before": True},
                quality=[
                    {
                        "length": 256,
                        "windows": 2,
                        "budgets": [80],
                        "decode_tokens": 0,
                        "selections": ["oracle", "window + sink"],
                    }
                ],
                speed={"length": 0},
                prompt=None,
            )
        ),
        tmp_path / "run",
        quiet(),
    )
    for step in ("before", "quality"):
        assert [(row["keys"], row["selection"], row["n"]) for row in results[step]["answers"]] == [
            (None, "dense", 2),
            (80, "oracle", 2),
            (80, "window + sink", 2),
        ]
    assert "## Answers that stand far back" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "log-loss of answers above dense" in (tmp_path / "run" / "report.html").read_text()
