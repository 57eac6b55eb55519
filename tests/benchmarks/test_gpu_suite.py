"""What a session on a GPU leaves behind: rows that survive, and what is read of them.
The whole script runs in tests/interpreter.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys

import pytest
import torch
from helpers.paths import RECIPES

from hf_sparse_attn.benchmarks.gpu.causes import read_counters
from hf_sparse_attn.benchmarks.gpu.rows import run_entries

RECIPES = RECIPES / "gpu"
read = runpy.run_path(str(RECIPES / "read.py"))


def test_a_row_that_fails_and_a_lack_of_time_cost_no_other_row(tmp_path):
    path, seen = tmp_path / "rows.json", []

    def row(number):
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else None)
        if number == 1:
            raise RuntimeError("out of memory")
        return {"number": number, "error": math.nan if number == 0 else 1.0}

    result = run_entries(path, [(f"row {n}", lambda n=n: row(n)) for n in range(3)], 600, stage="limits")
    assert [r["number"] for r in result["rows"]] == [0, 2] and seen == [None, 1, 1]
    assert result["failed"] == [{"entry": "row 1", "error": "RuntimeError: out of memory"}]
    written = json.loads(path.read_text())
    assert [r["error"] for r in written["rows"]] == [None, 1.0] and written["not_finite"] == ["rows[0].error is nan"]
    assert run_entries(path, [("late", dict)], -1)["not_run"] == ["late"]


PAGE = """==PROF== Connected to process 1
"ID","Process ID","Process Name","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum",\
"sm__inst_executed_pipe_tensor.sum"
"","","","","usecond","Gbyte","inst"
"0","1","python3","forward_kernel(bf16*, long)","1,203.5","0.61","n/a"
"1","1","python3","dkv_kernel","12","1.5","77"
"""


def test_counters_are_read_with_their_units():
    first, second = read_counters(PAGE)
    assert first["name"] == "forward_kernel" and first["gpu__time_duration.sum"] == {"value": 1203.5, "unit": "usecond"}
    assert first["sm__inst_executed_pipe_tensor.sum"]["value"] is None and second["dram__bytes_read.sum"] == {
        "value": 1.5,
        "unit": "Gbyte",
    }
    assert read_counters("==ERROR== no permission\n") == []


LOG = """
[gw0] [ 10%] PASSED tests/interpreter/test_grid.py::test_forward[a]
[gw1] [ 20%] FAILED tests/interpreter/test_grid.py::test_forward[b]
tests/interpreter/test_routing.py::test_mass PASSED                      [ 30%]
"""


def test_a_log_that_was_cut_off_tells_what_passed_and_failed():
    result = read["read_log"](LOG)
    assert result["counts"] == {"passed": 2, "failed": 1} and result["failed"] == [
        "tests/interpreter/test_grid.py::test_forward[b]"
    ]
    assert not result["finished"] and read["read_log"](LOG + "===== 1 failed, 2 passed in 12.30s =====\n")["finished"]


def limits(speedup):
    common = {
        "length": 32768,
        "density": 0.1,
        "keys": None,
        "heads": 32,
        "groups": 8,
        "head_dim": 128,
        "batch": 1,
        "dtype": "bfloat16",
    }
    row = {
        **common,
        "entry": "prefill",
        "benchmark": "attention",
        "baseline": "sdpa flash",
        "ideal_speedup": 8.0,
        "speedup_with_router": {"median": speedup, "min": speedup, "max": speedup},
        "share_of_ideal_with_router": speedup / 8,
        "peak_memory_bytes": 1 << 20,
        "times": {"attention": {"median_s": 0.002}},
    }
    ceilings = {"entry": "ceilings", "benchmark": "ceilings", "bytes_per_s": 3e12, "flops_per_s": 8e14}
    return {"seconds": 3.0, "rows": [ceilings, row], "failed": [{"entry": "x", "error": "E"}], "not_run": ["y"]}


@pytest.mark.parametrize(("speedup", "missed"), [(5.0, False), (3.0, True)])
def test_what_misses_a_target_is_told_with_the_limit_that_holds_it(speedup, missed, tmp_path, capsys, monkeypatch):
    (tmp_path / "machine.json").write_text(json.dumps({"dry": False, "card": "NVIDIA H100 80GB HBM3"}))
    (tmp_path / "limits.json").write_text(json.dumps(limits(speedup)))
    result = read["read"](tmp_path)
    lines = read["misses"](result)
    assert any(line.startswith("decode at 128k, 4096 kept: not measured (wanted 5)") for line in lines)
    prefill = [line for line in lines if line.startswith("prefill at 32k")]
    assert len(prefill) == missed
    if missed:  # 8.8e12 operations, an eighth of them: 1.37 ms at 8e14
        assert "3.00, wanted 4; its floor is arithmetic, 1.37 ms, of which it reaches 0.69" in prefill[0]
    table = "\n".join(read["table"](result))
    assert (
        "card: NVIDIA H100 80GB HBM3" in table
        and "right: not run" in table
        and "FAILED x: E" in table
        and "not run: y" in table
    )
    assert f"| attention | 32768 | 10% |  | {speedup:.2f}x |" in "\n".join(read["readme_rows"](result))
    monkeypatch.setitem(read["write"].__globals__, "RESULTS", tmp_path)
    monkeypatch.setattr("hf_sparse_attn.benchmarks.plot.plot_speedups", lambda path, rows: path.write_text("plot"))
    path = read["write"](result, tmp_path)
    assert path.name == "gpu-nvidia-h100-80gb-hbm3.json" and json.loads(path.read_text())["misses"] == lines
    assert path.with_suffix(".svg").read_text() == "plot"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no machine\.json"):
        read["read"](tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_and_ends(tmp_path):
    def run(*arguments):
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(
            ["bash", RECIPES / "run.sh", *arguments], capture_output=True, text=True, env=environment, check=False
        )

    done = run(tmp_path / "out")
    assert done.returncode == 2 and "there is no GPU here" in done.stderr and "--dry" in done.stderr
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["machine.json"]
    assert run().returncode == 64 and "run.sh --dry OUT" in run().stderr
