"""What is measured on a GPU, dry: every stage with tiny sizes on the CPU, and the whole script."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import RECIPES
from hf_sparse_attn_kernels.implementations import preferred

from hf_sparse_attn.benchmarks.gpu import causes, launch_grid, limits, whole_models
from hf_sparse_attn.benchmarks.gpu.rows import run_entries

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="dry runs are for machines without a GPU")

RECIPES = RECIPES / "gpu"
STAGES = {"limits": limits, "models": whole_models, "causes": causes, "launches": launch_grid}
ROWS = {"limits": 7, "models": 4, "causes": 4, "launches": 3}


# peft asks transformers for a property that the newest versions call by another name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
def test_every_row_of_a_stage_is_measured(stage, tmp_path):
    with preferred("triton"):
        result = run_entries(tmp_path / "rows.json", STAGES[stage].entries(dry=True), 600)
    assert not result["failed"] and not result["not_run"] and len(result["rows"]) == ROWS[stage]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_of_the_script_passes_every_stage_and_is_read(tmp_path):
    ran = subprocess.run(
        ["bash", RECIPES / "run.sh", "--dry", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len(list(tmp_path.iterdir())) <= 8
    for stage, count in ROWS.items():
        result = json.loads((tmp_path / f"{stage}.json").read_text())
        assert len(result["rows"]) == count and not result["failed"] and not result["not_run"], (
            stage,
            result["failed"],
            result["not_run"],
        )
    options = subprocess.run(
        [sys.executable, RECIPES / "read.py", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert "card: none (dry run)" in options and "FAILED" not in options and (tmp_path / "gpu-dry.json").exists()
