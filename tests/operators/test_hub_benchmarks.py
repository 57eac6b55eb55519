"""The workloads of the Hub kernel project run, and give the results that they say they must have."""

from __future__ import annotations

import importlib.util
import sys
import types

import hf_sparse_attn_kernels
import pytest
import torch
from helpers.paths import ROOT

SCRIPT = ROOT / "kernels/benchmarks/benchmark_attention.py"


@pytest.fixture
def workloads(monkeypatch):
    """The benchmark class, loaded as the runner of the package `kernels` does, at a small length."""
    package, module = types.ModuleType("kernels"), types.ModuleType("kernels.benchmark")
    module.Benchmark = type("Benchmark", (), {"kernel": hf_sparse_attn_kernels, "device": "cpu"})
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setitem(sys.modules, "kernels.benchmark", module)
    spec = importlib.util.spec_from_file_location("benchmark_attention", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    monkeypatch.setattr(loaded.BlockSparseAttentionBenchmark, "length", 640)
    return loaded.BlockSparseAttentionBenchmark


@pytest.mark.parametrize("name", ["prefill", "decode", "teacher"])
def test_a_workload_gives_the_result_that_it_must_have(workloads, name):
    torch.manual_seed(0)
    work = workloads()
    getattr(work, f"setup_{name}")()
    work.selection.check(work.q, work.k, values=True)
    getattr(work, f"benchmark_{name}")()
    torch.testing.assert_close(work.out, getattr(work, f"verify_{name}")(), rtol=1e-4, atol=1e-5)
    assert bool((work.selection.indices >= 0).any(-1).all())
