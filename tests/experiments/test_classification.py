"""Documents with classes: reading, splitting by document, windows; extended positions;
classification as a task of a recipe.
"""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers.paths import RECIPES
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.experiments.recipe import RecipeError, load_recipe
from hf_sparse_attn.experiments.rows.class_labels import (
    Labelled,
    classes_of,
    labelled_windows,
    read_labelled,
    split_labelled,
)
from hf_sparse_attn.experiments.run import run_recipe
from hf_sparse_attn.experiments.scores.task_scores import class_table, macro_f1
from hf_sparse_attn.experiments.tasks.classification import extended_positions
from hf_sparse_attn.system.terminal import Terminal

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def bert(positions=64, seed=0, **changes):
    torch.manual_seed(seed)
    config = BertConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **changes,
        },
        max_position_embeddings=positions,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


# -- reading --------------------------------------------------------------------------------------------------------


def test_sources_name_their_class(tmp_path):
    for name in ("a1", "a2", "b1"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    result = read_labelled([f"first={tmp_path}/a*.txt", f"second kind={tmp_path}/b1.txt"], None)
    assert [(d.name, d.text, d.label) for d in result] == [
        ("a1.txt", "text of a1", "first"),
        ("a2.txt", "text of a2", "first"),
        ("b1.txt", "text of b1", "second kind"),
    ]
    with pytest.raises(SourceError, match=r"a1.txt' names no class: write LABEL=SOURCE, or set data.label"):
        read_labelled([f"{tmp_path}/a1.txt"], None)


def test_tables_hold_their_classes_in_a_column(tmp_path):
    rows = [{"text": "w5 w6", "kind": "x"}, {"text": "w7", "kind": 2}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [{**r, "kind": str(r["kind"])} for r in rows])))
    result = read_labelled([f"{tmp_path}/rows.jsonl#text"], "kind")
    assert [(d.text, d.label) for d in result] == [("w5 w6", "x"), ("w7", "2")]
    with pytest.raises(SourceError, match=r"no column 'class' but text, kind"):
        read_labelled([f"{tmp_path}/rows.jsonl#text"], "class")
    (tmp_path / "gap.jsonl").write_text('{"text": "w5", "kind": "x"}\n{"text": "w6", "kind": null}\n')
    with pytest.raises(SourceError, match=r"gap.jsonl, row 1: the class is missing"):
        read_labelled([f"{tmp_path}/gap.jsonl#text"], "kind")
    (tmp_path / "plain.txt").write_text("no table")
    with pytest.raises(SourceError, match=r"plain.txt is no table"):
        read_labelled([f"{tmp_path}/plain.txt"], "kind")


def documents(**counts):
    return [Labelled(f"{label}{i}", "w5 " * 20, label) for label, count in counts.items() for i in range(count)]


def test_a_split_keeps_the_share_of_every_class_and_no_document_twice():
    train, evaluated = split_labelled(documents(a=10, b=4, c=2), 0.75, seed=1)
    assert [sum(d.label == c for d in train) for c in "abc"] == [8, 3, 1] and [
        sum(d.label == c for d in evaluated) for c in "abc"
    ] == [
        2,
        1,
        1,
    ]
    assert not {d.name for d in train} & {d.name for d in evaluated}
    assert (
        split_labelled(documents(a=10, b=4, c=2), 0.75, seed=1)[0]
        == train
        != split_labelled(documents(a=10, b=4, c=2), 0.75, seed=2)[0]
    )
    with pytest.raises(SourceError, match=r"class 'b' has one document only"):
        split_labelled(documents(a=3, b=1), 0.5, seed=0)
    with pytest.raises(SourceError, match=r"all 3 documents have the class 'a': it takes two classes"):
        classes_of(documents(a=3))


def test_windows_are_cut_padded_and_short_rests_left_out(word_tokenizer):
    long = Labelled("long", " ".join(f"w{5 + i % 50}" for i in range(70)), "b")
    short = Labelled("short", "w8 w9", "a")
    result = labelled_windows([long, short], word_tokenizer, 32, ["a", "b"], most=5)
    assert [(w.name, int(w.attention_mask.sum()), w.label) for w in result] == [
        ("long[0]", 32, 1),
        ("long[1]", 32, 1),
        ("short[0]", 2, 0),
    ]
    assert result[1].input_ids.tolist() == [5 + i % 50 for i in range(32, 64)] and result[2].input_ids.tolist() == [
        8,
        9,
        *[0] * 30,
    ]
    assert len(labelled_windows([long], word_tokenizer, 32, ["b"], most=1)) == 1
    with pytest.raises(SourceError, match=r"short has the class 'a', which no training document has: b"):
        labelled_windows([short], word_tokenizer, 32, ["b"], most=1)


# -- positions ------------------------------------------------------------------------------------------------------


def test_extended_positions_repeat_the_learned_ones():
    model = bert(64)
    longer = extended_positions(model, 150)
    assert longer.config.max_position_embeddings == 150 and model.config.max_position_embeddings == 64
    ids = torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(longer(ids).logits, model(ids).logits)
        table = longer.bert.embeddings.position_embeddings.weight
        assert torch.equal(table[64:128], table[:64]) and torch.equal(table[128:], table[:22])
        assert longer(torch.cat([ids, ids], 1)).logits.shape == (2, 2)
    assert extended_positions(model, 64) is model


def test_models_without_learned_positions_are_refused(tiny_config):
    model = LlamaForSequenceClassification(tiny_config(max_position_embeddings=64))
    with pytest.raises(
        RecipeError, match=r"LlamaForSequenceClassification reads 64 tokens and has no table of learned positions"
    ):
        extended_positions(model, 65)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    result, label = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    assert macro_f1(result, label, 5) == pytest.approx((2 * 1 / 4 + 2 * 2 / 6) / 2)


def test_the_table_counts_hits():
    scores = [
        {"row": str(i), "keys": None, "selection": "dense", "loss": 0.5 * i, "found": f, "label": 1}
        for i, f in enumerate((1, 0, 1, 1))
    ]
    [row] = class_table(scores, 2)
    assert (row["n"], row["accuracy"], row["loss"]) == (4, 0.75, 0.75) and row["accuracy_error"] == pytest.approx(
        (0.75 * 0.25 / 4) ** 0.5
    )


# -- the task -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(word_tokenizer, tmp_path):
    bert(64).save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    generator = np.random.default_rng(0)
    for label, low in (("low", 5), ("high", 45)):
        for i in range(6):
            (tmp_path / f"{label}{i}.txt").write_text(" ".join(f"w{w}" for w in generator.integers(low, low + 40, 300)))
    shutil.copy(RECIPES / "defaults.yaml", tmp_path)

    def make(**changes):
        values = {
            "name": "tiny",
            "task": "classification",
            "model": {"source": str(tmp_path / "base"), "license": "mit", "dtype": "float32"},
            "sparse_attention": {
                "query_tile": 16,
                "min_keys": 96,
                "density": 0.05,
                "sink": 16,
                "local": 16,
                "dense_below": 0,
            },
            "data": {"train": [f"low={tmp_path}/low*.txt", f"high={tmp_path}/high*.txt"], "split": 0.5},
            "distill": {"context": 144, "batches": 2},
            "lora": {
                "context": 144,
                "steps": 3,
                "settings": {"rank": 2, "lr": 0.01, "target_modules": ["query", "key", "value"]},
            },
            "compare": {"before": True, "dense_lora": True},
            "quality": [
                {"length": 144, "windows": 6, "budgets": [96], "selections": ["oracle", "two stages", "window + sink"]}
            ],
            **changes,
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "tiny.yaml")

    return make


def test_a_classification_run_ends_with_a_sparse_model_its_card_and_a_table(recipe, tmp_path):
    results = run_recipe(recipe(), tmp_path / "run", Terminal(io.StringIO()))
    assert results["convert"]["classes"] == ["high", "low"] and results["convert"]["positions_before"] == 64
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == "SparseBertForSequenceClassification" and model.config.id2label == {
        0: "high",
        1: "low",
    }
    assert model.config.max_position_embeddings == 144 and model.config.attention_probs_dropout_prob == 0
    [shown] = results["tables"]
    assert [row[0] for row in shown["rows"]] == [
        *(
            "largest class",
            "dense, before",
            "oracle, before",
            "two stages, before",
            "window + sink, before",
            "dense, dense LoRA",
        ),
        *("dense", "oracle", "two stages", "window + sink", "dense, first 64 tokens only"),
    ]
    scores = results["evaluation"]["scores"]
    assert len({s["row"] for s in scores}) == 6 and all(np.isfinite(s["loss"]) for s in scores)
    assert results["before"]["scores"] != scores and results["lora"]["log"][0]["kl"] > 0
    trained = {name.split("[")[0] for name in results["distill"]["documents"]}
    assert not trained & {s["row"].split("[")[0] for s in scores}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification.from_pretrained" in card
    assert "Classes" in (tmp_path / "run" / "report.html").read_text()


def test_recipes_that_ask_for_more_than_there_is_are_refused(recipe, tmp_path):
    with pytest.raises(
        RecipeError, match=r"distill.batches is 99, but only \d+ windows that train are 144 tokens long"
    ):
        run_recipe(recipe(distill={"context": 144, "batches": 99}), tmp_path / "run", Terminal(io.StringIO()))
