"""Before and after, against dense LoRA, paired by window; questions and their answers; texts split by time."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch

from hf_sparse_attn.attention.call import SparseCall
from hf_sparse_attn.data.questions import ANSWERED, QUOTED, ask
from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.data.text_documents import Document
from hf_sparse_attn.data.windows import Window, token_windows
from hf_sparse_attn.evaluation.baselines import make_selectors
from hf_sparse_attn.experiments.rows.time_split import split_texts
from hf_sparse_attn.experiments.scores.answers import answer_table, evaluate_answers, read_answer
from hf_sparse_attn.experiments.scores.perplexity import comparison


def row(document, prefill, keys=None, selection="dense", length=64, decode=None):
    return {
        "document": document,
        "length": length,
        "keys": keys,
        "selection": selection,
        "prefill": prefill,
        "decode": decode,
    }


def test_perplexities_are_paired_with_the_same_window_of_the_reference():
    after = [row("a", 2.0), row("b", 3.0), row("a", 2.1, 80, "two stages"), row("b", 3.3, 80, "two stages")]
    before = [row("a", 2.5), row("b", 3.5), row("a", 2.6, 80, "two stages")]
    reference = [row("b", 2.9), row("a", 2.1), row("a", 9.0, length=128)]
    dense, sparse = comparison(after, before, reference)
    assert (dense["keys"], dense["n"], dense["after"], dense["before"]) == (None, 2, 2.5, 3.0)
    assert dense["perplexity_after"] == pytest.approx(math.exp(2.5)) and dense["perplexity_before"] == pytest.approx(
        math.exp(3.0)
    )
    assert dense["over_reference"]["ratio"] == pytest.approx(1.0)  # (-0.1 + 0.1) / 2
    assert dense["over_reference"]["low"] == pytest.approx(math.exp(-0.1)) and dense["over_reference"][
        "high"
    ] == pytest.approx(math.exp(0.1))
    # a window is missing
    assert sparse["over_reference"]["ratio"] == pytest.approx(math.exp((0.0 + 0.4) / 2)) and "before" not in sparse


def test_decoded_tokens_are_compared_by_themselves():
    after = [row("a", 2.0, 80, "two stages", decode=1.5), row("b", 3.0, 80, "two stages", decode=1.0)]
    result = comparison(after, reference=[row("a", 2.0, decode=1.2), row("b", 3.0, decode=1.1)])[0]
    assert result["over_reference"]["ratio"] == pytest.approx(1.0)
    assert result["decode_over_reference"]["ratio"] == pytest.approx(math.exp(0.1))  # (0.3 - 0.1) / 2
    assert "decode_over_reference" not in comparison(after, reference=[row("a", 2.0), row("b", 3.0)])[0]


def test_rows_stand_by_length_and_budget():
    after = [row("a", 1.0, 96, "x", 128), row("a", 1.0, 80, "x"), row("a", 1.0, length=128), row("a", 1.0)]
    assert [(r["length"], r["keys"]) for r in comparison(after)] == [(64, None), (64, 80), (128, None), (128, 96)]
    assert all("before" not in r and "over_reference" not in r for r in comparison(after))


# -- questions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(llama_folder, random_words):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    windows = token_windows([Document("d", random_words(1600, seed=3))], tokenizer, 400, 4, 16)
    return windows, tokenizer, ask(windows, tokenizer, seed=0)


def test_a_question_quotes_a_passage_and_asks_for_what_follows(questions):
    windows, _, requested = questions
    for source, question in zip(windows, requested, strict=True):
        ids = question.input_ids
        assert len(ids) == 400 and question.document == source.document
        answer = ids[-ANSWERED:]
        assert (question.labels[:-ANSWERED] == -100).all() and torch.equal(question.labels[-ANSWERED:], answer)
        start = 400 - ANSWERED - question.distance
        assert torch.equal(ids[start : start + ANSWERED], answer)  # where the passage stands in the text
        quoted = ids[start - QUOTED : start]
        assert int((ids[: start + ANSWERED].unfold(0, QUOTED, 1) == quoted).all(1).sum()) == 1
        # quoted at the end
        assert any(torch.equal(ids[at : at + QUOTED], quoted) for at in range(start + 1, 400 - QUOTED))
        assert question.distance > 0.2 * 400


def test_questions_differ_by_seed_only(questions):
    windows, tokenizer, requested = questions
    again, other = ask(windows, tokenizer, seed=0), ask(windows, tokenizer, seed=1)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(requested, again, strict=True))
    assert any(a.distance != b.distance for a, b in zip(requested, other, strict=True))


def test_texts_without_a_question_are_refused(questions):
    _, tokenizer, _ = questions
    with pytest.raises(SourceError, match="too short for a question"):
        ask([Window("short", torch.arange(3, 90)[None])], tokenizer, 0)
    with pytest.raises(SourceError, match="repeats itself"):
        ask([Window("again", torch.tensor([[5, 6, 7, 8]]).repeat(1, 100))], tokenizer, 0)


def test_answers_are_read_at_their_own_tokens(sparse_llama, real_budget, questions):
    _, _, requested = questions
    model = sparse_llama(real_budget, noise=0.1)
    question = requested[0]
    loss, predicted = read_answer(model, question, SparseCall(dense=True))
    with torch.no_grad():
        out = model(
            question.input_ids[None], labels=question.labels[None], use_cache=False, sparse_call=SparseCall(dense=True)
        )
    assert loss == pytest.approx(float(out.loss), rel=1e-5)
    assert predicted == out.logits[0, -ANSWERED - 1 : -1].argmax(-1).tolist()
    selectors = make_selectors(["oracle", "window + sink"])
    rows = evaluate_answers(model, requested[:2], [80, 96], selectors)
    assert [(r["keys"], r["selection"]) for r in rows[:5]] == [
        (None, "dense"),
        *((keys, name) for keys in (80, 96) for name in ("oracle", "window + sink")),
    ]
    assert rows[0]["answer"] == question.input_ids[-ANSWERED:].tolist() and rows[0]["predicted"] == predicted
    known, new = [{**rows[0], "loss": -1.0}, *rows[1:7]], []
    again = evaluate_answers(model, requested[:2], [80, 96], selectors, done=known, on_row=new.append)
    assert again[:7] == known and again[7:] == new == rows[7:]  # those that are known are not read again
    table = answer_table(rows)
    assert len(table) == 5 and all(r["n"] == 2 for r in table)
    assert table[0]["loss"] == pytest.approx((rows[0]["loss"] + rows[5]["loss"]) / 2)
    above = table[2]["loss_above_dense"]
    assert (
        above["mean"] == pytest.approx(table[2]["loss"] - table[0]["loss"])
        and above["low"] <= above["mean"] <= above["high"]
    )
    assert model.config.sparse_attention["min_keys"] == 80  # as before


def test_the_table_of_answers_by_hand():
    def answered(document, predicted, keys=None, selection="dense", loss=1.0):
        where = {"task": "t", "document": document, "length": 64, "keys": keys, "selection": selection}
        return {**where, "distance": 9, "loss": loss, "predicted": predicted, "answer": [1, 2]}

    dense = [answered("a", [1, 2]), answered("b", [1, 2])]
    dense_row, row = answer_table([*dense, answered("a", [1, 2], 80, "x", 1.5), answered("b", [1, 3], 80, "x", 2.0)])
    assert (dense_row["accuracy"], dense_row["accuracy_error"], dense_row["exact"], dense_row["n"]) == (1, 0, 1, 2)
    assert (row["accuracy"], row["exact"], row["loss"], row["n"]) == (0.75, 0.5, 1.75, 2)
    assert row["accuracy_error"] == pytest.approx(0.25)  # deviations of 0.25 from the mean: √(2 · 0.25² / 1) / √2
    assert (row["below_dense"]["mean"], row["below_dense"]["high"], row["loss_above_dense"]["mean"]) == (0.5, 1, 0.75)
    assert answer_table(dense[:1])[0]["accuracy_error"] is None


# -- split by time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("packed", [False, True])
def test_a_text_is_cut_at_a_line_and_nothing_is_lost(tmp_path, share, packed, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    lines = b"".join(b"%05d some words of line\n" % i for i in range(70_000))  # more than one chunk
    source = tmp_path / ("big.log.gz" if packed else "big.log")
    source.write_bytes(gzip.compress(lines, 1) if packed else lines)
    (train,), (rest,) = split_texts([str(source)], share, tmp_path / "texts")
    first, second = Path(train).read_bytes(), Path(rest).read_bytes()
    assert first + second == lines and first.endswith(b"\n") and train.endswith("big.log")
    assert 0 <= len(first) - share * len(lines) < 40


def test_only_so_much_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hf_sparse_attn.experiments.rows.time_split.EVALUATED_BYTES", 1000)
    (tmp_path / "a.log").write_text("one line of text\n" * 1000)
    _, (rest,) = split_texts([str(tmp_path / "a.log")], 0.5, tmp_path / "texts")
    assert Path(rest).read_text() == "one line of text\n" * (1000 // 17)  # whole lines, so no character in two


def test_a_name_that_holds_train_or_eval_mixes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    for name in ("my-train-run.log", "x-eval-y.log"):
        (tmp_path / name).write_text("".join(f"{name} line {i}\n" for i in range(10)))
    train, rest = split_texts([str(tmp_path / "*.log")], 0.5, tmp_path / "texts")
    assert {Path(p).parent.name for p in train} == {"train"} and {Path(p).parent.name for p in rest} == {"eval"}
    assert sorted(map(str, (tmp_path / "texts/train").iterdir())) == sorted(train)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.log", "one line", "no line end behind 50%"), ("a.csv", "text\nx\n", "is csv: only plain")],
)
def test_what_cannot_be_split_is_refused(tmp_path, name, text, message, monkeypatch):
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        split_texts([str(tmp_path / name)], 0.5, tmp_path / "texts")
