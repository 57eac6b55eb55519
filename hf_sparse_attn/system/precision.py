"""In which dtype to compute: bfloat16 where the processor or GPU multiplies it, float32 elsewhere."""

from __future__ import annotations

import logging
import os
import platform
import time
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels.cpp_kernels.compiling import LEVEL_VARIABLE

logger = logging.getLogger(__name__)

AUTO = "auto"
DTYPES = (AUTO, "bfloat16", "float32", "float16")
WITHOUT_BFLOAT16 = ("avx512", "avx2")  # of what $HF_SPARSE_ATTN_CPU may ask for
ROWS, WIDTH, GPU_SIZE = 256, 1024, 4096  # of the linear layer whose rate is measured
MEASURED_SECONDS = 0.1
# best first: the name, and what torch calls it
X86 = (
    ("AMX", ("amx_tile", "amx_bf16")),
    ("AVX512-BF16", ("avx512_bf16",)),
    ("AVX-512", ("avx512_f",)),
    ("AVX2", ("avx2",)),
)
# of torch versions that do not list what a processor has
OLDER_NAMES = {
    **dict.fromkeys(("amx_tile", "amx_bf16"), "_is_amx_tile_supported"),
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512_f": "_is_avx512_supported",
    "avx2": "_is_avx2_supported",
}


class Choice(NamedTuple):
    """The dtype that ``auto`` stands for, and why."""

    dtype: torch.dtype
    why: str


@cache
def instruction_set() -> str:
    """What this processor multiplies with: AMX, AVX512-BF16, AVX-512, AVX2, or the machine's name with what torch knows
    of it.
    """
    machine = platform.machine()
    if machine.lower() in ("x86_64", "amd64"):
        return next((name for name, needed in X86 if _has(*needed)), "x86-64 without AVX2")
    return f"{machine} {torch.backends.cpu.get_cpu_capability()}{' with bfloat16' if _has('bf16') else ''}"


def computed_with() -> str:
    """`instruction_set`, and what ``$HF_SPARSE_ATTN_CPU`` limits the C++ kernels to."""
    limit = os.environ.get(LEVEL_VARIABLE)
    return instruction_set() if not limit else f"{instruction_set()}, {LEVEL_VARIABLE}={limit}"


def multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether ``device`` has instructions for products of ``dtype``, rather than converting every number."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device != "cpu":
        # what is emulated converts every number
        return dtype == torch.float16 or device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if os.environ.get(LEVEL_VARIABLE) in WITHOUT_BFLOAT16:
        return False
    if dtype == torch.float16:
        return any(map(_has, ("avx512_fp16", "amx_fp16", "fp16_arith")))
    return any(map(_has, ("avx512_bf16", "amx_bf16", "bf16")))


def choice(device: str | None = None) -> Choice:
    """What ``dtype: auto`` is on ``device``, by default the GPU if there is one, else the processor."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        limit = os.environ.get(LEVEL_VARIABLE)
        limited = f" ({LEVEL_VARIABLE}={limit})" if limit in WITHOUT_BFLOAT16 else ""
        name = f"this processor, {instruction_set()}{limited},"
    else:
        name = torch.cuda.get_device_name() if device == "cuda" else device
    if multiplies(torch.bfloat16, device):
        return Choice(torch.bfloat16, f"{name} multiplies bfloat16")
    return Choice(torch.float32, f"{name} has no instructions that multiply bfloat16")


def resolve(name: str, device: str | None = None, *, warn: bool = True) -> torch.dtype:
    """The dtype that ``name`` (one of DTYPES) stands for. A name other than ``auto`` is taken as it is, with one
    warning if that is slow.

    Raises:
        ValueError: another name.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    if name == AUTO:
        return choice(device).dtype
    dtype: torch.dtype = getattr(torch, name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if warn and not multiplies(dtype, device):
        _warn(dtype, device)
    return dtype


def of_saved(dtype: torch.dtype | None, device: str | None = None) -> torch.dtype:
    """The dtype in which ``auto`` loads a model that was saved in ``dtype``:
    that one, or float32 where its products are converted.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.float32 if dtype is None or not multiplies(dtype, device) else dtype


@cache
def _warn(dtype: torch.dtype, device: str) -> None:
    name, factor = str(dtype).removeprefix("torch."), linear_rate(torch.float32, device) / linear_rate(dtype, device)
    logger.warning(
        "dtype %s was asked for, and %s: its linear layers take %.1f times as long as float32's. dtype auto is "
        "float32 here",
        name,
        choice(device).why if dtype == torch.bfloat16 else f"{device} has no instructions that multiply it",
        factor,
    )


def linear_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a linear layer in ``dtype``, the best of a tenth of a second of calls."""
    rows, width = (ROWS, WIDTH) if device == "cpu" else (GPU_SIZE, GPU_SIZE)
    x, w = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, width))
    times: list[float] = []
    with torch.no_grad():
        # untimed: a first call sets up its kernels
        F.linear(x, w)
        while len(times) < 2 or sum(times) < MEASURED_SECONDS:
            _wait(device)
            start = time.perf_counter()
            F.linear(x, w)
            _wait(device)
            times.append(time.perf_counter() - start)
    # 2 · rows · width² operations a call: a multiplication and an addition for each weight and row
    return 2 * rows * width * width / min(times)


def linear_rates(device: str = "cpu") -> dict[str, float]:
    """`linear_rate` of each dtype by its name."""
    return {name: linear_rate(getattr(torch, name), device) for name in DTYPES if name != AUTO}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _has(*flags: str) -> bool:
    """Whether the processor has all of ``flags``, as torch names them."""
    listed = getattr(torch.cpu, "get_capabilities", None)
    if listed is not None:
        lines = listed()
        return all(bool(lines.get(flag)) for flag in flags)
    return all(getattr(torch.cpu, OLDER_NAMES[flag])() if flag in OLDER_NAMES else False for flag in flags)
