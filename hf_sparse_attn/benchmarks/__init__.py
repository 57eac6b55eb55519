"""Speed and memory of sparse attention against dense attention, in one run, router included, output verified first."""

from .attention_call import bench_attention, bench_backward, bench_decode, bench_router, crossover
from .generation import bench_model
from .layer_shape import LayerShape
from .planner.fit import NotEnoughMemoryError, check_memory
from .planner.plan import TrainingPlan, plan_training
from .timing import BenchmarkError, PeakMemory
from .training_step import TrainingShape, bench_training
from .varying_budgets import bench_budgets

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
