"""Texts as tokens with their places, in which no text becomes a control token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import PlantDataError


class TextEncoder:
    """Tokens of texts, each with the characters it stands for.

    A control token is a special token, or an added one in brackets such as ``<|user|>``. A text that spells one, such
    as a line that quotes "<|im_end|>", is cut behind the first character of it, as often as needed: its tokens are
    those of the letters.

    Raises:
        PlantDataError: the tokenizer does not tell the places of its tokens (it is none of the library `tokenizers`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise PlantDataError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for",
                ["use a fast tokenizer: AutoTokenizer.from_pretrained(…, use_fast=True)", "use templates, not text"],
            )
        self.tokenizer = tokenizer
        bracketed = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (len(token.content) > 2 and token.content[0] + token.content[-1] in ("<>", "[]"))
        }
        control = {*bracketed, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self.control = np.array(sorted(control), np.int64)

    def __call__(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """(tokens [n], first character and the one behind the last of each [n, 2]) of each text."""
        return [self._without_control(text, *encoded) for text, encoded in zip(texts, self._encode(texts), strict=True)]

    def _encode(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        # added tokens in a text are left to the ordinary ones; not all tokenizers obey
        before, backend.encode_special_tokens = backend.encode_special_tokens, True
        try:
            encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        finally:
            backend.encode_special_tokens = before
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(len(e.ids), 2)) for e in encodings]

    def _without_control(
        self, text: str, ids: NDArray[np.int32], spans: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        hits = np.flatnonzero(np.isin(ids, self.control))
        if not len(hits):
            return ids, spans
        for start, stop in spans[hits]:
            if stop - start < 2:
                raise PlantDataError(
                    f"the character {text[start:stop]!r} alone is a control token of this tokenizer",
                    ["use templates, not text", "replace the character", "use another model"],
                )
        cuts = [0, *(spans[hits, 0] + 1).tolist(), len(text)]
        parts = self([text[a:b] for a, b in pairwise(cuts)])
        moved = [part_spans + np.int32(cut) for cut, (_, part_spans) in zip(cuts, parts, strict=False)]
        return np.concatenate([part for part, _ in parts]), np.concatenate(moved)
