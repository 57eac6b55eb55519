"""Routers that lack a part of the design, to show what it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...router.module import SparseRouter


def _mean_only(router: SparseRouter) -> None:
    """Stage 1 reads the mean of a block's keys; its weights of the maxima and minima are zero and stay so."""
    mask = torch.ones_like(router.wk)
    mask[:, :, : 2 * router.head_dim] = 0
    with torch.no_grad():
        router.wk.mul_(mask)
    router.requires_grad_(True)  # a hook needs it; distillation sets it back
    router.wk.register_hook(lambda grad: grad * mask)
    router.requires_grad_(False)


def _after_rope(router: SparseRouter) -> None:
    """Stage 1 pools keys and queries as they are, after RoPE, and turns nothing."""
    router.rotary = None


VARIANTS: dict[str, Callable[[SparseRouter], None]] = {"mean only": _mean_only, "after RoPE": _after_rope}


def vary(routers: Iterable[SparseRouter], variant: str) -> None:
    """Turn fresh or loaded routers into a variant, in place, before they are trained or used.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"the variant of the routers is {variant!r}: must be {', '.join(VARIANTS)}")
    for router in routers:
        VARIANTS[variant](router)
