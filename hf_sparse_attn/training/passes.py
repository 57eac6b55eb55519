"""Forward passes over batches that only observe, select or teach: without logits, in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import SUPPORTED
from ..attention.call import SparseCall
from ..data.model_inputs import model_inputs


def backbone(model: nn.Module) -> Any:
    """What runs the layers of a sparse ``model`` and makes no logits."""
    config: Any = model.config
    # the class that takes the call for modules it does not reach is the outermost one
    return getattr(model, "base_model", model) if SUPPORTED[config.model_type].hands_on else model


@torch.no_grad()
def run_sparse(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], call: SparseCall) -> None:
    """Forward passes over ``batches`` with ``call``, without gradients."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in model_inputs(model, batches):
            inputs = {name: value.to(device) for name, value in batch.items()}
            backbone(model)(**inputs, use_cache=False, sparse_call=call)
    finally:
        model.train(training)
