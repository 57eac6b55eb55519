"""Ablation: levels, costs, the table by hand, and a whole run on a tiny model."""

from __future__ import annotations

import io
import math
import shutil

import pytest
import torch
import yaml
from helpers.calls import Watching
from helpers.paths import RECIPES
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_sparse_attn import SparseAttentionConfig, routers
from hf_sparse_attn.attention.call import learned_selector
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.experiments.ablation import factors
from hf_sparse_attn.experiments.ablation.costs import DENSE, Contender, capture, measure
from hf_sparse_attn.experiments.ablation.factors import BASELINE, FACTORS, JOINT_KL, LEVELS, default_of, levels
from hf_sparse_attn.experiments.ablation.level_table import ablation_table
from hf_sparse_attn.experiments.ablation.readings import difference
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.system.terminal import Terminal

# -- levels ---------------------------------------------------------------------------------------------------------


def test_every_level_changes_something_and_has_a_name_of_its_own():
    default = SparseAttentionConfig()
    for level in LEVELS:
        changed = default.changed(**level.sparse)  # a field that exists, at a value that is allowed
        touched = level.training != 1 or level.keys != 1 or level.selection
        assert changed != default or touched
        assert default_of(level.factor, default, 64) != level.name
    assert len({level.slug for level in LEVELS}) == len(LEVELS)
    assert set(FACTORS) == {level.factor for level in LEVELS} | {JOINT_KL}


def test_levels_are_chosen_by_factor_and_grid():
    short, full = levels(), levels(full=True)
    assert full == list(LEVELS) and short == [level for level in LEVELS if not level.full] != full
    assert {level.factor for level in levels(["block size"])} == {"block size"}
    with pytest.raises(ValueError, match=r"names 'blocks'; known: keys kept, stages, "):
        levels(["blocks"])


def test_only_what_the_routers_depend_on_is_trained_anew():
    retrained = {level.factor for level in LEVELS if level.retrains}
    assert retrained == {"rank of stage 2", "features of stage 1", "block size", "distillation batches"}


@pytest.mark.parametrize(
    "factor", ["pooling of stage 1", "keys that are pooled", "target of the distillation", "cut blocks"]
)
def test_a_factor_that_lost_says_so(factor):
    with pytest.raises(ValueError, match=rf"ablate\.factors names '{factor}'; known: .*'{factor}' was removed \(.*; "):
        levels([factor])


# -- costs ----------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_a_layers_real_inputs(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget), token_ids(1, 200)
    inputs = capture(model, ids, 1)
    seen = {}
    with torch.no_grad():
        model.base_model(
            ids, use_cache=False, sparse_call=Watching(dense=True, document=lambda r, i: seen.update({r.layer: i}))
        )
    assert (
        torch.equal(inputs.q, seen[1].q) and torch.equal(inputs.v, seen[1].v) and not torch.equal(inputs.q, seen[0].q)
    )
    with pytest.raises(ValueError, match=r"no sparse layer 7: it has \[0, 1\]"):
        capture(model, ids, 7)
    router = routers(model)[1]
    mine = Contender(router, learned_selector)
    result = measure(
        {
            BASELINE: mine,
            "half": Contender(router, learned_selector, 0.5),
        },
        BASELINE,
        inputs,
        2,
        3,
    )
    assert set(result) == {BASELINE, "half", DENSE} and all(row["n"] == 3 and row["ms"] > 0 for row in result.values())
    # layers, KV heads, whole blocks, router_dim, float32
    assert result[BASELINE]["summary_bytes"] == 2 * 2 * 12 * 32 * 4
    assert result[BASELINE]["weight_bytes"] == 2 * sum(w.numel() for w in router.weights) * 4


# -- the table ------------------------------------------------------------------------------------------------------


def reading(factor, level, seed, document, kl):
    return {"factor": factor, "level": level, "seed": seed, "document": document, "kl": kl, "loss": 2 + kl}


def test_differences_are_paired_by_window_and_seed():
    base = [
        reading(BASELINE, BASELINE, seed, d, kl)
        for seed, d, kl in [(0, "a", 0.1), (0, "b", 0.5), (1, "a", 0.2), (1, "b", 0.6)]
    ]
    mine = [
        reading("f", "x", seed, d, kl) for seed, d, kl in [(1, "b", 0.7), (1, "a", 0.3), (0, "a", 0.3), (0, "b", 0.7)]
    ]
    result = difference(mine, base, "kl")
    assert result["mean"] == pytest.approx(0.15) and sorted(result["seeds"]) == pytest.approx([0.1, 0.2])
    assert result["low"] == result["high"] == pytest.approx(0.15)  # both windows have the same mean
    with pytest.raises(ValueError, match=r"the baseline lacks seed and window \(2, 'a'\)"):
        difference([reading("f", "x", 2, "a", 0.1)], base, "kl")


def test_the_table_has_every_level_beside_its_default():
    readings = [reading(BASELINE, BASELINE, 0, d, 0.1) for d in "abc"]
    readings += [reading("f", "x", 0, d, 0.1 + above) for d, above in zip("abc", (0.01, 0.02, 0.03), strict=True)]
    readings += [reading("f", "y", 0, d, 0.1 + above) for d, above in zip("abc", (-0.01, 0.02, 0.01), strict=True)]
    readings += [reading("g", BASELINE, 0, d, 0.5) for d in "abc"] + [reading("g", "z", 0, d, 0.4) for d in "abc"]
    cost = {"ms": 3.0, "mb": 1.0, "over_default": {"median": 1.0, "min": 0.9, "max": 1.1}}
    table = ablation_table(readings, {BASELINE: cost, "f x": {**cost, "ms": 9.0}}, {"f": "w", "g": "v"})
    assert [(row["factor"], row["level"], row["verdict"]) for row in table] == [
        ("f", "w", "default"),
        ("f", "x", "worse"),
        ("f", "y", "no difference shown"),
        ("g", "v", "default"),
        ("g", "z", "better"),  # than its own default
    ]
    assert [row.get("ms") for row in table] == [3.0, 9.0, None, 3.0, None] and all(row["n"] == 3 for row in table)


# -- a run ----------------------------------------------------------------------------------------------------------

SEPARATE = ["keys kept", "stages", "block size", "budget", "dense layers", "distillation batches", JOINT_KL]


@pytest.fixture(scope="module")
def recipe(llama_folder, random_words, real_budget, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    for i, count in enumerate((2600, 600)):
        (folder / f"{i}.txt").write_text(random_words(count, seed=i))
    shutil.copy(RECIPES / "defaults.yaml", folder)
    values = {
        "name": "tiny",
        "task": "ablation",
        "model": {"source": str(llama_folder), "name": "tiny Llama", "license": "apache-2.0", "dtype": "float32"},
        "sparse_attention": {**real_budget, "local": 0},  # blocks of 32 fit
        "data": {"train": [str(folder / "0.txt")], "eval": [str(folder / "1.txt")]},
        "distill": {"context": 256, "batches": 2},
        "lora": {"context": 256, "steps": 2, "settings": {"rank": 2, "kl_tile_share": 4}},
        "quality": [{"length": 256, "windows": 2, "fit_windows": 1, "budgets": [96]}],
        "ablate": {"factors": SEPARATE, "seeds": 2, "repeats": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def chosen():
    """Fewer levels than the grid has: of blocks those that a tiny budget allows."""
    kept = [
        level for level in LEVELS if level.factor in SEPARATE and level.name not in ("64", "128", "the first three")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "LEVELS", tuple(kept))
        yield kept


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_ablation_reads_every_level_against_the_default(recipe, chosen, tmp_path):
    loaded, console = load_recipe(recipe), Terminal(io.StringIO())
    results = run_recipe(loaded, tmp_path / "run", console)
    table = results["table"]
    assert {(row["factor"], row["level"]) for row in table if not row["default"]} == {
        *((level.factor, level.name) for level in chosen),
        (JOINT_KL, "weight 0"),
    }
    by_level = {row["level"]: row for row in table if not row["default"]}
    assert by_level["untrained"]["seeds"] == 2 and by_level["32"]["seeds"] == by_level["by threshold"]["seeds"] == 1
    assert all(row["n"] == 2 and row["kl"] >= 0 and math.isfinite(row["loss"]) for row in table)
    assert all(row["kl_above"]["mean"] == 0 for row in table if row["default"])
    assert by_level["stage 2 alone"]["kl"] != by_level["stage 1 alone"]["kl"]
    assert all(row["ms"] > 0 for row in table if row["factor"] != JOINT_KL) and "ms" not in by_level["weight 0"]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "by threshold" in html and 'src="data:image/svg' in html and "http" not in html.replace("http-equiv", "")
    before = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    again = run_recipe(loaded, tmp_path / "run", console)  # all of it was done
    assert again["table"] == table and (tmp_path / "run" / "results.json").stat().st_mtime_ns > before
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "state" / "base")
    assert type(base).__name__ == "LlamaForCausalLM"  # stock: no model is left behind


def test_an_ablation_that_cannot_be_read_is_refused(recipe, tmp_path):
    console = Terminal(io.StringIO())
    with pytest.raises(RecipeError, match="one entry of quality with one budget"):
        run_recipe(
            load_recipe(recipe, changes=["quality=[{length: 256, windows: 1, budgets: [96, 128]}]"]),
            tmp_path / "a",
            console,
        )
    with pytest.raises(RecipeError, match=r"ablate\.seeds is 0"):
        run_recipe(load_recipe(recipe, changes=["ablate.seeds=0"]), tmp_path / "b", console)
    with pytest.raises(ValueError, match="names 'colour'"):
        run_recipe(load_recipe(recipe, changes=["ablate.factors=[colour]"]), tmp_path / "c", console)
    with pytest.raises(RecipeError, match="is of task causal_lm, this verb runs those of task ablation"):
        CliRunner().invoke(app, ["ablate", str(RECIPES / "demo.yaml")], catch_exceptions=False)
