"""Benchmarks report only what was verified; the memory meter sees an allocation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_sparse_attn import attention, profiling
from hf_sparse_attn.profiling import BenchmarkError, PeakMemory, bench_attention, bench_model, spread, timed

SHAPE = {"heads": 4, "groups": 2, "head_dim": 16, "repeats": 2}


def wrong(function, change):
    """``function`` with a changed output."""

    def perturbed(*args, **options):
        out, lse = function(*args, **options)
        return change(out), lse

    return perturbed


# -- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_benchmark_reports_speed_and_memory(dtype):
    row = bench_attention(600, 256, dtype, **SHAPE)
    assert (row["length"], row["keys"], row["dtype"]) == (600, 256, str(dtype).removeprefix("torch."))
    for name in ("dense", "sparse_with_router", "router"):
        assert 0 < row[name]["min_s"] <= row[name]["median_s"] <= row[name]["max_s"] and row[name]["n"] == 2
    assert 0 < row["speedup"]["min"] <= row["speedup"]["median"] <= row["speedup"]["max"]
    assert row["ideal_speedup"] == pytest.approx((600 * 601 / 2) / (256 * 257 / 2 + 344 * 256))
    assert isinstance(row["extra_bytes"], int) and row["extra_bytes"] >= 0


def test_the_same_benchmark_runs_when_everything_is_kept():
    row = bench_attention(300, 512, torch.float32, **SHAPE)
    assert row["ideal_speedup"] == 1.0


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
def test_a_wrong_attention_output_is_never_timed(change, monkeypatch):
    monkeypatch.setattr(profiling, "block_sparse_attention", wrong(profiling.block_sparse_attention, change))
    monkeypatch.setattr(profiling, "timed", lambda function: pytest.fail("a wrong output was timed"))
    with pytest.raises(BenchmarkError, match=r"differs from the float64 one by .* in tile \d"):
        bench_attention(600, 256, torch.float32, **SHAPE)


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
    assert row["prefill_speedup"] == pytest.approx(row["prefill"]["stock"]["median_s"] / row["prefill"]["sparse"]["median_s"])
    for field, other in (("decode_speedup", "stock"), ("decode_speedup_over_best_dense", "best_dense")):
        assert row[field] == pytest.approx(row["decode"][other]["median_s"] / row["decode"]["sparse"]["median_s"])
    assert sorted(row["peak_bytes"]) == ["sparse", "stock"] and all(value >= 0 for value in row["peak_bytes"].values())


def test_a_model_with_a_wrong_sparse_path_is_never_timed(model, token_ids, monkeypatch):
    before = settings_of(model)
    monkeypatch.setattr(attention, "block_sparse_attention", wrong(attention.block_sparse_attention, lambda out: out * 1.001))
    monkeypatch.setattr(profiling, "timed", lambda function: pytest.fail("a wrong model was timed"))
    with pytest.raises(BenchmarkError, match=r"with every block kept the logits differ from the stock model's by .* relative"):
        bench_model(model, token_ids(1, 300), 256, decode_tokens=2)
    assert settings_of(model) == before


def test_short_inputs_of_a_model_that_runs_dense_below_a_length_are_verified_on_the_sparse_path(
    sparse_llama, real_budget, token_ids, monkeypatch
):
    model = sparse_llama({**real_budget, "dense_below": 4096})
    monkeypatch.setattr(attention, "block_sparse_attention", wrong(attention.block_sparse_attention, lambda out: out * 1.001))
    with pytest.raises(BenchmarkError):
        bench_model(model, token_ids(1, 200), 256, decode_tokens=2)


# -- meters ---------------------------------------------------------------------------------------------------------


METER = """
import time, torch
from hf_sparse_attn.profiling import PeakMemory
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
    used, unused = map(int, subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True).stdout.split())
    assert 0.9 * (64 << 20) <= used <= 1.25 * (64 << 20)
    assert unused < 4 << 20


def test_times_are_summarised():
    assert spread([3.0, 1.0, 2.0]) == {"median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "n": 3}
    called = []
    assert timed(lambda: called.append(1)) >= 0 and called == [1]
