"""How far from the limit: the device's ceilings, the kernels against the best dense ones, and the router."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid

from ..attention_call import bench_attention, bench_backward, bench_decode, bench_router, fastest
from ..dense_baselines import dense_peers
from ..layer_shape import Layer, LayerShape
from ..timing import alternate, ratio, spread, timed
from .rows import Entry

HEADS, HEAD_DIM = (32, 8), 128  # of Llama 3.1 8B
LENGTHS = (32768, 65536, 131072)
SHORTER = (16384, 8192, 4096)  # where sparse attention starts to win
DECODE_KEYS = 4096
ROUNDS, LONG_ROUNDS, LONG = 20, 7, 65536
DRY_KEYS = 192  # at least what is forced with blocks of 64
COPY_BYTES, PRODUCT = 4 << 30, 8192

# times of the dense kernels, which do not depend on the density
_dense: dict[tuple[Any, ...], dict[str, list[float]]] = {}


def shape(length: int, density: float = 0.1, block_size: int = 16, *, dry: bool, keys: int | None = None) -> LayerShape:
    """The layer that is measured; dry, one of the same kind with a few hundred tokens on the CPU."""
    if dry:
        return LayerShape(256, DRY_KEYS, heads=2, groups=1, head_dim=16, block_size=block_size, dtype="float32")
    return LayerShape(
        length, keys, density, heads=HEADS[0], groups=HEADS[1], head_dim=HEAD_DIM, block_size=block_size, device="cuda"
    )


def rounds(length: int, dry: bool) -> int:
    return 1 if dry else LONG_ROUNDS if length >= LONG else ROUNDS


def entries(dry: bool) -> Iterator[Entry]:
    """What is measured, the most important first; dry, one row of each kind."""
    seen = set()
    for kind, entry in _all_entries(dry):
        if not (dry and kind in seen):
            yield entry
        seen.add(kind)


def _all_entries(dry: bool) -> Iterator[tuple[str, Entry]]:
    """(kind, entry) of every row."""
    yield "ceilings", ("ceilings", partial(ceilings, dry))
    for block_size in (16, 64):
        row = shape(LENGTHS[0], block_size=block_size, dry=dry)
        yield (
            f"dense {block_size}",
            (f"dense share, {LENGTHS[0]} tokens, blocks of {block_size}", partial(dense_share, row, dry)),
        )
    for length, density in itertools.product(LENGTHS, (0.1, 0.05)):
        row = shape(length, density, dry=dry)
        yield "prefill", (f"prefill, {length} tokens, {density:.0%} kept", partial(_prefill, row, rounds(length, dry)))
    for length, density in zip(LENGTHS, (0.1, 0.05, 0.05), strict=True):
        row = shape(length, density, dry=dry)
        label = f"forward and backward, {length} tokens, {density:.0%} kept"
        yield "backward", (label, partial(bench_backward, row, repeats=rounds(length, dry)))
    for length in (LENGTHS[0], LENGTHS[-1]):
        row = shape(length, dry=dry, keys=DECODE_KEYS)
        yield "decode", (f"decode, {length} tokens, {DECODE_KEYS} kept", partial(_decode, row, rounds(length, dry)))
        yield (
            "router",
            (f"router, {length} tokens", partial(bench_router, shape(length, dry=dry), repeats=rounds(length, dry))),
        )
    for length in SHORTER:
        yield (
            "prefill",
            (f"prefill, {length} tokens, 10% kept", partial(_prefill, shape(length, dry=dry), rounds(length, dry))),
        )
    for length in LENGTHS[:2]:
        row = shape(length, block_size=64, dry=dry)
        yield (
            "prefill",
            (f"prefill, {length} tokens, 10% kept, blocks of 64", partial(_prefill, row, rounds(length, dry))),
        )


@torch.no_grad()
def ceilings(dry: bool) -> dict[str, Any]:
    """What the device reaches: bytes a second of a copy (read and written ones), operations a second of a bfloat16
    product.
    """
    device, size, n = ("cpu", 1 << 20, 128) if dry else ("cuda", COPY_BYTES, PRODUCT)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).bfloat16() for _ in range(2))
    times = alternate({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 11, device)
    # the first round warms up
    copy, product = (statistics.median(times[name][1:]) for name in ("copy", "product"))
    # a copy reads and writes every byte; an n × n product has n³ multiplications and as many additions
    return {"benchmark": "ceilings", "bytes_per_s": 2 * size / copy, "flops_per_s": 2 * n**3 / product}


@torch.no_grad()
def dense_share(sizes: LayerShape, dry: bool) -> dict[str, Any]:
    """The sparse kernel with every block kept against the best dense kernel:
    the share of its rate that sparsity starts from.
    """
    layer = Layer(sizes)
    grid = TileGrid(sizes.length, sizes.length, layer.router.config.query_tile, sizes.block_size)
    indices = grid.visible_blocks(layer.q.device).expand(sizes.batch, sizes.groups, -1, -1).contiguous()
    selection = BlockSelection(indices, grid)
    layer.verify(layer.attend(selection), selection)
    peers = dense_peers(layer)
    times = alternate(
        {"every block": lambda: layer.attend(selection), **peers}, rounds(sizes.length, dry), sizes.device
    )
    best = fastest(times, peers)
    # two products (q·k and p·v) of D multiplications and D additions for each pair and head
    flops = 4 * sizes.batch * sizes.heads * sizes.head_dim * sizes.dense_pairs
    return {
        "benchmark": "dense share",
        "length": sizes.length,
        "head_dim": sizes.head_dim,
        "block_size": sizes.block_size,
        "baseline": best,
        "share": ratio(times[best], times["every block"]),
        "tflops": {name: flops / statistics.median(seconds) / 1e12 for name, seconds in times.items()},
        "times": {name: spread(seconds) for name, seconds in times.items()},
    }


def _prefill(sizes: LayerShape, repeats: int) -> dict[str, Any]:
    """`bench_attention`, with the dense kernels timed once for all densities of the same sizes."""
    # all that dense times depend on: neither density nor block size
    key = (sizes.length, sizes.heads, sizes.groups, sizes.head_dim, sizes.batch, sizes.dtype)
    if key not in _dense:
        with torch.no_grad():
            _dense[key] = alternate(dense_peers(Layer(sizes)), repeats, sizes.device)
    return bench_attention(sizes, repeats=repeats, dense=_dense[key])


@torch.no_grad()
def _decode(sizes: LayerShape, repeats: int) -> dict[str, Any]:
    """`bench_decode`, and on a GPU the same step of one layer replayed from a CUDA graph."""
    row = bench_decode(sizes, repeats=repeats)
    if sizes.device != "cuda":
        return row
    graphed: dict[str, Any] = {}
    for name, step in _graphed_steps(replace(sizes)).items():
        graphed[name] = spread([timed(step, sizes.device) for _ in range(repeats + 1)][1:])
    return {**row, "graphed": graphed}


def _graphed_steps(sizes: LayerShape) -> dict[str, Callable[[], object]]:
    """Decode steps of one layer as CUDA graphs: ours with its router, and the best dense one."""
    layer = Layer(sizes, queries=1)
    q, k, v = layer.q, layer.k, layer.v
    # query heads of a KV group as rows of one product over the group's keys
    packed = q.reshape(*k.shape[:2], -1, q.shape[-1])
    steps: dict[str, Callable[[], object]] = {
        "with router": layer.sparse,
        "best dense": lambda: torch.nn.functional.scaled_dot_product_attention(packed, k, v),
    }
    return {name: _captured(step) for name, step in steps.items()}


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    # capturing allows no first calls, which compile and allocate: these run on another stream before
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
