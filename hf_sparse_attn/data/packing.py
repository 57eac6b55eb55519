"""Tokens of documents -> rows of one length, in whole blocks.

Rows are filled in reading order. Every document in a row is told by ``position_ids``, which start again at 0: it
attends to itself only, and no document predicts the first token of the next one. The part of a document that continues
from the row before is a document of its own.

Nothing but an unfinished last row is dropped. A document is cut at the end of a row, and never into parts shorter than
one block where that can be helped: the selection works on blocks, and a part of a few tokens has no context to learn
from. The row is padded instead, by less than two blocks; a padding is a document of its own without labels, so rows
need no attention mask. Dropping short tails would lose text that was paid for with reading and tokenising; padding
costs a percent or so of the row. Both are counted.
"""

# shapes: n tokens of a part of a document

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import IGNORE_INDEX
from .sources import SourceError

Row = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class PackingOptions:
    """How rows are made.

    Args:
        length: tokens of a row, a multiple of ``block_size``.
        block_size: of the sparse attention, tokens.
        pad: one part of a document a row, padded on the right and with an attention mask, in place of packed documents.
        end_of_text: put the tokenizer's end-of-text token behind each document.

    Raises:
        SourceError: ``length`` is no positive multiple of ``block_size``.
    """

    length: int
    block_size: int
    pad: bool = False
    end_of_text: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.length < 1 or self.length % self.block_size:
            raise SourceError(
                f"a row must hold whole blocks: length {self.length} is no multiple of block_size {self.block_size}"
            )


@dataclass
class PackingReport:
    """Where the tokens went: ``tokens + padding == rows * length + dropped``."""

    documents: int = 0  # with at least one token
    empty: int = 0  # documents without any, which are left out
    tokens: int = 0  # of all documents, special ones included
    rows: int = 0
    padding: int = 0  # tokens that fill rows up
    dropped: int = 0  # tokens of an unfinished last row


@dataclass
class Packer:
    """Makes rows of the tokens of documents, which may come in parts.

    A row is ``{"input_ids", "position_ids", "labels"}`` (padded: ``{"input_ids", "attention_mask", "labels"}``), each
    an int64 array [length]. ``labels`` are the input ids, but -100 for the first token of each document and for
    padding: Transformers' models shift them.

    Args:
        options: length and kind of the rows.
        pad_id: token that padding consists of.
    """

    options: PackingOptions
    pad_id: int
    report: PackingReport = field(default_factory=PackingReport)

    def __post_init__(self) -> None:
        self._parts: list[NDArray[np.int32]] = []  # of the row that is being filled, one for each document in it
        self._used = 0  # their tokens
        self._waiting = np.empty(0, np.int32)  # tokens of the current document that are in no row yet

    def add(self, ids: NDArray[np.int32], ends: bool) -> Iterator[Row]:
        """Rows that the next ``ids`` [n] of the current document complete; ``ends`` says that they are its last."""
        self.report.tokens += len(ids)
        self._waiting = np.concatenate([self._waiting, ids]) if len(self._waiting) else ids
        done, block = 0, self.options.block_size
        while left := len(self._waiting) - done:
            room = self.options.length - self._used
            if not ends and left < room + block:
                break  # where to cut depends on what follows
            taken = left if left <= room else self._taken(left, room)
            if taken:
                self._parts.append(self._waiting[done : done + taken])
                self._used, done = self._used + taken, done + taken
            # a document that goes on does so in the next row
            if self.options.pad or taken < left or self._used == self.options.length:
                yield self._row()
        self._waiting = self._waiting[done:].copy()  # a view would keep the whole

    def _taken(self, left: int, room: int) -> int:
        """How many of the ``left`` > ``room`` tokens of a document go into the rest of the row."""
        block = self.options.block_size
        # a part of less than a block is not begun
        if room < block:
            return 0
        if left - room >= block:
            return room
        if left - block >= block:
            return left - block  # one whole block remains
        # fewer than two blocks are not cut; alone in its row such a document has to be
        return 0 if self._parts else room

    def finish(self) -> None:
        """Count what is left of an unfinished row as dropped; padded rows are always finished."""
        self.report.dropped += self._used
        self._parts, self._used = [], 0

    def _row(self) -> Row:
        parts, self._parts = self._parts, []
        padding, self._used = self.options.length - self._used, 0
        self.report.rows += 1
        self.report.padding += padding
        lengths = [len(part) for part in parts]
        ids = np.concatenate([*parts, np.full(padding, self.pad_id, np.int32)]).astype(np.int64)
        starts = np.cumsum([0, *lengths])
        labels = ids.copy()
        # models shift labels: a first token would be predicted by another document
        labels[starts[:-1]] = IGNORE_INDEX
        labels[starts[-1] :] = IGNORE_INDEX
        if self.options.pad:
            return {
                "input_ids": ids,
                "attention_mask": (np.arange(len(ids)) < starts[-1]).astype(np.int64),
                "labels": labels,
            }
        # padding is the last document of its row
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in (*lengths, padding)])
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    def state(self) -> dict[str, Any]:
        """What has been taken in but not given out, as plain data:
        at most a row and a block of tokens, and the report.
        """
        return {
            "parts": [part.tolist() for part in self._parts],
            "waiting": self._waiting.tolist(),
            "report": asdict(self.report),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state()`` was called."""
        self._parts = [np.array(part, np.int32) for part in state["parts"]]
        self._used = sum(map(len, self._parts))
        self._waiting, self.report = np.array(state["waiting"], np.int32), PackingReport(**state["report"])
