"""`SparseAttentionConfig`: defaults, validation, JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest

from hf_sparse_attn import SparseAttentionConfig
from hf_sparse_attn.config import Bookkeeping

DEFAULTS = {
    "block_size": 16,
    "query_tile": 64,
    "density": 0.125,
    "min_keys": 512,
    "max_keys": None,
    "mass_threshold": None,
    "candidate_factor": 3.0,
    "sink": 16,
    "local": 64,
    "dense_below": 2048,
    "dense_layers": (),
    "retrieval_heads": (),
    "router_dim": None,
    "index_dim": None,
    "query_samples": 32,
    "bookkeeping": Bookkeeping(),
}


def test_the_defaults_are_those_that_are_promised():
    config = SparseAttentionConfig()
    assert {f.name: getattr(config, f.name) for f in fields(config)} == DEFAULTS
    assert config.bookkeeping == Bookkeeping(version=1, trained=False, calibration=None)
    assert config.resolved_router_dim(64) == 128 and config.resolved_index_dim(64) == 64


def test_json_round_trip():
    config = SparseAttentionConfig(
        density=0.5,
        min_keys=1024,
        max_keys=2048,
        dense_layers=(0, 3),
        retrieval_heads=((0, 1), (7, 2)),
        router_dim=96,
        index_dim=16,
    ).mark_trained()
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert SparseAttentionConfig.from_dict(json.loads(text)) == config
    assert SparseAttentionConfig.from_dict(json.loads(text)).bookkeeping.trained
    assert SparseAttentionConfig.coerce(config) is config
    assert SparseAttentionConfig.coerce({"density": 0.5}) == SparseAttentionConfig(density=0.5)


IMPOSSIBLE = [
    ("block_size", 24, "16, 32, 64, 128"),
    ("block_size", "16", "integer"),
    ("block_size", 16.0, "integer"),
    ("block_size", True, "integer"),
    ("query_tile", 48, "1, 16, 32, 64, 128"),
    ("query_tile", 0, "1, 16, 32, 64, 128"),
    ("density", 0.0, r"\(0, 1\]"),
    ("density", -0.1, r"\(0, 1\]"),
    ("density", 1.5, r"\(0, 1\]"),
    ("density", math.nan, r"\(0, 1\]"),
    ("density", "0.1", "a number"),
    ("density", None, "a number"),
    ("candidate_factor", 0.99, ">= 1"),
    ("candidate_factor", math.inf, "finite"),
    ("candidate_factor", math.nan, "finite"),
    ("sink", -1, ">= 0"),
    ("sink", 1.5, "integer"),
    ("local", -1, ">= 0"),
    ("dense_below", -5, ">= 0"),
    ("query_samples", 0, ">= 1"),
    ("min_keys", 0, ">= "),
    ("min_keys", None, "integer"),
    ("min_keys", 143, ">= 144"),  # 16 sink + 64 local + a tile of 64
    ("max_keys", 511, r"None or >= min_keys \(512\)"),
    ("max_keys", "1024", "integer"),
    ("dense_layers", (0, -1), ">= 0"),
    ("dense_layers", (0.5,), "layer indices"),
    ("dense_layers", ("1",), "layer indices"),
    ("dense_layers", 3, "layer indices"),
    ("dense_layers", None, "layer indices"),
    *(
        ("retrieval_heads", value, r"pairs.*KV head")
        for value in (3, None, [3], [[1]], [[1, 2, 3]], [[1, -1]], [[0.5, 1]], [["1", 1]], "7.2", {"7": 2})
    ),
    ("router_dim", 0, "even integer >= 2"),
    ("router_dim", 65, "even integer"),
    ("index_dim", 7, "even integer"),
    ("index_dim", "full", "integer"),
    ("bookkeeping", None, "dict"),
    ("bookkeeping", 3, "dict"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as error:
        SparseAttentionConfig(**{name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    "call", [SparseAttentionConfig.from_dict, lambda values: SparseAttentionConfig().changed(**values)]
)
def test_an_unknown_field_is_refused_by_name_with_the_known_ones(call):
    with pytest.raises(ValueError, match=r"no field 'blok_size'.*block_size"):
        call({"blok_size": 16})


def test_a_config_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match="True"):
        SparseAttentionConfig.from_dict(True)


def test_min_keys_at_the_forced_links_is_the_least():
    forced = SparseAttentionConfig().forced_keys
    assert forced == 16 + 64 + 64
    assert SparseAttentionConfig(min_keys=forced).min_keys == forced
    with pytest.raises(ValueError, match=f"min_keys is {forced - 1}: must be >= {forced}"):
        SparseAttentionConfig(min_keys=forced - 1)
    with pytest.raises(ValueError, match="min_keys is 512"):
        SparseAttentionConfig(sink=512)


def test_a_fixed_budget_is_valid():
    config = SparseAttentionConfig(min_keys=1024, max_keys=1024)
    assert {config.budget_blocks(visible) for visible in (1, 1024, 5000, 10**6)} == {64}


def test_the_budget_is_the_clamped_density_in_whole_blocks():
    config = SparseAttentionConfig(density=0.125, min_keys=512, max_keys=1000)
    assert [config.budget_blocks(n) for n in (100, 4096, 4097, 6000, 10**6)] == [32, 32, 33, 47, 63]


def test_sizes_that_do_not_fit_the_head_are_refused():
    with pytest.raises(ValueError, match=r"router_dim is 32: must be >= .*64"):
        SparseAttentionConfig(router_dim=32).resolved_router_dim(64)
    with pytest.raises(ValueError, match=r"index_dim is 96: must be <= .*64"):
        SparseAttentionConfig(index_dim=96).resolved_index_dim(64)


@pytest.mark.parametrize(
    ("bookkeeping", "message"),
    [
        ({"version": 2}, "version is 2.*version 1"),
        ({"version": None}, "version is None"),
        ({"trained": "yes"}, "trained is 'yes'"),
    ],
)
def test_bookkeeping_of_another_layout_is_refused(bookkeeping, message):
    with pytest.raises(ValueError, match=message):
        SparseAttentionConfig.from_dict({"bookkeeping": bookkeeping})


def test_an_unknown_bookkeeping_field_is_refused_as_a_value():
    with pytest.raises(ValueError, match=r"bookkeeping.*taught"):
        SparseAttentionConfig.from_dict({"bookkeeping": {"taught": True}})


def test_a_config_cannot_be_changed_in_place():
    config = SparseAttentionConfig()
    with pytest.raises(AttributeError):
        config.density = 0.5
    assert config.changed(density=0.5).density == 0.5 and config.density == 0.125


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, 10**400)
            for name in ("candidate_factor", "min_keys", "max_keys", "sink", "local", "dense_below", "query_samples")
        ],
        *[("candidate_factor", 1e308), ("router_dim", 2**40), ("index_dim", 2**40), ("dense_layers", [10**400])],
    ],
)
def test_numbers_that_no_model_has_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"sparse_attention\.{field} is "):
        SparseAttentionConfig.from_dict({field: value})


@pytest.mark.parametrize(
    "name", ["../x.json", "/x.json", "a/b.json", "a\\b.json", "x.txt", "", "a\0.json", 5, ["a"], {}]
)
def test_a_calibration_is_a_file_beside_the_config(name):
    with pytest.raises(ValueError, match=r"bookkeeping\.calibration is "):
        SparseAttentionConfig.from_dict({"bookkeeping": {"calibration": name}})


def test_field_names_of_mixed_kinds_are_refused():
    with pytest.raises(ValueError, match="no field 1, 'a'"):
        SparseAttentionConfig.from_dict({"a": 1, 1: 2})
