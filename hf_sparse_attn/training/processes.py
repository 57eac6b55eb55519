"""Processes of a distributed run: how they start, and how they are kept alike."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn


def process_state() -> PartialState:
    """Accelerate's state of this process. Ask for it before ``Accelerator()`` or ``Trainer``, so that a run on CPUs is what it says.

    Where there is no accelerator, Accelerate would run the processes that ``accelerate launch`` starts each for itself;
    with ``ACCELERATE_USE_CPU`` it would run DistributedDataParallel where FSDP or DeepSpeed is asked for. After this call
    all three work on CPUs, over gloo. Everywhere else it is ``PartialState()``. Trainer takes the state over with
    ``accelerator_config={"use_configured_state": True}``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (torch.accelerator.is_available() and not _flag("ACCELERATE_USE_CPU")):
        return PartialState()
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return PartialState(backend="gloo")
    state = PartialState(cpu=True)
    if _flag("ACCELERATE_USE_FSDP"):
        state.distributed_type = DistributedType.MULTI_GPU  # what Accelerate makes FSDP of; the device stays the CPU
    return state


def materialize_trained(model: nn.Module) -> None:
    """Give trainable weights memory in the processes that read none (``fsdp_cpu_ram_efficient_loading``); FSDP fills them later.

    Accelerate finds the sharded weights of an optimiser by the addresses of the whole ones, and on the meta device all are
    0: without a word the optimiser of such a process would hold one weight many times, and none of the others.
    """
    if not (_flag("ACCELERATE_USE_FSDP") and _flag("FSDP_CPU_RAM_EFFICIENT_LOADING")):
        return
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.requires_grad and weight.is_meta:
                if weight not in made:
                    made[weight] = nn.Parameter(torch.empty_like(weight, device="cpu"))
                module._parameters[name] = made[weight]


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
