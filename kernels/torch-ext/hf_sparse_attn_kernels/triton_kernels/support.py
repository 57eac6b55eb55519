"""What the Triton kernels accept; imports no Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
QUERY_TILES = (1, 16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256  # of the features that scores are made of
OTHER = 'or use impl="torch"'


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported(q: Tensor, query_tile: int, block_size: int) -> str | None:
    """Why the attention kernels cannot run on ``q`` [B, H, Q, D] (what is wrong, what is supported, what to do), or
    None.
    """
    return _no_device(q) or _not_among(
        ("head dim", q.shape[-1], HEAD_DIMS),
        ("block_size", block_size, BLOCK_SIZES),
        ("query_tile", query_tile, QUERY_TILES),
        ("dtype", q.dtype, DTYPES),
    )


def unsupported_scores(inputs: tuple[Tensor, ...], query_tile: int = 1, block_size: int = 16) -> str | None:
    """Why the routers' kernels cannot run on ``inputs``, features [..., E] of up to MAX_WIDTH, or None.

    A kernel without tiles or blocks of keys leaves ``query_tile`` or ``block_size`` out.
    """
    x = inputs[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return f'impl="triton": scores have no gradient. Detach the inputs, {OTHER}'
    if x.shape[-1] > MAX_WIDTH:
        return (
            f'impl="triton": features of width {x.shape[-1]} are not supported; supported: up to {MAX_WIDTH}. '
            f"Choose one of them {OTHER}"
        )
    return _no_device(x) or _not_among(
        ("block_size", block_size, BLOCK_SIZES), ("query_tile", query_tile, QUERY_TILES), ("dtype", x.dtype, DTYPES)
    )


def _no_device(x: Tensor) -> str | None:
    if find_spec("triton") is None:
        command = "pip install 'hf_sparse_attn[triton]'"
        return f'impl="triton": the package triton is not installed: {command} (Linux), {OTHER}'
    if x.device.type != "cuda" and not interpreted():
        return (
            f'impl="triton": the tensors are on device "{x.device}"; supported: CUDA and ROCm devices. Move them '
            f"to a GPU {OTHER}"
        )
    return None


def _not_among(*checks: tuple[str, Any, tuple[Any, ...]]) -> str | None:
    for name, value, supported in checks:
        if value not in supported:
            return (
                f'impl="triton": {name}={value} is not supported; supported: {", ".join(map(str, supported))}. '
                f"Choose one of them {OTHER}"
            )
    return None
