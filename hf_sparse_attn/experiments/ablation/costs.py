"""What a level costs on one layer's real queries, keys and values, in turn with the default."""

# shapes: N tokens

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hf_sparse_attn_kernels import block_sparse_attention
from torch import Tensor
from transformers import PreTrainedModel

from ...attention.call import Selector, SparseCall
from ...attention.dense import dense_attention
from ...benchmarks.timing import PeakMemory, alternate, ratio, spread
from ...models.attach import routers
from ...router.module import RoutingInputs, SparseRouter

DENSE = "dense attention"


class Captured(Exception):
    """Ends a forward pass once the layer's ``inputs`` are there."""

    def __init__(self, inputs: RoutingInputs) -> None:
        self.inputs = inputs


class _Capture(SparseCall):
    def __init__(self, layer: int) -> None:
        super().__init__(dense=True)
        self.layer = layer

    # the pass ends in the layer that is asked for: those behind it are not needed
    def on_document(self, router: SparseRouter, inputs: RoutingInputs) -> None:
        if router.layer == self.layer:
            raise Captured(inputs)


@torch.no_grad()
def capture(model: PreTrainedModel, ids: Tensor, layer: int) -> RoutingInputs:
    """Queries, keys and values of a layer on ``ids`` [1, N], from a dense pass."""
    try:
        model.base_model(ids, use_cache=False, sparse_call=_Capture(layer))
    except Captured as ended:
        return ended.inputs
    raise ValueError(
        f"{type(model).__name__} has no sparse layer {layer}: it has {[router.layer for router in routers(model)]}"
    )


@dataclass(frozen=True)
class Contender:
    """What runs: a layer's router, and how it selects."""

    router: SparseRouter
    selector: Selector
    dense_share: float = 0.0  # of the model's layers

    def __call__(self, inputs: RoutingInputs) -> Tensor:
        selection = self.selector(self.router, inputs, self.router.config.query_tile)
        assert inputs.v is not None
        return block_sparse_attention(inputs.q, inputs.k, inputs.v, selection, scale=inputs.scale)[0]

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.router.weights)

    def summary_bytes(self, inputs: RoutingInputs) -> int:
        """Of the stage-1 keys that a cache of this input holds."""
        keys = self.router.router_keys(inputs.k, inputs.positions)
        return keys.numel() * inputs.k.element_size()


@torch.no_grad()
def measure(
    contenders: Mapping[str, Contender], baseline: str, inputs: RoutingInputs, layers: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds and megabytes of every contender, each in turn with the baseline, and of dense attention.

    Selection and attention of one layer's prefill, times the model's sparse ``layers``; a contender with dense layers
    takes the dense time for those. ``over_default`` is the ratio of the times, median, least and most over the rounds.
    ``mb`` is the peak of one layer above its inputs, beside the routers' weights and the cached stage-1 keys of all
    layers.
    """
    dense = _run_dense(inputs)
    figures: dict[str, Any] = {}
    for name, contender in contenders.items():
        run: Callable[[], object] = lambda: contender(inputs)  # noqa: B023, E731
        base: Callable[[], object] = lambda: contenders[baseline](inputs)  # noqa: E731
        # once each, untimed
        alternate({"warm": run, "base": base}, 1)
        times = alternate({"own": run, "base": base, "dense": dense}, repeats)
        share = contender.dense_share
        # (1 − s) · own + s · dense, s the share of layers that the level leaves dense
        mixed_times = [(1 - share) * a + share * b for a, b in zip(times["own"], times["dense"], strict=True)]
        with PeakMemory() as peak:
            run()
        # the peak is of one layer at work; weights and stage-1 keys exist in every layer
        figures[name] = _figures(mixed_times, times["base"], layers) | {
            "mb": (peak.bytes + layers * (contender.weight_bytes + contender.summary_bytes(inputs))) / 2**20,
            "peak_bytes": peak.bytes,
            "weight_bytes": layers * contender.weight_bytes,
            "summary_bytes": layers * contender.summary_bytes(inputs),
        }
        if name == baseline:
            figures[DENSE] = _figures(times["dense"], times["base"], layers)
    return figures


def _run_dense(inputs: RoutingInputs) -> Callable[[], object]:
    v = inputs.v
    assert v is not None
    return lambda: dense_attention(inputs.q, inputs.k, v, inputs.scale, inputs.causal, None, None)


def _figures(times: list[float], base: list[float], layers: int) -> dict[str, Any]:
    # from seconds of one layer to milliseconds of all that are sparse
    return {"ms": 1e3 * layers * spread(times)["median_s"], "over_default": ratio(times, base), "n": len(times)}
