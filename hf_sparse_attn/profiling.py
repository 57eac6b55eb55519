"""Speed and memory of sparse attention against dense attention, in one run, router included, output verified first."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import block_sparse_attention
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .attention import ATTN_IMPLEMENTATION, SparseCall
from .config import SparseAttentionConfig
from .conversion import sparse_attention_as
from .rotary import Rotary
from .router import RoutingInputs, SparseRouter
from .selecting import select_blocks

VERIFY_TILES = 3  # tiles of the benchmarked output that are computed again in float64
PAGE_BYTES = 4096


class BenchmarkError(RuntimeError):
    """A benchmark whose output is wrong; no time is reported."""


class PeakMemory:
    """Peak resident memory of this process above that at the start of a ``with`` block, in bytes, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *_: object) -> None:
        self._peak = max(self._peak, _resident())
        self._stop.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self._peak - self._start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _release_freed_memory() -> None:
    """Give memory that the C library holds on to back to the system (glibc only), so that a peak is not hidden by it."""
    libc = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(libc), "malloc_trim", None) if libc else None
    if trim is not None:
        trim(0)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, least and most of some times in seconds, with their number."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "n": len(seconds)}


@torch.no_grad()
def bench_attention(
    length: int = 16384,
    keys: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: int = 9,
    groups: int = 3,
    head_dim: int = 64,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """One attention layer, router included, against SDPA causal on the same random q, k and v, alternating.

    Returns times, the speed-up of each pair of runs, and the peak memory beyond q, k, v and the output in bytes.

    Raises:
        BenchmarkError: the sparse output differs from a float64 computation over the selected keys.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, length, head_dim, generator=generator).to(dtype) for h in (heads, groups, groups))
    rotary = Rotary(LlamaRotaryEmbedding(LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads, head_dim=head_dim)))
    router = SparseRouter(SparseAttentionConfig(min_keys=keys, max_keys=keys), heads, groups, head_dim, rotary, 0)
    router.init_weights()
    inputs = RoutingInputs(q, k, torch.arange(length)[None], head_dim**-0.5)
    dense_k, dense_v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))

    def sparse() -> Tensor:
        return block_sparse_attention(q, k, v, select_blocks(router, inputs))[0]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, dense_k, dense_v, is_causal=True)

    _release_freed_memory()
    with PeakMemory() as memory:  # the first call at this size, so that no memory kept from an earlier one hides its need
        out = sparse()
    verify_attention(out, router, inputs, v)
    dense()
    pairs = [(timed(dense), timed(sparse)) for _ in range(repeats)]
    routing = [timed(lambda: select_blocks(router, inputs)) for _ in range(repeats)]
    speedups = [a / b for a, b in pairs]
    return {
        "length": length,
        "keys": keys,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads,
        "groups": groups,
        "head_dim": head_dim,
        "dense": spread([a for a, _ in pairs]),
        "sparse_with_router": spread([b for _, b in pairs]),
        "router": spread(routing),
        "speedup": {"median": statistics.median(speedups), "min": min(speedups), "max": max(speedups)},
        "ideal_speedup": _dense_pairs(length) / _kept_pairs(length, keys),
        "extra_bytes": max(0, memory.bytes - out.numel() * out.element_size()),
    }


def _dense_pairs(length: int) -> float:
    return length * (length + 1) / 2


def _kept_pairs(length: int, keys: int) -> float:
    return sum(min(i + 1, keys) for i in range(length))


def verify_attention(out: Tensor, router: SparseRouter, inputs: RoutingInputs, v: Tensor) -> None:
    """Raise BenchmarkError unless some tiles of ``out`` agree with float64 attention over the selected keys."""
    selection = select_blocks(router, inputs)
    hg = router.heads // router.groups
    allowed = 32 * torch.finfo(out.dtype).eps * float(v.abs().max())
    for row, group in itertools.product(range(out.shape[0]), range(router.groups)):
        heads = slice(group * hg, (group + 1) * hg)
        for t in torch.linspace(0, selection.grid.tiles - 1, VERIFY_TILES).long().tolist():
            queries = torch.arange(t * router.config.query_tile, min((t + 1) * router.config.query_tile, out.shape[2]))
            blocks = selection.indices[row, group, t]
            keys = (blocks[blocks >= 0].long()[:, None] * router.config.block_size + torch.arange(router.config.block_size)).flatten()
            keys = keys[keys < inputs.k.shape[2]]
            scores = inputs.q[row, heads, queries].double() @ inputs.k[row, group, keys].double().T * inputs.scale
            p = scores.masked_fill(keys > queries[:, None], -torch.inf).softmax(-1)
            error = float((out[row, heads, queries].double() - p @ v[row, group, keys].double()).abs().max())
            if not error <= allowed:
                raise BenchmarkError(f"the sparse output differs from the float64 one by {error:.3g} (allowed {allowed:.3g}) in tile {t}")


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def verify_model(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise BenchmarkError unless, with every block kept, the sparse path gives the stock logits of ``ids`` to rounding."""
    with sparse_attention_as(model, min_keys=ids.shape[1], max_keys=None, dense_below=0):
        sparse = model(ids, use_cache=False).logits.float()
    with _implementation(model, "sdpa"):
        dense = model(ids, use_cache=False).logits.float()
    error = float((sparse - dense).norm() / dense.norm())
    allowed = 8 * torch.finfo(model.dtype).eps
    if not error <= allowed:
        raise BenchmarkError(
            f"with every block kept the logits differ from the stock model's by {error:.3g} relative (allowed {allowed:.3g})"
        )


@torch.no_grad()
def bench_model(model: PreTrainedModel, ids: Tensor, keys: int, *, decode_tokens: int = 8, repeats: int = 1) -> dict[str, Any]:
    """Prefill and decode of ``ids`` [1, N] by the sparse ``model`` against stock SDPA and the best dense decode.

    The best dense decode is the sparse model's cache with the query heads of a KV group packed into one matmul. Decode
    steps of the three alternate; sparse and best dense ones take turns on one cache, so their contexts differ by a token.

    Raises:
        BenchmarkError: with every block kept the logits are not the stock ones.
    """
    n = ids.shape[1] - 2 * decode_tokens
    verify_model(model, ids[:, :1500])
    prefill: dict[str, list[float]] = {"sparse": [], "stock": []}
    memory: dict[str, int] = {}
    caches: dict[str, Any] = {}
    with sparse_attention_as(model, min_keys=keys, max_keys=keys):
        for _ in range(repeats):
            for name, implementation in (("sparse", ATTN_IMPLEMENTATION), ("stock", "sdpa")):
                caches[name] = DynamicCache(config=model.config)
                with _implementation(model, implementation), PeakMemory() as peak:
                    run = lambda: model(ids[:, :n], past_key_values=caches[name], logits_to_keep=1)  # noqa: B023, E731
                    prefill[name].append(timed(run))
                memory[name] = max(memory.get(name, 0), peak.bytes)
        decode: dict[str, list[float]] = {"sparse": [], "best_dense": [], "stock": []}
        for at in range(n, n + 2 * decode_tokens, 2):
            one, two = ids[:, at : at + 1], ids[:, at + 1 : at + 2]
            with _implementation(model, "sdpa"):
                decode["stock"].append(timed(lambda: model(one, past_key_values=caches["stock"])))  # noqa: B023
            dense = SparseCall(dense=True)
            decode["best_dense"].append(timed(lambda: model(one, past_key_values=caches["sparse"], sparse_call=dense)))  # noqa: B023
            decode["sparse"].append(timed(lambda: model(two, past_key_values=caches["sparse"])))  # noqa: B023
    decode = {name: times[1:] or times for name, times in decode.items()}  # the first step warms up and grows the caches
    return {
        "length": n,
        "keys": keys,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prefill": {name: {**spread(times), "tokens_per_s": n / statistics.median(times)} for name, times in prefill.items()},
        "decode": {name: {**spread(times), "tokens_per_s": 1 / statistics.median(times)} for name, times in decode.items()},
        "peak_bytes": memory,
        "prefill_speedup": statistics.median(prefill["stock"]) / statistics.median(prefill["sparse"]),
        "decode_speedup": statistics.median(decode["stock"]) / statistics.median(decode["sparse"]),
        "decode_speedup_over_best_dense": statistics.median(decode["best_dense"]) / statistics.median(decode["sparse"]),
    }
