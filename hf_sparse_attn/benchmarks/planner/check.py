"""Plans against what was measured, and the device that a plan is for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...config import SparseAttentionConfig
from ...models.attach import routers
from ...training.config import AdaptationConfig
from ..contenders import DENSE, SPARSE, STOCK
from .cpu_rates import faster, measure_cpu
from .devices import GPUS, Device, gpu
from .plan import plan_training

PLANNED = {SPARSE: "sparse", DENSE: "dense", STOCK: "stock"}  # kinds of the benchmark -> attention of a plan


def named_device(name: str, config: Any, dtype: torch.dtype, lora: AdaptationConfig | None = None) -> Device:
    """The GPU of that name, or "cpu", measured here on sizes of the model that ``config`` is of.
    Raises ValueError for others.
    """
    return measure_cpu(config, dtype, lora) if name == "cpu" else gpu(name)


def device_here(model: PreTrainedModel, lora: AdaptationConfig | None = None) -> Device | None:
    """The device that ``model`` is on, None for a GPU that is not in the table of devices."""
    return device_at(model.device, model.config, model.dtype, lora)


def device_at(
    where: torch.device, config: PreTrainedConfig, dtype: torch.dtype, lora: AdaptationConfig | None = None
) -> Device | None:
    """The device at ``where`` (a CPU is measured on sizes like those of ``config``), None for a GPU that is not in the
    table.
    """
    if where.type == "cpu":
        return named_device("cpu", config, dtype, lora)
    known = torch.cuda.get_device_name(where).replace(" ", "")
    size = torch.cuda.get_device_properties(where).total_memory
    # the table counts in 10⁹ bytes, and a card has somewhat more or less than its name says
    fitting = [name for name in GPUS if name.partition("-")[0] in known and abs(GPUS[name][0] * 1e9 / size - 1) < 0.15]
    return gpu(fitting[0]) if fitting else None


def faster_here(before: Device, model: PreTrainedModel, lora: AdaptationConfig | None = None) -> Device:
    """The device that ``model`` is on: of a CPU the better rates of ``before`` and of now, so that a busy moment does
    not count.
    """
    return faster(before, measure_cpu(model.config, model.dtype, lora)) if before.name == "cpu" else before


def compare_plan(
    model: PreTrainedModel, device: Device, row: dict[str, Any], training: AdaptationConfig
) -> dict[str, Any]:
    """For each kind of a `bench_training` row what was predicted and its relative error: memory at the peak of a step,
    time.

    Raises:
        ValueError: the model's step cannot be planned.
    """
    sparse = SparseAttentionConfig.coerce(routers(model)[0].config).changed(**row["budget"])
    compared = {}
    for kind, attention in PLANNED.items():
        options = {"batch": row["batch"], "dtype": model.dtype, "sparse_attention": sparse, "training": training}
        plan = plan_training(model.config, device, row["length"], attention=attention, **options)
        measured = row["kinds"][kind]
        memory = measured["static_bytes"] + measured["peak_memory_bytes"]
        # relative errors: predicted / measured − 1
        compared[kind] = {
            **plan.to_dict(),
            "memory_error": (plan.static_bytes + plan.peak_bytes) / memory - 1,
            "step_memory_error": plan.peak_bytes / max(measured["peak_memory_bytes"], 1) - 1,
            "time_error": plan.seconds / measured["median_s"] - 1,
        }
    return compared
