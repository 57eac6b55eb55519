"""Pieces of documents -> their tokens, several pieces in one call of the tokenizer."""

# shapes: n tokens of a text

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .document_chunks import Piece, PieceReader
from .sources import SourceError

BATCH = 1 << 20  # characters that are tokenised at a time; a tokenizer needs a hundred bytes for each token of a batch
PIECES = 2048  # at most in a batch: rows of a table may be short


class Encoder:
    """A tokenizer as training sees it: which tokens stand before and behind a document, and a batch of texts at a time.

    A tokenizer that puts a begin-of-text token before a text puts it before each document, too.

    Args:
        tokenizer: fast tokenizers work on the pieces of a batch in parallel (``TOKENIZERS_PARALLELISM``).
        end_of_text: put the end-of-text token behind each document.
        pad: rows are padded.

    Raises:
        SourceError: a token that is needed is missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_of_text: bool = True, pad: bool = False) -> None:
        self.tokenizer = tokenizer
        eos, padding, bos = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id
        if end_of_text and eos is None:
            raise SourceError(
                "the tokenizer has no end-of-text token to put between documents: set tokenizer.eos_token, or ask for "
                "end_of_text=False"
            )
        if pad and padding is None and eos is None:
            raise SourceError(
                "the tokenizer has neither a padding nor an end-of-text token to pad rows with: set tokenizer.pad_token"
            )
        # without either, any token will do: no document sees the padding of a packed row
        self.pad_id = int(next(token for token in (padding, eos, 0) if token is not None))
        self.after = np.array([eos] if end_of_text else [], np.int32)
        self.before = np.array([bos] if bos is not None and self._starts_with(bos) else [], np.int32)

    def _starts_with(self, bos: int) -> bool:
        ids: list[int] = self.tokenizer("a", verbose=False)["input_ids"]
        return ids[:1] == [bos]

    def __call__(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Tokens [n] of each text, without special ones."""
        return [np.array(ids, np.int32) for start, stop in _spans(texts) for ids in self._ids(texts[start:stop])]

    def _ids(self, texts: list[str]) -> Iterator[list[int]]:
        if not self.tokenizer.is_fast:
            yield from self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            return
        backend = self.tokenizer.backend_tokenizer
        # as a call of the tokenizer would set it
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        # 1.7 times as fast as the call, which also tells the place in the text of every token
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            yield encoding.ids

    @functools.cached_property
    def digest(self) -> str:
        """Names all that decides about the tokens of a text."""
        tokenizer = self.tokenizer
        parts = [
            type(tokenizer).__name__,
            self.before.tolist(),
            self.after.tolist(),
            self.pad_id,
            tokenizer.split_special_tokens,
        ]
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            # truncation and padding are what the last call of the tokenizer asked for; ours ask for none
            parts.append({key: value for key, value in backend.items() if key not in ("truncation", "padding")})
        else:
            parts += [tokenizer.get_vocab(), tokenizer.special_tokens_map, str(tokenizer.init_kwargs)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _spans(texts: list[str]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive texts that make up a batch."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > BATCH:
            yield start, index
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)


def piece_batches(reader: PieceReader) -> Generator[tuple[Any, list[Piece]]]:
    """(where the batch starts, its pieces), about ``BATCH`` characters a batch;
    a batch ends where reading can be taken up.
    """
    start, batch, size = reader.position(), list[Piece](), 0
    with contextlib.closing(iter(reader)) as pieces:
        for piece in pieces:
            batch.append(piece)
            size += len(piece.text)
            # only where reading can be taken up: not between two pieces of a table's row
            if (size >= BATCH or len(batch) >= PIECES) and (position := reader.position()) is not None:
                yield start, batch
                start, batch, size = position, [], 0
    if batch:
        yield start, batch
