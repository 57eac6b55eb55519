"""What a device can do: memory, rates of products, of memory and of attention. GPUs by data sheet, the CPU by a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from hf_sparse_attn_kernels import block_sparse_attention
from torch import Tensor

from ..plan import make_plan
from ..training.losses import tile_loss
from .layer import Layer, LayerShape
from .meters import timed
from .work import AttentionShape, layer_work

GB = 10**9
# shares of a GPU's peak that are assumed; none of them was measured with this library
MATMUL, ATTENTION, SPARSE_ATTENTION, ROUTING, BANDWIDTH = 0.6, 0.4, 0.25, 0.1, 0.8
RESERVED_BYTES = 3 * GB // 4  # what CUDA's context and the kernels take before any tensor
FRAGMENTATION = 1.05  # memory that torch's caching allocator holds over what tensors need
LAUNCH_SECONDS = 6e-6  # of one operation: Python and the launch, where the device does not hide it
OPERATION_SECONDS = 5e-6  # of one operation on a CPU, beside its work
CALIBRATION_TOKENS = 4096
CALIBRATION_KEYS = 1024
TAUGHT_SHARE = 16  # the KL of the calibration is computed on one tile in so many


@dataclass(frozen=True)
class Device:
    """Rates in operations and bytes per second, as they are reached, not peaks; memory in bytes.

    ``attention`` are the rates of forward and backward pass of dense causal attention, ``sparse_attention`` those of
    attention over selected blocks, counted in operations of useful pairs (4·D forward, 10·D backward, per pair and head).
    ``routing`` and ``teaching`` are those of selecting and of the KL, in products of both stages.
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
        ROUTING * float32 * 1e12,
        LAUNCH_SECONDS,
        RESERVED_BYTES,
        FRAGMENTATION,
        f"assumed: {MATMUL:.0%} of the peak in products, {ATTENTION:.0%} in dense and {SPARSE_ATTENTION:.0%} in sparse attention, "
        f"{ROUTING:.0%} in the router, {BANDWIDTH:.0%} of the memory's bandwidth",
    )


def available_memory() -> int:
    """Bytes that this machine can give without swapping (Linux; elsewhere a 64-bit maximum)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return 2**63 - 1
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure_cpu(dtype: str = "bfloat16", hidden: int = 1024, heads: int = 9, groups: int = 3, head_dim: int = 64) -> Device:
    """This CPU, by a measurement of about two seconds on sizes like those of the model."""
    shape = LayerShape(CALIBRATION_TOKENS, CALIBRATION_KEYS, dtype=dtype, heads=heads, groups=groups, head_dim=head_dim)
    layer = Layer(shape)
    selection = layer.select()
    q, k, v = leaves = tuple(x.detach().clone().requires_grad_() for x in (layer.q, layer.k, layer.v))

    def dense_attention() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > groups)

    def sparse_attention() -> Tensor:
        return block_sparse_attention(q, k, v, selection)[0]

    work = layer_work(layer.router.config, AttentionShape(1, heads, groups, head_dim), shape.length, TAUGHT_SHARE, 2)
    kind: torch.dtype = getattr(torch, dtype)
    return Device(
        "cpu",
        available_memory(),
        {name: _product_rate(name, hidden) for name in {kind, torch.float32}},
        _bandwidth(kind, hidden),
        _attention_rates(dense_attention, leaves, 4 * heads * head_dim * shape.dense_pairs),
        _attention_rates(sparse_attention, leaves, shape.flops),
        work.routing / _seconds(layer.select),
        work.teaching / _seconds(lambda: _teach(layer)),
        OPERATION_SECONDS,
        note="measured on this machine just now",
    )


def _teach(layer: Layer) -> None:
    weights = list(layer.router.requires_grad_(True).parameters())
    plan = make_plan(layer.router.config, layer.inputs.grid(layer.router.config.query_tile, layer.shape.block_size))
    count = -(-int(plan.open.sum()) // TAUGHT_SHARE)
    loss = tile_loss(layer.router, layer.inputs, layer.router.config.query_tile, count, torch.Generator().manual_seed(0))
    assert loss is not None
    torch.autograd.grad(loss.coarse + loss.fine, weights)


def _seconds(function: Callable[[], object], least: float = 0.15) -> float:
    """Median seconds of a call, after one that warms up."""
    function()
    times = [timed(function)]
    while sum(times) < least and len(times) < 9:
        times.append(timed(function))
    return statistics.median(times)


def _product_rate(dtype: torch.dtype, hidden: int) -> float:
    x, w = torch.randn(1024, hidden).to(dtype), torch.randn(4 * hidden, hidden).to(dtype)
    return 8 * 1024 * hidden * hidden / _seconds(lambda: F.linear(x, w))


def _bandwidth(dtype: torch.dtype, hidden: int) -> float:
    """Bytes per second of element-wise operations, as a norm or an activation makes them."""
    x, y = (torch.randn(4096, hidden).to(dtype) for _ in range(2))

    def some() -> Tensor:
        return (x * y).float().square().to(dtype) + y

    moved = 8 * x.element_size() + 4 * 4  # per element: operands and results of the five operations
    return x.numel() * moved / _seconds(some)


def _attention_rates(attention: Callable[[], Tensor], leaves: tuple[Tensor, ...], flops: float) -> tuple[float, float]:
    """Rates of forward and backward pass, the latter of two and a half times the operations."""
    with torch.no_grad():
        forward = _seconds(attention)
    grad = torch.randn(leaves[0].shape).to(leaves[0].dtype)
    both = _seconds(lambda: torch.autograd.grad(attention(), leaves, grad))
    return flops / forward, 2.5 * flops / max(both - forward, forward)
