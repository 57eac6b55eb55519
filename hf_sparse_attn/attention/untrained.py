"""Training loops that know nothing of routers: they stay as they are, which is said once, and no process waits for their gradients."""

from __future__ import annotations

import logging
from functools import cache

import torch.distributed as dist
from torch import Tensor

from ..router.module import SparseRouter, active_router
from .gradients import attach

logger = logging.getLogger(__name__)


@cache
def say_once() -> None:
    """Tell that this loop does not train routers."""
    logger.warning(
        "the routers of this sparse model stay frozen: this training loop gives them nothing to learn from. Train with "
        "hf_sparse_attn.SparseTrainer (or SparseTrainerMixin, SparseObjective) to let them follow the model"
    )


def leave_routers(router: SparseRouter, output: Tensor) -> Tensor:
    """``output`` of a layer in a training step without a KL.

    PEFT makes the routers of its adapters trainable, and DistributedDataParallel waits for the gradient of every trainable
    weight: there they get zeros.
    """
    say_once()
    weights = [p for p in active_router(router).weights if p.requires_grad]
    if not (weights and dist.is_available() and dist.is_initialized()):
        return output
    return attach(output, weights)
