"""What of the dense attention a router may be taught, per query tile and key block."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import TileGrid, block_mass
from torch import Tensor

from ..router.module import RoutingInputs

TARGETS = ("mass", "max", "output")


@torch.no_grad()
def block_target(inputs: RoutingInputs, grid: TileGrid, tiles: Tensor, target: str) -> Tensor:
    """The teacher of the query tiles ``tiles`` (int64 [m]) of ``grid``: float32 [B, G, m, nb], not negative.

    From every key's softmax mass, averaged over a tile's tokens and a group's heads: "mass" is its sum over a block, "max" its
    largest value there, so that a single strong key counts more than many weak ones, and "output" its sum with each key weighted
    by the norm of its value, which bounds what the block adds to the output.

    Raises:
        ValueError: another target, or "output" where the layer gives no values.
    """
    if target == "mass":
        return block_mass(inputs.q, inputs.k, grid, tiles, inputs.scale)
    if target not in TARGETS:
        raise ValueError(f"the target is {target!r}: must be {', '.join(TARGETS)}")
    keys = block_mass(inputs.q, inputs.k, replace(grid, block_size=1), tiles, inputs.scale, impl="torch")
    if target == "output":
        if inputs.v is None:
            raise ValueError("the target 'output' needs the layer's values, which these inputs lack: observe a forward pass of a model")
        keys = keys * inputs.v.float().norm(dim=-1)[:, :, None]
    blocks = F.pad(keys, (0, grid.blocks * grid.block_size - grid.kv_len)).unflatten(-1, (grid.blocks, grid.block_size))
    made: Tensor = blocks.amax(-1) if target == "max" else blocks.sum(-1)
    return made
