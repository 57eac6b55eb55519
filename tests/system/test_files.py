"""Files survive exceptions, a full disk and a kill in the middle of writing."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoModelForCausalLM

from hf_sparse_attn.system import files
from hf_sparse_attn.system.files import replaced_folder, write_atomically, write_json, write_text


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "result.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert content(tmp_path) == {"deep/result.txt": b"two"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "error", [ValueError("half way"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_the_previous_file_survives_an_exception_in_the_middle(tmp_path, error):
    path = tmp_path / "result.bin"
    write_text(path, "previous")

    def half(temporary):
        temporary.write_text("hal")
        assert path.read_text() == "previous"
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert content(tmp_path) == {"result.bin": b"previous"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_previous_file_survives_a_disk_that_is_full_at_the_end(tmp_path, monkeypatch, step):
    path = tmp_path / "result.bin"
    write_text(path, "previous")
    monkeypatch.setattr(files.os, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "next")
    assert content(tmp_path) == {"result.bin": b"previous"}


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [1.0, -math.inf]}])
def test_json_refuses_what_it_cannot_hold_and_keeps_the_previous_file(tmp_path, value):
    path = tmp_path / "result.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, value)
    assert json.loads(path.read_text()) == {"loss": 1.5} and path.read_text().endswith("}\n")
    assert list(content(tmp_path)) == ["result.json"]


def test_a_folder_is_replaced_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "model"
    with replaced_folder(target) as temporary:
        (temporary / "model.safetensors").write_text("old")
    with pytest.raises(RuntimeError), replaced_folder(target) as temporary:
        (temporary / "model.safetensors").write_text("new")
        (temporary / "sub").mkdir()
        raise RuntimeError
    assert content(tmp_path) == {"model/model.safetensors": b"old"}
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_stale_weight_files_go_and_other_files_stay(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "README.md",
    ):
        (target / name).write_text("old")
    with replaced_folder(target) as temporary:
        (temporary / "model.safetensors").write_text("new")
        (temporary / "config.json").write_text("new")
    assert content(target) == {"model.safetensors": b"new", "config.json": b"new", "README.md": b"old"}
    with replaced_folder(target) as temporary:
        (temporary / "tokenizer.json").write_text("new")
    assert (target / "model.safetensors").exists()  # no weights in the new set: the old ones stay


def test_saving_a_variant_keeps_the_main_weights(sparse_llama, real_budget, tmp_path):
    model = sparse_llama(real_budget)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model", variant="fp16")
    assert {"model.safetensors", "model.fp16.safetensors"} <= set(content(tmp_path / "model"))


@pytest.mark.parametrize("place", ["save_file", "replace"])
def test_a_full_disk_while_saving_a_model_keeps_the_previous_one(
    sparse_llama, real_budget, tmp_path, monkeypatch, place
):
    """Where all of the new files were written already they are kept, too."""
    model = sparse_llama(real_budget, noise=0.1)
    model.save_pretrained(tmp_path / "model")
    before = content(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(
            *((files.os, "replace") if place == "replace" else (transformers.modeling_utils, "safe_save_file")),
            full_disk,
        )
        with pytest.raises(OSError, match="No space left") as raised:
            sparse_llama(real_budget, seed=1).save_pretrained(tmp_path / "model")
    assert content(tmp_path / "model") == before
    others = [f for f in tmp_path.iterdir() if f.name != "model"]
    if place == "save_file":
        assert not others
    else:
        assert len(others) == 1 and str(others[0]) in str(raised.value)
        AutoModelForCausalLM.from_pretrained(others[0])


KILLED = """
import os, signal, sys
import transformers.modeling_utils as m
from transformers import AutoModelForCausalLM
import hf_sparse_attn

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for parameter in model.parameters():
    parameter.data.zero_()
save = m.safe_save_file

def killed(tensors, path, **options):
    save(tensors, path, **options)
    with open(path, "r+b") as file:
        file.truncate(1000)  # half written
    os.kill(os.getpid(), signal.SIGKILL)

m.safe_save_file = killed
model.save_pretrained(sys.argv[1])
"""


def test_a_kill_in_the_middle_of_saving_leaves_the_previous_model_loadable(
    sparse_llama, real_budget, tmp_path, token_ids
):
    model, folder = sparse_llama(real_budget, noise=0.1), tmp_path / "model"
    model.save_pretrained(folder)
    before = content(folder)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert content(folder) == before
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(token_ids(1, 100)).logits, model(token_ids(1, 100)).logits)
