"""Keys of a recipe that its task does not read:
refused, and kept from the run, so that the list of what is read cannot rot.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys

import pytest
import yaml
from helpers.paths import RECIPES

from hf_sparse_attn.experiments import sizing
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.recipe_values import defaults, recipe_names
from hf_sparse_attn.experiments.reports import model_card
from hf_sparse_attn.experiments.run import TASKS
from hf_sparse_attn.experiments.tasks.keys import READS, stated

SOURCES = {"model": {"source": "some/model"}, "data": {"train": ["a.txt"], "split": 0.9}}
LEAST = {
    "robustness": {"model": SOURCES["model"], "robustness": {"domains": {"plays": ["a.txt"]}}},
    "longlink": {},
}
EVERY_KEY = set(stated({**defaults(), "smoke": {}}, defaults())) | {"smoke", "quality.fit_windows"}


def load(tmp_path, task, changes=(), **more):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"task": task, **LEAST.get(task, SOURCES), **more}))
    return load_recipe(path, changes=changes)


def test_every_task_says_what_it_reads_and_every_key_is_read_by_a_task():
    assert set(READS) == set(TASKS)
    assert set().union(*READS.values()) == EVERY_KEY


@pytest.mark.parametrize("smoke", [False, True])
def test_shipped_recipes_state_only_what_their_task_reads(smoke):
    for name in recipe_names():
        load_recipe(
            RECIPES / f"{name}.yaml", smoke=smoke, changes=["data.train=[a.log]"] if name == "logs_text" else []
        )


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("causal_lm", "series.patch=8"),
        ("causal_lm", "longlink={length: 512}"),
        ("questions", "lora.packed=true"),
        ("questions", "minutes=null"),
        ("classification", "speed.length=0"),
        ("forecasting", "prompt=Hello"),
        ("ablation", "compare.before=true"),
        ("robustness", "lora.steps=0"),
        ("longlink", "distill.batches=2"),
        ("longlink", "data.train=[a.txt]"),
    ],
)
def test_a_key_that_the_task_does_not_read_is_refused_with_those_it_reads(tmp_path, task, key):
    name = re.escape(key.partition("=")[0])
    words = (
        rf"mine\.yaml: {name} is stated, but task '{task}' does not read it: remove it, or set task to one that "
        r"reads it: \w.*"
    )
    with pytest.raises(RecipeError, match=rf"{words}; all its keys: .*seed"):
        load(tmp_path, task, [key])


def test_a_key_of_the_file_its_smoke_section_or_an_entry_of_quality_is_refused_alike(tmp_path):
    for more in ({"speed": {"length": 0}}, {"smoke": {"speed": {"length": 0}}}):
        with pytest.raises(RecipeError, match=r"speed\.length is stated, .* forecasting reads nothing of speed"):
            load(tmp_path, "forecasting", **more)
    entry = {"length": 512, "windows": 1, "budgets": [64], "decode_tokens": 0}
    with pytest.raises(
        RecipeError, match=r"quality\.decode_tokens is stated, .*classification reads quality\.budgets, quality\.length"
    ):
        load(tmp_path, "classification", quality=[entry])


@pytest.mark.parametrize("task", sorted(READS))
def test_a_run_sees_nothing_but_the_keys_that_its_task_reads(tmp_path, task):
    """So each run of a task in these tests is a proof: it would raise KeyError where it read another key."""
    recipe, known = load(tmp_path, task), defaults()
    for section in (name for name, value in known.items() if isinstance(value, dict) and value):
        assert {f"{section}.{key}" for key in getattr(recipe, section)} == {
            key for key in READS[task] if key.startswith(f"{section}.")
        }


def names_read(task):
    """Texts and attributes that the sources of a task's run name:
    its classes, their helpers, the card and the templates.
    """
    modules = [*(sys.modules[cls.__module__] for cls in TASKS[task].__mro__ if cls is not object), sizing, model_card]
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.Attribute):
                yield node.attr
    for template in (RECIPES.parent / "hf_sparse_attn/experiments/reports/templates").iterdir():
        yield from re.findall(r"\w+", template.read_text())


@pytest.mark.parametrize("task", sorted(READS))
def test_the_code_of_a_task_names_every_key_that_it_is_said_to_read(task):
    # read where the recipe is checked
    at_load = {"name", "task", "smoke", "packages", "distill.settings", "lora.settings"}
    names = set(names_read(task))
    assert {key for key in READS[task] - at_load if key.rpartition(".")[2] not in names} == set()
