"""Static launch parameters by architecture, element size and head dim; no timing at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .support import interpreted


@dataclass(frozen=True)
class Launch:
    """Rows and keys of a program's tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's launcher and compiler are told;
        fused multiply-adds are asked for, as the default is about to change.
        """
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Launches:
    """The launch of each kernel."""

    forward: Launch
    dq: Launch
    dkv: Launch


# Starting points; those of 2-byte types compile without spills on sm_90 (tests/aot), those of float32 spill. None has
# been timed.
# Keys: (architecture or family, bytes an element, head dim up to a power of two); "gfx" is for 64 to 99 KB of shared
# memory.
TABLE = {
    ("sm90", 2, 64): Launches(Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
    ("sm90", 2, 128): Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 32, 8, 2)),
    # 64 rows, which wgmma needs, would spill here
    ("sm90", 2, 256): Launches(Launch(32, 32, 8, 2), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    ("sm90", 4, 64): Launches(Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(32, 32, 4, 2)),
    ("sm90", 4, 128): Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 8, 1)),
    ("sm90", 4, 256): Launches(Launch(16, 32, 4, 1), Launch(16, 32, 8, 1), Launch(16, 16, 8, 1)),
    ("sm80", 2, 64): Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(64, 64, 4, 2)),
    ("sm80", 2, 128): Launches(Launch(64, 64, 8, 3), Launch(64, 64, 8, 2), Launch(64, 32, 8, 2)),
    ("gfx", 2, 64): Launches(Launch(64, 64, 4, 2), Launch(64, 64, 4, 1), Launch(64, 64, 4, 1)),
    ("gfx", 2, 128): Launches(Launch(64, 64, 4, 1), Launch(64, 32, 4, 1), Launch(64, 32, 4, 1)),
    ("gfx", 2, 256): Launches(Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    ("gfx", 4, 64): Launches(Launch(64, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
    ("gfx", 4, 128): Launches(Launch(32, 32, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)),
    ("gfx", 4, 256): Launches(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)),
    ("interpreter", 2, 64): Launches(Launch(128, 64), Launch(128, 64), Launch(128, 64)),
}
# sm_86, sm_89 and sm_120 have 99 KB of shared memory: "gfx"
FAMILIES = {"sm80": "sm90", "sm90": "sm90", "sm100": "sm90"}
SIMPLE = Launch(64, 16)  # kernels without a matrix product
LONG_DECODE = 2  # key tiles that a split of a decode step should at least have


@cache
def architecture(device_type: str, index: int | None) -> str:
    """sm80, sm90, gfx942, ..., or "interpreter"."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


@cache
def processors(device_type: str, index: int | None) -> int:
    """Multiprocessors of the device; the interpreter acts as if it had 8."""
    return 8 if interpreted() else int(torch.cuda.get_device_properties(index).multi_processor_count)


def padded(head_dim: int) -> int:
    """Head dim up to a power of two of at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launches(arch: str, dtype: torch.dtype, head_dim: int) -> Launches:
    """The table's row for an architecture, or for its family; small head dims take that of 64."""
    if arch == "interpreter":
        return TABLE["interpreter", 2, 64]
    key = dtype.itemsize, max(64, padded(head_dim))
    return TABLE[(arch, *key)] if (arch, *key) in TABLE else TABLE[(FAMILIES.get(arch, "gfx"), *key)]


def row_tile(launch: Launch, rows: int) -> int:
    """Rows of a program for a tile of ``rows`` rows: a power of two, at least 16 (the least a matrix unit takes)."""
    return min(launch.block_m, max(16, 1 << (rows - 1).bit_length()))


def decode_splits(programs: int, width: int, block_size: int, block_n: int, multiprocessors: int) -> int:
    """Into how many programs the list of a single query is split: fill the device, but keep LONG_DECODE key tiles each.

    Depends on shapes only, so that a captured graph stays valid.
    """
    most = max(1, width * block_size // (block_n * LONG_DECODE))
    return min(most, max(1, 2 * multiprocessors // max(programs, 1)), 64)


def scoring_launch(dtype: torch.dtype, head_dim: int) -> Launch:
    """Launch of the routers' kernels: key tiles of 64 (a block of 128 is one tile), fewer rows for wide ones."""
    wide = dtype.itemsize * padded(head_dim) > 256
    return Launch(32 if wide else 64, 64, 4, 1 if wide else 2)
