"""The mask function that Transformers calls beside the attention function."""

# Shape legend: B batch, N keys.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..config import KEY
from . import static_decode

OVERLAID = (
    "another mask lies over that of packed documents in a compiled model, such as images whose tokens see each other: "
    "run it without torch.compile, or without packing"
)


def sparse_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function registered beside the attention function.

    For layers with a sliding window, and below ``dense_below`` keys, the stock SDPA mask; else None or the 2D padding
    mask, or the document's number of every token where Transformers itself found packed documents in ``position_ids``
    (the attention function finds those that come with a cache, and ``cu_seq_lens_q``). Any other mask that a model lays
    over the causal one comes as a 4D mask, which the attention function honours or refuses.
    """
    sparse = getattr(config, KEY, None)
    overlaid = use_vmap or _overlays(mask_function)
    # a static cache tells its whole room as kv_length and where the queries start as a tensor; the attention function
    # reads how much is filled, and so decides itself, where a graph is compiled that must not read values
    compiling = torch.compiler.is_compiling()
    static = isinstance(q_offset, Tensor)
    unread = compiling or (static and q_length == 1 and static_decode.wanted(q_offset.device))
    filled = kv_length if not static else sparse["dense_below"] if unread and sparse else int(q_offset) + q_length
    if sparse is None or local_size is not None or overlaid or filled < sparse["dense_below"]:
        if overlaid and local_size is None:
            # the stock function leaves out masks that look plainly causal, and an overlay with them
            kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            use_vmap=use_vmap,
            config=config,
            **kwargs,
        )
    if _packs(mask_function):
        return _document_numbers(mask_function, batch_size, q_length, kwargs.get("device", "cpu"))
    # without a mask the attention function has no padding to look for
    if attention_mask is None or (not compiling and attention_mask.ndim == 2 and bool(attention_mask.all())):
        return None
    return attention_mask


def _overlays(mask_function: Callable[..., Any]) -> bool:
    """Whether other links are allowed than causal or bidirectional ones within packed documents."""
    return not (
        mask_function is causal_mask_function or mask_function is bidirectional_mask_function or _packs(mask_function)
    )


def _packs(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function without overlays keeps packed documents apart: Transformers joins the two conditions by
    `and_masks`.

    From Transformers 5.24 on it joins what is laid over a packed mask, such as images whose tokens see each other, by
    it, too.
    """
    if getattr(mask_function, "__name__", "") != "and_mask":
        return False
    # a graph's functions do not tell what they hold: `_document_numbers` asks what they do
    if torch.compiler.is_compiling():
        return True
    (joined,) = _held(mask_function)
    return all(_is_of_documents(part) for part in joined)


def _is_of_documents(part: Callable[..., Any]) -> bool:
    """Whether ``part`` is the causal condition, at the positions within documents or not, or that of the
    same document.
    """
    if part.__qualname__.startswith("remap_positions_for_packed_sequence."):  # not before Transformers 5.18
        return any(inner is causal_mask_function for inner in _held(part))
    return part is causal_mask_function or part.__qualname__.startswith("packed_sequence_mask_function.")


def _held(function: Callable[..., Any]) -> list[Any]:
    """What a function that was made within another one holds of it."""
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _document_numbers(mask_function: Callable[..., Any], batch: int, length: int, device: Any) -> Tensor:
    """The number of every token's document, from 1: int64 [B, N].
    A token sees the one before it unless it is the first of its document.
    """
    row, slot = (
        torch.arange(batch, device=device, dtype=torch.int64)[:, None],
        torch.arange(length, device=device, dtype=torch.int64)[None],
    )
    head = row.new_zeros(())
    first = F.pad(~mask_function(row, head, slot[:, 1:], slot[:, :-1]), (1, 0), value=True)
    if torch.compiler.is_compiling():
        # a graph cannot tell an overlay by name, so it asks what the mask shows: of packed documents
        # each token sees the first one of its document, and none sees its successor
        start = torch.where(first, slot, 0).cummax(1).values
        narrowed = ~mask_function(row, head, slot, start).all()
        widened = mask_function(row, head, slot[:, :-1], slot[:, 1:]).any()
        torch._assert_async(~(narrowed | widened), OVERLAID)
    return first.long().cumsum(1).expand(batch, -1)


def mask_if_it_hides(mask: Any, cache: Any, first: bool | None) -> Any:
    """A padding ``mask`` [B, N] of `generate`, None if it hides nothing.

    That is read at the ``first`` call with a prompt and noted at the ``cache``: what `generate` appends to a mask are
    ones, and reading a value at every token would wait for an accelerator. Without being told which call is the first
    it is not asked here.
    """
    if first is None or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type == "cpu":
        return mask
    if first or not hasattr(cache, "rows_are_padded"):
        cache.rows_are_padded = not bool(mask.all())
    return mask if cache.rows_are_padded else None


def of_the_caches_length(mask: Any, cache: Any) -> Any:
    """A padding ``mask`` [B, N] as long as a static ``cache``, so that one compiled graph serves all steps; any other
    as it is.

    What is added covers slots that hold no keys yet. A model with several kinds of layers has a mask for each, in a
    dict.
    """
    if isinstance(mask, dict):
        return {kind: of_the_caches_length(one, cache) for kind, one in mask.items()}
    static = bool(cache.layers) and all(isinstance(layer, StaticLayer) for layer in cache.layers)
    if not (static and isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    room = max(layer.max_cache_len for layer in cache.layers)
    return F.pad(mask, (0, max(room - mask.shape[1], 0)))
