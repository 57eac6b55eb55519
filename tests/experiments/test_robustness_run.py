"""Routers on other kinds of text and at other lengths: the table by hand, and a whole run on a tiny model."""

from __future__ import annotations

import io
import shutil

import pytest
import yaml
from helpers.paths import RECIPES
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn import SparseCall, set_sparse_attention
from hf_sparse_attn.data.windows import Window
from hf_sparse_attn.evaluation.divergence import last_hidden, predictions
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.experiments.scores.robustness import robustness_table
from hf_sparse_attn.system.terminal import Terminal
from hf_sparse_attn.training.router_state import load_routers


def reading(selection, document, kl, domain="a"):
    return {
        "domain": domain,
        "length": 64,
        "keys": 16,
        "selection": selection,
        "document": document,
        "kl": kl,
        "loss": 1 + kl,
    }


def test_shares_lie_between_the_window_and_the_oracle():
    readings = [reading("window + sink", d, kl) for d, kl in (("x", 0.5), ("y", 0.7))]
    readings += [
        reading("oracle", "x", 0.1),
        reading("oracle", "y", 0.1),
        reading("mine", "x", 0.2),
        reading("mine", "y", 0.3),
    ]
    rows = {row["selection"]: row for row in robustness_table(readings)}
    assert rows["window + sink"]["share"]["share"] == 0 and rows["oracle"]["share"]["share"] == 1
    assert rows["mine"]["share"]["share"] == pytest.approx(0.35 / 0.5) and rows["mine"]["n"] == 2
    assert rows["mine"]["kl"] == pytest.approx(0.25) and rows["mine"]["loss"] == pytest.approx(1.25)
    with pytest.raises(ValueError, match="a, 64 tokens: 'mine' has windows that"):
        robustness_table([*readings, reading("mine", "z", 0.2)])


@pytest.fixture(scope="module")
def recipe(llama_folder, random_words, real_budget, tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    for i in range(2):
        words = random_words(3000, seed=i).split(" ")
        (folder / f"{i}.txt").write_text("\n".join(" ".join(words[at : at + 50]) for at in range(0, len(words), 50)))
    shutil.copy(RECIPES / "defaults.yaml", folder)
    values = {
        "name": "tiny",
        "task": "robustness",
        "model": {"source": str(llama_folder), "name": "tiny Llama", "license": "apache-2.0", "dtype": "float32"},
        "sparse_attention": real_budget,
        "robustness": {"domains": {"one": [str(folder / "0.txt")], "two": [str(folder / "1.txt")]}, "contexts": [400]},
        "distill": {"context": 200, "batches": 4},
        "quality": [
            {"length": 200, "windows": 2, "budgets": [80]},
            {"length": 400, "windows": 2, "budgets": [96]},
        ],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


def test_every_domain_and_length_is_read_with_all_routers(recipe, tmp_path):
    results = run_recipe(load_recipe(recipe), tmp_path / "run", Terminal(io.StringIO()))
    base = ("oracle", "window + sink", "untrained")
    assert [(row["domain"], row["selection"]) for row in results["domains"]] == [
        (domain, name)
        for domain in ("one", "two")
        for name in (*base, "trained on one, 200 tokens", "trained on two, 200 tokens")
    ]
    assert [(row["length"], row["keys"], row["selection"]) for row in results["lengths"]] == [
        (n, keys, name)
        for n, keys in ((200, 80), (400, 96))
        for name in (*base, "trained on one, 200 tokens", "trained on one, 400 tokens")
    ]
    # as many tokens
    assert len(results["routers-one-200"]["documents"]) == 4 and len(results["routers-one-400"]["documents"]) == 2
    html = (tmp_path / "run" / "report.html").read_text()
    assert "Other kinds of text" in html and html.count('class="learned"') == 2 + 2  # its own routers

    # one reading, made anew from the files that the run left
    state = tmp_path / "run" / "state"
    model = AutoModelForCausalLM.from_pretrained(
        state / "base", sparse_attention=load_recipe(recipe).sparse_attention
    ).eval()
    load_routers(model, state / "two-200.safetensors")
    set_sparse_attention(model, min_keys=80, max_keys=80)
    text = (state / "texts/one/eval/000-0.txt").read_text()
    ids = AutoTokenizer.from_pretrained(state / "base")(text, return_tensors="pt")["input_ids"][:, 200:400]
    window = Window("w", ids)
    result = predictions(
        model, window.ids, last_hidden(model, ids, SparseCall()), last_hidden(model, ids, SparseCall(dense=True))
    )
    kept = [r for r in results["domain-one"]["readings"] if r["selection"] == "trained on two, 200 tokens"]
    assert kept[1]["kl"] == pytest.approx(result.kl, rel=1e-3) and kept[1]["loss"] == pytest.approx(
        result.loss, rel=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("robustness.domains={}", "robustness.domains is {}: must map names"),
        ("robustness.domains={a b: [x]}", "must map names"),
        ("robustness.domains={one: []}", "must map names"),
        ("quality=[{length: 200, windows: 1, budgets: [80, 96]}]", "one entry of quality for each length"),
    ],
)
def test_recipes_without_kinds_of_text_are_refused(recipe, change, message, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    if change.startswith("robustness"):
        values["robustness"]["domains"] = yaml.safe_load(change.partition("=")[2])
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
        shutil.copy(RECIPES / "defaults.yaml", tmp_path)
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "tiny.yaml")
        return
    with pytest.raises(RecipeError, match=message):
        run_recipe(load_recipe(recipe, changes=[change]), tmp_path / "run", Terminal(io.StringIO()))
