"""Files -> rows, one after the other, with a state that goes on in the middle of a document."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .document_chunks import Piece, PieceReader
from .file_check import content
from .formats import SourceFile
from .packing import Packer, PackingOptions, PackingReport, Row
from .sources import SourceError
from .tokenization import Encoder, piece_batches

VERSION = 2  # counted up whenever the same files give other rows


class RowStream:
    """Rows of the documents of files in order.

    A state is the place where the current batch of pieces starts, what the packer held there, and the number of rows
    since: going on costs tokenising one batch again, wherever in the data it is.

    Args:
        files: what to read.
        encoder: the tokenizer.
        options: how rows are made.
        state: what ``state()`` returned; the rows behind it follow.

    Raises:
        SourceError: while iterating, a file cannot be read.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        encoder: Encoder,
        options: PackingOptions,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.files, self.encoder, self.options = files, encoder, options
        self.packer = Packer(options, encoder.pad_id)
        self._state = state or {"position": None, "packer": self.packer.state(), "document": 0, "rows": 0}
        self._document = 0  # tokens of the current document, special ones included

    def state(self) -> dict[str, Any]:
        """Plain data that fits into JSON; a reference is kept, so it must not be changed."""
        return self._state

    @property
    def report(self) -> PackingReport:
        """What became of the tokens so far."""
        return self.packer.report

    def __iter__(self) -> Generator[Row]:
        # ``skip`` rows of the first batch were given out before the state was taken
        start, skip = self._state, self._state["rows"]
        self.packer.load_state(start["packer"])
        self._document = start["document"]
        with contextlib.closing(piece_batches(PieceReader(self.files, start["position"]))) as batches:
            for position, pieces in batches:
                self._state = {
                    "position": position,
                    "packer": self.packer.state(),
                    "document": self._document,
                    "rows": 0,
                }
                for row in self._rows(pieces):
                    self._state = {**self._state, "rows": self._state["rows"] + 1}
                    if self._state["rows"] > skip:
                        yield row
                skip = 0
        self.packer.finish()

    def _rows(self, pieces: list[Piece]) -> Generator[Row]:
        report = self.packer.report
        for piece, ids in zip(pieces, self.encoder([piece.text for piece in pieces]), strict=True):
            if piece.first:
                self._document = 0
            # a document without tokens gets no special ones either
            if len(ids) and not self._document:
                ids = np.concatenate([self.encoder.before, ids])
            self._document += len(ids)
            if piece.last and self._document:
                ids = np.concatenate([ids, self.encoder.after])
                report.documents += 1
            elif piece.last:
                report.empty += 1
            yield from self.packer.add(ids, piece.last)


def fingerprint(files: Sequence[SourceFile], encoder: Encoder, options: PackingOptions) -> str:
    """Names the rows: the same for the same content of the files, tokenizer, options and version of this code.

    Raises:
        SourceError: a file cannot be read (see `survey`), or a dataset cannot be found any more.
    """
    everything = [VERSION, [content(file) for file in files], encoder.digest, asdict(options)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def no_row(report: PackingReport, options: PackingOptions) -> SourceError:
    """The error of sources that are too small."""
    needed = 1 if options.pad else options.length
    return SourceError(
        f"the sources yield no row: {report.tokens} tokens in all ({report.documents} documents, {report.empty} "
        "empty), "
        f"one row needs {needed}: add texts or ask for shorter rows"
    )
