"""Recipes: what is refused, and with which words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from hf_sparse_attn.pipeline.recipe import Quality, RecipeError, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
LEAST = {"model": {"source": "some/model"}, "data": {"train": ["a.txt"], "eval": ["b.txt"]}}


@pytest.fixture
def load(tmp_path):
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)

    def make(changes=None, text=None):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**LEAST, **(changes or {})}) if text is None else text)
        return load_recipe(path)

    return make


def test_a_recipe_is_a_delta_against_the_defaults(load):
    recipe = load({"name": "mine", "model": {"source": "x", "dtype": "float32"}, "distill": {"batches": 3, "settings": {"lr": 0.5}}})
    assert recipe.name == "mine" and recipe.model == {"source": "x", "name": None, "hub_id": None, "license": None, "dtype": "float32"}
    assert recipe.distill == {"context": 4096, "batches": 3, "packed": False, "settings": {"lr": 0.5}} and recipe.distillation.lr == 0.5
    assert recipe.lora["steps"] == 8 and recipe.quality[0].budgets == (512, 1024)
    assert recipe.raw["distill"]["batches"] == 3 and recipe.raw["lora"]["context"] == 4096


def test_the_seed_reaches_both_stages_unless_they_have_their_own(load):
    recipe = load({"seed": 7, "lora": {"settings": {"seed": 3}}})
    assert recipe.distillation.seed == 7 and recipe.adaptation.seed == 3


def test_a_list_replaces_the_default_list(load):
    recipe = load({"quality": [{"length": 128, "windows": 1, "budgets": [64], "decode_tokens": 0}]})
    assert len(recipe.quality) == 1 and recipe.quality[0] == Quality(128, 1, (64,), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, r"the recipe has no key 'modle'; keys: .*model.*speed"),
        ({"model": {"source": "x", "sorce": 1}}, r"model has no key 'sorce'; keys: dtype, hub_id, license, name, source"),
        ({"speed": {"lenght": 1}}, r"speed has no key 'lenght'; keys: attention_repeats, decode_tokens, keys, length, repeats"),
        (
            {"quality": [{"length": 1024, "windows": 1, "budgets": [64]}, {"len": 1}]},
            r"quality\[1\] has no key 'len'; keys: budgets, .*windows",
        ),
        ({"sparse_attention": {"blocksize": 16}}, r"sparse_attention has no field 'blocksize'; fields: block_size, .*bookkeeping"),
        ({"distill": {"settings": {"learning_rate": 1.0}}}, "learning_rate"),
        ({"lora": {"settings": {"rnk": 4}}}, "rnk"),
    ],
)
def test_unknown_keys_are_named_with_the_known_ones(load, changes, message):
    with pytest.raises(RecipeError, match=message):
        load(changes)


@pytest.mark.parametrize("stage", ["distill", "lora"])
def test_unknown_settings_of_a_stage_list_the_known_ones(load, stage):
    with pytest.raises(RecipeError, match=r"'lrate'.*save_every"):
        load({stage: {"settings": {"lrate": 1.0}}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "x"}}, r"mine\.yaml: model\.source is missing"),
        ({"data": {"eval": ["b.txt"]}}, r"data\.train names no text"),
        ({"data": {"train": ["a.txt"], "eval": []}}, r"data\.eval names no text"),
    ],
)
def test_missing_model_or_texts(load, changes, message):
    with pytest.raises(RecipeError, match=message):
        load(changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", r"mine\.yaml is not YAML"),
        ("- a\n- b\n", "a recipe is a mapping of keys, got list"),
        ("", "a recipe is a mapping of keys, got NoneType"),
        ("just words", "a recipe is a mapping of keys, got str"),
    ],
)
def test_files_that_are_no_recipe(load, text, message):
    with pytest.raises(RecipeError, match=message):
        load(text=text)


def test_a_file_that_is_not_utf_8_is_refused_by_name(tmp_path):
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(tmp_path / "mine.yaml")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"defaults\.yaml: no such file .*beside it"):
        load_recipe(tmp_path / "mine.yaml")
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    with pytest.raises(RecipeError, match=r"mine\.yaml: no such file"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "some/model"}, r"model is 'some/model': must be a mapping"),
        ({"data": {"train": "a.txt", "eval": ["b.txt"]}}, r"data\.train is 'a\.txt': must be a list"),
        ({"distill": {"batches": "many"}}, r"distill\.batches is 'many': must be a int"),
        ({"seed": 1.5}, r"seed is 1\.5: must be a int"),
        ({"seed": True}, "seed is True: must be a int"),
        ({"seed": [1]}, r"seed is \[1\]"),
        ({"quality": {"length": 512}}, "quality is .*: must be a list"),
        ({"quality": ["all"]}, r"quality\[0\] is 'all': must be a mapping"),
        ({"sparse_attention": {"block_size": "16"}}, r"sparse_attention\.block_size is '16': must be an integer"),
        ({"sparse_attention": {"block_size": 17}}, r"sparse_attention\.block_size is 17: must be one of"),
        ({"distill": {"settings": {"steps_per_batch": 0}}}, r"steps_per_batch is 0: must be >= 1"),
        ({"lora": {"settings": {"rank": 0}}}, r"lora\.rank is 0: must be > 0"),
        ({"quality": [{"length": 512}]}, "windows"),
        ({"quality": [{"length": "a", "windows": 1, "budgets": [64]}]}, r"mine\.yaml"),
        ({"quality": [{"length": 512, "windows": 1, "budgets": 64}]}, r"mine\.yaml"),
    ],
)
def test_values_of_the_wrong_kind(load, changes, message):
    with pytest.raises(RecipeError, match=message):
        load(changes)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", None])
def test_other_dtypes_are_refused(load, dtype):
    with pytest.raises(RecipeError, match=rf"model\.dtype is {dtype!r}; supported: auto, bfloat16, float32, float16"):
        load({"model": {"source": "x", "dtype": dtype}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"selections": ["oracle", "two stages"]}, r"must hold window \+ sink"),
        ({"fit_windows": 0}, "fit_windows is 0: must be >= 1"),
        ({"selections": ["window + sink"]}, "must hold oracle"),
        ({"selections": []}, r"must hold oracle, window \+ sink"),
        ({"selections": ["oracle", "window + sink", "magic"]}, r"names 'magic'; known: oracle, two stages"),
        ({"budgets": []}, "at least one budget"),
        ({"windows": 0}, "one window"),
        ({"decode_tokens": 256}, "below half the length"),
        ({"decode_tokens": -1}, "below half the length"),
    ],
)
def test_impossible_quality_entries(load, fields, message):
    with pytest.raises(RecipeError, match=message):
        load({"quality": [{"length": 512, "windows": 1, "budgets": [64], **fields}]})


def test_questions_know_no_selections_that_are_fitted(load):
    names = ["oracle", "two stages by threshold", "window + sink"]
    entry = {"quality": [{"length": 1024, "windows": 1, "budgets": [64], "selections": names}]}
    assert load(entry).quality[0].is_fitted
    with pytest.raises(RecipeError, match=r"task 'questions' must be of oracle, two stages"):
        load({**entry, "task": "questions"})


# -- reduced runs, changes from the command line, split -------------------------------------------------------------


def test_smoke_is_a_delta_over_the_recipe(tmp_path):
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    values = {
        **LEAST,
        "sparse_attention": {"min_keys": 1024},
        "lora": {"steps": 9, "settings": {"rank": 4}},
        "smoke": {"sparse_attention": {"dense_below": 512}, "lora": {"steps": 2, "settings": {"alpha": 8}}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    full, reduced = (load_recipe(tmp_path / "mine.yaml", smoke=smoke) for smoke in (False, True))
    assert full.lora["steps"] == 9 and not full.smoke_run and full.sparse_attention.dense_below == 2048
    assert reduced.smoke_run and reduced.lora["steps"] == 2 and reduced.lora["settings"] == {"rank": 4, "alpha": 8}
    assert (reduced.sparse_attention.min_keys, reduced.sparse_attention.dense_below) == (1024, 512)
    assert "smoke" not in full.raw and full.raw != reduced.raw


@pytest.mark.parametrize("smoke", [{"modle": {}}, {"lora": {"stepz": 1}}, {"smoke": {}}])
def test_unknown_keys_of_a_smoke_section_are_refused(tmp_path, smoke):
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**LEAST, "smoke": smoke}))
    with pytest.raises(RecipeError, match="has no key"):
        load_recipe(tmp_path / "mine.yaml", smoke=True)


def test_changes_from_the_command_line(tmp_path):
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(LEAST))
    recipe = load_recipe(
        tmp_path / "mine.yaml", changes=["data.train=[x.log, y.log]", "lora.settings.lr=0.5", "prompt=Hello: you", "seed=4"]
    )
    assert recipe.data["train"] == ["x.log", "y.log"] and recipe.adaptation.lr == 0.5 and recipe.seed == recipe.adaptation.seed == 4
    assert recipe.raw["data"]["train"] == ["x.log", "y.log"]
    for change, message in (
        ("lora.steps", "must be key.path=value"),
        ("lora.stepz=1", "lora has no key 'stepz'"),
        ("lora.steps=many", "lora.steps is 'many': must be a int"),
        ("data.train=x.log", "data.train is 'x.log': must be a list"),
        ("lora=3", "lora is 3: must be a mapping"),
        ("data.train=[", "not YAML"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "mine.yaml", changes=[change])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ["a"], "eval": []}, r"data\.eval names no text: name some, or set data\.split"),
        ({"train": ["a"], "eval": ["b"], "split": 0.5}, "not both"),
        ({"train": ["a"], "split": 1.5}, "share of each training text"),
    ],
)
def test_texts_are_split_or_named(load, data, message):
    with pytest.raises(RecipeError, match=message):
        load({"data": data})
    assert load({"data": {"train": ["a"], "split": 0.8, "eval": []}}).data["split"] == 0.8


def test_an_unknown_task_is_refused(load):
    with pytest.raises(RecipeError, match="task is 'translation'; supported: causal_lm, questions"):
        load({"task": "translation"})
