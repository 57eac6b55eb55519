"""Learnable two-stage sparse attention for pretrained Transformers models.

Importing this package registers it with Transformers: ``from_pretrained(..., sparse_attention={...})`` then gives a
sparse model; without that argument, and for stock checkpoints, everything stays stock.
"""

from .versions import VERSION, check_transformers

check_transformers()

from .adapters import load_adapter, lora_config  # noqa: E402  (the version check comes first)
from .attending import SparseCall, learned_selector  # noqa: E402
from .budgets import KeptKeys, fit_mass_threshold  # noqa: E402
from .calibration import remove_calibration, use_calibration  # noqa: E402
from .config import SparseAttentionConfig  # noqa: E402
from .conversion import set_sparse_attention, sparse_attention_as, sparsify, to_dense  # noqa: E402
from .registration import register, sparse_class, sparse_config  # noqa: E402
from .sites import routers  # noqa: E402
from .training.adaptation import AdaptationConfig, adapt  # noqa: E402
from .training.chunked_loss import chunk_loss  # noqa: E402
from .training.distillation import distill  # noqa: E402
from .training.distiller import DistillationConfig  # noqa: E402
from .training.objective import SparseObjective  # noqa: E402
from .training.schedule import SparseTrainingConfig  # noqa: E402

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
