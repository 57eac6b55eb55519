"""What a 4D attention mask says of padding and packed documents."""

# Shape legend: B batch, N keys, Q queries.

from __future__ import annotations

import torch
from torch import Tensor

HIDES = -1e4  # an additive mask with this value or less leaves a link no weight


def read_mask(mask: Tensor, q_len: int, causal: bool) -> tuple[Tensor, Tensor | None]:
    """Padding mask [B, N] and first slots of documents [B, N] (None: one document a row) that a 4D mask expresses.

    ``mask`` [B or 1, 1, Q, N], boolean or additive, holds for the last Q of N tokens.

    Raises:
        ValueError: it allows or hides other links than causal (or bidirectional) attention with padding and packed
            documents does.
    """
    visible = _visible(mask)
    kv_len, offset = visible.shape[2], visible.shape[2] - q_len
    slot = torch.arange(kv_len, device=mask.device, dtype=torch.int64)
    queries = slot[offset:]
    sees_itself = visible[
        :, torch.arange(q_len, device=mask.device, dtype=torch.int64), queries
    ]  # a query that does not see itself is padding
    first = visible.view(torch.uint8).argmax(-1)  # the first slot that each query sees: where its document starts
    if offset:  # the tokens before the call: real if any real query of it sees them
        real = torch.cat([(visible[:, :, :offset] & sees_itself[:, :, None]).any(1), sees_itself], 1)
        # a call that continues a cache continues one document a row
        document = torch.zeros_like(real, dtype=torch.long)
    else:
        real, document = sees_itself, first
    # the links of plain attention; rows that are padding may hold anything
    want = real[:, None] & (document[:, offset:, None] == document[:, None])
    want &= (slot <= queries[:, None]) if causal else True
    if bool((sees_itself[..., None] & (want != visible)).any()):
        kind = "causal" if causal else "bidirectional"
        raise ValueError(
            f"the 4-dimensional attention mask {tuple(mask.shape)} is not {kind} attention with padding and packed "
            "documents, which is all "
            "that sparse attention can honour. Pass a 2D padding mask, or run dense with "
            'model.set_attn_implementation("sdpa")'
        )
    starts = torch.zeros_like(real)
    if not offset:
        starts = (document == slot) & real
        # the first document of a row cuts nothing
        starts &= (starts.cumsum(1) > 1) | (document != document[:, :1])
    return real, starts if bool(starts.any()) else None


def _visible(mask: Tensor) -> Tensor:
    """Boolean [B or 1, Q, N] of a 4D mask that all heads share."""
    shape = mask.shape
    if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):
        raise ValueError(
            f"the attention mask {tuple(shape)} differs between heads; sparse attention supports one mask for all of "
            "them. "
            'Run dense with model.set_attn_implementation("sdpa")'
        )
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not bool((visible | (mask <= HIDES)).all()):
        raise ValueError(
            f"the additive attention mask {tuple(shape)} holds other values than 0 and those below {HIDES:g}: sparse "
            "attention supports "
            'masks that hide or show, no biases. Run dense with model.set_attn_implementation("sdpa")'
        )
    return visible
