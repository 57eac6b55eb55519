"""A document's tokens in a batch, and cutting a batch into documents."""

# Shape legend: B batch, N keys, N' keys of one document.

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Real tokens of one document: batch rows ``rows`` (all with the same layout) and their key slots.

    ``slots`` int64 [N'] in order, or None for all slots. ``queries`` of them, the last ones, have queries in this call.
    ``slots_on_host`` are the same on the CPU, ``place`` int64 [3] is (batch row, first slot, end slot), on the device:
    both None where ``slots`` is. ``consecutive``: whether the positions of the queries grow by one, None for unknown.
    """

    rows: slice
    slots: Tensor | None
    queries: int
    slots_on_host: Tensor | None = None
    consecutive: bool | None = None
    place: Tensor | None = None

    @cached_property
    def extent(self) -> tuple[int, int] | None:
        """First slot and end slot, None where the segment has all slots or there are others between its own."""
        if self.slots_on_host is None:
            return None
        # slots ascend: they are a run if their ends are as far apart as there are slots
        first, last = (int(self.slots_on_host[at]) for at in (0, -1))
        return (first, last + 1) if last - first == len(self.slots_on_host) - 1 else None

    def keys(self, x: Tensor) -> Tensor:
        """The segment's part of ``x`` [B, heads, N, D]."""
        return self._take(x[self.rows], 2)

    def _take(self, x: Tensor, dim: int) -> Tensor:
        """The segment's slots of dimension ``dim``, as a view where they are consecutive."""
        if self.slots is None:
            return x
        return (
            x.index_select(dim, self.slots) if self.extent is None else x.narrow(dim, self.extent[0], len(self.slots))
        )

    def positions(self, positions: Tensor) -> Tensor:
        """The segment's part of ``positions`` [1 or B, N]."""
        return self._take(positions if positions.shape[0] == 1 else positions[self.rows], 1)

    def links(self, mask: Tensor) -> Tensor:
        """The segment's part of a ``mask`` [1 or B, 1 or heads, N, N] of a call without a past."""
        part = mask if mask.shape[0] == 1 else mask[self.rows]
        return self._take(self._take(part, 2), 3)

    def query_slots(self, q_len: int, kv_len: int) -> slice | Tensor:
        """Indices of the segment's queries among the ``q_len`` of the call."""
        if self.slots is None:
            return slice(None)
        if self.extent is None:
            return self.slots[len(self.slots) - self.queries :] - (kv_len - q_len)
        end = self.extent[1] - (kv_len - q_len)
        return slice(end - self.queries, end)

    def query_slots_on_host(self, q_len: int, kv_len: int) -> Tensor:
        """`query_slots` on the CPU, of a segment that does not have all slots."""
        assert self.slots_on_host is not None
        return self.slots_on_host[len(self.slots_on_host) - self.queries :] - (kv_len - q_len)


def cut_documents(batch: int, q_len: int, kv_len: int, mask: Tensor | None, starts: Tensor | None) -> list[Segment]:
    """The documents of a call whose padding ``mask`` [B, N] and first slots ``starts`` [1 or B, N] (both boolean) are
    known.
    """
    starts = None if starts is None or not bool(starts.any()) else starts
    if starts is None and (mask is None or bool(mask.all())):
        return [Segment(slice(0, batch), None, q_len)]
    segments, places = [], []
    marks = starts if mask is None else mask
    assert marks is not None
    device = marks.device
    for row in range(batch):
        slots = (
            torch.arange(kv_len, dtype=torch.int64, device="cpu") if mask is None else mask[row].nonzero()[:, 0].cpu()
        )
        if starts is None:
            cuts: list[int] = []
        else:
            cuts = starts[min(row, starts.shape[0] - 1)].cpu()[slots].nonzero()[:, 0].tolist()
        for part in torch.tensor_split(slots, [c for c in cuts if c > 0]):
            # a document without queries in this call has no output
            queries = int((part >= kv_len - q_len).sum())
            if queries:
                segments.append(Segment(slice(row, row + 1), part.to(device), queries, part))
                places.append((row, int(part[0]), int(part[-1]) + 1))
    # one copy for all layers and documents
    on_device = torch.tensor(places, dtype=torch.int64, device="cpu").to(device)
    return [replace(segment, place=place) for segment, place in zip(segments, on_device, strict=True)]
