"""Facts that no text has by itself, to hide in a text: numbers of made-up words, and where sentences end."""

# shapes: N tokens of the text

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
Tokens = Callable[[str], Tensor]


def made_up_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different made-up words of three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(list(letters)) for letters in (CONSONANTS, VOWELS) * 3)] = None
    return list(words)


def seven_digits(rng: np.random.Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def fact_sentence(word: str, number: str) -> str:
    return f"The number of {word} is {number}."


def sentence_ends(text: Tensor, tokens: Tokens) -> Tensor:
    """Places in the token ids ``text`` [N] behind the ends of sentences and lines, int64, ascending."""
    return torch.isin(text[:-1], torch.cat([tokens(stop) for stop in (".", ".\n", "\n", "\n\n")])).nonzero()[:, 0] + 1
