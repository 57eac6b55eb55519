"""The training benchmark: every kind of step starts alike, is verified before it is timed, and leaves the
model alone.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from hf_sparse_attn.attention import layer
from hf_sparse_attn.benchmarks import BenchmarkError, bench_training, padding_vs_packing, training_step
from hf_sparse_attn.benchmarks import TrainingShape as Shape
from hf_sparse_attn.benchmarks.contenders import (
    DENSE,
    EAGER,
    SPARSE,
    STOCK,
    WITHOUT_KL,
    make_contenders,
    verify_training,
)
from hf_sparse_attn.benchmarks.memory import peaks_in_a_fresh_process
from hf_sparse_attn.benchmarks.padding_vs_packing import IGNORE_INDEX, packed_batch, padded_batch
from hf_sparse_attn.benchmarks.plot import plot_training
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.models.convert import sparse_attention_as
from hf_sparse_attn.training.config import AdaptationConfig

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TrainingShape = partial(Shape, fresh_process=False)  # starting a process takes seconds
BUDGET = {"min_keys": 96, "max_keys": 96}


@pytest.fixture(scope="module")
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.1)


@pytest.fixture(scope="module")
def windows(token_ids):
    return [token_ids(2, 300, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def row(model, windows):
    return bench_training(model, windows, TrainingShape(BUDGET, eager=True, padded=True))


def never_timed(monkeypatch):
    for name in ("alternate", "measure_peaks", "peaks_in_a_fresh_process"):
        monkeypatch.setattr(training_step, name, lambda *_: pytest.fail("a wrong step was measured"))


def test_a_row_holds_every_kind_with_its_times_memory_and_losses(row):
    assert (row["length"], row["batch"], row["dtype"], row["device"], row["budget"]) == (
        300,
        2,
        "float32",
        "cpu",
        BUDGET,
    )
    assert list(row["kinds"]) == [SPARSE, WITHOUT_KL, DENSE, STOCK, EAGER]
    for created in row["kinds"].values():
        assert created["n"] == 2 and 0 < created["min_s"] <= created["median_s"] <= created["max_s"]
        assert created["tokens_per_s"] == pytest.approx(600 / created["median_s"])
        assert created["peak_memory_bytes"] >= 0 and created["static_bytes"] > 0
    assert row["verified"]["loss"] < 1e-6 and row["verified"]["gradient"] < 1e-5
    json.dumps(row)


def test_losses_are_those_of_equal_tokens_from_an_equal_start(row):
    kinds = row["kinds"]
    assert kinds[STOCK]["loss_first"] == pytest.approx(kinds[DENSE]["loss_first"], rel=1e-6)
    assert kinds[STOCK]["loss_first"] == pytest.approx(kinds[EAGER]["loss_first"], rel=1e-6)
    assert kinds[STOCK]["loss_last"] == pytest.approx(kinds[DENSE]["loss_last"], rel=1e-4)
    assert kinds[SPARSE]["loss_first"] == kinds[WITHOUT_KL]["loss_first"]  # the KL does not reach the backbone
    assert kinds[SPARSE]["loss_first"] != pytest.approx(kinds[STOCK]["loss_first"], rel=1e-6)


def test_the_recipe_is_the_average_of_its_steps(row):
    assert row["recipe"]["dense_every"] == 4
    ends = [row["kinds"][kind][end] for kind in (SPARSE, DENSE) for end in ("min_s", "max_s")]
    assert min(ends) <= row["recipe"]["median_s"] <= max(ends)
    times = {SPARSE: [1.0, 2.0], WITHOUT_KL: [0.9, 1.8], DENSE: [5.0, 6.0], STOCK: [4.0, 8.0]}
    created = training_step._ratios(times, 4, 100)
    assert (
        created["recipe"]["min_s"] == 2.0
        and created["recipe"]["max_s"] == 3.0
        and created["recipe"]["tokens_per_s"] == 40
    )
    assert created["speedup"]["recipe"]["min"] == 2.0 and created["speedup"][SPARSE]["median"] == 4.0
    assert created["kl_share"] == pytest.approx(0.1) and "speedup_over_eager" not in created
    assert training_step._ratios(times, 0, 100)["recipe"]["min_s"] == 1.0


def test_a_benchmark_leaves_the_model_as_it_was(model, windows):
    before, settings = {name: p.clone() for name, p in model.named_parameters()}, model.config.sparse_attention
    bench_training(model, windows[:2], TrainingShape(BUDGET))
    assert model.config.sparse_attention == settings and not model.training and not hasattr(model, "chunked_loss")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_contenders_share_the_frozen_weights_and_nothing_else(model):
    created = make_contenders(model, AdaptationConfig(), (SPARSE, STOCK))
    weight = "model.layers.0.mlp.up_proj.weight"
    shared = {dict(c.model.get_base_model().named_parameters())[weight].data_ptr() for c in created.values()}
    assert shared == {dict(model.named_parameters())[weight].data_ptr()}
    assert type(created[STOCK].model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert created[SPARSE].lora.keys() == created[STOCK].lora.keys()
    assert all(
        torch.equal(p, created[STOCK].lora[name]) and p is not created[STOCK].lora[name]
        for name, p in created[SPARSE].lora.items()
    )
    assert all(float(state["step"]) == 0 for c in created.values() for state in c.optimizer.state.values())


def test_memory_is_measured_in_a_fresh_process(model, windows, monkeypatch):
    batch = {"input_ids": windows[0], "labels": windows[0]}
    steps = [("a", SPARSE, batch), ("b", STOCK, batch), ("a again", SPARSE, batch)]
    names, config = (SPARSE, STOCK), AdaptationConfig()
    peaks = peaks_in_a_fresh_process(model, names, steps, BUDGET, config)
    assert list(peaks) == ["a", "b", "a again"] and all(value > 300_000 for value in peaks.values())
    assert peaks["a again"] == pytest.approx(peaks["a"], rel=0.5)
    seen = []
    monkeypatch.setattr(
        training_step, "peaks_in_a_fresh_process", lambda *a: seen.append(a) or dict.fromkeys([s[0] for s in a[2]], 7)
    )
    row = bench_training(model, windows[:2], Shape(BUDGET, padded=True))
    assert (
        row["kinds"][SPARSE]["peak_memory_bytes"] == row["layouts"]["stock sdpa, padded"]["peak_memory_bytes"] == 7
        and len(seen) == 1
    )
    with pytest.raises(BenchmarkError, match="the process that measures memory failed: KeyError"):
        peaks_in_a_fresh_process(model, (STOCK,), steps, BUDGET, config)


def test_measuring_memory_in_this_process_leaves_no_trace_in_the_losses(row, model, windows):
    assert (
        bench_training(model, windows[:2], TrainingShape(BUDGET))["kinds"][SPARSE]["loss_first"]
        == row["kinds"][SPARSE]["loss_first"]
    )


def test_eager_attention_is_left_out_of_long_rows(model, windows, monkeypatch):
    monkeypatch.setattr(training_step, "EAGER_LENGTH", 299)
    assert EAGER not in bench_training(model, windows[:2], TrainingShape(BUDGET, eager=True))["kinds"]


# -- verified before it is timed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [200, 300], ids=["dense below", "as given"])
def test_a_wrong_attention_output_is_never_timed(model, token_ids, short, monkeypatch):
    original = layer.block_sparse_attention
    monkeypatch.setattr(layer, "block_sparse_attention", lambda *a, **o: (original(*a, **o)[0] * 1.001, None))
    never_timed(monkeypatch)
    with pytest.raises(BenchmarkError, match=r"with every block kept the (LoRA gradients differ|loss differs)"):
        bench_training(model, [token_ids(1, short)] * 2, TrainingShape(BUDGET))


def test_a_wrong_gradient_is_never_timed(model, windows, monkeypatch):
    original = layer.block_sparse_attention

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    monkeypatch.setattr(
        layer, "block_sparse_attention", lambda q, k, v, s, **o: original(Scaled.apply(q), k, v, s, **o)
    )
    never_timed(monkeypatch)
    with pytest.raises(BenchmarkError, match=r"the LoRA gradients differ from the stock model's by .* relative"):
        bench_training(model, windows, TrainingShape(BUDGET))


def test_verification_leaves_lora_and_settings_as_they_were(model, windows):
    created = make_contenders(model, AdaptationConfig(), (SPARSE, STOCK))
    before = {name: p.clone() for name, p in created[SPARSE].lora.items()}
    verify_training(created[SPARSE], created[STOCK], {"input_ids": windows[0], "labels": windows[0]})
    assert all(torch.equal(before[name], p) for name, p in created[SPARSE].lora.items())
    assert created[SPARSE].losses == [] and all(p.grad is None for p in created[SPARSE].trainable)


def test_too_few_windows_are_refused(model, windows):
    with pytest.raises(ValueError, match="1 windows are too few"):
        bench_training(model, windows[:1])


# -- padded and packed -----------------------------------------------------------------------------------------------


def test_padded_and_packed_layouts_of_the_same_documents_are_measured(row):
    assert row["documents"] == [300, 150]
    assert list(row["layouts"]) == ["sparse, padded", "stock sdpa, padded", "sparse, packed", "stock sdpa, packed"]
    for created in row["layouts"].values():
        assert created["n"] == 2 and created["tokens_per_s"] == pytest.approx(450 / created["median_s"])
    for losses in row["layout_losses"].values():
        assert losses["padded"] == pytest.approx(losses["packed"], rel=1e-5)
    assert row["layout_speedup"].keys() == {"padded", "packed"}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", [SPARSE, STOCK])
def test_layouts_have_the_loss_of_the_documents_by_themselves(model, token_ids, kind, left):
    documents = [token_ids(1, n, n)[0] for n in (203, 90, 140)]
    with torch.no_grad(), sparse_attention_as(model, **BUDGET):
        contender = make_contenders(model, AdaptationConfig(), (kind,))[kind]
        alone = [float(contender.loss({"input_ids": d[None], "labels": d[None]})[0]) * (len(d) - 1) for d in documents]
        want = sum(alone) / sum(len(d) - 1 for d in documents)
        for batch in (padded_batch(documents, left), packed_batch(documents)):
            assert int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) == sum(len(d) - 1 for d in documents)
            assert float(contender.loss(batch)[0]) == pytest.approx(want, rel=1e-5)


def test_layouts_that_disagree_are_never_timed(model, windows, monkeypatch):
    def leaking(documents):
        return {name: x for name, x in packed_batch(documents).items() if name != "position_ids"}

    monkeypatch.setattr(padding_vs_packing, "packed_batch", leaking)
    with pytest.raises(BenchmarkError, match=r"the loss of .* is .* padded and .* packed"):
        bench_training(model, windows[:2], TrainingShape(BUDGET, padded=True))


# -- meters, plots, the command line ---------------------------------------------------------------------------------


def test_a_plot_shows_rates_and_memory(row, tmp_path):
    plot_training(tmp_path / "t.svg", [row, {**row, "length": 600}])
    drawn = (tmp_path / "t.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("tokens per second", SPARSE, STOCK, EAGER, "600"))


@pytest.fixture(scope="module")
def saved(model, word_tokenizer, random_words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    model.save_pretrained(folder / "model")
    word_tokenizer.save_pretrained(folder / "model")
    (folder / "words.txt").write_text(random_words(2000))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command_measures_every_length_and_states_the_error_of_the_plan(saved):
    options = ["--text", saved / "words.txt", "--length", "200,304", "--keys", 96, "--steps", 1, "--padded", "--eager"]
    done = invoke("bench", "training", saved / "model", *options, "--json", saved / "t.json")
    assert (
        done.exit_code == 0 and done.stdout == "" and "plan, sparse: memory" in done.stderr and "recipe" in done.stderr
    )
    rows = json.loads((saved / "t.json").read_text())["rows"]
    assert [(row["benchmark"], row["length"]) for row in rows] == [("training", 200), ("training", 304)] and (
        saved / "t.svg"
    ).exists()
    for row in rows:
        assert row["budget"] == {"min_keys": 96, "max_keys": 96, "mass_threshold": None} and row["plan"].keys() == {
            SPARSE,
            DENSE,
            STOCK,
        }
        for kind, plan in row["plan"].items():
            created = row["kinds"][kind]
            assert plan["time_error"] == pytest.approx(plan["seconds"] / created["median_s"] - 1)
            assert plan["static_bytes"] == created["static_bytes"]  # weights, LoRA, routers and states to the byte


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "200"], "--text is missing"),
        (
            ["--length", "200", "--text", "t", "--keys", "96", "--density", "0.5"],
            "--keys and --density exclude each other",
        ),
        (["--length", "0", "--text", "t"], "--length is 0: must be >= 1"),
        (["--length", "200", "--text", "t", "--steps", "0"], "--steps is 0: must be >= 1"),
        (["--plan", "--gpu", "H1000"], "--gpu is 'H1000'; known: B200-180GB"),
        (["--plan", "--dtype", "int3"], "dtype 'int3' is not supported"),
    ],
)
def test_mistakes_name_the_option(saved, options, message):
    with pytest.raises(ValueError, match=message):
        invoke("bench", "training", saved / "model", *options)
