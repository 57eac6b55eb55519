"""Better launch parameters: a small grid for each kernel and head dim, every output checked, the best proposed as a
table.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hf_sparse_attn_kernels import BlockSelection, block_sparse_attention
from hf_sparse_attn_kernels.triton_kernels import launch as table
from hf_sparse_attn_kernels.triton_kernels.launch import Launch, Launches
from torch import Tensor

from ..layer_shape import Layer, LayerShape
from ..timing import timed
from .limits import HEADS, shape
from .rows import Entry, say

LENGTH = 32768
KERNELS = ("forward", "dq", "dkv")
HEAD_DIMS = (128, 64)
GRID = tuple(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)))  # rows, keys, warps, pipeline stages
SECONDS_A_KERNEL = 25
ROUNDS = 5


def entries(dry: bool) -> Iterator[Entry]:
    for head_dim, kernel in itertools.product(HEAD_DIMS[:1] if dry else HEAD_DIMS, KERNELS):
        yield f"{kernel}, head dim {head_dim}", partial(best_launch, kernel, head_dim, dry)


def best_launch(kernel: str, head_dim: int, dry: bool) -> dict[str, Any]:
    """Times by launch of one kernel, in a pass that runs it, and the fastest one whose results are those of the table's
    launch.
    """
    sizes = shape(LENGTH, dry=dry)
    sizes = sizes if dry else replace(sizes, head_dim=head_dim, heads=HEADS[0], groups=HEADS[1])
    run, key, known = _prepared(kernel, sizes)
    start, tried, failed = time.monotonic(), [], {}
    want = run()
    for block_m, block_n, warps, stages in GRID[:1] if dry else GRID:
        # a kernel's share of the session: what was tried until then is compared
        if time.monotonic() - start > SECONDS_A_KERNEL:
            break
        candidate = Launch(block_m, block_n, warps, stages)
        with _launched(key, replace(known, **{kernel: candidate})):
            try:
                _verify(run(), want)
            except Exception as error:  # does not compile, needs too much shared memory, or is wrong: the next one
                failed[str(candidate)] = f"{type(error).__name__}: {error}"[:200]
                continue
            seconds = statistics.median(timed(run, sizes.device) for _ in range(1 if dry else ROUNDS))
        tried.append((seconds, candidate))
    if not tried:
        raise RuntimeError(f"no launch ran: {failed}")
    seconds, best = min(tried, key=lambda entry: entry[0])
    # the table's launch is timed last, as warm as the others
    now = statistics.median(timed(run, sizes.device) for _ in range(1 if dry else ROUNDS))
    say(f"    {key}: {kernel} {best} {seconds * 1e3:.2f} ms, the table's {getattr(known, kernel)} {now * 1e3:.2f} ms")
    return {
        "benchmark": "launches",
        "kernel": kernel,
        "key": list(key),
        "table_s": now,
        "best_s": seconds,
        "proposed": f"{key}: {kernel}={best}",
        "tried": {str(candidate): seconds for seconds, candidate in tried},
        "refused": failed,
    }


def _prepared(kernel: str, sizes: LayerShape) -> tuple[Callable[[], list[Tensor]], tuple[Any, ...], Launches]:
    """(a pass that runs ``kernel`` and returns its results, the table's key for it, the table's launches)."""
    layer = Layer(sizes)
    selection: BlockSelection = layer.select()
    arch = table.architecture(layer.q.device.type, layer.q.device.index)
    known = table.launches(arch, layer.q.dtype, sizes.head_dim)
    # rows of the table: architecture, bytes of a number, head dim padded to a power of two of at least 64
    key = (
        ("interpreter", 2, 64)
        if arch == "interpreter"
        else (arch, layer.q.dtype.itemsize, max(64, table.padded(sizes.head_dim)))
    )
    grad = layer.random_gradient()

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [block_sparse_attention(layer.q, layer.k, layer.v, selection)[0]]

    def backward() -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (layer.q, layer.k, layer.v))
        return list(torch.autograd.grad(block_sparse_attention(q, k, v, selection)[0], (q, k, v), grad))

    return forward if kernel == "forward" else backward, key, known


class _launched:  # a context manager, used as a function
    """Within it the kernels are launched as ``launches`` says for the row ``key`` of the table."""

    def __init__(self, key: tuple[Any, ...], launches: Launches) -> None:
        self.key, self.launches = key, launches

    def __enter__(self) -> None:
        self.before = table.TABLE.get(self.key)
        table.TABLE[self.key] = self.launches

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del table.TABLE[self.key]
        else:
            table.TABLE[self.key] = self.before


def _verify(outputs: list[Tensor], want: list[Tensor]) -> None:
    for got, expected in zip(outputs, want, strict=True):
        # ‖got − want‖ / ‖want‖: another launch adds up in another order, which costs some epsilons
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        if not error <= 4 * torch.finfo(got.dtype).eps:
            raise RuntimeError(f"its results differ by {error:.3g} relative")
