"""Everything that a GPU should measure, most important first, within a time limit, in one JSON file.

``hf-sparse-attn bench --suite gpu --json OUT`` or, where the command line's packages are missing,
``python -m hf_sparse_attn.profiling.suite OUT``.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection, TileGrid, block_sparse_attention

from ..environment import environment
from ..files import finite_results, write_json
from .attention import bench_attention, bench_backward, bench_decode, bench_router, fastest
from .layer import Layer, LayerShape
from .meters import alternate, ratio, spread
from .peers import dense_peers

LENGTHS = (32768, 65536, 131072, 16384, 8192, 4096)
DENSITIES = (0.1, 0.05, 0.25, 0.5)
HEADS = ((32, 8), (16, 16), (24, 8), (64, 8), (64, 4))  # GQA ratios 4, 1, 3, 8, 16
CHECKED = "triton"  # implementation whose error is compared with that of eager attention
ROUNDS = 20
LONG_ROUNDS = 7  # at 64k tokens and beyond

Entry = tuple[str, LayerShape, Callable[[LayerShape], dict[str, Any]]]


def _shape(length: int, density: float, heads: tuple[int, int] = HEADS[0], batch: int = 1, **sizes: Any) -> LayerShape:
    sizes = {"head_dim": 128, "device": "cuda", **sizes}
    return LayerShape(length, None, density, heads=heads[0], groups=heads[1], batch=batch, **sizes)


def _rounds(shape: LayerShape) -> int:
    return LONG_ROUNDS if shape.length >= 65536 else ROUNDS


def check(shape: LayerShape) -> dict[str, Any]:
    """Root-mean-square errors against float64 of the output and all gradients: of the checked implementation and of eager attention."""
    layer = Layer(replace(shape, keys=256))
    selection = layer.select()
    tensors = (layer.q, layer.k, layer.v)
    grad = layer.random_gradient()

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
        out, _ = block_sparse_attention(q, k, v, selection, impl=impl)
        out.backward(grad.to(dtype))
        return [out.detach().double(), *(leaf.grad.double() for leaf in (q, k, v) if leaf.grad is not None)]

    exact = run("reference", torch.float64)
    errors = []
    for impl in (CHECKED, "reference"):
        got = run(impl, layer.q.dtype)
        errors.append([float((a - b).square().mean().sqrt()) for a, b in zip(got, exact, strict=True)])
    names = ("out", "dq", "dk", "dv")
    return {
        "benchmark": "check",
        "shape": f"{shape.dtype} D={shape.head_dim} {shape.heads}/{shape.groups} S={shape.block_size} N={shape.length}",
        "error": dict(zip(names, errors[0], strict=True)),
        "eager_error": dict(zip(names, errors[1], strict=True)),
        "passed": all(ours <= 1.1 * eager + 1e-6 for ours, eager in zip(*errors, strict=True)),
    }


@torch.no_grad()
def dense_share(shape: LayerShape) -> dict[str, Any]:
    """The sparse kernel with every block kept against the best dense kernel: the share of its rate that sparsity starts from."""
    layer = Layer(shape)
    grid = TileGrid(shape.length, shape.length, layer.router.config.query_tile, shape.block_size)
    block = torch.arange(grid.blocks, device=layer.q.device, dtype=torch.int64)
    visible = block <= (grid.last_positions(layer.q.device) // shape.block_size)[:, None]
    indices = torch.where(visible, block, -1).sort(-1).values.int().expand(shape.batch, shape.groups, -1, -1).contiguous()
    selection = BlockSelection(indices, grid)
    layer.verify(layer.attend(selection), selection)
    peers = dense_peers(layer)
    times = alternate({"every block": lambda: layer.attend(selection), **peers}, _rounds(shape), shape.device)
    best = fastest(times, peers)
    flops = 4 * shape.batch * shape.heads * shape.head_dim * shape.dense_pairs
    return {
        "benchmark": "dense share",
        "length": shape.length,
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "baseline": best,
        "share": ratio(times[best], times["every block"]),
        "tflops": {name: flops / statistics.median(seconds) / 1e12 for name, seconds in times.items()},
        "times": {name: spread(seconds) for name, seconds in times.items()},
    }


def gpu_entries() -> Iterator[Entry]:
    """What is measured, in order: correctness, the dense limit, the rows of the targets, then the rest of the grid."""
    for dtype, head_dim, block_size in itertools.product(("bfloat16", "float16", "float32"), (64, 128), (16, 64)):
        yield "check", _shape(1000, 0.1, (12, 4), 2, dtype=dtype, head_dim=head_dim, block_size=block_size), check
    for length, block_size in ((8192, 64), (32768, 64), (32768, 16)):
        yield "dense share", _shape(length, 0.1, block_size=block_size), dense_share
    for block_size, length in itertools.product((64, 16), (32768, 65536, 131072)):
        yield "prefill", _shape(length, 0.1, block_size=block_size), _prefill
    for length, density in ((32768, 0.1), (65536, 0.05), (131072, 0.05)):
        yield "backward", _shape(length, density, block_size=64), _backward
    for length in (32768, 131072):
        yield "decode", replace(_shape(length, 0.1), keys=4096), _decode
        yield "router", _shape(length, 0.1), bench_router
    for length, density, heads, batch in itertools.product(LENGTHS, DENSITIES, HEADS, (1, 4)):
        if batch * length <= 131072:
            yield "grid", _shape(length, density, heads, batch, block_size=64), _prefill


_dense: dict[tuple[Any, ...], dict[str, list[float]]] = {}


def _prefill(shape: LayerShape) -> dict[str, Any]:
    """`bench_attention`, with the dense kernels timed once for all densities of the same sizes."""
    sizes = (shape.length, shape.heads, shape.groups, shape.head_dim, shape.batch, shape.dtype)
    if sizes not in _dense:
        with torch.no_grad():
            peers = dense_peers(Layer(shape))
            _dense[sizes] = alternate(peers, _rounds(shape), shape.device)
    return bench_attention(shape, repeats=_rounds(shape), dense=_dense[sizes])


def _backward(shape: LayerShape) -> dict[str, Any]:
    return bench_backward(shape, repeats=_rounds(shape))


def _decode(shape: LayerShape) -> dict[str, Any]:
    return bench_decode(shape, repeats=_rounds(shape))


def run_suite(path: Path, seconds: float = 520, entries: Iterator[Entry] | None = None) -> dict[str, Any]:
    """Run the entries until ``seconds`` have passed; ``path`` is rewritten after each, so that nothing measured is lost.

    An entry that fails is recorded with its error, and the next one is run.

    Raises:
        RuntimeError: there is no GPU.
    """
    if entries is None and not torch.cuda.is_available():
        raise RuntimeError("--suite gpu needs a GPU: torch.cuda.is_available() is False")
    start = time.monotonic()
    result: dict[str, Any] = {"environment": environment(), "rows": [], "failed": [], "not_run": []}
    for name, shape, measure in entries or gpu_entries():
        label = f"{name} {shape}"
        if time.monotonic() - start > seconds:
            result["not_run"].append(label)
            continue
        try:
            row = measure(shape)
        except Exception as error:  # one kernel that fails must not cost the rows after it
            result["failed"].append({"entry": label, "error": f"{type(error).__name__}: {error}"})
            print(f"{label}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            result["rows"].append({"suite": name, **row})
            print(_line(name, shape, row), file=sys.stderr, flush=True)
        write_json(path, finite_results(result))
    write_json(path, finite_results(result))
    return result


def _line(name: str, shape: LayerShape, row: dict[str, Any]) -> str:
    label = f"{name}: {shape.length} tokens, {shape.heads}/{shape.groups} heads, batch {shape.batch}, blocks of {shape.block_size}"
    if "passed" in row:
        return f"{row['shape']}: {'passed' if row['passed'] else 'FAILED'} {row['error']}"
    if "share" in row:
        return f"{label}: {row['share']['median']:.2f} of {row['baseline']}"
    if row["benchmark"] == "router":
        return f"{label}: router {row['times']['router']['median_s'] * 1e3:.1f} ms, {row['router_share']:.2f} of the whole"
    speedups = ", ".join(f"{key} {row[key]['median']:.2f}" for key in ("speedup", "speedup_with_router") if key in row)
    return f"{label}, density {shape.density}: {speedups}; ideal {row['ideal_speedup']:.2f}"


if __name__ == "__main__":
    run_suite(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-suite.json"))
