"""Names of version 0.1.0: importing one says the new one."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
from transformers import LlamaForCausalLM

from hf_sparse_attn import sparse_class
from hf_sparse_attn.system.old_names import MOVED, NAMES, PACKAGE


def test_every_new_name_is_a_module():
    missing = [
        new
        for new in [*MOVED.values(), *(place for place, _ in NAMES.values())]
        if not importlib.util.find_spec(f"{PACKAGE}.{new}")
    ]
    assert not missing and len(MOVED) > 100


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("attending", r"attending of version 0\.1\.0 is hf_sparse_attn\.attention\.layer"),
        ("prefill", r"is hf_sparse_attn\.models\.generate_hooks"),
        ("training.targets", r"is no more: what it tried was not better"),
        ("training.svd", r"is hf_sparse_attn\.training\.index_init"),
        (
            "pipeline.recipe",
            r"hf_sparse_attn\.pipeline of version 0\.1\.0 has moved: .*pipeline\.recipe is experiments\.recipe",
        ),
    ],
)
def test_an_old_module_raises_with_its_new_name(old, new):
    with pytest.raises(ModuleNotFoundError, match=new + r".*0\.1\.0 pickled.*save_pretrained"):
        importlib.import_module(f"{PACKAGE}.{old}")


def test_a_name_that_never_was_is_not_found_as_before():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'hf_sparse_attn\.nothing'$"):
        importlib.import_module(f"{PACKAGE}.nothing")


@pytest.mark.parametrize("package", NAMES)
def test_names_of_a_module_that_is_a_package_now_raise_with_their_new_place(package):
    place, names = NAMES[package]
    assert all(hasattr(importlib.import_module(f"{PACKAGE}.{place}"), name) for name in names)
    with pytest.raises(ImportError, match=rf"{names[0]} of version 0\.1\.0 is hf_sparse_attn\.{place}\.{names[0]}"):
        getattr(importlib.import_module(f"{PACKAGE}.{package}"), names[0])
    assert not hasattr(importlib.import_module(f"{PACKAGE}.{package}"), "nothing")


def test_the_module_that_adapters_of_0_1_0_name_has_the_model_classes_and_nothing_else():
    old = importlib.import_module("hf_sparse_attn.registration")
    assert old.SparseLlamaForCausalLM is sparse_class(LlamaForCausalLM)
    with pytest.raises(
        ImportError,
        match=r"sparse_config_class: hf_sparse_attn\.registration of version 0\.1\.0 is .*models\.registration",
    ):
        old.sparse_config_class  # noqa: B018
