"""Speed and memory of sparse attention against dense attention, in one run, router included, output verified first."""

from .attention import bench_attention, bench_backward, bench_decode, bench_router, crossover
from .layer import LayerShape
from .meters import BenchmarkError, PeakMemory
from .model import bench_model

__all__ = [
    "BenchmarkError",
    "LayerShape",
    "PeakMemory",
    "bench_attention",
    "bench_backward",
    "bench_decode",
    "bench_model",
    "bench_router",
    "crossover",
]
