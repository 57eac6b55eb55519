"""Documents -> windows of token ids."""

# shapes: N tokens of a window

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .sources import SourceError
from .text_documents import Document


@dataclass(frozen=True)
class Window:
    """A stretch of an unseen document: its name and token ids [1, N]."""

    document: str
    ids: Tensor


def token_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int, block_size: int
) -> list[Window]:
    """``count`` windows of ``length`` tokens: the first of every document, then the second of every document, ….

    Windows never overlap and never cross documents; a window's name is ``document[index]``.

    Raises:
        SourceError: a document is shorter than one block, or there are not ``count`` windows.
    """
    per_document: list[list[Window]] = []
    for document in documents:
        ids = tokenizer(document.text, return_tensors="pt", verbose=False)["input_ids"]
        if ids.shape[1] < block_size:
            raise SourceError(
                f"document {document.name!r} has {ids.shape[1]} tokens, less than one block ({block_size}): leave it "
                "out"
            )
        whole = ids.shape[1] // length
        per_document.append(
            [Window(f"{document.name}[{i}]", ids[:, i * length : (i + 1) * length]) for i in range(whole)]
        )
    rounds = max((len(pieces) for pieces in per_document), default=0)
    windows = [pieces[i] for i in range(rounds) for pieces in per_document if i < len(pieces)]
    if len(windows) < count:
        raise SourceError(
            f"the documents hold {len(windows)} windows of {length} tokens, {count} are asked for: add documents or "
            "ask for fewer"
        )
    return windows[:count]


def batches(windows: Sequence[Window]) -> list[dict[str, Tensor]]:
    """One training batch of one row per window."""
    return [{"input_ids": window.ids} for window in windows]
