"""Training steps of a whole model: sparse against stock, in time, memory and loss at equal tokens;
verified before timed.
"""

# shapes: B rows of a step, N tokens of a row

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..models.convert import sparse_attention_as
from ..training.config import AdaptationConfig
from .contenders import DENSE, EAGER, SPARSE, STOCK, WITHOUT_KL, Contender, make_contenders, verify_training
from .memory import Step, measure_peaks, peaks_in_a_fresh_process, trial
from .padding_vs_packing import Batch, bench_layouts, check_layouts, make_layouts, with_memory
from .timing import alternate, ratio, spread

EAGER_LENGTH = 4096  # eager attention keeps every score: beyond this it is left out


@dataclass(frozen=True)
class TrainingShape:
    """What is measured on windows of one length.

    Attributes:
        budget: fields of SparseAttentionConfig that fix the budget, e.g. ``{"min_keys": 1024, "max_keys": 1024}``.
        config: LoRA, optimiser, checkpointing, chunked loss and the KL, the same for sparse and stock.
        eager: also measure stock eager attention, up to 4096 tokens.
        padded: also compare a padded batch of two documents with the same documents packed.
        fresh_process: on a CPU, measure memory in a process of its own (see `memory`); else in this one, on a used
            heap.
    """

    budget: Mapping[str, Any] = field(default_factory=dict)
    config: AdaptationConfig = field(default_factory=AdaptationConfig)
    eager: bool = False
    padded: bool = False
    fresh_process: bool = True


def bench_training(
    model: PreTrainedModel, windows: Sequence[Tensor], shape: TrainingShape | None = None
) -> dict[str, Any]:
    """Training steps on ``windows`` (token ids [B, N] each) of a sparse ``model``, which is left as it was.

    All contenders see the same windows in the same order and start from the same LoRA weights. The first window warms
    up, and is what memory is measured on; every other one is a round in which each contender makes a step. Times are
    seconds,
    memory bytes: ``static_bytes`` between steps (weights, LoRA, optimiser), ``peak_memory_bytes`` above that within a
    step.

    Raises:
        BenchmarkError: with every block kept, loss or gradients are not the stock ones; or the losses of a padded batch
            are not those of the packed one.
        ValueError: fewer than two windows.
    """
    shape = shape or TrainingShape()
    if len(windows) < 2:
        raise ValueError(f"{len(windows)} windows are too few: one to warm up and measure memory, one for each round")
    with sparse_attention_as(model, **shape.budget):
        measured = _measure(model, windows, shape)
    return {
        "benchmark": "training",
        "length": windows[0].shape[1],
        "batch": windows[0].shape[0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "budget": dict(shape.budget),
        "gradient_checkpointing": shape.config.gradient_checkpointing,
        "chunked_loss": shape.config.chunked_loss,
        **measured,
    }


def _measure(model: PreTrainedModel, windows: Sequence[Tensor], shape: TrainingShape) -> dict[str, Any]:
    """Everything of a row that is measured: verified first, then memory, then times."""
    device = str(model.device)
    batches = [{"input_ids": ids.to(device), "labels": ids.to(device)} for ids in windows]
    tokens = windows[0].numel()
    eager = (EAGER,) if shape.eager and windows[0].shape[1] <= EAGER_LENGTH else ()
    contenders = make_contenders(model, shape.config, (SPARSE, WITHOUT_KL, DENSE, STOCK, *eager))
    deviations = verify_training(contenders[SPARSE], contenders[STOCK], batches[0])
    layouts = make_layouts(windows, device) if shape.padded else {}
    losses = {name: check_layouts(contenders[name], layouts) for name in (SPARSE, STOCK)} if layouts else {}
    memory = _peaks(model, contenders, batches[0], layouts, shape)
    # one step of each that is not timed
    for contender in contenders.values():
        contender.step(batches[0])
    rounds = [alternate({n: partial(c.step, batch) for n, c in contenders.items()}, 1, device) for batch in batches[1:]]
    times = {name: [r[name][0] for r in rounds] for name in contenders}
    kinds = {name: _kind(c, times[name], memory[name], tokens) for name, c in contenders.items()}
    compared = bench_layouts(contenders, layouts, len(rounds), device) if layouts else {}
    return {
        "verified": deviations,
        "kinds": kinds,
        **_ratios(times, shape.config.dense_every, tokens),
        "memory_over_stock": {name: memory[name] / memory[STOCK] for name in contenders},
        **({"layout_losses": losses, **with_memory(compared, memory)} if layouts else {}),
    }


def _peaks(
    model: PreTrainedModel,
    contenders: Mapping[str, Contender],
    batch: Batch,
    layouts: Mapping[str, Batch],
    shape: TrainingShape,
) -> dict[str, int]:
    """Peak memory of a step above that at its start, in bytes, by contender and by "contender, layout"."""
    steps: list[Step] = [(name, name, batch) for name in contenders]
    steps += [
        (f"{name}, {layout}", name, documents) for layout, documents in layouts.items() for name in (SPARSE, STOCK)
    ]
    # a GPU's memory is counted by torch; a CPU's heap still holds what earlier steps freed
    if shape.fresh_process and model.device.type == "cpu":
        return peaks_in_a_fresh_process(model, tuple(contenders), steps, shape.budget, shape.config)
    with trial(contenders.values()):
        return measure_peaks(contenders, steps)


def _kind(contender: Contender, times: list[float], peak: int, tokens: int) -> dict[str, Any]:
    losses = [float(loss) for loss in contender.losses]
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
        # (1 − 1 / d) · sparse + 1 / d · dense, d = dense_every
        share = 1 / dense_every
        recipe = [(1 - share) * s + share * d for s, d in zip(times[SPARSE], times[DENSE], strict=True)]
    ours = {**{name: times[name] for name in (SPARSE, WITHOUT_KL, DENSE)}, "recipe": recipe}
    # share of the KL: 1 − (time without / time with it)
    without = ratio(times[WITHOUT_KL], times[SPARSE])
    result: dict[str, Any] = {
        "speedup": {name: ratio(times[STOCK], seconds) for name, seconds in ours.items()},
        "recipe": {**spread(recipe), "dense_every": dense_every, "tokens_per_s": tokens / statistics.median(recipe)},
        "kl_share": 1 - without["median"],
    }
    if EAGER in times:
        result["speedup_over_eager"] = {name: ratio(times[EAGER], seconds) for name, seconds in ours.items()}
    return result
