"""What a call asks of an attention layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """What a call asks of a layer, beside its queries, keys and values.

    Attributes:
        attention_mask: None, a padding mask [B, at least N] or 4D, see `Layout`.
        position_ids: rotary positions [1 or B, Q] of the queries, None for the last of consecutive ones.
        cu_seq_lens: first slots of packed documents and the end, int [documents + 1], or None.
        filled: how many of the keys' slots are filled, int64 [], None for all.
    """

    scale: float
    causal: bool
    softcap: float | None = None
    sinks: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    filled: Tensor | None = None
