"""Tasks of the lm-evaluation-harness: every selection answers the same documents, and reaches the attention."""

from __future__ import annotations

import copy
import json

import pytest
from typer.testing import CliRunner

import hf_sparse_attn.evaluation.lm_eval_harness as harness
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.evaluation.baselines import WindowAndSink
from hf_sparse_attn.evaluation.lm_eval_harness import HarnessError, harness_rows, harness_table, load_tasks
from hf_sparse_attn.experiments.reports.model_card import model_card

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {file}-cache
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - metric: {metric}
"""
KINDS = {
    "chosen": ("multiple_choice", 'doc_to_choice: ["w5", "w6"]', "acc"),
    "generated": ("generate_until", "generation_kwargs: {max_gen_toks: 3, until: []}", "exact_match"),
}


@pytest.fixture(scope="module")
def folder(random_words, tmp_path_factory):
    """Tasks of both kinds that the harness has: answers that are scored, and answers that are written."""
    out = tmp_path_factory.mktemp("tasks")
    for name, (kind, more, metric) in KINDS.items():
        rows = [{"text": random_words(200, seed), "answer": 1 if name == "chosen" else "w5 w6 w7"} for seed in range(6)]
        (out / f"{name}.json").write_text("\n".join(json.dumps(row) for row in rows))
        (out / f"{name}.yaml").write_text(
            YAML.format(name=name, file=out / f"{name}.json", kind=kind, more=more, metric=metric)
        )
    return out


@pytest.fixture
def tokenizer(word_tokenizer):
    ended = copy.deepcopy(word_tokenizer)
    ended.eos_token = "w4"
    return ended


@pytest.fixture(scope="module")
def asked(folder, llama_folder):
    return load_tasks(list(KINDS), str(llama_folder), include=folder)


def test_every_selection_reads_the_same_documents_through_its_own_attention(
    asked, sparse_llama, real_budget, tokenizer
):
    model, seen = sparse_llama(real_budget), []

    def watched(router, inputs, query_tile):
        seen.append(query_tile)
        return WindowAndSink()(router, inputs, query_tile)

    rows = harness_rows(model, tokenizer, asked, 4, [64], {"watched": watched})
    assert {(row["task"], row["selection"], row["keys"]) for row in rows} == {
        (task, *cell) for task in KINDS for cell in (("dense", None), ("watched", 64))
    }
    # decoded tokens, and prompts
    assert {row["document"] for row in rows} == {0, 1, 2, 3} and 1 in seen and max(seen) > 1
    assert not model._forward_pre_hooks and model.config.sparse_attention["min_keys"] == real_budget["min_keys"]
    for row in harness_table(rows):
        assert row["n"] == 4 and (row["selection"] != "dense" or row["below_dense"] == {"mean": 0, "low": 0, "high": 0})


def test_answers_in_the_cache_are_those_of_this_model_and_selection(
    asked, sparse_llama, real_budget, tokenizer, tmp_path
):
    calls = []

    def watched(router, inputs, query_tile):
        calls.append(router.layer)
        return WindowAndSink()(router, inputs, query_tile)

    def read(model, name):
        calls.clear()
        return harness_rows(model, tokenizer, asked, 2, [64], {name: watched}, cache=tmp_path), len(calls)

    first, some = read(sparse_llama(real_budget), "one")
    again, none = read(sparse_llama(real_budget), "one")
    assert some > 0 and none == 0 and again == first
    assert read(sparse_llama({**real_budget, "candidate_factor": 2.0}), "one")[1] == some
    assert (
        read(sparse_llama(real_budget), "another")[1] == some and read(sparse_llama(real_budget, seed=1), "one")[1] > 0
    )


def test_the_table_pairs_documents_and_leaves_out_other_lengths():
    samples = {
        "niah": [
            {"doc_id": at, "metrics": ["4096", "8192"], "4096": score, "8192": -1, "filter": "none"}
            for at, score in enumerate([1.0, 0.0, 1.0])
        ]
    }
    result = list(harness._scores(samples))
    assert {row["metric"] for row in result} == {"4096"} and [row["score"] for row in result] == [1.0, 0.0, 1.0]
    rows = [{"selection": "dense", "keys": None, **row} for row in result]
    rows += [
        {"selection": "x", "keys": 64, **row, "score": max(0.0, row["score"] - (row["document"] == 2))}
        for row in reversed(result)
    ]
    dense, other = harness_table(rows)
    assert dense["score"] == pytest.approx(2 / 3) and other["score"] == pytest.approx(1 / 3)
    assert (
        other["below_dense"]["mean"] == pytest.approx(1 / 3)
        and other["below_dense"]["low"] >= 0
        and dense["error"] == pytest.approx(1 / 3)
    )


def test_the_verb_reports(folder, llama_folder, tmp_path):
    arguments = [
        "lm-eval",
        llama_folder,
        "--tasks",
        "chosen",
        "--include",
        folder,
        "--limit",
        2,
        "--budgets",
        160,
        "--selections",
        "oracle",
    ]
    done = CliRunner().invoke(
        app, [*map(str, arguments), "--json", str(tmp_path / "r.json"), "--report", str(tmp_path / "r.html")]
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(row["selection"], row["n"]) for row in result["scores"]] == [("dense", 2), ("oracle", 2)] and result[
        "lm_eval"
    ]
    page, card = (tmp_path / "r.html").read_text(), str(model_card(result, "mine"))
    assert "| oracle | 160 | 2 |" in card and "chosen of lm-eval, acc" in card
    assert "chosen of lm-eval, acc" in page and "oracle" in page and "How it was made" in page and "http://" not in page


def test_a_tokenizer_without_an_end_is_refused(asked, sparse_llama, real_budget, word_tokenizer):
    with pytest.raises(HarnessError, match="no end-of-sequence token"):
        harness_rows(sparse_llama(real_budget), word_tokenizer, asked, 1, [64], {})


def test_what_cannot_be_asked_is_said(folder, llama_folder, monkeypatch, tmp_path):
    with pytest.raises(HarnessError, match="no task 'nothing_such'"):
        load_tasks(["nothing_such"], str(llama_folder))
    (tmp_path / "gone.yaml").write_text(
        YAML.format(name="gone", file="/nowhere.json", kind="generate_until", more="", metric="exact_match")
    )
    with pytest.raises(HarnessError, match=r"task gone .* is its data reachable"):
        load_tasks(["gone"], str(llama_folder), include=tmp_path)
    for option, value, message in (
        ("--limit", 0, "--limit is 0"),
        ("--selections", "orcale", "no selector 'orcale'; known: oracle"),
    ):
        done = CliRunner().invoke(app, ["lm-eval", str(llama_folder), "--tasks", "chosen", option, str(value)])
        with pytest.raises(ValueError, match=message):
            raise done.exception


def test_a_run_that_was_stopped_goes_on_where_it_was(asked, sparse_llama, real_budget, tokenizer, tmp_path):
    prompts = []

    def watched(router, inputs, query_tile):
        if router.layer == 0 and inputs.q.shape[2] > 1:  # a decoded token is one query
            if len(prompts) == 3:
                raise KeyboardInterrupt
            prompts.append(1)
        return WindowAndSink()(router, inputs, query_tile)

    written = [task for task in asked if task.OUTPUT_TYPE == "generate_until"]
    with pytest.raises(KeyboardInterrupt):
        harness_rows(sparse_llama(real_budget), tokenizer, written, 5, [64], {"one": watched}, cache=tmp_path)
    prompts.clear()
    rows = harness_rows(sparse_llama(real_budget), tokenizer, written, 5, [64], {"one": watched}, cache=tmp_path)
    assert len(prompts) == 2 and sum(row["selection"] == "one" for row in rows) == 5  # three of five were there
