"""Processes of a distributed run: how they start, and how they are kept alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn


def process_state() -> PartialState:
    """Accelerate's state of this process. Ask for it before ``Accelerator()`` or ``Trainer``, so that a run on CPUs is
    what it says.

    Where there is no accelerator, Accelerate would run the processes that ``accelerate launch`` starts each for itself;
    with ``ACCELERATE_USE_CPU`` it would run DistributedDataParallel where FSDP or DeepSpeed is asked for. After this
    call all three work on CPUs, over gloo. Everywhere else it is ``PartialState()``. Trainer takes the state over with
    ``accelerator_config={"use_configured_state": True}``.
    """
    # one process, or an accelerator: nothing to correct
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (
        torch.accelerator.is_available() and not _flag("ACCELERATE_USE_CPU")
    ):
        return PartialState()
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return PartialState(backend="gloo")
    state = PartialState(cpu=True)
    if _flag("ACCELERATE_USE_FSDP"):
        state.distributed_type = DistributedType.MULTI_GPU  # what Accelerate makes FSDP of; the device stays the CPU
    return state


def materialize_trained(model: nn.Module) -> None:
    """Give trainable weights memory in the processes that read none (``fsdp_cpu_ram_efficient_loading``); FSDP fills
    them later.

    Accelerate finds the sharded weights of an optimiser by the addresses of the whole ones, and on the meta device all
    are 0: without a word the optimiser of such a process would hold one weight many times, and none of the others.
    """
    if not (_flag("ACCELERATE_USE_FSDP") and _flag("FSDP_CPU_RAM_EFFICIENT_LOADING")):
        return
    copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.requires_grad and weight.is_meta:
                if weight not in copies:
                    # any values do until FSDP fills them: what counts is that addresses differ
                    copies[weight] = nn.Parameter(torch.empty_like(weight, device="cpu"))
                module._parameters[name] = copies[weight]


def rank_and_size() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


# mean = Σ_p counts_p · value_p / Σ_p counts_p. One all-reduce: its last entry is the number of processes that count.
def mean_over_processes(values: Mapping[str, float], device: torch.device, counts: bool = True) -> dict[str, float]:
    """The mean of each value over the processes of which this ``counts``; all call this, with the same names."""
    if rank_and_size()[1] == 1:
        return dict(values)
    sums = torch.tensor([*values.values(), 1.0], dtype=torch.float32, device=device) * float(counts)
    dist.all_reduce(sums)
    return dict(zip(values, (sums[:-1] / sums[-1]).tolist(), strict=True))


def mean_tensor(tensor: Tensor, counts: bool = True) -> Tensor:
    """The mean of ``tensor`` over the processes of which this ``counts``; all call this, with the same shape."""
    if rank_and_size()[1] == 1:
        return tensor
    # the appended 1 becomes the number of processes that count
    total = torch.cat([tensor.flatten(), tensor.new_ones(1)]) * float(counts)
    dist.all_reduce(total)
    return (total[:-1] / total[-1]).view_as(tensor)


# g = Σ_p counts_p · g_p / Σ_p counts_p, as in `mean_over_processes`; all weights travel in one message
def average_gradients(weights: Sequence[Tensor], counts: bool) -> bool:
    """Replace the gradients of ``weights`` by their mean over the processes of which this ``counts``.

    All processes call this, with or without gradients of their own. Returns whether any of them counts.
    """
    if rank_and_size()[1] == 1:
        return counts
    gradients = [torch.zeros_like(w) if w.grad is None or not counts else w.grad for w in weights]
    flat = torch.cat(
        [
            *(grad.flatten() for grad in gradients),
            torch.full((1,), float(counts), dtype=gradients[0].dtype, device=gradients[0].device),
        ]
    )
    dist.all_reduce(flat)
    total = float(flat[-1])
    if not total:
        return False
    for weight, mean in zip(weights, (flat[:-1] / total).split([w.numel() for w in weights]), strict=True):
        weight.grad = mean.view_as(weight)
    return True


def same_everywhere(weights: Iterable[Tensor]) -> None:
    """Overwrite ``weights`` with those of the main process."""
    if rank_and_size()[1] > 1:
        for weight in weights:
            dist.broadcast(weight.detach(), 0)


def from_main(value: Any) -> Any:
    """What the main process has as ``value``, in every process."""
    if rank_and_size()[1] == 1:
        return value
    # the collective overwrites the list's entry in all other processes
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
