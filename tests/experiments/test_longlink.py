"""LongLink: what is planted, its ceilings, its files, and the scores by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from datasets import load_from_disk
from typer.testing import CliRunner

from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.evaluation.baselines import selector_names
from hf_sparse_attn.experiments.longlink.ceilings import ceiling, chance
from hf_sparse_attn.experiments.longlink.export import load, save
from hf_sparse_attn.experiments.longlink.families import FAMILIES, MISSING, LongLinkConfig, LongLinkError
from hf_sparse_attn.experiments.longlink.link_answers import (
    accuracy,
    by_distance,
    pairs_told_apart,
    reach,
    right_tokens,
)
from hf_sparse_attn.experiments.longlink.link_metrics import (
    AveragePrecision,
    ChanceAdjustedRecall,
    NormalisedAccuracy,
    average_precision,
)
from hf_sparse_attn.experiments.longlink.planting import plant
from hf_sparse_attn.experiments.longlink.study import study

SMALL = {"length": 600, "sequences": 6, "links": 5, "distractors": 3, "keys": 16}


def config_of(family="delayed", **changes):
    return LongLinkConfig(family=family, **{**SMALL, **changes})


def read(planted, link):
    """The answer that a reader who knows the family gives: from the tokens alone, None if a cause cannot be read."""
    tokens, row, config = planted.config.tokens, planted.input_ids[link.sequence][: link.effect], planted.config

    def value_of(key, kind):
        result = [v for v in range(config.values) for token in row if token == kind(key, v)]
        assert len(result) <= 1
        return result[0] if result else None

    requested = [k for k in range(config.keys) if planted.input_ids[link.sequence][link.effect] == tokens.ask(k)]
    key = requested[0]
    if link.family == "lag":
        return value_of((key - 1) % config.keys, tokens.cause)
    if link.family == "count":
        return int((row == tokens.event(key)).sum())
    if link.family == "two_hops":
        hops = [other for other in range(config.keys) if (row == tokens.hop(key, other)).any()]
        return value_of(hops[0], tokens.cause) if hops else None
    if link.family == "conjunction":
        parts = value_of(key, tokens.cause), value_of(key, tokens.second)
        return None if None in parts else sum(parts) % config.values
    return value_of(key, tokens.cause)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_stands_in_the_text_where_the_table_says(family):
    planted = plant(config_of(family), seed=1)
    config = planted.config
    assert planted.input_ids.shape == planted.labels.shape == (6, 600) and len(planted.links) == 6 * 5
    for link in planted.links:
        row = planted.input_ids[link.sequence]
        assert link.causes[0] >= 64 and link.distance == link.effect - link.causes[0] >= config.min_distance
        assert (
            row[link.effect + 1] == planted.labels[link.sequence, link.effect + 1] == config.tokens.value(link.answer)
        )
        assert list(link.causes) == sorted(link.causes) and link.causes[-1] < link.effect
        if family == "null":
            assert read(planted, link) is None
        else:
            assert read(planted, link) == link.value == link.answer
    assert (planted.labels != -100).sum() == 30 and planted.input_ids.max() < config.tokens.count
    answers = [link.answer for link in plant(config_of(family, sequences=400), seed=3).links]
    assert np.bincount(answers, minlength=4).min() > 0.2 * len(answers)  # uniform


def test_the_same_seed_gives_the_same_set_and_more_sequences_begin_alike():
    first, again, more, other = (plant(config_of(sequences=n), seed) for n, seed in ((6, 1), (6, 1), (9, 1), (6, 2)))
    assert np.array_equal(first.input_ids, again.input_ids) and first.links == again.links
    assert np.array_equal(first.input_ids, more.input_ids[:6]) and not np.array_equal(first.input_ids, other.input_ids)


@pytest.mark.parametrize("family", ["delayed", "two_hops", "conjunction", "lag", "counterfactual", "null"])
def test_the_ceiling_is_what_the_best_reader_gets(family):
    noise = {"strength": 0.8, "corruption": 0.2, "missing": 0.1}
    planted = plant(config_of(family, sequences=800, **noise), seed=5)
    generator = np.random.default_rng(0)
    hits = []
    for link in planted.links:
        options = read(planted, link)
        hits.append((int(generator.integers(4)) if options is None else options) == link.answer)
    want = ceiling(planted.config)
    assert abs(np.mean(hits) - want) < 4 * math.sqrt(want * (1 - want) / len(hits))
    assert want == {"null": 0.25}.get(family, want) and chance(planted.config) == 0.25


def test_ceilings_by_hand():
    assert ceiling(config_of()) == 1.0 and ceiling(config_of("null")) == 0.25
    assert ceiling(config_of(strength=0.5)) == pytest.approx(0.625)
    assert ceiling(config_of("conjunction", corruption=0.2)) == pytest.approx(0.64 + 0.36 / 4)
    assert ceiling(config_of("two_hops", corruption=0.2, missing=0.5)) == pytest.approx(0.2 + 0.8 / 4)


def test_a_pair_differs_in_one_cause_and_its_answer():
    planted = plant(config_of("counterfactual"), seed=2)
    for at in range(0, 6, 2):
        changed = (planted.input_ids[at] != planted.input_ids[at + 1]).nonzero()[0].tolist()
        link = next(link for link in planted.links if link.sequence == at)
        assert changed == [link.causes[0], link.effect + 1]


def test_unseen_distances_are_left_out_or_alone():
    seen, unseen = (plant(config_of(unseen=(100, 300), only_unseen=only, sequences=40), 1) for only in (False, True))
    assert not any(100 <= link.distance < 300 for link in seen.links) and all(
        100 <= link.distance < 300 for link in unseen.links
    )


def test_the_lag_is_one_for_a_sequence_give_or_take_the_jitter():
    planted = plant(config_of("lag", jitter=3), seed=1)
    for at in range(6):
        lags = [link.distance for link in planted.links if link.sequence == at]
        assert max(lags) - min(lags) <= 6
    assert len({link.distance // 10 for link in planted.links}) > 3


def test_missing_tokens_spare_questions_and_answers():
    planted = plant(config_of(missing=0.5), seed=1)
    assert abs((planted.input_ids == MISSING).mean() - 0.5) < 0.03
    for link in planted.links:
        assert MISSING not in planted.input_ids[link.sequence, link.effect : link.effect + 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "other"}, "family is 'other': must be one of delayed"),
        ({"strength": 1.1}, "strength is 1.1: must be a share"),
        ({"min_distance": 590}, "min_distance is 590"),
        ({"keys": 7}, "keys is 7: must be >= 8"),
        ({"family": "count", "missing": 0.1}, "no ceiling in closed form"),
        ({"family": "counterfactual", "sequences": 3}, "even"),
        ({"only_unseen": True}, "only_unseen"),
        ({"unseen": (5, 5)}, "a range"),
        ({"links": 0}, "links is 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(LongLinkError, match=message):
        config_of(**changes)


def test_links_that_do_not_fit_are_refused():
    with pytest.raises(LongLinkError, match="60 links do not fit into 130 tokens"):
        plant(config_of(length=130, links=60, keys=63, first=0, min_distance=60), seed=0)


def test_a_set_survives_its_folder_and_a_cut_off_one_is_refused(tmp_path):
    planted = plant(config_of("two_hops", unseen=(100, 120)), seed=4)
    save(planted, tmp_path / "set")
    again = load(tmp_path / "set")
    assert again.config == planted.config and again.links == planted.links and again.seed == 4
    assert np.array_equal(again.input_ids, planted.input_ids) and np.array_equal(again.labels, planted.labels)
    assert load_from_disk(str(tmp_path / "set/links")).column_names[:3] == ["sequence", "family", "causes"]
    (tmp_path / "set/longlink.json").write_text('{"seed": 4')
    with pytest.raises(LongLinkError, match="holds no whole LongLink set"):
        load(tmp_path / "set")
    with pytest.raises(LongLinkError, match="holds no whole LongLink set"):
        load(tmp_path / "nothing")


def test_the_verb_writes_a_set(tmp_path):
    done = CliRunner().invoke(
        app, ["synth", str(tmp_path / "s"), "--set", "family: lag, sequences: 2, length: 512", "--json", "-"]
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["config"]["family"] == "lag"
    assert load(tmp_path / "s").input_ids.shape == (2, 512)
    with pytest.raises(ValueError, match="unexpected keyword"):
        CliRunner().invoke(app, ["synth", str(tmp_path / "t"), "--set", "colour: 1"], catch_exceptions=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_study_is_made_of_every_family(family, sparse_llama, real_budget):
    config = config_of(family, sequences=2, links=3)
    model = sparse_llama(real_budget, vocab_size=config.tokens.count)
    result = study(model, config, seed=1)
    assert {row["n"] for row in result["answers"]} == {6} and len(result["answers"]) == 1 + len(selector_names())
    kinds = {row["noise"] for row in result["noise"]}
    assert kinds == (
        {"strength", "distractors"} if family == "count" else {"corruption", "missing", "strength", "distractors"}
    )
    mine = next(row for row in result["answers"] if row["selection"] == "two stages")
    plain = next(row for row in result["noise"] if (row["noise"], row["level"]) == ("strength", 1.0))
    assert plain["answers"]["two stages"]["accuracy"] == mine["accuracy"]


# -- scores ---------------------------------------------------------------------------------------------------------


def test_average_precision_by_hand():
    assert average_precision(np.array([0.9, 0.1, 0.5]), np.array([1, 0, 0])) == 1.0
    assert average_precision(np.array([0.9, 0.8, 0.5, 0.1]), np.array([0, 1, 0, 1])) == pytest.approx(
        (1 / 2 + 2 / 4) / 2
    )
    assert average_precision(np.full(3, 0.5), np.array([0, 1, 0])) == 0.5  # the middle of three
    with pytest.raises(ValueError, match="no reference is 1"):
        average_precision(np.ones(3), np.zeros(3))


def test_the_metrics_work_without_a_network():
    result = NormalisedAccuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 0], chance=0.25, ceiling=1.0)
    assert result["accuracy"] == 0.75 and result["normalised"] == pytest.approx(2 / 3) and result["n"] == 4
    assert result["error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    one = NormalisedAccuracy().compute(predictions=[1, 2], references=[1, 1], chance=0.5, ceiling=0.5)
    assert (one["accuracy"], one["normalised"]) == (0.5, None)  # nothing to find
    ranking = AveragePrecision()
    ranking.add_batch(predictions=[[0.9, 0.8]], references=[[0, 1]])
    ranking.add_batch(predictions=[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], references=[[0, 0, 1], [0, 0, 1]])
    assert ranking.compute() == {"average_precision": pytest.approx((1 / 2 + 1 + 1 / 3) / 3), "n": 3}
    recall = ChanceAdjustedRecall().compute(predictions=[1, 1, 0, 1], references=[0.5] * 4)
    assert recall["recall"] == 0.75 and recall["chance_adjusted_recall"] == 0.5
    assert (recall["chance"], recall["n"]) == (0.5, 4)
    everything = ChanceAdjustedRecall().compute(predictions=[1, 1], references=[1.0, 1.0])
    assert everything["chance_adjusted_recall"] == 1.0
    with pytest.raises(ValueError, match=r"the ceiling 0\.2 lies below chance 0\.25"):
        NormalisedAccuracy().compute(predictions=[1], references=[1], chance=0.25, ceiling=0.2)


def test_accuracy_by_distance_and_its_reach():
    planted = plant(config_of(sequences=40), seed=0)
    near = np.array([link.distance < 128 for link in planted.links])
    tokens = np.where(near, right_tokens(planted), -1)
    assert accuracy(planted, tokens)["accuracy"] == near.mean()
    rows = by_distance(planted, tokens)
    assert [(row["from"], row["accuracy"]) for row in rows] == [(64, 1.0), (128, 0.0), (256, 0.0), (512, 0.0)][
        : len(rows)
    ]
    assert sum(row["n"] for row in rows) == 200 and reach(rows, 0.5) == 128 and reach(rows[1:], 0.5) is None


def test_right_answers_and_pairs_by_hand():
    planted = plant(config_of("counterfactual"), seed=2)
    tokens = right_tokens(planted)
    assert tokens.tolist() == [planted.config.tokens.value(link.answer) for link in planted.links]
    assert pairs_told_apart(planted, tokens) == 1.0
    wrong = tokens.copy()
    wrong[5] = -1  # the first link of sequence 1
    assert pairs_told_apart(planted, wrong) == pytest.approx(2 / 3)
    wrong[[5, 6]] = tokens[5], -1
    assert pairs_told_apart(planted, wrong) == 1.0
    scores = accuracy(planted, wrong)
    assert (scores["accuracy"], scores["n"]) == (29 / 30, 30) and scores["normalised"] == pytest.approx(
        (29 / 30 - 0.25) / 0.75
    )
