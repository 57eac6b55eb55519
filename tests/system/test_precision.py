"""``dtype: auto``: what this processor or GPU multiplies, what is said of a dtype that it does not, and what is
recorded.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.cli.options import load
from hf_sparse_attn.system import precision
from hf_sparse_attn.system.environment import environment
from hf_sparse_attn.system.precision import choice, computed_with, instruction_set, multiplies, of_saved, resolve

AVX2 = {"avx2": True, "fma3": True}
AVX512 = {**AVX2, "avx512_f": True}
BF16 = {**AVX512, "avx512_bf16": True}
AMX = {**BF16, "amx_tile": True, "amx_bf16": True}


@pytest.fixture
def processor(monkeypatch):
    """A machine without GPU whose processor has these instructions."""

    def make(has, machine="x86_64", limit=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)
        monkeypatch.delenv("HF_SPARSE_ATTN_CPU", raising=False)
        if limit is not None:
            monkeypatch.setenv("HF_SPARSE_ATTN_CPU", limit)
        for function in (instruction_set, precision._warn):
            function.cache_clear()

    yield make
    for function in (instruction_set, precision._warn):
        function.cache_clear()


@pytest.mark.parametrize(
    ("has", "name", "dtype"),
    [
        (AMX, "AMX", torch.bfloat16),
        (BF16, "AVX512-BF16", torch.bfloat16),
        (AVX512, "AVX-512", torch.float32),
        (AVX2, "AVX2", torch.float32),
        ({}, "x86-64 without AVX2", torch.float32),
    ],
)
def test_auto_is_what_the_processor_multiplies(processor, has, name, dtype):
    processor(has)
    created = choice()
    assert (
        instruction_set() == computed_with() == name
        and resolve("auto") == created.dtype == dtype
        and name in created.why
    )
    assert created.why.endswith(
        "multiplies bfloat16" if dtype == torch.bfloat16 else "has no instructions that multiply bfloat16"
    )


def test_arm_processors_and_torch_versions_that_list_nothing(processor, monkeypatch):
    for has, dtype in (({"neon": True, "bf16": True}, torch.bfloat16), ({"neon": True}, torch.float32)):
        processor(has, "aarch64")
        assert choice().dtype == dtype and instruction_set().endswith("with bfloat16") == (dtype == torch.bfloat16)
    processor({})
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choice().dtype == torch.bfloat16 and instruction_set() == "AVX512-BF16"


@pytest.mark.parametrize(
    ("limit", "dtype"),
    [("avx2", "float32"), ("avx512", "float32"), ("avx512_bf16", "bfloat16"), ("none", "bfloat16"), ("", "bfloat16")],
)
def test_auto_goes_by_the_instruction_set_that_is_asked_for(processor, limit, dtype):
    processor(AMX, limit=limit)
    assert choice().dtype == getattr(torch, dtype) and (limit in ("avx2", "avx512")) == (
        "HF_SPARSE_ATTN_CPU" in choice().why
    )
    assert computed_with() == (f"AMX, HF_SPARSE_ATTN_CPU={limit}" if limit else "AMX")


def test_a_gpu_decides_where_there_is_one(processor, monkeypatch):
    processor(AVX2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert choice().dtype == dtype and choice().why.startswith("a GPU ") and choice("cpu").dtype == torch.float32


def test_a_dtype_that_is_named_is_taken_and_warned_of_once(processor, monkeypatch, caplog):
    processor(AVX2)
    rates = {torch.float32: 56e9, torch.bfloat16: 8e9, torch.float16: 7e9}
    monkeypatch.setattr(precision, "linear_rate", lambda dtype, device: rates[dtype])
    with caplog.at_level(logging.WARNING):
        assert [resolve("bfloat16") for _ in range(3)] == [torch.bfloat16] * 3 and resolve("float32") == torch.float32
        assert resolve("auto") == torch.float32
    (record,) = caplog.records
    assert "dtype bfloat16 was asked for" in record.getMessage() and "7.0 times as long" in record.getMessage()
    assert (
        resolve("float16") == torch.float16
        and "8.0 times" in caplog.records[-1].getMessage()
        and len(caplog.records) == 2
    )
    processor(BF16)
    caplog.clear()
    assert resolve("bfloat16") == torch.bfloat16 and not caplog.records
    with pytest.raises(ValueError, match="dtype 'bf16' is not supported; supported: auto, bfloat16, float32, float16"):
        resolve("bf16")


def test_saved_models_keep_their_dtype_unless_it_is_converted_here(processor):
    processor(AVX2)
    assert [of_saved(d) for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)] == [
        torch.float32
    ] * 3 + [torch.float64]
    processor(BF16)
    assert (
        of_saved(torch.bfloat16) == torch.bfloat16
        and of_saved(torch.float32) == torch.float32
        and of_saved(torch.float16) == torch.float32
    )


def test_verbs_load_in_the_dtype_of_the_rule(processor, stock_llama, word_tokenizer, tmp_path):
    stock_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    processor(AVX2)
    assert load(str(tmp_path), "auto", "")[0].dtype == torch.float32
    assert load(str(tmp_path), "bfloat16", "")[0].dtype == torch.bfloat16
    processor(BF16)
    assert load(str(tmp_path), "auto", "")[0].dtype == torch.bfloat16


def test_doctor_says_which_dtype_why_and_how_fast_each_is(processor):
    processor(AVX2)
    done = CliRunner().invoke(app, ["doctor", "--json", "-"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert (
        result["dtype"] == "float32"
        and result["why_dtype"] == "this processor, AVX2, has no instructions that multiply bfloat16"
    )
    assert result["instruction_set"] == environment()["instruction_set"] == "AVX2"
    assert (
        result["linear_layer_gflops"].keys() == {"bfloat16", "float32", "float16"}
        and min(result["linear_layer_gflops"].values()) > 0
    )


def test_a_rate_is_the_rate(processor):
    assert multiplies(torch.float32, "cpu") and precision.linear_rate(torch.float32) > 1e8
