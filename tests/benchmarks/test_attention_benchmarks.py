"""Benchmarks report only what was verified; the memory meter sees an allocation."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_sparse_attn.attention import layer
from hf_sparse_attn.benchmarks import (
    BenchmarkError,
    LayerShape,
    attention_call,
    bench_attention,
    bench_backward,
    bench_decode,
    bench_model,
    bench_router,
    crossover,
    dense_baselines,
    generation,
    layer_shape,
    timing,
)
from hf_sparse_attn.benchmarks.dense_baselines import dense_peers
from hf_sparse_attn.benchmarks.plot import plot_speedups
from hf_sparse_attn.benchmarks.timing import spread, timed

IDEAL = (600 * 601 / 2) / (256 * 257 / 2 + 344 * 256)


def shape(length=600, keys=256, dtype="float32", **sizes):
    return LayerShape(length, keys, dtype=dtype, **{"heads": 4, "groups": 2, "head_dim": 16, **sizes})


def wrong(function, change):
    """``function`` with a changed output."""

    def perturbed(*args, **options):
        out, lse = function(*args, **options)
        return change(out), lse

    return perturbed


def never_timed(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setattr(module, "timed", lambda *_: pytest.fail("a wrong output was timed"))


def check_ratio(row, field, slow, fast="with router"):
    """The median lies within its spread, and the spread within what the fastest and slowest rounds allow."""
    times = row["times"]
    assert row[field]["min"] <= row[field]["median"] <= row[field]["max"]
    assert times[slow]["min_s"] / times[fast]["max_s"] <= row[field]["min"]
    assert row[field]["max"] <= times[slow]["max_s"] / times[fast]["min_s"]


# -- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_attention_benchmark_reports_speed_and_memory(dtype):
    row = bench_attention(shape(dtype=dtype), repeats=3)
    assert (row["length"], row["keys"], row["dtype"], row["baseline"]) == (600, 256, dtype, "sdpa")
    for name in ("sdpa", "attention", "with router", "router"):
        assert 0 < row["times"][name]["min_s"] <= row["times"][name]["median_s"] <= row["times"][name]["max_s"]
        assert row["times"][name]["n"] == 3
    check_ratio(row, "speedup", "sdpa", "attention")
    check_ratio(row, "speedup_with_router", "sdpa")
    assert row["ideal_speedup"] == pytest.approx(IDEAL)
    assert row["share_of_ideal_with_router"] == pytest.approx(row["speedup_with_router"]["median"] / IDEAL)
    assert row["router_share"] == pytest.approx(
        row["times"]["router"]["median_s"] / row["times"]["with router"]["median_s"]
    )
    assert isinstance(row["peak_memory_bytes"], int) and row["peak_memory_bytes"] >= 0
    json.dumps(row)


def test_the_ideal_counts_the_pairs_of_the_selection():
    for sizes in (shape(300, 512), shape(600, 256), shape(1000, None, density=0.3)):
        kept = (layer_shape.Layer(sizes).select().indices >= 0).sum(-1)[0, 0] * 16
        per_query = kept.repeat_interleave(64)[: sizes.length]
        assert sizes.kept_pairs == int(torch.minimum(per_query, torch.arange(1, sizes.length + 1)).sum())
    assert shape(300, 512).dense_pairs == shape(300, 512).kept_pairs


def test_dense_times_of_an_earlier_benchmark_are_used():
    row = bench_attention(shape(), repeats=2, dense={"slow": [100.0, 200.0], "fast": [10.0, 10.0]})
    assert row["baseline"] == "fast" and row["times"]["slow"]["median_s"] == 150 and "sdpa" not in row["times"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backward_benchmark_compares_a_whole_step(dtype):
    row = bench_backward(shape(dtype=dtype), repeats=2)
    check_ratio(row, "speedup", "sdpa", "attention")
    check_ratio(row, "speedup_with_router", "sdpa")
    assert (
        row["peak_memory_bytes"] >= 0
        and row["dense_peak_memory_bytes"] >= 0
        and row["ideal_speedup"] == pytest.approx(IDEAL)
    )
    json.dumps(row)


def test_a_decode_benchmark_compares_with_stock_and_the_best_dense():
    row = bench_decode(shape(1000), repeats=3)
    check_ratio(row, "speedup_with_router", "best dense")
    check_ratio(row, "speedup_over_stock", "stock")
    assert all(row["times"][name]["n"] == 3 for name in ("stock", "best dense", "with router", "router"))
    assert row["ideal_speedup"] == pytest.approx(1000 / 256)
    json.dumps(row)


def test_a_router_benchmark_times_every_stage():
    row = bench_router(shape(2000, 256), repeats=2, index_dim=8, query_samples=4, candidate_factor=1.5)
    assert (row["index_dim"], row["query_samples"], row["candidate_factor"]) == (8, 4, 1.5)
    assert all(row["times"][name]["min_s"] > 0 for name in ("keys", "queries", "select", "router"))
    assert row["router_share"] > 0
    json.dumps(row)


def last_group(out):
    changed = out.clone()
    changed[:, -1] += 0.01
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out + 0.001,
        lambda out: out * torch.nan,
        lambda out: torch.cat([out[:, :, :-1], out[:, :, -1:] + 0.01], 2),
        last_group,
    ],
    ids=["everywhere", "nan", "last query", "last head"],
)
@pytest.mark.parametrize("bench", [bench_attention, bench_decode, bench_router, bench_backward])
def test_a_wrong_attention_output_is_never_timed(bench, change, monkeypatch):
    monkeypatch.setattr(layer_shape, "block_sparse_attention", wrong(layer_shape.block_sparse_attention, change))
    never_timed(monkeypatch, timing, attention_call)
    with pytest.raises(BenchmarkError, match=r"output differs from the float64 one by .* in tile \d"):
        bench(shape(), repeats=1)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_wrong_gradient_is_never_timed(which, monkeypatch):
    original = layer_shape.block_sparse_attention

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.5

    def attend(q, k, v, selection):
        inputs = {"q": q, "k": k, "v": v}
        inputs[which] = Doubled.apply(inputs[which])
        return original(*inputs.values(), selection)

    monkeypatch.setattr(layer_shape, "block_sparse_attention", attend)
    never_timed(monkeypatch, timing, attention_call)
    with pytest.raises(BenchmarkError, match=f"gradient of {which}"):
        bench_backward(shape(), repeats=1)


def test_the_dense_baseline_is_exact_attention():
    layer = layer_shape.Layer(shape(100, 512))
    (name, peer), *others = dense_peers(layer).items()
    assert name == "sdpa" and not others
    torch.testing.assert_close(peer(), layer.attend(layer.select()), rtol=1e-4, atol=1e-5)


def test_a_plot_is_drawn_from_the_rows(tmp_path):
    rows = [bench_attention(shape(n, dtype=d), repeats=1) for n in (300, 600) for d in ("float32", "bfloat16")]
    plot_speedups(tmp_path / "plot.svg", rows)
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml") and "bfloat16, with router" in drawn


# -- a whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget, noise=0.1, max_position_embeddings=2048)


def settings_of(model):
    return model.config.sparse_attention, model.config._attn_implementation


def test_a_model_benchmark_reports_ratios_and_leaves_the_model_alone(model, token_ids):
    before = settings_of(model)
    row = bench_model(model, token_ids(1, 1610), 256, decode_tokens=5, repeats=2)
    assert settings_of(model) == before
    assert (row["length"], row["keys"], row["dtype"]) == (1600, 256, "float32")
    assert sorted(row["prefill"]) == ["sparse", "stock"] and sorted(row["decode"]) == ["best_dense", "sparse", "stock"]
    assert all(row["prefill"][name]["n"] == 2 and row["prefill"][name]["tokens_per_s"] > 0 for name in row["prefill"])
    assert all(row["decode"][name]["n"] == 4 for name in row["decode"])  # the first step is warm-up
    assert row["prefill_speedup"] == pytest.approx(
        row["prefill"]["stock"]["median_s"] / row["prefill"]["sparse"]["median_s"]
    )
    for field, other in (("decode_speedup", "stock"), ("decode_speedup_over_best_dense", "best_dense")):
        assert row[field] == pytest.approx(row["decode"][other]["median_s"] / row["decode"]["sparse"]["median_s"])
    assert sorted(row["peak_bytes"]) == ["sparse", "stock"] and all(value >= 0 for value in row["peak_bytes"].values())


def test_a_model_with_a_wrong_sparse_path_is_never_timed(model, token_ids, monkeypatch):
    before = settings_of(model)
    monkeypatch.setattr(layer, "block_sparse_attention", wrong(layer.block_sparse_attention, lambda out: out * 1.001))
    never_timed(monkeypatch, generation)
    with pytest.raises(
        BenchmarkError, match=r"with every block kept the logits differ from the stock model's by .* relative"
    ):
        bench_model(model, token_ids(1, 300), 256, decode_tokens=2)
    assert settings_of(model) == before


def test_short_inputs_of_a_model_that_runs_dense_below_a_length_are_verified_on_the_sparse_path(
    sparse_llama, real_budget, token_ids, monkeypatch
):
    model = sparse_llama({**real_budget, "dense_below": 4096})
    monkeypatch.setattr(layer, "block_sparse_attention", wrong(layer.block_sparse_attention, lambda out: out * 1.001))
    with pytest.raises(BenchmarkError):
        bench_model(model, token_ids(1, 200), 256, decode_tokens=2)


# -- meters ---------------------------------------------------------------------------------------------------------


METER = """
import time, torch
from hf_sparse_attn.benchmarks import PeakMemory
with PeakMemory() as memory:
    block = torch.ones((64 << 20) // 4)
    time.sleep(0.2)  # many samples long
    del block
with PeakMemory() as nothing:
    pass
print(memory.bytes, nothing.bytes)
"""


def test_peak_memory_sees_what_was_freed_again():
    """In a process of its own: what other tests left to the garbage collector would be counted too."""
    used, unused = map(
        int, subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True).stdout.split()
    )
    assert 0.9 * (64 << 20) <= used <= 1.25 * (64 << 20)
    assert unused < 4 << 20


def test_times_are_summarised():
    assert spread([3.0, 1.0, 2.0]) == {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "n": 3}
    called = []
    assert timed(lambda: called.append(1)) >= 0 and called == [1]


@pytest.mark.parametrize(
    ("speedups", "want"),
    [
        ({1024: 0.5, 4096: 2.0, 16384: 6.0}, pytest.approx(2048)),
        ({1024: 1.5, 4096: 2.0}, "below 1024"),
        ({1024: 0.5, 4096: 0.9}, "above 4096"),
        ({1024: 1.2, 4096: 0.8, 16384: 1.25}, pytest.approx(8192)),  # what counts is where it stays faster
    ],
)
def test_the_crossover_is_interpolated_between_the_lengths(speedups, want):
    rows = [{"dtype": "float32", "length": n, "speedup_with_router": {"median": x}} for n, x in speedups.items()]
    assert crossover(rows) == {"float32": want}


def test_installed_sparse_peers_get_what_their_interfaces_ask_for(monkeypatch):
    """Stand-ins with the peers' interfaces: NSA's lists are checked by attending to them token by token."""
    layer = layer_shape.Layer(replace(shape(300, 256), heads=32, groups=2))
    selection = layer.select()

    def parallel_nsa(q, k, v, *, block_indices, block_counts, block_size):
        assert block_indices.shape[:3] == (1, 300, 2) and block_counts.shape == (1, 300, 2)
        token = torch.arange(300)
        blocks = -(-300 // block_size)
        real = torch.arange(block_indices.shape[-1]) < block_counts[..., None]
        kept = torch.zeros(1, 300, 2, blocks + 1, dtype=torch.bool).scatter_(
            3, torch.where(real, block_indices, blocks), True
        )[..., :-1]
        mask = (
            (kept[..., token // block_size] & (token <= token[:, None])[None, :, None])
            .transpose(1, 2)
            .repeat_interleave(16, 1)
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    seen = []
    modules = {
        "fla.ops.nsa.parallel": SimpleNamespace(parallel_nsa=parallel_nsa),
        "adasplash": SimpleNamespace(adasplash=lambda q, k, v, alpha, is_causal: seen.append(k.shape) or q),
        "flash_sparse_attn": SimpleNamespace(flash_sparse_attn_func=lambda q, k, v, is_causal, softmax_threshold: q),
    }
    monkeypatch.setattr(dense_baselines, "find_spec", lambda name: name)
    monkeypatch.setattr(dense_baselines, "import_module", modules.__getitem__)
    assert dense_baselines.sparse_peers(layer, selection) == {}  # on a CPU none of them runs
    layer.shape = replace(layer.shape, device="cuda")
    result = dense_baselines.sparse_peers(layer, selection)
    assert list(result) == ["NSA", "AdaSplash", "flash-sparse-attn"]
    layer.verify(result["NSA"](), selection)
    assert result["AdaSplash"]().shape == layer.q.shape == result["flash-sparse-attn"]().shape and seen == [
        layer.q.shape
    ]

    monkeypatch.setitem(modules, "adasplash", SimpleNamespace(adasplash=lambda *args, **kwargs: 1 / 0))
    running, failed = attention_call._checked_peers(layer, selection)
    assert list(running) == ["NSA", "flash-sparse-attn"] and failed == {
        "AdaSplash": "ZeroDivisionError: division by zero"
    }
