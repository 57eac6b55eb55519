"""The same documents as padded rows and packed into one row: losses that must agree, times and memory."""

# shapes: N tokens of the longest document, n of one

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import IGNORE_INDEX
from .contenders import SPARSE, STOCK, Contender
from .timing import BenchmarkError, alternate, ratio, spread

LOSS_EPSILONS = 0.25  # the mean loss of thousands of tokens may differ by so much of the epsilon of the model's dtype

Batch = Mapping[str, Tensor]


def padded_batch(documents: Sequence[Tensor], left: bool = False) -> dict[str, Tensor]:
    """Documents (token ids [n] each) as rows padded to the longest:
    ids, mask, positions and labels, [len(documents), N].
    """
    width = max(len(ids) for ids in documents)
    ids, mask = (torch.zeros(len(documents), width, dtype=torch.long, device="cpu") for _ in range(2))
    for row, document in enumerate(documents):
        at = slice(width - len(document), width) if left else slice(len(document))
        ids[row, at], mask[row, at] = document, 1
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    if left:
        # a pad predicts nothing
        labels[torch.arange(len(documents), dtype=torch.int64, device="cpu"), mask.argmax(1)] = IGNORE_INDEX
    # positions of the content: pads before it stay at 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def packed_batch(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same documents one after the other in one row [1, sum], told apart by ``position_ids``;
    none predicts the next.
    """
    # models shift labels: the last token of a document must not predict the first of the next
    labels = [torch.cat([ids.new_full((1,), IGNORE_INDEX), ids[1:]]) for ids in documents]
    positions = [torch.arange(len(ids), dtype=torch.int64, device="cpu") for ids in documents]
    rows = {"input_ids": list(documents), "position_ids": positions, "labels": labels}
    return {name: torch.cat(parts)[None] for name, parts in rows.items()}


def make_layouts(windows: Sequence[Tensor], device: str) -> dict[str, dict[str, Tensor]]:
    """Two documents, the first window and half of the second, padded and packed, on ``device``."""
    documents = (windows[0][0], windows[1][0, : max(1, windows[1].shape[1] // 2)])
    layouts = {"padded": padded_batch(documents), "packed": packed_batch(documents)}
    return {layout: {name: x.to(device) for name, x in batch.items()} for layout, batch in layouts.items()}


def bench_layouts(
    contenders: Mapping[str, Contender], layouts: Mapping[str, Batch], rounds: int, device: str
) -> dict[str, Any]:
    """Times of a step on every layout by sparse and stock."""
    names = (SPARSE, STOCK)
    steps = {
        f"{name}, {layout}": partial(contenders[name].step, batch)
        for layout, batch in layouts.items()
        for name in names
    }
    times = alternate(steps, rounds, device)
    tokens = layouts["packed"]["input_ids"].numel()
    rows = {
        label: {**spread(times[label]), "tokens_per_s": tokens / statistics.median(times[label])} for label in steps
    }
    speedups = {layout: ratio(times[f"{STOCK}, {layout}"], times[f"{SPARSE}, {layout}"]) for layout in layouts}
    return {
        "documents": layouts["padded"]["attention_mask"].sum(1).tolist(),
        "layouts": rows,
        "layout_speedup": speedups,
    }


def with_memory(compared: dict[str, Any], peaks: Mapping[str, int]) -> dict[str, Any]:
    """What `bench_layouts` returned with the peak memory of each layout's step, in bytes."""
    return {
        **compared,
        "layouts": {label: {**row, "peak_memory_bytes": peaks[label]} for label, row in compared["layouts"].items()},
    }


@torch.no_grad()
def check_layouts(contender: Contender, layouts: Mapping[str, Batch]) -> dict[str, float]:
    """The task losses by layout. Raises BenchmarkError unless they agree."""
    losses = {layout: float(contender.loss(batch)[0]) for layout, batch in layouts.items()}
    padded, packed = losses["padded"], losses["packed"]
    # a share of the loss; the floor is for float32, whose epsilon is less than sums in another order differ by
    allowed = LOSS_EPSILONS * max(torch.finfo(contender.model.dtype).eps, 4e-5)
    if not abs(padded - packed) <= allowed * abs(packed):
        raise BenchmarkError(
            f"the loss of {contender.name} is {padded:.6f} padded and {packed:.6f} packed: more than {allowed:.1g} "
            "relative apart"
        )
    return losses
