"""Pooled-key summaries beside the KV cache: stage-1 keys of whole blocks, always derivable from the cached keys.

A cache layer is adopted at its first use: its object is replaced by one of a subclass that shares its state. What is
added is the rotary position of every slot and, for every row, the router keys of the blocks that are complete.
Whatever changes the cache (crop, reorder, batch operations) keeps or drops summaries; dropped ones are rebuilt from
the cached keys at the next call. Offloading a layer leaves them where they are: keys are offloaded as soon as they are
appended, before the attention that reads the summaries, which take about a sixteenth of their memory.
"""

# Shape legend: B batch, b some of its rows, G KV heads, N keys, Q queries, D head dim, R router_dim.

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures.class_factory import MadeMixin
from ..router.module import SparseRouter, active_router
from .object_registry import number

# keys, values and summaries are stored with room for this many more tokens, so that decoding rarely copies them
GROWTH_TOKENS = 4096


class SparseCacheLayerMixin(MadeMixin):
    """Placed in front of a stock cache layer class by `adopt`."""

    keys: Tensor  # the stock layer's
    values: Tensor
    is_initialized: bool
    slot_positions: Tensor | None  # [1 or B, slots] int64 rotary positions
    position_buffer: Tensor | None  # [1 or B, 1, capacity, 1] storage of which `slot_positions` is the filled part
    router_keys: Tensor | None  # [B, G, capacity, R], in the dtype of the keys
    summarised: list[int]  # per row: blocks of router_keys that are valid
    summarised_slots: list[int]  # per row: slot of the last key of the last valid block
    layouts: list[Tensor | None]  # per row: slots of the keys of the valid blocks, None for the first ones

    summarised_by: ref[SparseRouter] | None  # the router that made the summaries; a copy takes the first that asks
    number: Tensor  # by which an operator of a compiled graph finds this layer
    steps: Any  # of a static layer: the budgets of `static_decode`, None as long as its steps cannot be made so
    steps_by: SparseRouter | None  # the router that they are for, with the settings that it had
    steps_config: Any

    def __getstate__(self) -> dict[str, Any]:
        # a weak reference cannot be copied
        return {**self.__dict__, "summarised_by": None, "steps": None, "steps_by": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.take_number()  # a copy is not its original

    def take_number(self) -> None:
        self.number = number(self)

    def start_summaries(self) -> None:
        self.summarised_by = self.steps = self.steps_by = None
        self.slot_positions = self.router_keys = None
        self.position_buffer = None
        self.summarised, self.summarised_slots, self.layouts = [], [], []

    def forget_summaries(self) -> None:
        """All summaries are made anew at the next call."""
        self.steps = self.steps_by = None
        self.summarised, self.summarised_slots = [0] * len(self.summarised), [-1] * len(self.summarised)

    def record_positions(self, positions: Tensor, slots: int) -> Tensor:
        """Note the rotary ``positions`` [1 or B, Q] of the last Q of ``slots`` keys; return those of all slots.

        Slots that were filled before this layer was adopted are taken to run up to the first new position.
        """
        known, past = self.slot_positions, slots - positions.shape[1]
        have = 0 if known is None else min(known.shape[1], past)
        if known is not None and have == past and positions.shape[0] == known.shape[0]:  # most often: where it stopped
            here, new = known[:, None, :past, None], positions[:, None, :, None]
            self.position_buffer, filled = _appended(self.position_buffer, here, new)
            self.slot_positions = filled[:, 0, :, 0]
            return self.slot_positions
        parts = [] if known is None else [known[:, :have]]
        if have < past:
            parts.append(positions[:, :1] + torch.arange(have - past, 0, device=positions.device, dtype=torch.int64))
        # one row of positions stands for all, until a call brings positions for each
        rows = max(p.shape[0] for p in (*parts, positions))
        self.slot_positions = torch.cat([p.expand(rows, -1) for p in (*parts, positions)], 1)
        return self.slot_positions

    def summaries(
        self, router: SparseRouter, batch: int, rows: slice, slots: Tensor | None, keys: Tensor, positions: Tensor
    ) -> Tensor:
        """Router keys of the whole blocks of ``keys`` [b, G, N, D], the real keys of rows ``rows`` of the ``batch``.

        ``slots`` [N], on the CPU, are their cache slots (None: 0 … N − 1), ``positions`` [1 or b, N] their rotary
        positions. Only blocks that are not summarised yet are computed.
        """
        size = router.config.block_size
        # whole blocks only: a partial one is always forced, never scored
        need = keys.shape[2] // size
        if self.router_keys is None:
            self.router_keys = keys.new_empty(batch, keys.shape[1], 0, router.wk.shape[1])
            self.summarised, self.summarised_slots, self.layouts = [0] * batch, [-1] * batch, [None] * batch
        router = active_router(router)
        if self.summarised_by is not None and self.summarised_by() is not router:  # another adapter, or another model
            self.forget_summaries()
        self.summarised_by = ref(router)
        have = min(self.summarised[rows])
        have = 0 if have > need else have  # another, shorter document of this row
        # summaries hold as long as the keys that they were made of stand in the same slots
        last = have * size - 1
        slot = -1 if have == 0 else last if slots is None else int(slots[last])
        if any(seen != slot for seen in self.summarised_slots[rows]) or not self._laid_out(rows, slots, have * size):
            have = 0
        if need > have:
            self._reserve(need, size)
            fresh = slice(have * size, need * size)
            with torch.no_grad():
                self.router_keys[rows, :, have:need] = router.router_keys(keys[:, :, fresh], positions[:, fresh])
        last_slot = -1 if need == 0 else need * size - 1 if slots is None else int(slots[need * size - 1])
        for row in range(*rows.indices(batch)):
            self.summarised[row], self.summarised_slots[row] = need, last_slot
            self.layouts[row] = None if slots is None else slots[: need * size]
        return self.router_keys[rows, :, :need]

    def prepare_steps(self, router: SparseRouter, keys: Tensor, positions: Tensor, slots: int, steps: Any) -> None:
        """Make room for the summaries of all ``slots``, make those of ``keys`` [B, G, N, D], and note ``steps``:
        see `static_decode`.
        """
        self.summaries(router, keys.shape[0], slice(0, keys.shape[0]), None, keys, positions)
        assert self.router_keys is not None
        # room for every slot: a captured graph keeps this shape
        blocks = -(-slots // router.config.block_size)
        self.router_keys = F.pad(self.router_keys[:, :, :blocks], (0, 0, 0, max(blocks - self.router_keys.shape[2], 0)))
        self.steps, self.steps_by = steps, active_router(router)
        self.steps_config = self.steps_by.config

    def _laid_out(self, rows: slice, slots: Tensor | None, tokens: int) -> bool:
        """Whether the first ``tokens`` of ``slots``, which end alike, are those that were summarised:
        the past can be masked anew.
        """
        known = self.layouts[rows.start]
        return slots is None or known is None or torch.equal(slots[:tokens], known[:tokens])

    def summary_bytes(self) -> int:
        """Bytes of the valid summaries and the positions, without what is reserved for more tokens."""
        held = 0 if self.slot_positions is None else self.slot_positions.nbytes
        if self.router_keys is None:
            return held
        return held + sum(self.summarised) * self.router_keys[0, :, :1].numel() * self.router_keys.element_size()

    def _reserve(self, blocks: int, block_size: int) -> None:
        assert self.router_keys is not None
        if blocks > self.router_keys.shape[2]:
            room = blocks + GROWTH_TOKENS // block_size
            self.router_keys = F.pad(self.router_keys, (0, 0, 0, room - self.router_keys.shape[2]))

    def _take_rows(self, index: Tensor | list[int]) -> None:
        index = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.int64, device="cpu")
        # a single row of positions is shared by all rows
        if self.slot_positions is not None and self.slot_positions.shape[0] > 1:
            self.slot_positions = self.slot_positions[index.to(self.slot_positions.device)]
        if self.router_keys is not None:
            self.router_keys = self.router_keys[index.to(self.router_keys.device)]
            self.steps = self.steps_by = None
            picked = torch.arange(len(self.summarised), dtype=torch.int64, device="cpu")[index.cpu()].tolist()
            self.summarised = [self.summarised[i] for i in picked]
            self.summarised_slots = [self.summarised_slots[i] for i in picked]
            self.layouts = [self.layouts[i] for i in picked]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take_rows(beam_idx)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.start_summaries()

    def crop(self, tokens_to_remove: int) -> None:
        before = int(self.get_seq_length())  # type: ignore[attr-defined]
        super().crop(tokens_to_remove)  # type: ignore[misc]
        slots = int(self.get_seq_length())  # type: ignore[attr-defined]
        self.steps = self.steps_by = None
        if slots < before:
            if self.slot_positions is not None:
                self.slot_positions = self.slot_positions[:, :slots]
            # which blocks lost a key depends on padding; a row whose last summarised slot is gone starts again
            kept = [slot < slots for slot in self.summarised_slots]
            self.summarised = [n if ok else 0 for n, ok in zip(self.summarised, kept, strict=True)]
            self.summarised_slots = [s if ok else -1 for s, ok in zip(self.summarised_slots, kept, strict=True)]


class GrowingLayerMixin(SparseCacheLayerMixin):
    """In front of a layer of a `DynamicCache`, whose rows and slots can change."""

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.summarised) or (0 if self.slot_positions is None else self.slot_positions.shape[0])
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take_rows(torch.arange(rows, dtype=torch.int64, device="cpu").repeat_interleave(repeats))


class QuantizedLayerMixin(GrowingLayerMixin):
    """In front of a layer that returns keys which it quantised:
    other ones than before, so all summaries are made anew.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.forget_summaries()
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc, no-any-return]


class AppendingLayerMixin(GrowingLayerMixin):
    """In front of `DynamicLayer`: appends in place, where concatenation would copy the whole cache for
    every new token.
    """

    buffers: dict[str, Tensor]  # storage of which `keys` and `values` are the filled part

    def start_summaries(self) -> None:
        super().start_summaries()
        self.buffers = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # a gradient may need what was appended before as it was, and of whose queries is not known here
        if not self.is_initialized or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.buffers = {}
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc, no-any-return]
        self.buffers["keys"], self.keys = _appended(self.buffers.get("keys"), self.keys, key_states)
        self.buffers["values"], self.values = _appended(self.buffers.get("values"), self.values, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.buffers = {}  # whoever read the keys before keeps them: the next append must not overwrite

    def offload(self) -> None:
        self.buffers = {}
        super().offload()  # type: ignore[misc]


def _appended(buffer: Tensor | None, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """``new`` behind ``old`` [B, G, N, D], in place if ``old`` is what fills ``buffer``:
    (the buffer, what fills it now).
    """
    # after a crop or a reorder the cache holds other memory than the buffer: then all is copied
    length, total = old.shape[2], old.shape[2] + new.shape[2]
    usable = buffer is not None and buffer.data_ptr() == old.data_ptr() and buffer.shape[0] == old.shape[0]
    if buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled():
        usable = False  # filled under inference_mode: such a tensor cannot be written to outside it
    if buffer is None or not usable or total > buffer.shape[2]:
        room = -(-total // GROWTH_TOKENS) * GROWTH_TOKENS + GROWTH_TOKENS  # a multiple of every block size
        buffer = old.new_empty(*old.shape[:2], room, old.shape[3])
        buffer[:, :, :length] = old
    buffer[:, :, length:total] = new
    return buffer, buffer[:, :, :total]
