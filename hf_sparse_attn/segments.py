"""Cutting a batch into documents without padding, so that routing and attention see content positions only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Real tokens of one document: batch rows ``rows`` (all with the same layout) and their key slots.

    ``slots`` int64 [N'] in order, or None for all slots. ``queries`` of them, the last ones, have queries in this call.
    """

    rows: slice
    slots: Tensor | None
    queries: int

    def keys(self, x: Tensor) -> Tensor:
        """The segment's part of ``x`` [B, heads, N, D]."""
        x = x[self.rows]
        return x if self.slots is None else _take(x, self.slots, 2)

    def positions(self, positions: Tensor) -> Tensor:
        """The segment's part of ``positions`` [1 or B, N]."""
        part = positions if positions.shape[0] == 1 else positions[self.rows]
        return part if self.slots is None else part[:, self.slots]

    def query_slots(self, q_len: int, kv_len: int) -> Tensor | None:
        """Indices of the segment's queries among the ``q_len`` of the call, None for all."""
        return None if self.slots is None else self.slots[len(self.slots) - self.queries :] - (kv_len - q_len)


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``index_select`` that is a view where the indices are consecutive."""
    if len(index) and int(index[-1]) - int(index[0]) == len(index) - 1:
        return x.narrow(dim, int(index[0]), len(index))
    return x.index_select(dim, index)


def find_segments(
    batch: int, q_len: int, kv_len: int, mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> list[Segment]:
    """The documents of a call.

    ``mask`` bool [B, N]: False for padding. Packed documents are recognised, in a call without a past, by
    ``cu_seq_lens`` (batch 1) or by ``position_ids`` [1 or B, N] that do not grow.
    """
    return cut_documents(batch, q_len, kv_len, mask, _document_starts(q_len, kv_len, mask, position_ids, cu_seq_lens))


def cut_documents(batch: int, q_len: int, kv_len: int, mask: Tensor | None, starts: Tensor | None) -> list[Segment]:
    """The documents of a call whose padding ``mask`` [B, N] and first slots ``starts`` [1 or B, N] (both boolean) are known."""
    if starts is None and (mask is None or bool(mask.all())):
        return [Segment(slice(0, batch), None, q_len)]
    segments = []
    for row in range(batch):
        slots = torch.arange(kv_len) if mask is None else mask[row].nonzero()[:, 0].cpu()
        if starts is None:
            cuts: list[int] = []
        else:
            cuts = starts[min(row, starts.shape[0] - 1)].cpu()[slots].nonzero()[:, 0].tolist()
        for part in torch.tensor_split(slots, [c for c in cuts if c > 0]):
            queries = int((part >= kv_len - q_len).sum())
            if queries:
                device = None if mask is None else mask.device
                segments.append(Segment(slice(row, row + 1), part.to(device), queries))
    return segments


def _document_starts(
    q_len: int, kv_len: int, mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Boolean [1 or B, N]: the slot starts a new packed document. None if there is but one document a row."""
    if q_len != kv_len:
        return None  # a call that continues a cache continues one document a row
    if cu_seq_lens is not None:
        starts = torch.zeros(1, kv_len, dtype=torch.bool, device=cu_seq_lens.device)
        inner = cu_seq_lens[1:-1].long()
        starts[0, inner[inner < kv_len]] = True
        return starts if len(inner) else None
    if position_ids is None or position_ids.shape[-1] != kv_len:
        return None
    falls = position_ids[:, 1:] <= position_ids[:, :-1]
    if mask is not None:  # positions inside padding are arbitrary: compare each real token with the real one before it
        rows = zip(position_ids.expand(len(mask), -1), mask, strict=True)
        falls = torch.stack([_falls_among_real(row, real) for row, real in rows])
    return torch.nn.functional.pad(falls, (1, 0)) if bool(falls.any()) else None


def _falls_among_real(positions: Tensor, real: Tensor) -> Tensor:
    """Boolean [N − 1]: the real token at slot i + 1 has no higher position than the real token before it."""
    slots = real.nonzero()[:, 0]
    starts = torch.zeros_like(real)
    starts[slots[1:]] = positions[slots[1:]] <= positions[slots[:-1]]
    return starts[1:]


def read_mask(mask: Tensor, q_len: int, causal: bool) -> tuple[Tensor, Tensor | None]:
    """Padding mask [B, N] and first slots of documents [B, N] (None: one document a row) that a 4D mask expresses.

    ``mask`` [B or 1, 1, Q, N], boolean or additive, holds for the last Q of N tokens.

    Raises:
        ValueError: it allows or hides other links than causal (or bidirectional) attention with padding and packed documents does.
    """
    visible = _visible(mask)
    kv_len, offset = visible.shape[2], visible.shape[2] - q_len
    slot = torch.arange(kv_len, device=mask.device)
    queries = slot[offset:]
    own = visible[:, torch.arange(q_len, device=mask.device), queries]  # a query that does not see itself is padding
    first = visible.int().argmax(-1)  # the first slot that each query sees: where its document starts
    if offset:  # the tokens before the call: real if any real query of it sees them
        real = torch.cat([(visible[:, :, :offset] & own[:, :, None]).any(1), own], 1)
        document = torch.zeros_like(real, dtype=torch.long)
    else:
        real, document = own, first
    want = real[:, None] & (document[:, offset:, None] == document[:, None])
    want &= (slot <= queries[:, None]) if causal else True
    if bool((own[..., None] & (want != visible)).any()):
        kind = "causal" if causal else "bidirectional"
        raise ValueError(
            f"the 4-dimensional attention mask {tuple(mask.shape)} is not {kind} attention with padding and packed documents, which is all "
            'that sparse attention can honour. Pass a 2D padding mask, or run dense with model.set_attn_implementation("sdpa")'
        )
    starts = torch.zeros_like(real)
    if not offset:
        starts = (document == slot) & real
        starts &= (starts.cumsum(1) > 1) | (document != document[:, :1])
    return real, starts if bool(starts.any()) else None


def _visible(mask: Tensor) -> Tensor:
    """Boolean [B or 1, Q, N] of a 4D mask that all heads share."""
    if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):
        raise ValueError(
            f"the attention mask {tuple(mask.shape)} differs between heads; sparse attention supports one mask for all of them"
        )
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if bool((~visible & (mask > torch.finfo(mask.dtype).min / 4)).any()):
        raise ValueError(
            f"the additive attention mask [batch, {tuple(mask.shape)[1:]}] holds values between 0 and -inf: sparse attention supports "
            'masks that hide or show, no biases. Run dense with model.set_attn_implementation("sdpa")'
        )
    return visible
