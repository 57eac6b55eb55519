"""A reader follows each way through the package in few files."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from helpers.paths import ROOT
from helpers.ways import files_entered

MOST_FILES = 12

LOADING = """
import json, sys
sys.path.insert(0, sys.argv[2])
from helpers.ways import entries
import transformers
transformers.utils.logging.set_verbosity_error()
auto = getattr(transformers, sys.argv[3])
print(json.dumps(entries(lambda: auto.from_pretrained(sys.argv[1], sparse_attention={}))))
"""


def in_a_new_process(code, *arguments):
    """What ``code`` prints as JSON, where no class was made and no module loaded by an earlier call."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_trace_names_files_in_the_order_of_their_first_call(make_router):
    assert files_entered(lambda: make_router().init_weights())[:2] == ["config.py", "router/module.py"]
    assert files_entered(lambda: None) == []


def test_loading_a_sparse_model_goes_through_few_files(stock_llama, tmp_path):
    stock_llama().save_pretrained(tmp_path)
    entered = in_a_new_process(LOADING, tmp_path, ROOT / "tests", "AutoModelForCausalLM")
    assert next(iter(entered)) == "models/config_dispatch.py" and {"models/attach.py", "router/module.py"} <= set(
        entered
    )
    assert len(entered) <= MOST_FILES, "\n".join(entered)


@torch.no_grad()
def test_a_forward_call_goes_through_few_files(sparse_llama, real_budget, token_ids):
    model, ids = sparse_llama(real_budget).eval(), token_ids(1, 200)
    model(ids, use_cache=False)  # what is made once for a length is made
    entered = files_entered(lambda: model(ids, use_cache=False))
    assert entered[:2] == ["attention/mask_interface.py", "attention/interface.py"] and "router/selection.py" in entered
    assert len(entered) <= MOST_FILES, "\n".join(entered)


def test_the_body_of_a_model_with_a_head_is_made_once(stock_llama, tmp_path):
    stock_llama().save_pretrained(tmp_path)
    plain, with_head = (
        in_a_new_process(LOADING, tmp_path, ROOT / "tests", f"AutoModelFor{head}")
        for head in ("CausalLM", "SequenceClassification")
    )
    assert list(with_head) == list(plain) and with_head["models/attach.py"] <= plain["models/attach.py"]
