"""Documents with a class each: of sources LABEL=SOURCE, or of tables with a column of classes;
cut into windows of one length.
"""

# shapes: N tokens of a window

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...data.formats import SourceFile, source_files
from ...data.sources import SourceError
from ...data.tables import TableRows, open_table
from ...data.text_documents import read_documents

NAMED = re.compile(r"([\w .-]+)=(.+)")
LEAST_SHARE = 0.25  # of a window: a shorter rest of a document is left out, unless it is all of it


@dataclass(frozen=True)
class Labelled:
    """A text, where it came from, and its class."""

    name: str
    text: str
    label: str


@dataclass(frozen=True)
class LabelledWindow:
    """Tokens [N] of a part of a document, which of them are real, and the document's class."""

    name: str
    input_ids: Tensor
    attention_mask: Tensor
    label: int

    def row(self) -> dict[str, Tensor]:
        """Inputs of a sequence classifier, without the batch dimension."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "labels": torch.tensor(self.label, dtype=torch.int64, device="cpu"),
        }


def read_labelled(sources: Sequence[str], label: str | None) -> list[Labelled]:
    """The documents of all sources, in order; ``label`` names the column of classes of tables.

    Raises:
        SourceError: a source names no class, a table lacks a column, or a row has no class.
    """
    if label is None:
        documents = []
        for source in sources:
            named = NAMED.fullmatch(source)
            if named is None:
                raise SourceError(
                    f"source {source!r} names no class: write LABEL=SOURCE, or set data.label to a column of a table"
                )
            documents += [Labelled(d.name, d.text, named[1]) for d in read_documents([named[2]])]
        return documents
    return [document for file in source_files(sources) for document in _rows(file, label)]


def _rows(file: SourceFile, label: str) -> list[Labelled]:
    if not file.is_table:
        raise SourceError(
            f"{file.path} is no table, so it has no column {label!r}: name TABLE#TEXT_COLUMN, or write LABEL=SOURCE "
            "without data.label"
        )
    # two readers of one table, side by side: of texts and of classes
    labels, rows = replace(file, column=label), []
    for (at, text), kind in zip(TableRows(file), open_table(labels), strict=True):
        lacks_class = kind[label] in (None, "") or kind[label] != kind[label]  # NaN is no class
        if lacks_class or not text:
            raise SourceError(f"{file.path}, row {at}: the {'class' if lacks_class else 'text'} is missing")
        rows.append(Labelled(f"{file.path}[{at}]", text, str(kind[label])))
    return rows


def split_labelled(documents: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """(what trains, what is evaluated): ``share`` of each class's documents, at random, and the others; no document in
    both.

    Raises:
        SourceError: a class has fewer than two documents.
    """
    generator = np.random.default_rng(seed)
    train, evaluated = [], []
    for label in classes_of(documents):
        of_class = [d for d in documents if d.label == label]
        if len(of_class) < 2:
            raise SourceError(
                f"class {label!r} has one document only: it takes two, one that trains and one that is evaluated"
            )
        order = generator.permutation(len(of_class))
        # a document at least on either side
        cut = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        train += [of_class[i] for i in sorted(order[:cut])]
        evaluated += [of_class[i] for i in sorted(order[cut:])]
    return train, evaluated


def classes_of(documents: Sequence[Labelled]) -> list[str]:
    """The classes in alphabetical order. Raises SourceError if there is one only."""
    classes = sorted({d.label for d in documents})
    if len(classes) < 2:
        raise SourceError(
            f"all {len(documents)} documents have the class {', '.join(map(repr, classes)) or 'none'}: it takes two "
            "classes"
        )
    return classes


def labelled_windows(
    documents: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, length: int, classes: Sequence[str], most: int
) -> list[LabelledWindow]:
    """Windows of ``length`` tokens, special ones included, at most ``most`` of a document; a shorter one is padded
    behind.

    Raises:
        SourceError: the tokenizer has no padding token, or a class that is not in ``classes``.
    """
    if tokenizer.pad_token_id is None:
        raise SourceError(
            f"{type(tokenizer).__name__} has no padding token, which rows of different lengths need: set one"
        )
    windows = []
    for document in documents:
        if document.label not in classes:
            raise SourceError(
                f"{document.name} has the class {document.label!r}, which no training document has: "
                f"{', '.join(classes)}"
            )
        # parts of at most ``length`` tokens, each with the special ones
        parts = tokenizer(
            document.text,
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            padding="max_length",
            verbose=False,
        )
        for at, (ids, mask) in enumerate(zip(parts["input_ids"][:most], parts["attention_mask"][:most], strict=True)):
            if at and sum(mask) < LEAST_SHARE * length:
                continue
            windows.append(
                LabelledWindow(
                    f"{document.name}[{at}]",
                    torch.tensor(ids, dtype=torch.int64, device="cpu"),
                    torch.tensor(mask, dtype=torch.int64, device="cpu"),
                    classes.index(document.label),
                )
            )
    return windows
