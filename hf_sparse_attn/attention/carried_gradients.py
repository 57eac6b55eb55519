"""Gradients that are known before the backward pass, carried to where autograd expects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
    """``value`` (a scalar without a graph), whose gradient with respect to ``tensors`` is what ``carried`` holds by then.

    Nothing is saved for the backward pass in autograd's sense, so gradient checkpointing recomputes nothing for it, and
    every tensor receives a gradient even if nothing was added: distributed training waits for each of them.
    """
    return _Carry.apply(value, carried, *tensors)  # type: ignore[no-any-return]
