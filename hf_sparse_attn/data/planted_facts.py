"""Facts that no text has by itself, to hide in a text: numbers of things, and texts with several of them."""

# shapes: N tokens of the text

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .package_cache import SourceError

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
# common nouns: small models look these up far better than made-up words, which most tokenizers split
_NAMES = (
    "apple basket bottle bridge button camera candle carpet castle coffee dragon engine forest garden guitar hammer "
    "helmet island jacket kitchen ladder lemon market mirror orange pencil pillow planet rabbit river rocket school "
    "shadow silver spider temple tunnel turtle valley violin wagon winter"
)
THINGS = tuple(_NAMES.split())
APART = 64  # tokens of text for every fact, at least
ANCHOR = "a"  # what stands before a piece that is split apart: some tokenizers treat the start of a text in another way
CHARACTERS = 16  # of a token, at most, in all but odd texts
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


@dataclass(frozen=True)
class PlantedFact:
    """A fact, its question and the answer to it, all int64 token ids; each goes on where the one before it ends.

    ``number_at`` is where its number begins in its ``sentence``. In a haystack ``start`` is where the sentence begins.
    """

    word: str
    number: str
    sentence: Tensor
    question: Tensor
    answer: Tensor
    number_at: int
    start: int = 0


@dataclass(frozen=True)
class Haystack:
    """A text with facts: token ids int64 [N], to which any fact's question can be added.

    With the longest question and answer it has ``length`` tokens.
    """

    length: int
    ids: Tensor
    facts: tuple[PlantedFact, ...]


class FactTokenizer:
    """A tokenizer that splits facts, questions and answers alike wherever they stand, or says that it does not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> Tensor:
        """Token ids of ``text`` alone, int64 [N]."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def first(self) -> Tensor:
        """The special tokens that the tokenizer puts before a text, int64."""
        whole, alone = self.tokenizer(ANCHOR)["input_ids"], self.ids(ANCHOR).tolist()
        at = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
        return torch.tensor(whole[:at], dtype=torch.int64, device="cpu")

    def after(self, before: str, text: str) -> Tensor:
        """Token ids of ``text`` where it follows ``before``. Raises ValueError if the two are split as one."""
        head, whole = self.ids(before), self.ids(before + text)
        if not torch.equal(whole[: len(head)], head):
            raise ValueError(
                f"this tokenizer splits {before!r} in another way when {text!r} follows ({self._shown(whole)}): what "
                f"is asked for cannot be read token by token. {INSTEAD}"
            )
        return whole[len(head) :]

    def fact(self, word: str, number: str, example: str) -> PlantedFact:
        """The fact that the number of ``word`` is ``number``; its question has the sentence ``example`` before it.

        Raises:
            ValueError: the tokenizer does not know the word or digits, or splits the number in another way in the
                fact than after the question.
        """
        sentence = self.after(ANCHOR, f"\n{fact_sentence(word, number)}\n")
        asked = f"\n\n{example}\n{fact_sentence(word, number).partition(f' {number}')[0]}"
        question, answer = self.after(ANCHOR, asked), self.after(ANCHOR + asked, f" {number}")
        for text, ids in ((word, question), (number, answer)):
            if text not in self.tokenizer.decode(ids.tolist()):
                raise ValueError(
                    f"this tokenizer gives {self.tokenizer.decode(ids.tolist())!r} back where {text!r} was written: "
                    f"facts of English words and numbers cannot be told in its tokens. {INSTEAD}"
                )
        runs = sentence.unfold(0, len(answer), 1) if len(answer) <= len(sentence) else answer.new_empty(0, len(answer))
        places = (runs == answer).all(1).nonzero()[:, 0]
        if not len(places):
            raise ValueError(
                f"this tokenizer splits the number {number} into {self._shown(answer)} after a question, but the fact "
                f"that tells it into {self._shown(sentence)}: the answer cannot be copied from there. {INSTEAD}"
            )
        return PlantedFact(word, number, sentence, question, answer, int(places[0]))

    def _shown(self, ids: Tensor) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(ids.tolist()))


INSTEAD = "Measure the model on text, with hf-sparse-attn eval"


def haystacks(
    text: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], count: int, seed: int
) -> list[Haystack]:
    """The beginning of ``text`` in each of ``lengths`` tokens, with ``count`` facts at evenly spread depths.

    One more fact stands in the middle: it is repeated before each question as an example of an answer, without which
    small models do not know what is asked of them. Deterministic by ``seed``; every length has facts of its own.

    Raises:
        SourceError: the text is too short, or a length too short for the facts.
        ValueError: see `FactTokenizer.fact`.
    """
    if not 1 <= count < len(THINGS):
        raise ValueError(f"the number of facts is {count}: must be 1 to {len(THINGS) - 1} for each length")
    split, longest = FactTokenizer(tokenizer), max(lengths)
    # the rest of a large file needs no tokens
    ids = split.ids(text[: CHARACTERS * longest])
    ids = split.ids(text) if len(ids) < longest else ids
    made = []
    for at, length in enumerate(lengths):
        rng = np.random.default_rng((seed, at))
        told = [(THINGS[thing], seven_digits(rng)) for thing in rng.permutation(len(THINGS))[: count + 1]]
        example = fact_sentence(*told[count // 2])
        made.append(_haystack(split, ids, length, [split.fact(*fact, example) for fact in told], count // 2))
    return made


def _haystack(split: FactTokenizer, text: Tensor, length: int, facts: Sequence[PlantedFact], example: int) -> Haystack:
    """A text with all ``facts``, of which that of number ``example`` is not asked for."""
    first = split.first()
    taken = len(first) + sum(len(fact.sentence) for fact in facts)
    taken += max(len(fact.question) + len(fact.answer) for fact in facts)
    room = length - taken
    if room < APART * len(facts):
        raise SourceError(
            f"a length of {length} tokens is too short for {len(facts) - 1} facts and an example: give at least "
            f"{taken + APART * len(facts)} tokens, or fewer facts"
        )
    if len(text) < room:
        raise SourceError(
            f"the text has {len(text)} tokens, but a length of {length} needs {room} of them beside the facts: "
            "give a longer text, or shorter lengths"
        )
    text = text[:room]
    parts, planted, before, at = [first], [], len(first), 0
    for fact, cut in zip(facts, _places(text, split.ids, len(facts)), strict=True):
        parts += [text[at:cut], fact.sentence]
        start = before + cut
        planted.append(PlantedFact(**{**vars(fact), "start": start}))
        before, at = before + len(fact.sentence), cut
    asked = (fact for place, fact in enumerate(planted) if place != example)
    return Haystack(length, torch.cat([*parts, text[at:]]), tuple(asked))


# place i of n lies nearest to (i + 1/2) / n of the text
def _places(text: Tensor, tokens: Tokens, count: int) -> list[int]:
    """Where facts stand in the ``text`` [N]: evenly spread, behind the ends of sentences where such are near."""
    ends, apart = sentence_ends(text, tokens), len(text) / count
    places = []
    for at in range(count):
        even = int((at + 0.5) * apart)
        near = int(ends[(ends - even).abs().argmin()]) if len(ends) else even
        # half as far as the next fact stands: they keep their order
        places.append(near if abs(near - even) < apart / 2 else even)
    return places
