"""What a stopped training is recognised by: it goes on only with the model, settings and texts that it was
begun with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import SparseAttentionConfig
from ..models.attach import is_of_router, routers

STREAMED_ROWS = 2
SAMPLED_ROWS = 16  # of a dataset, spread over it: reading all rows of a large one would take longer than a step
UNCHANGING = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "use_cache",
    "sparse_attention",
)  # of no effect, or told apart


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, kinds and values."""
    digest = hashlib.sha256()
    for name, weight in named:
        _add(digest, name, weight)
    return digest.hexdigest()


def batches_hash(batches: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over the fields of all batches or rows, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch, key=str):
            _add(digest, str(name), batch[name])
        # ends a batch: the fields of two are never read as those of one
        digest.update(b"|")
    return digest.hexdigest()


def rows_hash(rows: Any) -> str:
    """SHA-256 over the number of ``rows`` and a few of them;
    of a stream over the first ones, of an iterator nothing.
    """
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        # spread evenly, the first and the last among them
        picked = sorted({len(rows) * at // SAMPLED_ROWS for at in range(SAMPLED_ROWS)} | {len(rows) - 1})
        return f"{len(rows)} {batches_hash(rows[at] for at in picked)}"
    return "" if isinstance(rows, Iterator) else batches_hash(islice(rows, STREAMED_ROWS))


def model_identity(model: Any) -> dict[str, Any]:
    """What of a sparse ``model``'s settings decides what is learned, JSON-ready."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {name: value for name, value in base.config.to_dict().items() if name not in UNCHANGING}
    settings = without_bookkeeping(routers(model)[0].config)
    return {
        "the model's config": json.loads(json.dumps(config, default=str, sort_keys=True)),
        "sparse_attention": settings,
    }


def without_bookkeeping(settings: SparseAttentionConfig) -> dict[str, Any]:
    """The fields that a user chooses."""
    return {name: value for name, value in settings.to_dict().items() if name != "bookkeeping"}


def differences(known: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What differs between two identities, in words; empty where nothing does."""
    names = []
    for name in current:
        old, new = known.get(name), current[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [
                f"{name}.{key} ({old.get(key)!r} then, {new.get(key)!r} now)"
                for key in sorted({*old, *new})
                if old.get(key) != new.get(key)
            ]
        elif old != new:
            names.append(name if isinstance(new, str) else f"{name} ({old!r} then, {new!r} now)")
    return ", ".join(names)


def backbone_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters that are no router's, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not is_of_router(name)]


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype}{tuple(value.shape)} ".encode())
        for part in _plain(value):
            # as bytes: NumPy has no bfloat16
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return
    array = np.asarray(value)
    digest.update(f"{name} {array.dtype}{array.shape} ".encode())
    digest.update(repr(value).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data of ``tensor``: several of a quantised one, none of one on the meta device."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif not tensor.is_meta:
        yield tensor
