"""Facts in long texts: what a model finds of them under dense and sparse attention, and what the verdict says."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.finding_model import byte_tokenizer, finding_model, word_tokenizer_of
from helpers.tiny_models import sparse_tiny_model
from transformers import BertConfig, BertLMHeadModel

from hf_sparse_attn import SparseAttentionConfig, SparseCall, routers, set_sparse_attention, sparsify
from hf_sparse_attn.data.planted_facts import haystacks
from hf_sparse_attn.evaluation.baselines import make_selectors
from hf_sparse_attn.evaluation.needle_check import default_lengths, default_text, needle_check
from hf_sparse_attn.evaluation.needle_report import NeedleReading, NeedleReport, Remedy
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.selection import everything

LENGTH = 700
WORDS = "so it was said by them who went on and came back then when all had seen what they would do"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=4000))
BYTES = 260  # vocabulary of a model that reads bytes


def checked(model, tokenizer, **options):
    return needle_check(
        model, tokenizer, **{"lengths": [LENGTH], "facts": 3, "text": TEXT, "progress": False, **options}
    )


@pytest.fixture(scope="module")
def words():
    """A tokenizer that has a token for each word and number of the facts that are planted."""
    read = byte_tokenizer()
    made = haystacks(TEXT, read, [LENGTH, 900], 3, 0)
    return word_tokenizer_of(TEXT + "".join(read.decode(h.ids.tolist()) for h in made))


@pytest.fixture
def finding(words, real_budget):
    """Makes a model that finds every fact under dense attention."""
    return lambda **changes: sparsify(finding_model(len(words)), {**real_budget, "index_dim": None, **changes})


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma2", "gpt_oss", "qwen3_moe"])
def test_with_every_key_kept_sparse_attention_reads_what_dense_does(model_type, every_block):
    """Models with windows and models that do not hand the call on among them."""
    model = sparse_tiny_model(model_type, every_block)
    read = byte_tokenizer()
    with torch.no_grad():
        model.resize_token_embeddings(BYTES)
    report = checked(model.eval(), read)
    for reading in report.readings:
        assert reading.sparse == pytest.approx(reading.dense, abs=1e-4) and reading.found_dense == reading.found_sparse
    assert report.kept == {LENGTH: None} and len(report.readings) == 3


@torch.no_grad()
def test_a_fact_is_read_as_a_prompt_and_the_tokens_after_it_are(sparse_llama, real_budget):
    """The prompt in query tiles, the answer token by token, although all facts share a prefill."""
    model = sparse_llama(real_budget, noise=0.1, vocab_size=BYTES).eval()
    report = checked(model, byte_tokenizer())
    (haystack,) = haystacks(TEXT, byte_tokenizer(), [LENGTH], 3, 0)
    for fact, reading in zip(haystack.facts, report.readings, strict=True):
        prompt = torch.cat([haystack.ids, fact.question])
        ids, count = torch.cat([prompt, fact.answer])[None], len(fact.answer)
        for dense, loss in ((True, reading.dense), (False, reading.sparse)):
            call = SparseCall(dense=dense, decode_from=len(prompt))
            logits = model(ids, use_cache=False, sparse_call=call).logits[0, -count - 1 : -1]
            assert loss == pytest.approx(float(F.cross_entropy(logits, fact.answer)), abs=1e-4)
        assert reading.distance == len(prompt) - fact.start - fact.number_at
        assert reading.depth == pytest.approx(fact.start / len(prompt))
    assert any(abs(r.dense - r.sparse) > 1e-3 for r in report.readings) and report.kept[LENGTH] <= 80


def test_a_model_that_finds_all_with_every_key_is_told_so(finding, words):
    report = checked(finding(density=1.0), words)
    assert [r.outcome for r in report.readings] == ["found"] * 3 and not report.remedies
    assert re.fullmatch(
        r"Dense attention finds 3 of 3 facts, and sparse attention all of these, with all keys of 700 \(log-loss "
        r"[+-]0\.000 \[.*\] nats a token, n = 3\)\.",
        report.verdict(),
    )


def test_a_selector_that_never_passes_the_facts_on_makes_the_verdict_say_so(finding, words):
    window = make_selectors(["window + sink"])["window + sink"]
    report = checked(finding(), words, selector=window, lengths=[LENGTH, 900])
    assert [r.outcome for r in report.readings] == ["lost"] * 6 and [r["lost"] for r in report.by_length()] == [3, 3]
    verdict = report.verdict()
    lost = r"sparse attention loses 6 of these 6, with 7\d keys of 700, 7\d keys of 900 \(log-loss \+"
    assert re.search(lost, verdict)
    assert "Train the routers (hf-sparse-attn distill)" in verdict and "\n" not in verdict
    assert report.loss_above_dense()["n"] == 6 and report.loss_above_dense()["mean"] > 1


def test_what_helps_is_found_out(finding, words):
    """Here more candidates help with both facts beyond the window, and more keys with the one in a wider window."""

    def by_candidates(router, inputs, query_tile):
        if router.config.candidate_factor > 4:
            return everything(make_plan(router.config, inputs.grid(query_tile, router.config.block_size)), inputs)
        return make_selectors(["window + sink"])["window + sink"](router, inputs, query_tile)

    model = finding(min_keys=160, candidate_factor=1.5)
    report = checked(model, words, selector=by_candidates)
    assert [(remedy.changes, remedy.found) for remedy in report.remedies] == [
        ({"candidate_factor": 6.0}, 2),
        ({"density": 0.1, "min_keys": 320}, 1),
    ]
    advice = (
        "or set candidate_factor=6, which finds 2 of the 2 lost, or set density=0.1, min_keys=320, which finds 1 of"
    )
    assert advice in report.verdict()
    assert routers(model)[0].config.candidate_factor == 1.5


def test_a_model_that_finds_nothing_densely_is_not_judged(sparse_llama, real_budget):
    report = checked(sparse_llama(real_budget, vocab_size=BYTES), byte_tokenizer())
    assert {r.outcome for r in report.readings} == {"dense misses it"} and report.loss_above_dense() is None
    assert report.verdict().startswith("Dense attention finds none of the 3 facts, so this model cannot be judged")


def test_the_report_is_plain_json(finding, words):
    report = checked(finding(), words)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["verdict"] == report.verdict() and values["facts"] == 3 == len(values["readings"])
    assert values["by_length"][0].keys() == {"length", "kept", "n", "found_dense", "lost", "dense", "sparse"}
    assert {row["outcome"] for row in values["readings"]} <= {"found", "lost", "dense misses it"}


READING = {"length": 4096, "depth": 0.5, "distance": 2000, "word": "apple", "number": "1234567", "dense": 0.1}
LOST = NeedleReading(**READING, sparse=2.0, found_dense=True, found_sparse=False)
MISSED = NeedleReading(**READING, sparse=0.1, found_dense=False, found_sparse=True)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"trained": True}, {}, "Let hf_sparse_attn.find_retrieval_heads look for heads that need all candidates, or"),
        ({"trained": True}, {"calibrated": True}, "or calibrate with a larger mass"),
        (
            {},
            {"remedies": [Remedy({"min_keys": 1024}, 0, 1)]},
            "(dense_layers); the question alone was not answered with min_keys=1024. Then",
        ),
    ],
)
def test_the_advice_is_that_of_the_model(changes, options, said):
    report = NeedleReport((LOST, MISSED), {4096: 512.0}, SparseAttentionConfig(bookkeeping=changes), **options)
    assert said in report.verdict() and "finds 1 of 2 facts; sparse attention loses 1 of these 1" in report.verdict()


def test_lengths_follow_the_model(sparse_llama, real_budget):
    model = sparse_llama({**real_budget, "dense_below": 200})
    assert default_lengths(model) == [400, 800]
    set_sparse_attention(model, dense_below=300)
    assert default_lengths(model) == [600, 1024]  # its positions
    set_sparse_attention(model, dense_below=0)
    assert default_lengths(model) == [160, 320]  # twice min_keys


def test_the_default_text_is_there_and_long():
    assert len(default_text()) > 200_000 and "statement" in default_text()


# -- what is refused -----------------------------------------------------------------------------------------------


def test_lengths_that_say_nothing_are_refused(sparse_llama, real_budget):
    model = sparse_llama({**real_budget, "dense_below": 650}, vocab_size=BYTES)
    with pytest.raises(
        ValueError, match=r"a length of 700 tokens is too short: .* dense_below=650 .* at least \d+"
    ) as e:
        checked(model, byte_tokenizer())
    least = int(re.search(r"at least (\d+)", str(e.value))[1])
    assert checked(model, byte_tokenizer(), lengths=[least]).kept[least] is not None
    with pytest.raises(ValueError, match=f"a length of {least - 1} tokens is too short"):
        checked(model, byte_tokenizer(), lengths=[least - 1])
    with pytest.raises(ValueError, match=r"a length of 2000 tokens is beyond the 1024 positions of this model"):
        checked(model, byte_tokenizer(), lengths=[2000])
    with pytest.raises(ValueError, match=r"lengths is \[\]: give at least one"):
        checked(model, byte_tokenizer(), lengths=[])


def test_models_that_cannot_be_asked_are_refused(stock_llama, real_budget):
    with pytest.raises(ValueError, match=r"has no routers: convert it"):
        checked(stock_llama(), byte_tokenizer())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    encoder = sparsify(BertLMHeadModel(BertConfig(vocab_size=BYTES, **sizes)), {**real_budget, "min_keys": 160})
    with pytest.raises(ValueError, match=r"SparseBertLMHeadModel is no causal language model.*AutoModelForCausalLM"):
        checked(encoder, byte_tokenizer())


def test_a_model_in_training_is_so_afterwards(finding, words):
    model = finding().train()
    checked(model, words)
    assert model.training
