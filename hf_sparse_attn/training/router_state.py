"""Routers apart from their model: taken, loaded, kept in files, and the hash of all other weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.attach import is_of_router, routers
from ..models.convert import set_sparse_attention
from ..system.files import write_atomically
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


def save_routers(model: nn.Module, path: Path) -> None:
    """Write all router weights, and the settings that were found with them, to a safetensors file."""
    found = {"retrieval_heads": json.dumps(routers(model)[0].config.retrieval_heads)}
    write_atomically(path, lambda temporary: save_file(router_state(model), temporary, metadata=found))


def load_routers(model: nn.Module, path: Path) -> None:
    """Set what `save_routers` wrote. Raises ValueError if it does not match the model."""
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
    load_router_state(model, load_file(path))
    set_sparse_attention(model, **{name: json.loads(value) for name, value in found.items()})
