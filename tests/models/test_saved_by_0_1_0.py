"""What the code of version 0.1.0 saved, made by that code from the repository's history."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile

import pytest
import torch
from helpers.paths import ROOT
from hf_sparse_attn_kernels import implementations
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_sparse_attn import load_adapter, routers

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
COMMIT = "7897bf2"  # the last of 0.1.0
ON_DENSE = r"adapter of a sparse model: load its base with sparse_attention=\{'query_tile': 16, .*\}"
SAVE = """
import sys, torch
from hf_sparse_attn_kernels import implementations
implementations.default_choice = lambda device_type: ("torch", "")  # the compiled one would be compiled anew
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import hf_sparse_attn
assert hf_sparse_attn.__version__ == "0.1.0" and "hf_sparse_attn.attending" in sys.modules
torch.manual_seed(0)
sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()
model.save_pretrained("dense")
settings = dict(block_size=16, query_tile=16, sink=16, local=16, dense_below=0, query_samples=8,
                index_dim=8, density=0.05, min_keys=80)
hf_sparse_attn.sparsify(model, settings)
def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".router." in name or "lora_" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
move(model, 1)
model.save_pretrained("sparse")
torch.save(model, "model.pt")
ids = torch.randint(3, 97, (1, 200), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    want = {"sparse": model(ids).logits}
    base = AutoModelForCausalLM.from_pretrained("sparse")
    adapted = get_peft_model(base, hf_sparse_attn.lora_config(base, r=4, target_modules=["q_proj"]))
    move(adapted, 2)
    want["adapter"] = adapted.eval()(ids).logits
adapted.save_pretrained("adapter")
torch.save((ids, want), "want.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model, an adapter, a whole-model pickle and their logits, all of 0.1.0."""
    code, work = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("saved")
    packed = subprocess.run(
        [
            "git",
            "-C",
            str(ROOT),
            "archive",
            COMMIT,
            "hf_sparse_attn",
            "kernels/torch-ext",
            "-o",
            str(code / "code.tar"),
        ],
        capture_output=True,
    )
    if packed.returncode:
        pytest.skip(f"needs the repository's history, which has no commit {COMMIT} here (git fetch --unshallow)")
    with tarfile.open(code / "code.tar") as archive:
        archive.extractall(code, filter="data")
    environment = {**os.environ, "PYTHONPATH": f"{code}:{code / 'kernels/torch-ext'}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", SAVE], cwd=work, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return work


@pytest.fixture
def want(saved, monkeypatch):
    """(token ids, logits by what gave them)."""
    monkeypatch.chdir(saved)  # the adapter names its base by a relative path
    with implementations.preferred("torch"):
        yield torch.load(saved / "want.pt")


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits


def test_a_folder_gives_the_same_logits(saved, want):
    ids, expected = want
    model = AutoModelForCausalLM.from_pretrained(saved / "sparse")
    assert not any(router.fresh for router in routers(model))
    torch.testing.assert_close(logits(model, ids), expected["sparse"], rtol=1e-4, atol=1e-4)


def test_an_adapter_gives_the_same_logits_by_the_module_that_it_names(saved, want):
    ids, expected = want
    model = AutoPeftModel.from_pretrained(saved / "adapter", import_allowlist=["hf_sparse_attn.registration"])
    torch.testing.assert_close(logits(model, ids), expected["adapter"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "load", [load_adapter, PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder)]
)
def test_an_adapter_on_a_dense_base_is_refused_with_its_settings(saved, load):
    with pytest.raises(ValueError, match=ON_DENSE):
        load(LlamaForCausalLM.from_pretrained(saved / "dense"), str(saved / "adapter"))


def test_a_model_that_was_pickled_whole_says_the_way_out(saved):
    with pytest.raises(
        ModuleNotFoundError, match=r"load them with 0\.1\.0 .* and save them with model\.save_pretrained"
    ):
        torch.load(saved / "model.pt", weights_only=False)
