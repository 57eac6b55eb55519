"""Benchmarks of one attention layer: prefill, training step, decode step, router.
Every output is verified before it is timed.
"""

# letters: B batch, G KV heads, N tokens, D head dim; Q, K, V, O, S, P of one head: queries, keys, values, output,
# scores and probabilities, with their gradients dQ, dK, dV, dO, dS

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import BlockSelection, TileFeatures, TilePlan, select_blocks
from torch import Tensor

from ..router.budget import make_plan
from ..router.selection import FeatureMaker
from .dense_baselines import dense_peers, flex_peer, sparse_peers
from .layer_shape import Layer, LayerShape
from .timing import BenchmarkError, PeakMemory, alternate, ratio, spread, timed

DECODE = ("stock", "best dense", "with router", "router")
COLD_BYTES = 256 << 20  # caches of the layers of a decode benchmark together: more than a processor's cache holds


def _row(shape: LayerShape, ideal: float, times: dict[str, list[float]], dense: str) -> dict[str, Any]:
    """Sizes, times and the ratios that every benchmark reports, from alternating ``times``;
    ``dense`` names the baseline.
    """
    row: dict[str, Any] = {**asdict(shape), "ideal_speedup": ideal, "baseline": dense}
    for name, key in (("attention", "speedup"), ("with router", "speedup_with_router")):
        if name in times:
            row[key] = ratio(times[dense], times[name])
            # a share of 1: the time fell as much as the pairs of a query and a key did
            row[f"share_of_ideal{key.removeprefix('speedup')}"] = row[key]["median"] / ideal
    if "router" in times:
        row["router_share"] = statistics.median(times["router"]) / statistics.median(times["with router"])
    return {**row, "times": {name: spread(seconds) for name, seconds in times.items()}}


def fastest(times: dict[str, list[float]], names: Iterable[str]) -> str:
    """Which of the ``names`` has the least median time."""
    return min(names, key=lambda name: statistics.median(times[name]))


@torch.no_grad()
def bench_attention(
    shape: LayerShape, *, repeats: int = 5, flex: bool = False, dense: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    """Prefill of one layer against the best dense kernel of the device: the attention alone and with its router.

    ``dense`` are times of the dense kernels that were measured before for the same sizes. Memory is that of the first
    call beyond q, k, v and the output, in bytes.

    Raises:
        BenchmarkError: the sparse output differs from a float64 computation over the selected keys.
    """
    layer = Layer(shape)
    # the first call at this size: no memory kept from an earlier one hides its need
    with PeakMemory(shape.device) as memory:
        out = layer.sparse()
    selection = layer.select()
    layer.verify(out, selection)
    functions: dict[str, Callable[[], object]] = {
        "attention": lambda: layer.attend(selection),
        "with router": layer.sparse,
        "router": layer.select,
    }
    if flex:
        functions["flex"] = _verified_flex(layer, selection)
    if dense is None:
        functions |= dense_peers(layer)
    sparse, failed = _checked_peers(layer, selection)
    # ratios pair rounds, so ``dense`` holds as many times as there are ``repeats``
    times = alternate(functions | sparse, repeats, shape.device) | (dense or {})
    ours = ("attention", "with router", "router", "flex", *sparse)
    baseline = fastest(times, [name for name in times if name not in ours])
    row = _row(shape, shape.dense_pairs / shape.kept_pairs, times, baseline)
    if flex:
        row["flex_speedup"] = ratio(times[baseline], times["flex"])
    if sparse or failed:
        row["speedup_over_peers"] = {name: ratio(times[name], times["attention"]) for name in sparse}
        row["peers_failed"] = failed
    attention = row["times"]["attention"]["median_s"]
    # q, k and v were there before the block; the output has to be there in any case
    extra = max(0, memory.bytes - out.numel() * out.element_size())
    return {"benchmark": "attention", **row, "tflops": shape.flops / attention / 1e12, "peak_memory_bytes": extra}


def _checked_peers(layer: Layer, selection: BlockSelection) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The installed sparse peers that run on these sizes, and what the others raised."""
    running, failed = {}, {}
    for name, peer in sparse_peers(layer, selection).items():
        try:
            out = peer()
            # NSA alone attends to our links; the others choose their own, so that their outputs differ
            if name == "NSA":
                layer.verify(out, selection)
        except Exception as error:  # a peer that fails must not cost our own row; what it raised is reported
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            running[name] = peer
    return running, failed


# log N* = log a + log(b / a) · log s_a / (log s_a − log s_b): speed-ups s at lengths a < b as a power of the length
def crossover(rows: list[dict[str, Any]]) -> dict[str, float | str]:
    """By dtype, the length from which on the sparse layer, router included, is the faster one, interpolated between
    ``rows``.
    """
    lengths: dict[str, float | str] = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        points = sorted((row["length"], row["speedup_with_router"]["median"]) for row in rows if row["dtype"] == dtype)
        slower = [point for point in points if point[1] < 1]
        if not slower:
            lengths[dtype] = f"below {points[0][0]}"
        elif slower[-1] == points[-1]:
            lengths[dtype] = f"above {points[-1][0]}"
        else:
            (a, low), (b, high) = slower[-1], points[points.index(slower[-1]) + 1]
            lengths[dtype] = a * (b / a) ** (math.log(low) / (math.log(low) - math.log(high)))
    return lengths


def _verified_flex(layer: Layer, selection: BlockSelection) -> Callable[[], Tensor]:
    run = flex_peer(layer, selection)
    try:
        layer.verify(run(), selection)
    except BenchmarkError as error:
        raise BenchmarkError(f"compiled flex_attention is wrong here: {error}") from error
    return run


def bench_backward(shape: LayerShape, *, repeats: int = 5) -> dict[str, Any]:
    """Forward and backward pass of one layer, router included, against the best dense kernel; memory is the peak of a
    step.

    Raises:
        BenchmarkError: the output or a gradient differs from a float64 computation over the selected keys.
    """
    layer = Layer(shape)
    selection = layer.select()
    grad = layer.random_gradient()
    leaves = [x.requires_grad_() for x in (layer.q, layer.k, layer.v)]

    def step(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            out = forward()
            out.backward(grad)
            return out.detach()

        return run

    def measured(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
        for leaf in leaves:
            leaf.grad = None  # memory that only the step would free would count as if it needed none
        with PeakMemory(shape.device) as peak:
            out = run()
        return out, peak.bytes

    functions = {"attention": step(lambda: layer.attend(selection)), "with router": step(layer.sparse)}
    out, sparse_memory = measured(functions["with router"])
    _verify_gradients(layer, selection, out, grad)
    peers = dense_peers(layer)
    memory = 0
    for name, peer in peers.items():
        functions[name] = step(peer)
        _, peak = measured(functions[name])
        # the least that any dense kernel needs
        memory = min(memory or peak, peak)
    times = alternate(functions, repeats, shape.device)
    baseline = min(peers, key=lambda name: statistics.median(times[name]))
    return {
        "benchmark": "backward",
        **_row(shape, shape.dense_pairs / shape.kept_pairs, times, baseline),
        "peak_memory_bytes": sparse_memory,
        "dense_peak_memory_bytes": memory,
    }


# S = scale · Q Kᵀ, P = softmax S, O = P V, so Σ q·dq = Σ S ∘ dS = Σ k·dk and Σ v·dv = Σ P ∘ (dO Vᵀ) = Σ o·do
@torch.no_grad()
def _verify_gradients(layer: Layer, selection: BlockSelection, out: Tensor, grad: Tensor) -> None:
    """dq of some tiles against float64; dk and dv as wholes, by Σ q·dq = Σ k·dk and Σ v·dv = Σ out·dout."""
    q, k, v = (x.detach() for x in (layer.q, layer.k, layer.v))
    dq, dk, dv = (x.grad for x in (layer.q, layer.k, layer.v))
    assert dq is not None and dk is not None and dv is not None
    layer.verify(out, selection, grad, dq)
    for name, left, right in (("k", (q, dq), (k, dk)), ("v", (out, grad), (v, dv))):
        want, got = (a.double() * b.double() for a, b in (left, right))
        # rounding errors of the products add up like a random walk: the bound is a norm, not a sum
        error, allowed = float((got.sum() - want.sum()).abs()), 64 * torch.finfo(out.dtype).eps * float(want.norm())
        if not error <= allowed:
            raise BenchmarkError(
                f"the gradient of {name} is wrong: its product with {name} is off by {error:.3g} (allowed "
                f"{allowed:.3g})"
            )


@torch.no_grad()
def bench_decode(shape: LayerShape, *, repeats: int = 20) -> dict[str, Any]:
    """One query over a cache of ``length`` tokens, selection included, against stock attention and the best dense
    decode.

    The best dense decode packs the query heads of a KV group into one matmul. A step passes through layers whose caches
    together are more than a processor's cache holds, as in a model; times are a layer's share of a step.

    Raises:
        BenchmarkError: the sparse output differs from a float64 computation over the selected keys.
    """
    # keys and values of one layer: 2 tensors of B · G · N · D numbers of 2 bytes
    count = max(2, min(32, COLD_BYTES // (2 * shape.batch * shape.groups * shape.length * shape.head_dim * 2)))
    layers = [Layer(shape, queries=1, seed=seed) for seed in range(count)]
    for layer in layers:
        selection = layer.select()
        layer.verify(layer.attend(selection), selection)
    steps = alternate({name: _decode_step(layers, name) for name in DECODE}, repeats + 1, shape.device)
    times = {name: [t / count for t in seconds[1:]] for name, seconds in steps.items()}  # the first step warms up
    # indices are −1 where a tile keeps fewer blocks than its list is wide
    kept = (
        statistics.fmean(float((layer.select().indices >= 0).sum(-1).float().mean()) for layer in layers)
        * shape.block_size
    )
    row = _row(shape, shape.length / kept, times, "best dense")
    return {"benchmark": "decode", **row, "speedup_over_stock": ratio(times["stock"], times["with router"])}


def _decode_step(layers: list[Layer], name: str) -> Callable[[], object]:
    """What DECODE names, once for every layer."""

    def attend(layer: Layer) -> object:
        q, k, v = layer.q, layer.k, layer.v
        if name == "stock":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])
        if name == "best dense":
            # no mask: one query sees every key; the query heads of a KV group are rows of one product
            return F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, q.shape[-1]), k, v)
        return layer.sparse() if name == "with router" else layer.select()

    return lambda: [attend(layer) for layer in layers]


@torch.no_grad()
def bench_router(shape: LayerShape, *, repeats: int = 5, **fields: Any) -> dict[str, Any]:
    """Time of the router's stages at prefill; ``fields`` of SparseAttentionConfig replace those of the shape's.

    ``keys`` are the stage-1 keys and the index keys that a call prepares once, ``queries`` the pooled and the sampled
    queries of all tiles, ``select`` both stages of scores and the top-k.
    """
    layer = Layer(shape, config=replace(shape.config, **fields))
    selection = layer.select()
    layer.verify(layer.attend(selection), selection)
    plan = make_plan(layer.router.config, selection.grid, layer.q.device)
    # the first round warms up
    rounds = [_stage_times(layer, plan) for _ in range(repeats + 1)][1:]
    times = {name: [r[name] for r in rounds] for name in rounds[0]}
    times |= alternate({"router": layer.select, "with router": layer.sparse}, repeats, shape.device)
    share = statistics.median(times["router"]) / statistics.median(times["with router"])
    spreads = {name: spread(seconds) for name, seconds in times.items()}
    return {"benchmark": "router", **asdict(shape), **fields, "router_share": share, "times": spreads}


def _stage_times(layer: Layer, plan: TilePlan) -> dict[str, float]:
    """Seconds of each part of the router's work, one after the other over all tiles."""
    device = layer.shape.device
    # `timed` returns seconds only: the parts hand their results on through these lists
    makers: list[FeatureMaker] = []
    times = {"keys": timed(lambda: makers.append(FeatureMaker(layer.router, layer.inputs, plan.grid)), device)}
    runs = makers[0].runs(torch.arange(plan.grid.tiles, device=plan.device, dtype=torch.int64))
    features: list[TileFeatures] = []
    times["queries"] = timed(lambda: features.extend(map(makers[0].features, runs)), device)
    times["select"] = timed(
        lambda: [select_blocks(f, plan, run) for f, run in zip(features, runs, strict=True)], device
    )
    return times
