"""Model sources as ordinary checkpoints: what every process of a run can load, whole or sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..files import replaced_folder
from .sources import local_model


def ordinary_checkpoint(source: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> str:
    """What ``from_pretrained`` loads without further ado: ``source`` itself, or a GGUF file de-quantised to ``dtype`` into ``folder``.

    A folder that holds a checkpoint is used as it is. One process at a time may make it:
    ``with state.local_main_process_first(): ...``

    Raises:
        SourceError: the source cannot be read.
    """
    path, gguf = local_model(source)
    if gguf is None:
        return path
    if not (Path(folder) / "config.json").exists():
        write_checkpoint(path, gguf, folder, dtype)
    return str(folder)


def write_checkpoint(path: str, gguf: str | None, folder: str | Path, dtype: torch.dtype) -> int:
    """Write the causal model at ``path`` (its file ``gguf`` if given) and its tokenizer to ``folder``; returns the number of parameters."""
    extra = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **extra)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra)
    if gguf:  # otherwise save_pretrained refuses: the quantiser's config would be written for plain weights
        model.hf_quantizer.remove_quantization_config(model)
    model = model.to(dtype)
    model.config.dtype = dtype
    with replaced_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return sum(p.numel() for p in model.parameters())
