"""Batches as users have them (tensors, lists, rows of a dataset) as inputs of a model, and numbers that are none."""

# shapes: B rows, N tokens, D head dim

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# [B, N]; a row of its own may come as [N]
TOKEN_FIELDS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class NonFiniteError(RuntimeError):
    """Something that is NaN or infinite would be learned from or measured."""


def model_inputs(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """The ``batches`` as tensors that ``model`` takes, without ``labels`` and fields that are None.

    Fields may be tensors, arrays or lists; ``input_ids``, ``attention_mask``, ``position_ids`` and ``token_type_ids``
    may be one row [N] in place of [B, N].

    Raises:
        ValueError: a batch is no mapping, a field holds something else (texts, rows of several lengths), or token ids
            are not integers in the model's vocabulary. The message names batch and field.
    """
    if isinstance(batches, Mapping | str | Tensor):
        raise ValueError(
            f"the batches are one {type(batches).__name__}: give a list of batches, [{{'input_ids': …}}, …]"
        )
    vocabulary = _vocabulary(model)
    return [_inputs(batch, f"batch {at}", vocabulary) for at, batch in enumerate(batches)]


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids ``model`` knows; None of a model that takes none."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def _inputs(batch: Any, where: str, vocabulary: int | None) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{where} is {type(batch).__name__}: must be a mapping of the model's inputs, {{'input_ids': …}}"
        )
    fields = {name: value for name, value in batch.items() if name != "labels" and value is not None}
    if not fields:
        raise ValueError(f"{where} has no inputs (its fields: {', '.join(map(str, batch)) or 'none'}): give input_ids")
    tensors = {str(name): _tensor(value, f"{where}, field {name!r},", str(name)) for name, value in fields.items()}
    if "input_ids" in tensors:
        _check_ids(tensors["input_ids"], f"{where}, field 'input_ids',", vocabulary)
    return tensors


def _tensor(value: Any, where: str, name: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value), device="cpu")
    except (ValueError, TypeError) as error:  # ragged rows, texts
        kind = "rows of several lengths" if "inhomogeneous" in str(error) else f"no numbers ({_example(value)!r})"
        raise ValueError(
            f"{where} holds {kind}: batches hold tensors, arrays or lists of numbers, one length a batch; "
            "drop other columns (dataset.remove_columns), pad rows or give them one by one"
        ) from error
    if tensor.is_floating_point() and tensor.dtype == torch.float64 and not isinstance(value, Tensor):
        tensor = tensor.float()  # a list of Python numbers
    return tensor[None] if name in TOKEN_FIELDS and tensor.ndim == 1 else tensor


def _example(value: Any) -> Any:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, str) else type(value).__name__


def _check_ids(ids: Tensor, where: str, vocabulary: int | None) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{where} is {ids.dtype} {tuple(ids.shape)}: must be integers [B, N]")
    if vocabulary is None or not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"{where} holds token {least if least < 0 else most}: the model's vocabulary is 0 to {vocabulary - 1}"
        )


def check_finite(layer: int, **tensors: Tensor) -> None:
    """Raise NonFiniteError naming layer, tensor and the first position [..., N, D] that is NaN or infinite."""
    for name, x in tensors.items():
        if not bool(torch.isfinite(x).all()):
            # in any row and head
            position = int((~torch.isfinite(x)).any(-1).flatten(0, -2).any(0).nonzero()[0])
            raise NonFiniteError(
                f"layer {layer} has {name} that are NaN or infinite, first at token {position} of the document"
            )
