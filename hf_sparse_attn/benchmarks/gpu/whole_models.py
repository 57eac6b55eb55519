"""Whole models with random weights in the shapes of known ones: generation, a LoRA step, distilling."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ...config import fixed_budget
from ...models.convert import sparsify
from ...training.config import AdaptationConfig, DistillationConfig
from ...training.distillation import distill
from ..generation import bench_model
from ..timing import PeakMemory
from ..training_step import TrainingShape, bench_training
from .limits import DRY_KEYS
from .rows import Entry

KEYS = 4096  # that sparse attention keeps
DECODED = 16  # tokens after the first
WINDOWS = 256  # of a distilling run that a few batches are extrapolated to


@dataclass(frozen=True)
class Shape:
    """A model's sizes; ``layers`` of its ``all_layers`` are made, and times are those of these."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head_dim: int
    all_layers: int
    layers: int
    vocabulary: int = 128256


SMALL = Shape("1B", 2048, 8192, 32, 8, 64, 16, 16)  # Llama 3.2 1B
LARGE = Shape("8B", 4096, 14336, 32, 8, 128, 32, 8)  # Llama 3.1 8B; a quarter of its layers
TINY = Shape("tiny", 32, 64, 2, 1, 16, 1, 1, 97)


def entries(dry: bool) -> Iterator[Entry]:
    """What is measured, the most important first; models are made anew for each row, so that their memory
    is its own.
    """
    small, large = (TINY, TINY) if dry else (SMALL, LARGE)
    long, longest = (256, 256) if dry else (32768, 131072)
    for shape, length in ((small, long),) if dry else itertools.product((small, large), (long, longest)):
        yield f"{shape.name}, {length} tokens: prefill and decode", partial(generation_steps, shape, length, dry)
    yield f"{small.name}, {long} tokens: LoRA step with its KL", partial(lora_step, small, long, dry)
    half = long if dry else long // 2
    yield f"{small.name}, {half} tokens: distilling", partial(distilling, small, half, dry)
    rows = ((1, "static"),) if dry else ((4, None), (1, None), (1, "static"))
    for batch, cache in rows:
        kind = "static cache, CUDA graphs" if cache else "dynamic cache"
        yield (
            f"{small.name}, {long} tokens, batch {batch}: generate, {kind}",
            partial(generated, small, long, batch, cache, dry),
        )


def make(shape: Shape, dry: bool) -> PreTrainedModel:
    """A sparse model with random weights on the device."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.layers,
        max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    dtype = torch.float32 if dry else torch.bfloat16
    with torch.device("cpu" if dry else "cuda"):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=dtype)
    keys = DRY_KEYS if dry else KEYS
    sparse: PreTrainedModel = sparsify(model, {**fixed_budget(keys), **({"dense_below": 0} if dry else {})}).eval()
    return sparse


def random_ids(shape: Shape, rows: int, length: int, dry: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = torch.randint(3, shape.vocabulary, (rows, length), generator=generator, dtype=torch.int64, device="cpu")
    return ids.to("cpu" if dry else "cuda")


def _sizes(shape: Shape, length: int, batch: int = 1) -> dict[str, Any]:
    return {
        "model": shape.name,
        "layers": shape.layers,
        "all_layers": shape.all_layers,
        "length": length,
        "batch": batch,
    }


def generation_steps(shape: Shape, length: int, dry: bool) -> dict[str, Any]:
    """`bench_model`: one forward pass over a prompt and steps after it, against stock SDPA and the best
    dense decode.
    """
    model = make(shape, dry)
    decoded = 1 if dry else DECODED
    ids = random_ids(shape, 1, length + 2 * decoded, dry)
    repeats = 1 if dry or length > 65536 else 3
    row = bench_model(model, ids, DRY_KEYS if dry else KEYS, decode_tokens=decoded, repeats=repeats)
    return {"benchmark": "model", **_sizes(shape, length), **row}


def lora_step(shape: Shape, length: int, dry: bool) -> dict[str, Any]:
    """`bench_training`: a LoRA step with the routers' KL against the same step of the stock model."""
    keys = DRY_KEYS if dry else KEYS
    windows = [random_ids(shape, 1, length, dry, seed) for seed in range(3)]
    budget = fixed_budget(keys)
    training = TrainingShape(budget, AdaptationConfig(), fresh_process=False)
    return {**_sizes(shape, length), **bench_training(make(shape, dry), windows, training)}


def distilling(shape: Shape, length: int, dry: bool) -> dict[str, Any]:
    """Seconds a window of distilling, from three, and the minutes of a whole run by them."""
    model = make(shape, dry)
    times = [time.monotonic()]
    windows = [{"input_ids": random_ids(shape, 1, length, dry, seed)} for seed in range(1 if dry else 3)]
    distill(model, windows, DistillationConfig(), progress=False, on_batch=lambda _: times.append(time.monotonic()))
    seconds = min(b - a for a, b in itertools.pairwise(times))  # the first compiles kernels
    # in proportion to the layers, of which fewer are made than the model has
    whole = seconds * shape.all_layers / shape.layers * WINDOWS / 60
    return {
        "benchmark": "distilling",
        **_sizes(shape, length),
        "seconds_a_window": seconds,
        "windows": WINDOWS,
        "minutes": whole,
    }


def generated(shape: Shape, length: int, batch: int, cache: str | None, dry: bool) -> dict[str, Any]:
    """Seconds of `generate` up to the first token and a token after it, sparse and stock; the least of two runs."""
    model = make(shape, dry)
    ids = random_ids(shape, batch, length, dry)
    row: dict[str, Any] = {"benchmark": "generate", **_sizes(shape, length, batch), "cache": cache or "dynamic"}
    for name, implementation in (("sparse", None), ("stock", "sdpa")):
        if implementation is not None:
            model.set_attn_implementation(implementation)
        with PeakMemory(str(model.device)) as memory:
            row[name] = _generate(model, ids, cache, 1 if dry else DECODED)
        row[name]["peak_bytes"] = memory.bytes
    for what in ("first_token_s", "token_s"):
        row[f"{what.removesuffix('_s')}_speedup"] = row["stock"][what] / row["sparse"][what]
    return row


@torch.no_grad()
def _generate(model: PreTrainedModel, ids: Tensor, cache: str | None, decoded: int) -> dict[str, float]:
    def seconds(count: int) -> float:
        start = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        generate: Any = model.generate  # of a mixin that a PreTrainedModel is not known to have
        generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    runs = 2 if ids.device.type == "cuda" else 1
    if runs > 1:
        seconds(1 + decoded)  # compiles
    # both runs prefill, so that their difference is decoding: token = (t(1 + d) − t(1)) / d
    first, whole = (min(seconds(count) for _ in range(runs)) for count in (1, 1 + decoded))
    return {"first_token_s": first, "token_s": (whole - first) / decoded}
