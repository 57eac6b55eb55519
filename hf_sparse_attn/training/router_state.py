"""The weights of routers apart from the model's: taken, loaded, and the hash of all others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models.attach import is_of_router
from .run_identity import backbone_parameters, weights_hash


def backbone_hash(model: nn.Module) -> str:
    """SHA-256 over all parameters that are no router's."""
    return weights_hash(backbone_parameters(model))


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all router weights, by parameter name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if is_of_router(name)}


def load_router_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all router weights. Raises ValueError if names or shapes do not match."""
    parameters = {name: p for name, p in model.named_parameters() if is_of_router(name)}
    if parameters.keys() != state.keys():
        raise ValueError(
            f"router weights do not match the model: {sorted(parameters.keys() ^ state.keys())[:4]} are on one side "
            "only"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            if p.shape != state[name].shape:
                raise ValueError(
                    f"router weight {name} has shape {tuple(state[name].shape)}, the model needs {tuple(p.shape)}"
                )
            p.copy_(state[name])
