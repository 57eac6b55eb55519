"""Model sources as ordinary checkpoints: what every process of a run can load, whole or sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..system.files import read_json, replaced_folder, write_json
from .sources import SourceError, local_model

ORIGIN = "origin.json"  # in a checkpoint: what it was made of


def ordinary_checkpoint(source: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> str:
    """What ``from_pretrained`` loads without further ado: ``source`` itself, or a GGUF file de-quantised to ``dtype``
    into ``folder``.

    A folder that holds a checkpoint (config.json is what a save puts there last) is used as it is, unless it was made
    of something else. One process at a time may make it: ``with state.local_main_process_first(): ...``

    Raises:
        SourceError: the source cannot be read, or ``folder`` holds a checkpoint of another source or dtype.
    """
    path, gguf = local_model(source)
    if gguf is None:
        return path
    origin, known = {"source": source, "dtype": str(dtype)}, Path(folder) / ORIGIN
    if not (Path(folder) / "config.json").exists():
        write_checkpoint(path, gguf, folder, dtype)
        # after a kill before this line the origin is unknown, and the checkpoint is taken as it is
        write_json(known, origin)
    elif known.exists() and (recorded := read_json(known)) != origin:
        raise SourceError(
            f"{folder} holds a checkpoint made of {recorded['source']} in {recorded['dtype']}, not of {source} in "
            f"{dtype}: remove that folder, or "
            "give another"
        )
    return str(folder)


def write_checkpoint(path: str, gguf: str | None, folder: str | Path, dtype: torch.dtype) -> int:
    """Write the causal model at ``path`` (its file ``gguf`` if given) and its tokenizer to ``folder``;
    returns the number of parameters.
    """
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
