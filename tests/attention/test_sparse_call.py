"""A `SparseCall`: in which order a layer calls its methods, and what its keywords may be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hf_sparse_attn import SparseCall


class Noting(SparseCall):
    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def on_layer(self, router):
        self.calls.append(("on_layer", router.layer))

    def on_document(self, router, inputs):
        self.calls.append(("on_document", router.layer))

    def select(self, router, inputs, query_tile):
        self.calls.append(("select", router.layer))
        return super().select(router, inputs, query_tile)

    def on_selection(self, router, inputs, selection):
        self.calls.append(("on_selection", router.layer))


@torch.no_grad()
def test_every_layer_calls_the_methods_in_their_order(sparse_llama, real_budget, token_ids):
    model, call = sparse_llama(real_budget).eval(), Noting()
    model(token_ids(1, 160), use_cache=False, sparse_call=call)
    layers = range(model.config.num_hidden_layers)
    assert call.calls == [
        (name, layer) for layer in layers for name in ("on_layer", "on_document", "select", "on_selection")
    ]


@torch.no_grad()
def test_a_dense_call_selects_nothing(sparse_llama, real_budget, token_ids):
    model, call = sparse_llama(real_budget).eval(), Noting(dense=True)
    model(token_ids(1, 160), use_cache=False, sparse_call=call)
    assert {name for name, _ in call.calls} == {"on_layer", "on_document"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("observer", "observer is a method, on_document"), ("dens", "supported: dense, selector, decode_from")],
)
def test_a_keyword_that_is_none_is_refused(name, hint):
    with pytest.raises(TypeError, match=f"unexpected argument '{name}'; {hint}"):
        SparseCall(**{name: print})


def test_a_dataclass_is_refused_as_sharded_models_copy_it():
    @dataclass
    class Counting(SparseCall):
        seen: int = 0

        def __post_init__(self):
            super().__init__()

    with pytest.raises(TypeError, match="Counting is a dataclass: sharded models copy dataclasses at every module"):
        Counting()
