"""What the Triton kernels accept; imports no Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
QUERY_TILES = (1, 16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported(q: Tensor, query_tile: int, block_size: int) -> str | None:
    """Why the Triton kernels cannot run on ``q`` [B, H, Q, D] (what is wrong, what is supported, what to do), or None."""
    other = 'or use impl="torch"'
    if find_spec("triton") is None:
        return f'impl="triton": the package triton is not installed; pip install "hf_sparse_attn[triton]" (Linux), {other}'
    if q.device.type != "cuda" and not interpreted():
        return f'impl="triton": q is on device "{q.device}"; supported: CUDA and ROCm devices. Move the tensors to a GPU {other}'
    for name, value, supported in (
        ("head dim", q.shape[-1], HEAD_DIMS),
        ("block_size", block_size, BLOCK_SIZES),
        ("query_tile", query_tile, QUERY_TILES),
        ("dtype", q.dtype, DTYPES),
    ):
        if value not in supported:
            return (
                f'impl="triton": {name}={value} is not supported; supported: {", ".join(map(str, supported))}. Choose one of them {other}'
            )
    return None
