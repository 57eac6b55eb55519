"""A small model that learned LongLink: what its routers find, and that nothing is found where nothing is.

Its dense weights are ready-made (`data/longlink`, of `learn` with its defaults on 2048 tokens, five minutes of one
core); the slow test learns them anew.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.experiments.longlink.families import LongLinkConfig
from hf_sparse_attn.experiments.longlink.learning import EVALUATED, LearningConfig, Stage, learn, with_routers
from hf_sparse_attn.experiments.longlink.planting import plant
from hf_sparse_attn.experiments.longlink.study import study

LEARNED = Path(__file__).parent / "longlink_model"
CONFIG = LongLinkConfig(length=2048)
KEYS = 160  # of 2048: 15 % of what all tiles see
SPARSE = {
    "block_size": 16,
    "query_tile": 16,
    "sink": 16,
    "local": 16,
    "dense_below": 0,
    "min_keys": KEYS,
    "max_keys": KEYS,
}


@pytest.fixture(scope="module")
def found():
    return studied(LlamaForCausalLM.from_pretrained(LEARNED, dtype=torch.float32).eval(), distilled=40, sequences=12)


def studied(model, distilled, sequences):
    """The study of a dense model whose routers are distilled first."""
    with_routers(model, SparseAttentionConfig(**SPARSE), CONFIG, LearningConfig(distilled=distilled), progress=False)
    # beyond what two layers of window + sink can pass on
    return study(model, replace(CONFIG, min_distance=2 * KEYS + 16, sequences=sequences), EVALUATED * 7)


def answers(found, name):
    return next(row for row in found["answers"] if row["selection"] == name)


def test_dense_attention_learns_the_links_and_the_routers_keep_them(found):
    dense, learned = answers(found, "dense"), answers(found, "two stages")
    assert dense["normalised"] >= 0.95 and learned["normalised"] >= 0.95 * dense["normalised"]
    assert found["density"] <= 0.15 and learned["n"] == 96 and learned["d50"] == 2048
    assert learned["normalised"] > answers(found, "untrained")["normalised"] + 0.1


def test_local_attention_alone_and_a_null_set_are_at_chance(found):
    local = answers(found, "window + sink")
    assert abs(local["accuracy"] - found["chance"]) <= 2 * local["error"]
    for null in found["null"]["answers"].values():
        assert abs(null["accuracy"] - found["chance"]) <= 2 * null["error"] and null["normalised"] is None


def test_recall_is_high_and_does_not_rise_with_noise(found):
    recall = found["routing"]["recall"]
    chance, n = recall["random"]["chance"], recall["random"]["n"]
    assert recall["two stages"]["chance_adjusted_recall"] >= 0.9
    # .99, give or take two standard errors of n links
    assert recall["oracle"]["recall"] >= 0.99 - 2 * (0.99 * 0.01 / n) ** 0.5
    # the ratio of kept to eligible blocks, give or take two standard errors of as many draws
    assert abs(recall["random"]["recall"] - chance) <= 2.5 * (chance * (1 - chance) / n) ** 0.5
    for noise in ("corruption", "missing", "strength"):
        rows = [row["routing"] for row in found["noise"] if row["noise"] == noise]
        assert all(row["chance_adjusted_recall"] <= rows[0]["chance_adjusted_recall"] + 0.02 for row in rows)
    missing = [row["routing"]["recall"] for row in found["noise"] if row["noise"] == "missing"]
    assert missing[0] > missing[1] + 0.1 > missing[2] + 0.2  # what is not there is not found


def test_links_that_are_kept_are_needed(found):
    needed = found["necessity"]
    assert needed["whole"] - needed["without causes"] > 0.5 and abs(needed["whole"] - needed["without others"]) < 0.05
    assert found["counterfactual"]["two stages"] >= 0.8


def test_the_ranking_comes_near_that_of_the_dense_mass(found):
    routing = found["routing"]
    assert (
        routing["average_precision"] >= 0.8
        and routing["average_precision"] <= routing["oracle_average_precision"] + 0.05
    )
    alone = found["routing_of_single_queries"]  # no other question in its tile asks for blocks of its own
    assert alone["average_precision"] >= 0.8 and alone["recall"]["two stages"]["chance_adjusted_recall"] >= 0.9


def test_learning_starts_with_what_an_answer_is():
    """A few steps leave the guess among the values, of all tokens."""
    config = replace(CONFIG, length=256, min_distance=16)
    few = LearningConfig(layers=1, hidden=32, heads=2, groups=1, lr=1e-2, stages=(Stage(64, 8, 40),))
    model = learn(config, few, progress=False)
    planted = plant(replace(config, length=64, first=16, sequences=16), EVALUATED * 9)
    ids, labels = torch.from_numpy(planted.input_ids), torch.from_numpy(planted.labels)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
    assert math.log(config.values) - 0.1 < loss < math.log(config.values) + 0.4 < math.log(config.tokens.count) - 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dense_attention_learns_the_links_from_scratch():
    result = studied(
        learn(CONFIG, LearningConfig(), progress=False), distilled=LearningConfig().distilled, sequences=64
    )
    dense, learned = answers(result, "dense"), answers(result, "two stages")
    assert dense["n"] == 512 and dense["normalised"] >= 0.95 and learned["normalised"] >= 0.95 * dense["normalised"]
    assert result["routing"]["recall"]["two stages"]["chance_adjusted_recall"] >= 0.9
