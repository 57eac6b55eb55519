"""Cutting a batch into documents without padding, so that routing and attention see content positions only."""

# Shape legend: B batch, N keys, Q queries.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_4d import read_mask
from .segments import Segment, cut_documents


@dataclass(frozen=True)
class Layout:
    """What a call, the last Q of N tokens of B rows, tells of padding and documents.

    Attributes:
        batch: rows, B.
        q_len: queries, Q.
        kv_len: keys, N.
        mask: None; [B, at least N], zero for padding and, if it holds integers, another number for each packed
            document; or 4D, see `read_mask`.
        causal: whether the attention is.
        position_ids: [1 or B, Q]; in a causal call without a past, a document starts where they do not grow.
        cu_seq_lens: in a call without a past, ends of the packed documents, counted over all tokens of the batch.
    """

    batch: int
    q_len: int
    kv_len: int
    mask: Tensor | None
    causal: bool = True
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None

    def segments(self) -> list[Segment]:
        """The documents. Raises ValueError if something is told that cannot be honoured.

        All layers of a forward pass ask with the same contents: the last answer is kept (not beside an N×N mask).
        """
        plain_step = self.mask is None and self.q_len == 1  # nothing to find
        if plain_step or (self.mask is not None and self.mask.ndim == 4):
            return self._find_segments()
        global _last_answer
        layout, kept, segments = _last_answer
        if layout is None or not self._tells_the_same_as(layout, kept):
            segments = self._find_segments()
            contents = [None if x is None else x.clone() for x in self._told()]  # who owns them may change them
        else:
            contents = [None if noted is None else noted[1] for noted in kept]
        noted = (
            None if x is None or content is None else (_version(x), content)
            for x, content in zip(self._told(), contents, strict=True)
        )
        _last_answer = (self, tuple(noted), segments)
        return segments

    def _told(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.mask, self.position_ids, self.cu_seq_lens

    def _tells_the_same_as(self, other: Layout, kept: _Kept) -> bool:
        """Whether ``other``, whose tensors had the versions and contents ``kept``, was told the same.

        The layers of a forward pass share tensors, which tell so without being read: on a GPU reading would wait for
        it. On a CPU they are read, as memory that is shared with others may change without torch's knowing.
        """
        if (self.batch, self.q_len, self.kv_len, self.causal) != (other.batch, other.q_len, other.kv_len, other.causal):
            return False
        for mine, theirs, noted in zip(self._told(), other._told(), kept, strict=True):
            if mine is None or noted is None:
                if mine is not None or noted is not None:
                    return False
                continue
            version, content = noted
            if mine is theirs and mine.device.type != "cpu" and version is not None and _version(mine) == version:
                continue
            if (mine.dtype, mine.device) != (content.dtype, content.device) or not torch.equal(mine, content):
                return False
        return True

    def _find_segments(self) -> list[Segment]:
        real, starts = self._told_by_mask()
        segments = cut_documents(self.batch, self.q_len, self.kv_len, real, _join(starts, self._starts(real)))
        return [
            replace(segment, consecutive=consecutive)
            for segment, consecutive in zip(segments, self._consecutive(segments), strict=True)
        ]

    def _consecutive(self, segments: list[Segment]) -> list[bool | None]:
        """Of each document whether the positions of its queries grow by one, None for unknown."""
        positions = self.position_ids
        if positions is None or self.q_len == 1:
            return [True] * len(segments)
        if positions.ndim != 2 or positions.shape[1] != self.q_len:
            return [None] * len(segments)
        if all(segment.slots is None for segment in segments):
            return [bool((positions.diff() == 1).all())] * len(segments)
        # one copy to the host, not a wait for each document; one row may stand for all of the batch
        positions = positions.cpu()
        return [
            bool(
                (
                    positions[
                        min(segment.rows.start, len(positions) - 1),
                        segment.query_slots_on_host(self.q_len, self.kv_len),
                    ].diff()
                    == 1
                ).all()
            )
            for segment in segments
        ]

    def packed(self) -> list[Segment] | None:
        """The documents for an attention that honours any 4D mask itself; None if a row has but one."""
        four = self.mask is not None and self.mask.ndim == 4
        real, starts = (self._sees_itself(), None) if four else self._told_by_mask()
        starts = _join(starts, self._starts(real))
        return (
            None
            if starts is None or not bool(starts.any())
            else cut_documents(self.batch, self.q_len, self.kv_len, real, starts)
        )

    def mask_of_documents(self) -> Tensor | None:
        """The mask (None or 4D) without links between documents; no value of a tensor is read."""
        starts = self._starts(self._sees_itself())
        if starts is None:
            return self.mask
        # tokens of one document have one number
        number = starts.cumsum(1)
        links = (number[:, :, None] == number[:, None])[:, None]
        if self.mask is None:
            return links.tril() if self.causal else links
        return (
            self.mask & links
            if self.mask.dtype == torch.bool
            else self.mask.masked_fill(~links, torch.finfo(self.mask.dtype).min)
        )

    def _sees_itself(self) -> Tensor | None:
        """Which tokens of a call without a past are real [B, N], by a 4D mask:
        one that does not see itself is padding.
        """
        if self.mask is None or self.q_len != self.kv_len:
            return None
        links = self.mask[:, 0, :, : self.kv_len].diagonal(dim1=1, dim2=2)
        return (links if links.dtype == torch.bool else links == 0).expand(self.batch, -1)

    def _told_by_mask(self) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are real [B, N], and which start a document [1 or B, N]; None for all and for none."""
        mask, kv_len = self.mask, self.kv_len
        if mask is None:
            return None, None
        shape = tuple(mask.shape)
        if mask.ndim == 4 and shape[0] in (1, self.batch) and shape[2] == self.q_len and shape[3] >= kv_len:
            real, starts = read_mask(mask[..., :kv_len], self.q_len, self.causal)
            return real.expand(self.batch, -1), starts
        if mask.ndim != 2 or shape[0] not in (1, self.batch) or shape[1] < kv_len:
            raise ValueError(
                f"sparse attention got an attention mask {shape} for {self.batch} rows, {self.q_len} queries and "
                f"{kv_len} keys; supported: "
                "None, a padding mask [batch, keys] or a 4D mask [batch, 1, queries, keys]. "
                'Or run dense with model.set_attn_implementation("sdpa")'
            )
        # a boolean mask tells of padding only, integers also number the documents
        numbers = mask[:, :kv_len].expand(self.batch, -1)
        return numbers.bool(), None if numbers.dtype == torch.bool else _starts_where(torch.ne, numbers, numbers.bool())

    def _starts(self, real: Tensor | None) -> Tensor | None:
        """Boolean [1 or B, N]: the slot starts a packed document that is not the row's first. None if nothing tells of
        documents.

        A call that continues a cache continues one document a row.
        """
        if self.cu_seq_lens is not None:
            numbers = self._document_numbers(self.cu_seq_lens)
            return None if numbers is None else _starts_where(torch.ne, numbers, real)
        # stock bidirectional attention takes position_ids as they are: they do not cut documents
        if not self.causal or self.q_len != self.kv_len or self.q_len == 1 or self.position_ids is None:
            return None
        return None if self.position_ids.shape[-1] != self.kv_len else _starts_where(torch.ge, self.position_ids, real)

    def _document_numbers(self, cu_seq_lens: Tensor) -> Tensor | None:
        """The number of every token's document, int64 [B, N]; None in a call with a past."""
        ends, total = cu_seq_lens[1:].long(), self.batch * self.kv_len
        if self.q_len != self.kv_len:
            if len(ends) > 1:
                raise ValueError(
                    f"cu_seq_lens tells of {len(ends)} documents in a call with {self.q_len} queries and "
                    f"{self.kv_len} keys: packed "
                    "documents are supported in a call without a past only"
                )
            return None
        # a graph must not read values
        if not torch.compiler.is_compiling() and ((last := int(ends[-1])) > total or (self.batch > 1 and last < total)):
            raise ValueError(
                f"cu_seq_lens ends at {last}: must count the {total} tokens of the call, those of all {self.batch} "
                "rows together"
            )
        # an end is where the next document starts; that of the last one lies behind all tokens
        starts = torch.zeros(total + 1, dtype=torch.long, device=ends.device)
        starts[ends] = 1
        return starts[:total].cumsum(0).view(self.batch, self.kv_len)


_Kept = tuple[tuple[int | None, Tensor] | None, ...]  # version and copy of each tensor of a layout
# exchanged as a whole, so that threads see one or the other
_last_answer: tuple[Layout | None, _Kept, list[Segment]] = (None, (), [])


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place, None where torch does not count."""
    return None if x.is_inference() else x._version


def _join(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one | other if one is not None and other is not None else other if one is None else one


def _starts_where(new: Callable[[Tensor, Tensor], Tensor], values: Tensor, real: Tensor | None) -> Tensor:
    """Boolean [1 or B, N]: ``new(before, here)`` holds for what is ``values`` [1 or B, N] of a real token and the real
    one before it.

    What is told of padding is arbitrary.
    """
    if real is None:
        return F.pad(new(values[:, :-1], values[:, 1:]), (1, 0))
    values = values.expand(len(real), -1)
    last = torch.where(real, torch.arange(real.shape[1], device=real.device, dtype=torch.int64), -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)  # slot of the real token before
    return real & (before >= 0) & new(values.gather(1, before.clamp(min=0)), values)
