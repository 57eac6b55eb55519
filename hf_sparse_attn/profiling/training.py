"""Training steps of a whole model: sparse against stock, in time, memory and loss at equal tokens; verified before timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..conversion import sparse_attention_as
from ..training.adaptation import AdaptationConfig
from .contenders import DENSE, EAGER, SPARSE, STOCK, WITHOUT_KL, Contender, make_contenders, verify_training
from .meters import BenchmarkError, PeakMemory, alternate, mapped_allocations, ratio, spread

EAGER_LENGTH = 4096  # eager attention keeps every score: beyond this it is left out
LAYOUT_LOSS_EPSILONS = 0.25  # the mean loss of thousands of tokens may differ by so much of the epsilon of the model's dtype
IGNORED = -100  # label of a token that has no loss

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainingShape:
    """What is measured on windows of one length.

    Attributes:
        budget: fields of SparseAttentionConfig that fix the budget, e.g. ``{"min_keys": 1024, "max_keys": 1024}``.
        config: LoRA, optimiser, checkpointing, chunked loss and the KL, the same for sparse and stock.
        eager: also measure stock eager attention, up to 4096 tokens.
        padded: also compare a padded batch of two documents with the same documents packed.
    """

    budget: Mapping[str, Any] = field(default_factory=dict)
    config: AdaptationConfig = field(default_factory=AdaptationConfig)
    eager: bool = False
    padded: bool = False


def bench_training(model: PreTrainedModel, windows: Sequence[Tensor], shape: TrainingShape | None = None) -> dict[str, Any]:
    """Training steps on ``windows`` (token ids [B, N] each) of a sparse ``model``, which is left as it was.

    All contenders see the same windows in the same order and start from the same LoRA weights. The first window measures
    memory and warms up; every other one is a round in which each contender makes a step. Times are seconds, memory bytes:
    ``static_bytes`` between steps (weights, LoRA, optimiser), ``peak_memory_bytes`` above that within a step.

    Raises:
        BenchmarkError: with every block kept, loss or gradients are not the stock ones; or the losses of a padded batch
            are not those of the packed one.
        ValueError: fewer than two windows.
    """
    shape = shape or TrainingShape()
    if len(windows) < 2:
        raise ValueError(f"{len(windows)} windows are too few: one to warm up and measure memory, one for each round")
    device = str(model.device)
    batches = [{"input_ids": ids.to(device), "labels": ids.to(device)} for ids in windows]
    tokens = windows[0].numel()
    eager = (EAGER,) if shape.eager and windows[0].shape[1] <= EAGER_LENGTH else ()
    with sparse_attention_as(model, **shape.budget):
        contenders = make_contenders(model, shape.config, (SPARSE, WITHOUT_KL, DENSE, STOCK, *eager))
        deviations = verify_training(contenders[SPARSE], contenders[STOCK], batches[0])
        memory = {name: _peak(contender, batches[0]) for name, contender in contenders.items()}
        rounds = [alternate({n: partial(c.step, batch) for n, c in contenders.items()}, 1, device) for batch in batches[1:]]
        times = {name: [r[name][0] for r in rounds] for name in contenders}
        layouts = _bench_layouts(contenders, windows, device) if shape.padded else {}
    return {
        "benchmark": "training",
        "length": windows[0].shape[1],
        "batch": windows[0].shape[0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "budget": dict(shape.budget),
        "gradient_checkpointing": shape.config.gradient_checkpointing,
        "chunked_loss": shape.config.chunked_loss,
        "verified": deviations,
        "kinds": {name: _kind(c, times[name], memory[name], tokens) for name, c in contenders.items()},
        **_ratios(times, shape.config.dense_every, tokens),
        "memory_over_stock": {name: memory[name] / memory[STOCK] for name in contenders},
        **layouts,
    }


def _peak(contender: Contender, batch: Batch) -> int:
    """Peak memory of a step above that at its start, in bytes.

    In this process and not in one of its own: what was freed before is given back to the system, the optimiser's states
    exist already, and no tensor comes from the heap, so that the order of the contenders does not matter.
    """
    with mapped_allocations(), PeakMemory(str(contender.model.device)) as memory:
        contender.step(batch)
    return memory.bytes


def _kind(contender: Contender, times: list[float], peak: int, tokens: int) -> dict[str, Any]:
    losses = [float(loss) for loss in contender.losses[: 1 + len(times)]]  # not those of other layouts
    return {
        **spread(times),
        "tokens_per_s": tokens / statistics.median(times),
        "static_bytes": contender.static_bytes,
        "peak_memory_bytes": peak,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _ratios(times: Mapping[str, list[float]], dense_every: int, tokens: int) -> dict[str, Any]:
    """Speed-ups over stock round by round, the recipe's average step, and the KL's share of a sparse step."""
    recipe = times[SPARSE]
    if dense_every:  # one step in so many runs dense
        share = 1 / dense_every
        recipe = [(1 - share) * s + share * d for s, d in zip(times[SPARSE], times[DENSE], strict=True)]
    ours = {**{name: times[name] for name in (SPARSE, WITHOUT_KL, DENSE)}, "recipe": recipe}
    without = ratio(times[WITHOUT_KL], times[SPARSE])
    result: dict[str, Any] = {
        "speedup": {name: ratio(times[STOCK], seconds) for name, seconds in ours.items()},
        "recipe": {**spread(recipe), "dense_every": dense_every, "tokens_per_s": tokens / statistics.median(recipe)},
        "kl_share": 1 - without["median"],
    }
    if EAGER in times:
        result["speedup_over_eager"] = {name: ratio(times[EAGER], seconds) for name, seconds in ours.items()}
    return result


# -- padded against packed -------------------------------------------------------------------------------------------


def padded_batch(documents: Sequence[Tensor], left: bool = False) -> dict[str, Tensor]:
    """Documents (token ids [n] each) as rows padded to the longest: ids, mask, positions and labels, [len(documents), N]."""
    width = max(len(ids) for ids in documents)
    ids, mask = (torch.zeros(len(documents), width, dtype=torch.long) for _ in range(2))
    for row, document in enumerate(documents):
        at = slice(width - len(document), width) if left else slice(len(document))
        ids[row, at], mask[row, at] = document, 1
    labels = ids.masked_fill(mask == 0, IGNORED)
    if left:
        labels[torch.arange(len(documents)), mask.argmax(1)] = IGNORED  # a pad predicts nothing
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def packed_batch(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same documents one after the other in one row [1, sum], told apart by ``position_ids``; none predicts the next."""
    labels = [torch.cat([ids.new_full((1,), IGNORED), ids[1:]]) for ids in documents]
    positions = [torch.arange(len(ids)) for ids in documents]
    rows = {"input_ids": list(documents), "position_ids": positions, "labels": labels}
    return {name: torch.cat(parts)[None] for name, parts in rows.items()}


def _bench_layouts(contenders: Mapping[str, Contender], windows: Sequence[Tensor], device: str) -> dict[str, Any]:
    """Two documents, the second half as long as the first, padded and packed, by sparse and stock."""
    documents = (windows[0][0], windows[1][0, : max(1, windows[1].shape[1] // 2)])
    layouts = {"padded": padded_batch(documents), "packed": packed_batch(documents)}
    layouts = {layout: {name: x.to(device) for name, x in batch.items()} for layout, batch in layouts.items()}
    names = (SPARSE, STOCK)
    losses = {name: _check_layouts(contenders[name], layouts) for name in names}
    steps = {f"{name}, {layout}": (contenders[name], batch) for layout, batch in layouts.items() for name in names}
    memory = {label: _peak(contender, batch) for label, (contender, batch) in steps.items()}
    times = alternate({label: partial(c.step, batch) for label, (c, batch) in steps.items()}, len(windows) - 1, device)
    tokens = sum(map(len, documents))
    rows = {
        label: {**spread(times[label]), "tokens_per_s": tokens / statistics.median(times[label]), "peak_memory_bytes": memory[label]}
        for label in steps
    }
    speedups = {layout: ratio(times[f"{STOCK}, {layout}"], times[f"{SPARSE}, {layout}"]) for layout in layouts}
    return {"documents": [len(d) for d in documents], "layouts": rows, "layout_speedup": speedups, "layout_losses": losses}


@torch.no_grad()
def _check_layouts(contender: Contender, layouts: Mapping[str, Batch]) -> dict[str, float]:
    """The task losses by layout. Raises BenchmarkError unless they agree."""
    found = {layout: float(contender.loss(batch)[0]) for layout, batch in layouts.items()}
    padded, packed = found["padded"], found["packed"]
    allowed = LAYOUT_LOSS_EPSILONS * max(torch.finfo(contender.model.dtype).eps, 4e-5)
    if not abs(padded - packed) <= allowed * abs(packed):
        raise BenchmarkError(
            f"the loss of {contender.name} is {padded:.6f} padded and {packed:.6f} packed: more than {allowed:.1g} relative apart"
        )
    return found
