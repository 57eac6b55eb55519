"""Recipes: what is refused, and with which words."""

from __future__ import annotations

import shutil
from itertools import chain

import pytest
import yaml
from helpers.paths import RECIPES

from hf_sparse_attn.experiments.recipe import Quality, RecipeError, load_recipe
from hf_sparse_attn.experiments.recipe_values import HINTS, defaults

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
    recipe = load(
        {
            "name": "mine",
            "model": {"source": "x", "dtype": "float32"},
            "distill": {"batches": 3, "settings": {"lr": 0.5}},
        }
    )
    assert recipe.name == "mine" and recipe.model == {
        "source": "x",
        "name": None,
        "hub_id": None,
        "license": None,
        "dtype": "float32",
    }
    assert (
        recipe.distill == {"context": 4096, "batches": 3, "packed": False, "settings": {"lr": 0.5}}
        and recipe.distillation.lr == 0.5
    )
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
        (
            {"model": {"source": "x", "sorce": 1}},
            r"model has no key 'sorce'; keys: dtype, hub_id, license, name, source",
        ),
        (
            {"speed": {"lenght": 1}},
            r"speed has no key 'lenght'; keys: attention_repeats, decode_tokens, keys, length, repeats",
        ),
        (
            {"quality": [{"length": 1024, "windows": 1, "budgets": [64]}, {"len": 1}]},
            r"quality\[1\] has no key 'len'; keys: budgets, .*windows",
        ),
        (
            {"sparse_attention": {"blocksize": 16}},
            r"sparse_attention has no field 'blocksize'; fields: block_size, .*bookkeeping",
        ),
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


def test_a_file_that_is_missing_is_named_with_the_recipes_of_this_package(tmp_path, monkeypatch):
    for wrong in (tmp_path / "mine.yaml", "dmeo", "defaults", "../recipes/demo"):
        with pytest.raises(
            RecipeError, match=rf"{wrong}: no such file, and no recipe of this package, which are ablation, .*demo, "
        ):
            load_recipe(wrong)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").raw == load_recipe(RECIPES / "demo.yaml").raw
    (tmp_path / "demo").write_text(yaml.safe_dump({**LEAST, "name": "own"}))
    assert load_recipe("demo").name == "own"


def test_defaults_come_with_the_package_and_not_from_beside_the_recipe(tmp_path):
    (tmp_path / "defaults.yaml").write_text("name: theirs\nseed: 5\nanything: {}\n")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(LEAST))
    assert load_recipe(tmp_path / "mine.yaml").seed == 0
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**LEAST, "anything": {"x": 1}}))
    with pytest.raises(RecipeError, match="has no key 'anything'"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "some/model"}, r"model is 'some/model': must be a mapping"),
        ({"data": {"train": "a.txt", "eval": ["b.txt"]}}, r"data\.train is 'a\.txt': must be a list"),
        ({"distill": {"batches": "many"}}, r"distill\.batches is 'many': must be a whole number"),
        ({"seed": 1.5}, r"seed is 1\.5: must be a whole number"),
        ({"seed": True}, "seed is True: must be a whole number"),
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


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", ""])
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
        tmp_path / "mine.yaml",
        changes=["data.train=[x.log, y.log]", "lora.settings.lr=0.5", "prompt=Hello: you", "seed=4"],
    )
    assert (
        recipe.data["train"] == ["x.log", "y.log"]
        and recipe.adaptation.lr == 0.5
        and recipe.seed == recipe.adaptation.seed == 4
    )
    assert recipe.raw["data"]["train"] == ["x.log", "y.log"]
    for change, message in (
        ("lora.steps", "must be key.path=value"),
        ("lora.stepz=1", "lora has no key 'stepz'"),
        ("lora.steps=many", "lora.steps is 'many': must be a whole number"),
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


# -- what a stranger's recipe may not do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "value"),
    [
        *[
            (f"lora.settings.{name}", value)
            for name, value in (("lr", "1e-4"), ("lr", "1E-4"), ("kl_weight", "+1.5e-1"), ("rank", "1e1"))
        ],
        *[("distill.settings.lr", value) for value in ("1e-3", ".5", "1.", "0x1")],
        *[("lora.steps", value) for value in ("1e3", "1_000", "0o17", "+7")],
        ("data.split", "5e-1"),
        ("sparse_attention.min_keys", "1e3"),
    ],
)
def test_numbers_are_numbers_however_they_are_written(tmp_path, change, value):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**LEAST, "data": {"train": ["a.txt"], "split": 0.5}}))
    result = load_recipe(tmp_path / "mine.yaml", changes=[f"{change}={value}"]).raw
    for key in change.split("."):
        result = result[key]
    want = int(value, 0) if value[1:2] in "xo" and value[1:] else float(value)
    assert result == want and type(result) in (int, float)
    assert type(result) is int or change.split(".")[-1] not in ("rank", "steps", "min_keys")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.settings.lr='1e-4'", r"lora\.settings\.lr is '1e-4': must be a number, 1e-4 without quotes"),
        ("lora.settings.lr=1:30", r"lr is '1:30': must be a number"),
        ("lora.steps=010", "lora.steps is not YAML .* it is 010: write it without the leading 0"),
        ("lora.steps=2026-01-01", r"steps is '2026-01-01': must be a whole number"),
        ("compare.before=yes", r"compare\.before is 'yes': must be true or false; write true or false"),
        ("lora.packed=on", r"lora\.packed is 'on': must be true"),
        ("name=5", r"name is 5: must be a text; write it in quotes"),
        ("lora.settings.lr=.nan", r"\.nan: must be a finite number"),
        ("lora.settings.lr=1e999", "1e999: must be a finite number"),
        ("seed=9223372036854775808", r"9223372036854775808: whole numbers are at most"),
        ("seed=4294967296", "seed is 4294967296: must be a whole number from 0"),
        ("distill.batches=-1", r"distill\.batches is -1: must be a whole number >= 1"),
        ("data.train=[1]", r"data\.train\[0\] is 1: must be a text"),
        ("lora.settings.anneal={density: 1}", r"anneal\.density is 1: must be a list"),
        ("lora.settings.target_modules=q_proj", r"target_modules is 'q_proj': must be a list"),
    ],
)
def test_what_looks_like_another_kind_is_refused_with_the_fix(load, change, message, tmp_path):
    load()
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mine.yaml", changes=[change])


@pytest.mark.parametrize(
    "name",
    ["../x", "/tmp/x", "a/b", "a\\b", "..", ".", ".hidden", "", "con", "NUL.txt", "x" * 100, "a[b]", "a\nb", "x."],
)
def test_a_name_that_is_no_name_of_a_folder_is_refused(load, name):
    with pytest.raises(RecipeError, match="name is "):
        load({"name": name})


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "hub_token",
            "output_dir",
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "accelerator_config",
            "logging_dir",
            "resume_from_checkpoint",
        ),
        *(
            "auto_find_batch_size",
            "torch_compile_backend",
            "debug",
            "no_such_argument",
            "do_eval",
            "ddp_backend",
            "liger_kernel_config",
        ),
    ],
)
@pytest.mark.parametrize("network", [False, True])
def test_training_arguments_are_those_of_a_list(load, argument, network, tmp_path):
    load()
    changes = [
        f"{{}}.{argument}=x".format(section) for section in ("lora.settings.training_arguments", "series.pretrain")
    ]
    for change in changes:
        with pytest.raises(
            RecipeError, match=rf"{change[:-2]} is not allowed in a recipe; allowed: adam_beta1, .*weight_decay"
        ):
            load_recipe(tmp_path / "mine.yaml", changes=[change], network=network)


@pytest.mark.parametrize(
    "argument", ["push_to_hub=true", "hub_model_id=a/b", "report_to=[wandb]", "hub_strategy=end", "run_name=x"]
)
@pytest.mark.parametrize("section", ["lora.settings.training_arguments", "series.pretrain"])
def test_what_reaches_the_network_needs_the_flag(load, argument, section, tmp_path):
    load({"task": "forecasting", "data": {"train": ["a.csv"], "split": 0.5}})
    change = f"{section}.{argument}"
    with pytest.raises(RecipeError, match=rf"{change.split('=')[0]} sends what is trained.* give --allow-network"):
        load_recipe(tmp_path / "mine.yaml", changes=[change])
    load_recipe(tmp_path / "mine.yaml", changes=[change], network=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "series.model.auto_map={}",
            r"series\.model\.auto_map is not allowed in a recipe; allowed: activation_function",
        ),
        ("series.model.d_model=big", r"series\.model\.d_model is 'big': must be a whole number"),
        ("sparse_attention.bookkeeping={trained: true}", "bookkeeping is written by this package"),
        ("model.trust_remote_code=true", "model has no key 'trust_remote_code'"),
        ("longlink.path=x", "longlink has no key 'path'"),
        ("lora.settings.training_arguments.weight_decay=x", "weight_decay is 'x': must be a number"),
    ],
)
def test_free_mappings_have_their_list_too(load, change, message, tmp_path):
    load()
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mine.yaml", changes=[change])


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=False)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 20000 values, aliases written out"),
        ("name: &a [*a]", "holds itself"),
        ("name: " + "[" * 3000, "more than 40 levels"),
        ("name: r\nname: s", "has the key 'name' twice"),
        ("1: x", "has the key 1: keys are texts"),
        ("? [a]\n: x", "the key a list or mapping"),
        ("name: !!python/name:os.system", "has the tag .*only plain values"),
        ("name: !!str 5", "has the tag"),
        ("name: !!binary aGk=", "has the tag"),
        ("name: " + "x" * 1_000_001, "at most 1000000 are read"),
        ("<<: {name: x}", "has no key '<<'"),
    ],
    ids=range(11),
)
def test_hostile_yaml_is_refused_at_once(load, text, message):
    with pytest.raises(RecipeError, match=message):
        load(text=text)


def test_aliases_that_stay_small_are_read(load):
    assert load(text="model: {source: x}\ndata: {train: &t [a.txt], eval: [b.txt], fit: *t}").data["fit"] == ["a.txt"]


HEX = "0123456789abcdef" * 4


def test_every_package_of_a_recipe_has_its_hash(load):
    source, deb = "pypi:notes==1.0:**/*.txt", "c-api=deb:some-doc:usr/*.txt"
    with pytest.raises(
        RecipeError, match=r"data\.train\[0\] is 'pypi:notes==1\.0:.*packages has no sha256 of pypi:notes==1\.0: add it"
    ):
        load({"data": {"train": [source], "eval": ["b.txt"]}})
    with pytest.raises(RecipeError, match=r"packages\.pypi:notes==1\.0 is 'abc': must be a sha256"):
        load({"data": {"train": [source], "eval": ["b.txt"]}, "packages": {"pypi:notes==1.0": "abc"}})
    known = {"pypi:notes==1.0": HEX.upper(), "deb:some-doc": None}
    recipe = load({"model": {"source": source}, "data": {"train": [source, deb], "eval": ["b.txt"]}, "packages": known})
    assert (
        recipe.data["train"] == [f"pypi:notes==1.0@sha256={HEX}:**/*.txt", deb]
        and recipe.model["source"] == recipe.data["train"][0]
    )
    assert recipe.raw["data"]["train"] == [source, deb]  # what results and cards show
    assert load({"data": {"train": [recipe.data["train"][0]], "eval": ["b.txt"]}}).data["train"] == [
        recipe.data["train"][0]
    ]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_published_recipes_name_the_hash_of_every_package(path, smoke):
    if path.stem == "defaults":
        return
    recipe = load_recipe(path, smoke=smoke, changes=["data.train=[a.log]"] if path.stem == "logs_text" else [])
    texts = (recipe.data.get(key, []) for key in ("train", "eval", "fit"))
    sources = [*chain(*texts), recipe.model.get("source", ""), *chain(*recipe.robustness.get("domains", {}).values())]
    fetched = [source for source in sources if "pypi:" in source or "deb:" in source]
    assert all("@sha256=" in source for source in fetched) and (
        fetched or path.stem.startswith(("longlink", "scale", "ruler_32k"))
    )


def test_every_default_that_is_null_says_what_else_it_may_be():
    def walk(values, where=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{where}{key}.")
            elif value is None:
                yield f"{where}{key}"

    assert set(walk(defaults())) <= set(HINTS)


@pytest.mark.parametrize("name", ["two stages by corrected threshold", "two stages by top-p"])
def test_a_selection_that_lost_says_what_to_use_instead(load, name):
    with pytest.raises(
        RecipeError, match=rf"names '{name}'; known: .*'{name}' was removed \(.*use 'two stages by threshold'"
    ):
        load(
            {
                "quality": [
                    {"length": 4096, "windows": 1, "budgets": [64], "selections": ["oracle", "window + sink", name]}
                ]
            }
        )


def test_the_target_of_an_old_recipe_is_the_mass_or_an_error(load):
    assert load({"distill": {"settings": {"target": "mass"}}}).distill["settings"] == {}
    with pytest.raises(
        RecipeError, match=r"distill\.settings\.target is 'max': routers learn the block mass .*: leave target out"
    ):
        load({"distill": {"settings": {"target": "max"}}})
