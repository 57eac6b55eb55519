"""Learnable two-stage sparse attention for pretrained Transformers models.

Importing this package registers it with Transformers: ``from_pretrained(..., sparse_attention={...})`` then gives a
sparse model; without that argument, and for stock checkpoints, everything stays stock.
"""

from .versions import VERSION, checked_transformers

with checked_transformers():
    from .adapters import load_adapter, lora_config
    from .attending import SparseCall, learned_selector
    from .budgets import KeptKeys, fit_mass_threshold
    from .calibration import remove_calibration, use_calibration
    from .config import SparseAttentionConfig
    from .conversion import set_sparse_attention, sparse_attention_as, sparsify, to_dense
    from .registration import register, sparse_class, sparse_config
    from .sites import routers
    from .training.adaptation import AdaptationConfig, adapt
    from .training.chunked_loss import chunk_loss
    from .training.distillation import distill
    from .training.distiller import DistillationConfig
    from .training.objective import SparseObjective
    from .training.schedule import SparseTrainingConfig

register()

__version__ = VERSION
__all__ = [
    "AdaptationConfig",
    "DistillationConfig",
    "KeptKeys",
    "SparseAttentionConfig",
    "SparseCall",
    "SparseObjective",
    "SparseTrainer",
    "SparseTrainerMixin",
    "SparseTrainingConfig",
    "adapt",
    "chunk_loss",
    "distill",
    "fit_mass_threshold",
    "learned_selector",
    "load_adapter",
    "lora_config",
    "register",
    "remove_calibration",
    "routers",
    "set_sparse_attention",
    "sparse_attention_as",
    "sparse_class",
    "sparse_config",
    "sparsify",
    "to_dense",
    "use_calibration",
]


def __getattr__(name: str) -> object:
    """The Trainer pieces: importing Trainer takes a second, which only those who train should wait."""
    if name in ("SparseTrainer", "SparseTrainerMixin"):
        from .training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
