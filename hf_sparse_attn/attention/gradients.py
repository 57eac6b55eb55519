"""Gradients that are set, not derived: zeros, those known before the backward pass, and those of routers that nothing
teaches.

Distributed training waits for the gradient of every weight, and looks for weights behind the output.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..router.module import SparseRouter, active_router

logger = logging.getLogger(__name__)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)


def attach(output: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """``output`` unchanged, with ``tensors`` behind it in the graph: from here their gradients are zero."""
    return _Attach.apply(output, *tensors)  # type: ignore[no-any-return]


class Carried:
    """A weighted sum of gradients, filled during the forward pass; the backward pass reads the sum over ``weight``."""

    def __init__(self, weight: float | Tensor = 0.0) -> None:
        self.grads: list[Tensor] | None = None
        self.weight = weight

    def add(self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], factor: float = 1.0) -> None:
        """Add ``factor`` times the gradients with respect to ``tensors``; None stands for zeros."""
        if self.grads is None:
            self.grads = [torch.zeros_like(t) for t in tensors]
        for total, grad in zip(self.grads, grads, strict=True):
            if grad is not None:
                total.add_(grad, alpha=factor)


# ∂loss/∂t = (∂loss/∂value / weight) · g_t, g_t what was added up for the tensor t.
class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carried: Carried, *tensors: Tensor) -> Tensor:
        ctx.carried, ctx.kinds = carried, [(t.shape, t.dtype, t.device) for t in tensors]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        carried: Carried = ctx.carried
        if carried.grads is None:
            return None, None, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)
        factor = grads[0].float() / carried.weight  # a scalar: products keep the dtype of the gradients
        return None, None, *(g * factor for g in carried.grads)


def carry(value: Tensor, carried: Carried, tensors: Sequence[Tensor]) -> Tensor:
    """``value`` (a scalar without a graph), whose gradient with respect to ``tensors`` is what ``carried`` holds by
    then.

    Nothing is saved for the backward pass in autograd's sense, so gradient checkpointing recomputes nothing for it, and
    every tensor receives a gradient even if nothing was added: distributed training waits for each of them.
    """
    return _Carry.apply(value, carried, *tensors)  # type: ignore[no-any-return]


@cache
def say_once() -> None:
    """Tell that this loop does not train routers."""
    logger.warning(
        "the routers of this sparse model stay frozen: this training loop gives them nothing to learn from. Train with "
        "hf_sparse_attn.SparseTrainer (or SparseTrainerMixin, SparseObjective) to let them follow the model"
    )


def leave_routers(router: SparseRouter, output: Tensor) -> Tensor:
    """``output`` of a layer in a training step without a KL.

    PEFT makes the routers of its adapters trainable, and DistributedDataParallel waits for the gradient of every
    trainable weight: there they get zeros.
    """
    say_once()
    # a process alone waits for no gradients
    weights = [p for p in active_router(router).weights if p.requires_grad]
    if not (weights and dist.is_available() and dist.is_initialized()):
        return output
    return attach(output, weights)
