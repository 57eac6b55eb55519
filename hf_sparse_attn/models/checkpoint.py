"""What `from_pretrained` and `save_pretrained` of sparse models do beyond the stock ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..config import FIXED_FIELDS, KEY, SparseAttentionConfig
from ..router.module import SparseRouter
from ..system.files import replaced_folder
from .calibration import FILE as CALIBRATION
from .calibration import load_calibration, save_calibration
from .layer_numbers import number_layers

# of the options of a load those that say where files are
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class SparseSavingMixin:
    """Refuses a checkpoint that lost its trained routers; saves so that a kill leaves the previous files whole."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock method.

        Raises:
            ValueError: the config says that the routers were trained but weights are missing, or asks for other routers
                than the checkpoint holds.
            CalibrationError: the checkpoint refers to a calibration that is missing, or was made with something else.
        """
        named = pretrained_model_name_or_path is not None  # None: the weights are in state_dict
        # only a config that was passed can ask for other routers than the checkpoint's own; GGUF files hold no settings
        if named and "config" in kwargs and not kwargs.get("gguf_file"):
            _refuse_other_routers(pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        # a pair with output_loading_info=True
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # fresh: some of its weights were not in the checkpoint
        fresh = [m.layer for m in model.modules() if isinstance(m, SparseRouter) and m.fresh]
        bookkeeping = SparseAttentionConfig.coerce(model.config.sparse_attention).bookkeeping
        if fresh and bookkeeping.trained:
            raise ValueError(
                f"{pretrained_model_name_or_path if named else 'the config'} says that its routers were trained, but "
                f"{'it' if named else 'state_dict'} holds none for layers {fresh}: it was "
                "probably saved again without hf_sparse_attn. Load the original one, or pass sparse_attention={...} "
                "without bookkeeping "
                "to start with untrained routers"
            )
        if bookkeeping.calibration is not None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            load_calibration(
                model, bookkeeping.calibration, str(pretrained_model_name_or_path) if named else None, options
            )
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As the stock method, but files appear under ``save_directory`` only once all of them are complete."""
        # every process calls this, the main one alone writes
        if not kwargs.get("is_main_process", True):
            return
        number_layers(self)  # as they are read again
        with replaced_folder(Path(save_directory)) as temporary:
            save_calibration(self, temporary)
            super().save_pretrained(temporary, *args, **kwargs)  # type: ignore[misc]
        # the folder is whole already: what follows replaces it with the same files
        if push_to_hub:  # saved again for that: a push that fails must not cost the files
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
            with replaced_folder(Path(save_directory)) as temporary:
                save_calibration(self, temporary)
                super().save_pretrained(temporary, *args, push_to_hub=True, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Of the files that were there before a push, which leaves them out:
        the calibration is written first, but belongs to it.
        """
        stamps: dict[str, float] = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in stamps.items() if name != CALIBRATION}


def _refuse_other_routers(checkpoint: Any, options: dict[str, Any]) -> None:
    """Raise ValueError if the settings asked for and those that ``checkpoint`` was saved with call for routers of
    different kinds.
    """
    text = options["config"].get_text_config()
    values, _ = PreTrainedConfig.get_config_dict(
        checkpoint, **{name: options[name] for name in HUB_OPTIONS if name in options}
    )
    saved, requested = values.get(KEY), getattr(text, KEY, None)
    if saved is None or requested is None:
        return
    # sizes that settings leave open follow from the head dim: they are compared as the routers would have them
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = [_kind(SparseAttentionConfig.coerce(settings), dim) for settings in (saved, requested)]
    for name, (theirs, ours) in {name: (kinds[0][name], kinds[1][name]) for name in FIXED_FIELDS}.items():
        if theirs != ours:
            raise ValueError(
                f"sparse_attention.{name} {ours} was asked for, but {checkpoint} holds routers for {theirs}: leave it "
                "out, or make new "
                "routers with hf_sparse_attn.sparsify(hf_sparse_attn.to_dense(model), {...})"
            )


def _kind(config: SparseAttentionConfig, head_dim: int) -> dict[str, int]:
    """The fields that the routers' weights depend on, defaults filled in."""
    dims = {"router_dim": config.resolved_router_dim(head_dim), "index_dim": config.resolved_index_dim(head_dim)}
    return {"block_size": config.block_size, **dims}
