"""Speed and memory of sparse attention against dense attention, in one run, router included, output verified first."""

from .attention import bench_attention, bench_backward, bench_decode, bench_router, crossover
from .budgets import bench_budgets
from .layer import LayerShape
from .meters import BenchmarkError, PeakMemory
from .model import bench_model
from .planning import NotEnoughMemoryError, TrainingPlan, check_memory, plan_training
from .training import TrainingShape, bench_training

__all__ = [
    "BenchmarkError",
    "LayerShape",
    "NotEnoughMemoryError",
    "PeakMemory",
    "TrainingPlan",
    "TrainingShape",
    "bench_attention",
    "bench_backward",
    "bench_budgets",
    "bench_decode",
    "bench_model",
    "bench_router",
    "bench_training",
    "check_memory",
    "crossover",
    "plan_training",
]
