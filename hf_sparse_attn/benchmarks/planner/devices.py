"""What a device can do: memory, rates of products, of memory and of attention. GPUs by their data sheets; the CPU:
`cpu_rates`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

GB = 10**9
# shares of a GPU's peak that are assumed; none of them was measured with this library
MATMUL, ATTENTION, SPARSE_ATTENTION, ROUTING, BANDWIDTH = 0.6, 0.4, 0.25, 0.1, 0.8
RESERVED_BYTES = 3 * GB // 4  # what CUDA's context and the kernels take before any tensor
FRAGMENTATION = 1.05  # memory that torch's caching allocator holds over what tensors need
LAUNCH_SECONDS = 6e-6  # of one operation: Python and the launch, where the device does not hide it


@dataclass(frozen=True)
class Device:
    """Rates in operations and bytes per second, as they are reached, not peaks; memory in bytes.

    ``attention`` are the rates of forward and backward pass of dense causal attention, ``sparse_attention`` those of
    attention over selected blocks, counted in operations of useful pairs (4·D forward, 10·D backward, per pair and
    head). ``routing`` and ``teaching`` are those of selecting and of the KL, in products of both stages.
    """

    name: str
    memory_bytes: int
    products: dict[torch.dtype, float]
    bytes_per_s: float
    attention: tuple[float, float]
    sparse_attention: tuple[float, float]
    routing: float
    teaching: float
    operation_seconds: float
    reserved_bytes: int = 0
    fragmentation: float = 1.0
    note: str = field(default="", compare=False)


# (memory GB, dense bf16 TFLOP/s, float32 TFLOP/s without TF32, memory GB/s), from NVIDIA's data sheets and white papers
GPUS = {
    "B200-180GB": (180, 2250, 75, 7700),  # HGX B200 data sheet, per GPU
    "H200-141GB": (141, 989, 67, 4800),  # H200 data sheet, SXM
    "H100-80GB": (80, 989, 67, 3350),  # H100 data sheet, SXM
    "A100-80GB": (80, 312, 19.5, 2039),  # A100 data sheet, SXM 80GB
    "A100-40GB": (40, 312, 19.5, 1555),  # A100 data sheet, 40GB
    "L40S-48GB": (48, 362, 91.6, 864),  # L40S data sheet
    "L4-24GB": (24, 121, 30.3, 300),  # L4 data sheet (halved: it states sparse rates)
    "RTX4090-24GB": (24, 165.2, 82.6, 1008),  # Ada white paper, accumulating in float32
    "RTX3090-24GB": (24, 71, 35.6, 936),  # GA102 white paper
}


def gpu(name: str) -> Device:
    """The device of that name in GPUS.

    Raises:
        ValueError: there is none.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu is {name!r}; known: {', '.join(GPUS)}, cpu")
    memory, bf16, float32, bandwidth = GPUS[name]
    peak = bf16 * 1e12
    return Device(
        name,
        int(memory * GB),
        {torch.bfloat16: MATMUL * peak, torch.float16: MATMUL * peak, torch.float32: MATMUL * float32 * 1e12},
        BANDWIDTH * bandwidth * GB,
        (ATTENTION * peak, ATTENTION * peak),
        (SPARSE_ATTENTION * peak, SPARSE_ATTENTION * peak),
        ROUTING * peak,
        # the KL is computed in float32
        ROUTING * float32 * 1e12,
        LAUNCH_SECONDS,
        RESERVED_BYTES,
        FRAGMENTATION,
        f"assumed: {MATMUL:.0%} of the peak in products, {ATTENTION:.0%} in dense and {SPARSE_ATTENTION:.0%} in "
        "sparse attention, "
        f"{ROUTING:.0%} in the router, {BANDWIDTH:.0%} of the memory's bandwidth",
    )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this machine can give without swapping, within the limit of a container (Linux;
    elsewhere a 64-bit maximum).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return 2**63 - 1
    # meminfo counts in units of 1024 bytes
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    groups = root / "sys/fs/cgroup"
    limits = (
        _within(groups, "memory.max", "memory.current", "inactive_file"),
        # of cgroup v1
        _within(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    return min(free, *limits)


def _within(group: Path, limit: str, used: str, reclaimable: str) -> int:
    """Bytes that a control group has left, of which it gives file caches back;
    a 64-bit maximum where it sets no limit.
    """
    try:
        most = int((group / limit).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - int((group / used).read_text()) + int(statistics.get(reclaimable, 0)))
    except (OSError, ValueError):  # no such group, or "max"
        return 2**63 - 1
