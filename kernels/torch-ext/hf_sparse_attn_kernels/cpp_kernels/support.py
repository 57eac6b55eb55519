"""What the C++ kernels accept; compiles nothing before it is asked for inputs that fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiling import unavailable

BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER = 'or use impl="torch"'


def unsupported_scores(inputs: tuple[Tensor, ...], query_tile: int = 1, block_size: int = 16) -> str | None:
    """Why the routers' kernels cannot run on ``inputs``, or None; any ``query_tile`` is supported."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return f'impl="cpp": scores have no gradient. Detach the inputs, {OTHER}'
    return unsupported(*inputs, block_size=block_size)


def unsupported(*inputs: Tensor, block_size: int) -> str | None:
    """Why the kernels cannot run on ``inputs`` [..., width] (what is wrong, what is supported, what to do), or None."""
    for x in inputs:
        if x.device.type != "cpu":
            return f'impl="cpp": the tensors are on device "{x.device}"; supported: cpu. Move them to the CPU {OTHER}'
        checks: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("dtype", x.dtype, DTYPES),
            ("block_size", block_size, BLOCK_SIZES),
        )
        for name, value, supported in checks:
            if value not in supported:
                listed = ", ".join(map(str, supported))
                return f'impl="cpp": {name}={value} is not supported; supported: {listed}. Choose one of them {OTHER}'
        if x.shape[-1] % 2:
            return f'impl="cpp": a width of {x.shape[-1]} is not supported; supported: even widths. Choose one {OTHER}'
    reason = unavailable()
    return None if reason is None else f'impl="cpp": {reason}, {OTHER}'
