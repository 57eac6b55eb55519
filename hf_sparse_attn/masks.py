"""The mask function that Transformers calls beside the attention function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


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
    mask. Packed documents are recognised by the attention function from ``position_ids`` or ``cu_seq_lens_q``. Any other
    mask that a model lays over the causal one comes as a 4D mask, which the attention function honours or refuses.
    """
    sparse = getattr(config, "sparse_attention", None)
    overlaid = use_vmap or _overlays(mask_function)
    # a static cache tells its whole room as kv_length and where the queries start as a tensor; the attention function
    # reads how much is filled, and so decides itself, where a graph is compiled that must not read values
    compiling = torch.compiler.is_compiling()
    static = isinstance(q_offset, Tensor)
    filled = kv_length if not static else sparse["dense_below"] if compiling and sparse else int(q_offset) + q_length
    if sparse is None or local_size is not None or overlaid or filled < sparse["dense_below"]:
        if overlaid and local_size is None:
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
    if attention_mask is None or (not compiling and bool(attention_mask.all())):
        return None
    return attention_mask


def _overlays(mask_function: Callable[..., Any]) -> bool:
    """Whether more links than causal ones are allowed; Transformers joins masks by functions that it calls or_mask and and_mask."""
    return getattr(mask_function, "__name__", "") == "or_mask"
