"""Speed and memory of a whole model, sparse against stock, in one run."""

# shapes: N tokens of the prompt with those that are decoded

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..architectures.cache_arguments import MODEL_ARGUMENT
from ..attention.call import SparseCall
from ..config import ATTN_IMPLEMENTATION, fixed_budget
from ..models.convert import sparse_attention_as
from .timing import BenchmarkError, PeakMemory, spread, timed

# allowed: so many times what stock SDPA and eager attention differ by, or epsilons of the model's dtype
ROUNDINGS, EPSILONS = 2, 8


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ‖sparse − sdpa‖ / ‖sdpa‖ ≤ max(2 · ‖eager − sdpa‖ / ‖sdpa‖, 8 ε), over the logits of all tokens
@torch.no_grad()
def verify_model(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise BenchmarkError unless, with every block kept, the sparse path gives the stock logits of ``ids`` to
    rounding.

    How much rounding there is depends on the model, the text and the processor: two stock implementations show it.
    """
    with sparse_attention_as(model, min_keys=ids.shape[1], max_keys=None, mass_threshold=None, dense_below=0):
        sparse = model(ids, use_cache=False).logits.float()
    stock = []
    for name in ("sdpa", "eager"):
        with _implementation(model, name):
            stock.append(model(ids, use_cache=False).logits.float())
    error, rounding = (float((logits - stock[0]).norm() / stock[0].norm()) for logits in (sparse, stock[1]))
    allowed = max(ROUNDINGS * rounding, EPSILONS * torch.finfo(model.dtype).eps)
    if not error <= allowed:
        raise BenchmarkError(
            f"with every block kept the logits differ from the stock model's by {error:.3g} relative (allowed "
            f"{allowed:.3g}; "
            f"its own two implementations differ by {rounding:.3g})"
        )


def cache_sizes(cache: Any) -> dict[str, float]:
    """Bytes of keys and values and of the summaries beside them in a sparse model's ``cache``, and the share of the
    latter.
    """
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    summaries = sum(layer.summary_bytes() for layer in cache.layers)
    return {"keys_values_bytes": kept, "summaries_bytes": summaries, "summaries_share": summaries / kept}


@torch.no_grad()
def bench_model(
    model: PreTrainedModel, ids: Tensor, keys: int, *, decode_tokens: int = 8, repeats: int = 1
) -> dict[str, Any]:
    """Prefill and decode of ``ids`` [1, N] by the sparse ``model`` against stock SDPA and the best dense decode.

    The best dense decode is the sparse model's cache with the query heads of a KV group packed into one matmul. Decode
    steps of the three alternate; sparse and best dense ones take turns on one cache, so their contexts differ by a
    token.

    Raises:
        BenchmarkError: with every block kept the logits are not the stock ones.
    """
    # two tokens a decode step: best dense reads one, sparse the next
    n, device = ids.shape[1] - 2 * decode_tokens, str(model.device)
    verify_model(model, ids[:, :1500])
    prefill: dict[str, list[float]] = {"sparse": [], "stock": []}
    memory: dict[str, int] = {}
    caches: dict[str, Any] = {}
    with sparse_attention_as(model, **fixed_budget(keys)):
        for _ in range(repeats):
            for name, implementation in (("sparse", ATTN_IMPLEMENTATION), ("stock", "sdpa")):
                # a cache for every call; those of the last round serve the decode steps
                caches[name] = DynamicCache(config=model.config)
                with _implementation(model, implementation), PeakMemory(device) as peak:
                    run = partial(model, ids[:, :n], **{MODEL_ARGUMENT: caches[name]}, logits_to_keep=1)
                    prefill[name].append(timed(run, device))
                memory[name] = max(memory.get(name, 0), peak.bytes)
        decode: dict[str, list[float]] = {"sparse": [], "best_dense": [], "stock": []}
        # stock and best dense read the same token, sparse the one behind it
        for at in range(n, n + 2 * decode_tokens, 2):
            one, two = ids[:, at : at + 1], ids[:, at + 1 : at + 2]
            with _implementation(model, "sdpa"):
                decode["stock"].append(timed(partial(model, one, **{MODEL_ARGUMENT: caches["stock"]}), device))
            best = partial(model, one, **{MODEL_ARGUMENT: caches["sparse"]}, sparse_call=SparseCall(dense=True))
            decode["best_dense"].append(timed(best, device))
            decode["sparse"].append(timed(partial(model, two, **{MODEL_ARGUMENT: caches["sparse"]}), device))
    # the first step warms up and grows the caches
    decode = {name: times[1:] or times for name, times in decode.items()}
    return {
        "length": n,
        "keys": keys,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prefill": {
            name: {**spread(times), "tokens_per_s": n / statistics.median(times)} for name, times in prefill.items()
        },
        "decode": {
            name: {**spread(times), "tokens_per_s": 1 / statistics.median(times)} for name, times in decode.items()
        },
        "peak_bytes": memory,
        "cache": cache_sizes(caches["sparse"]),
        "prefill_speedup": statistics.median(prefill["stock"]) / statistics.median(prefill["sparse"]),
        "decode_speedup": statistics.median(decode["stock"]) / statistics.median(decode["sparse"]),
        "decode_speedup_over_best_dense": statistics.median(decode["best_dense"]) / statistics.median(decode["sparse"]),
    }
