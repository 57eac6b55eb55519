"""LongLink as a recipe: learning, routers and study in steps that are continued."""

from __future__ import annotations

import io
import shutil

import yaml
from helpers.paths import RECIPES

from hf_sparse_attn.experiments.longlink.families import LongLinkConfig
from hf_sparse_attn.experiments.longlink.learning import LearningConfig, Stage, learn
from hf_sparse_attn.experiments.recipe import load_recipe
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.system.terminal import Terminal

SPARSE = {"block_size": 16, "query_tile": 16, "sink": 16, "local": 16, "dense_below": 0, "min_keys": 96, "max_keys": 96}


def test_a_recipe_learns_distils_and_studies(tmp_path, monkeypatch):
    few = LearningConfig(layers=1, hidden=32, heads=2, groups=1, stages=(Stage(256, 2, 2),), distilled=2)
    monkeypatch.setattr(LearningConfig, "up_to", classmethod(lambda cls, length, seed=0: few))
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)
    longlink = {"length": 256, "sequences": 2, "links": 3, "min_distance": 130}
    values = {
        "name": "tiny",
        "task": "longlink",
        "model": {"dtype": "float32"},
        "sparse_attention": SPARSE,
        "longlink": longlink,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    console = Terminal(io.StringIO())
    results = run_recipe(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run", console)
    study = results["study"]
    assert study["config"]["length"] == 256 and {row["n"] for row in study["answers"]} == {6}
    assert study["sparse_attention"]["bookkeeping"]["trained"] is True and results["routers"]["batches"] == 2
    html = (tmp_path / "run" / "report.html").read_text()
    assert (
        'family "delayed", 256 tokens' in html
        and html.count("data:image/svg") == 2
        and "hf-sparse-attn run recipes/tiny.yaml" in html
    )
    # continued, not made anew
    assert run_recipe(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run", console)["study"] == study


def test_longer_sequences_get_slower_rotary_pairs():
    short, long, longest = (LearningConfig.up_to(length).rope_theta for length in (2048, 8192, 16384))
    assert short == long < longest
    one = LearningConfig(layers=1, hidden=32, heads=2, groups=1, stages=(Stage(256, 1, 1),))
    config = LongLinkConfig(length=256, links=3, min_distance=130)
    assert learn(config, one, progress=False).config.rope_parameters["rope_theta"] == one.rope_theta
