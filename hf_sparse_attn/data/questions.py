"""Questions whose answer stands far back in a long text: which words follow a passage that is quoted?

Made from any text, without a generator or labels: a passage of the window is quoted by its first words at the end, and
the model must go on as the text did. The quoted words stand in the window once, so the answer can only come from there.
"""

# shapes: N tokens of the window

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import IGNORE_INDEX
from .sources import SourceError
from .windows import Window

QUOTED_TASK = "quoted"  # the name of this task
QUOTED, ANSWERED = 16, 16  # tokens
FARTHEST = 0.75  # passages are taken from this first part of the window
TRIES = 200
BEFORE, BETWEEN = "\n\nThe text above has a passage that begins with these words:\n", "\nIt goes on as follows:\n"


@dataclass(frozen=True)
class Question:
    """A window with its question: ``input_ids`` and ``labels`` [N] (−100 but for the answer), and how far back the
    answer stands.
    """

    document: str
    input_ids: Tensor
    labels: Tensor
    distance: int  # tokens from the passage's answer to its repetition, or from the first token that an answer needs
    task: str = QUOTED_TASK


def ask(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Question]:
    """One question of as many tokens as the window, from each window. Deterministic by ``seed``.

    Raises:
        SourceError: a window is too short, or has no passage whose quoted words stand in it once.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    before, between = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64, device="cpu")
        for text in (BEFORE, BETWEEN)
    )
    return [_question(window, before, between, generator) for window in windows]


def _question(window: Window, before: Tensor, between: Tensor, generator: torch.Generator) -> Question:
    ids = window.ids[0]
    kept = len(ids) - len(before) - len(between) - QUOTED - ANSWERED
    if kept < 4 * (QUOTED + ANSWERED):
        raise SourceError(
            f"window {window.document!r} of {len(ids)} tokens is too short for a question: give at least 256"
        )
    text = ids[:kept]
    # all runs of QUOTED tokens, [kept − QUOTED + 1, QUOTED]
    grams = text.unfold(0, QUOTED, 1)
    last = int(FARTHEST * kept) - QUOTED - ANSWERED
    for _ in range(TRIES):
        at = int(torch.randint(last, (), generator=generator, dtype=torch.int64, device="cpu"))
        # words that stand once make a question with one answer
        if int((grams == text[at : at + QUOTED]).all(1).sum()) == 1:
            break
    else:
        raise SourceError(f"window {window.document!r} repeats itself: no passage of {QUOTED} tokens stands in it once")
    quoted, answer = text[at : at + QUOTED], text[at + QUOTED : at + QUOTED + ANSWERED]
    input_ids = torch.cat([text, before, quoted, between, answer])
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[-ANSWERED:] = answer
    # from the answer in the text to its repetition at the end
    return Question(window.document, input_ids, labels, len(input_ids) - ANSWERED - at - QUOTED)
