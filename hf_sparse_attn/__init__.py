"""Learnable two-stage sparse attention for pretrained Transformers models.

Importing this package registers it with Transformers: ``from_pretrained(..., sparse_attention={...})`` then gives a
sparse model; without that argument, and for stock checkpoints, everything stays stock.
"""

from .architectures.versions import VERSION, checked_transformers
from .system import old_names

old_names.install()

with checked_transformers():
    from .attention.call import SparseCall, learned_selector
    from .config import SparseAttentionConfig
    from .models.adapters import load_adapter, lora_config
    from .models.attach import routers
    from .models.calibration import remove_calibration, use_calibration
    from .models.convert import set_sparse_attention, sparse_attention_as, sparsify, to_dense
    from .models.mass_monitor import MassMonitor
    from .models.registration import named_class, register, sparse_class, sparse_config
    from .training.chunked_loss import chunk_loss
    from .training.config import AdaptationConfig, DistillationConfig, SparseTrainingConfig
    from .training.distillation import distill
    from .training.lora import adapt
    from .training.mass_threshold import KeptKeys, fit_mass_threshold
    from .training.objective import SparseObjective
    from .training.retrieval_heads import find_retrieval_heads

register()

__version__ = VERSION
__all__ = [
    "AdaptationConfig",
    "DistillationConfig",
    "KeptKeys",
    "MassMonitor",
    "SparseAttentionConfig",
    "SparseCall",
    "SparseObjective",
    "SparseTrainer",
    "SparseTrainerMixin",
    "SparseTrainingConfig",
    "adapt",
    "chunk_loss",
    "distill",
    "find_retrieval_heads",
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
    """The Trainer pieces: importing Trainer takes a second, which others need not wait. Sparse classes, too."""
    if name in ("SparseTrainer", "SparseTrainerMixin"):
        from .training import trainer

        return getattr(trainer, name)
    return named_class(name)
