"""What `from_pretrained` and `save_pretrained` of sparse models do beyond the stock ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .config import SparseAttentionConfig
from .files import replaced_folder
from .router import SparseRouter


class SparseSavingMixin:
    """Refuses a checkpoint that lost its trained routers; saves so that a kill leaves the previous files whole."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock method. Raises ValueError if the config says the routers were trained but weights are missing."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        fresh = [m.layer for m in model.modules() if isinstance(m, SparseRouter) and m.fresh]
        if fresh and SparseAttentionConfig.coerce(model.config.sparse_attention).bookkeeping.trained:
            raise ValueError(
                f"{pretrained_model_name_or_path} says that its routers were trained, but holds none for layers {fresh}: it was "
                "probably saved again without hf_sparse_attn. Load the original one, or pass sparse_attention={...} without bookkeeping "
                "to start with untrained routers"
            )
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As the stock method, but files appear under ``save_directory`` only once all of them are complete."""
        if not kwargs.get("is_main_process", True):
            return
        with replaced_folder(Path(save_directory)) as temporary:
            super().save_pretrained(temporary, *args, **kwargs)  # type: ignore[misc]
        if push_to_hub:  # saved again for that: a push that fails must not cost the files
            kwargs.setdefault("repo_id", Path(save_directory).name)
            with replaced_folder(Path(save_directory)) as temporary:
                super().save_pretrained(temporary, *args, push_to_hub=True, **kwargs)  # type: ignore[misc]
