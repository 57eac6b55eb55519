"""The synthetic tasks of RULER (Hsieh et al. 2024, arXiv:2404.06654) on a haystack of one's own, as questions with one
right answer.

Retrieval of numbers hidden in a text, variables that are assigned to each other, the most common and the most frequent
words of a list. Made anew from the paper's description, with made-up words and no other text than the windows. Where
RULER takes several answers in any order, they are asked for in the order in which the text has them, so that an answer
can be read token by token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...config import IGNORE_INDEX
from ...data.planted_facts import Tokens, fact_sentence, made_up_words, sentence_ends, seven_digits
from ...data.questions import Question
from ...data.sources import SourceError
from ...data.windows import Window

NEEDLES = 4  # of the tasks with several
HOPS = 4  # of a chain of variables
COMMON, MOST_FREQUENT = 10, 3  # words that are asked for
# a common word stands at most so many times in the list, and ten times as often as a rare one
COMMON_TIMES, RARE_SHARE = 30, 10
ZETA = 2.0  # exponent of the words' frequencies in "fwe"
LEAST_HAYSTACK = 64  # tokens


@dataclass(frozen=True)
class _Task:
    """Sentences to hide in a text, the question at its end, the answer, and the first sentence that it needs."""

    facts: list[str]
    question: str
    answer: str
    needed: int = 0


def _niah(keys: int, values: int, queried: int) -> Callable[[np.random.Generator], _Task]:
    """``keys`` names with ``values`` numbers each, in random order, of which ``queried`` are asked for."""

    def make(rng: np.random.Generator) -> _Task:
        needles = [(key, seven_digits(rng)) for key in made_up_words(rng, keys) for _ in range(values)]
        needles = [needles[at] for at in rng.permutation(len(needles))]
        wanted = (
            {needles[at][0] for at in rng.permutation(len(needles))[:1]}
            if queried == 1
            else {key for key, _ in needles}
        )
        needed = [(at, key, number) for at, (key, number) in enumerate(needles) if key in wanted]
        names = " and ".join(dict.fromkeys(key for _, key, _ in needed))
        which = f"numbers of {names}, in the order of the text, are" if len(needed) > 1 else f"number of {names} is"
        answer = " " + ", ".join(number for _, _, number in needed)
        return _Task(
            [fact_sentence(key, number) for key, number in needles],
            f"\n\nIn the text above the {which}:",
            answer,
            needed[0][0],
        )

    return make


def _variables(rng: np.random.Generator) -> _Task:
    """Two chains of variables, one of which is asked for."""
    names = [name.upper() for name in made_up_words(rng, 2 * (HOPS + 1))]
    chains = [names[: HOPS + 1], names[HOPS + 1 :]]
    numbers = [seven_digits(rng) for _ in chains]
    # whose turn it is: shuffled as a whole, so that each chain keeps its order
    sides = rng.permutation([0] * (HOPS + 1) + [1] * (HOPS + 1))
    facts, at = [], [0, 0]
    for side in sides:
        chain, step = chains[side], at[side]
        facts.append(f"VAR {chain[step]} = {numbers[side] if not step else 'VAR ' + chain[step - 1]}.")
        at[side] += 1
    first = int(np.flatnonzero(sides == 0)[0])
    question = f"\n\nThe variables of the text above whose value is {numbers[0]}, in the order of the text, are:"
    return _Task(facts, question, " " + ", ".join(chains[0]), first)


TASKS: dict[str, Callable[[np.random.Generator], _Task]] = {
    "niah_single": _niah(1, 1, 1),
    "niah_multikey": _niah(NEEDLES, 1, 1),
    "niah_multivalue": _niah(1, NEEDLES, NEEDLES),
    "niah_multiquery": _niah(NEEDLES, 1, NEEDLES),
    "vt": _variables,
}
LISTS = ("cwe", "fwe")
RULER = (*TASKS, *LISTS)


def ruler(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, seed: int, task: str) -> list[Question]:
    """One question of the task, as long as the window, from each window. Deterministic by ``seed``.

    The window's text is the haystack; in "cwe" and "fwe", whose text is a list of words, it only fills the rest.

    Raises:
        ValueError: an unknown task.
        SourceError: a window is too short for the task.
    """
    if task not in RULER:
        raise ValueError(f"the RULER task is {task!r}: must be {', '.join(RULER)}")

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64, device="cpu")

    questions = []
    for at, window in enumerate(windows):
        # every task and window draws numbers of its own
        rng = np.random.default_rng((seed, RULER.index(task), at))
        questions.append(_hidden(window, tokens, task, rng) if task in TASKS else _listed(window, tokens, task, rng))
    return questions


def _question(window: Window, task: str, parts: Sequence[Tensor], answer: Tensor, needed: int) -> Question:
    """``needed`` is the position of the first token that the answer needs."""
    input_ids = torch.cat([*parts, answer])
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[-len(answer) :] = answer
    return Question(window.document, input_ids, labels, len(input_ids) - len(answer) - needed, task)


def _hidden(window: Window, tokens: Tokens, task: str, rng: np.random.Generator) -> Question:
    """The facts between the sentences of the window, in their order."""
    instance = TASKS[task](rng)
    facts, question, answer = (
        [tokens(f"\n{fact}\n") for fact in instance.facts],
        tokens(instance.question),
        tokens(instance.answer),
    )
    taken = sum(map(len, (*facts, question, answer)))
    room = window.ids.shape[1] - taken
    if room < LEAST_HAYSTACK:
        least = taken + LEAST_HAYSTACK
        raise SourceError(
            f"window {window.document!r} of {window.ids.shape[1]} tokens is too short for {task}: give at least {least}"
        )
    text = window.ids[0, :room]
    stops = sentence_ends(text, tokens)
    # a text with too few of them is cut anywhere
    places = stops.numpy() if len(stops) >= len(facts) else np.arange(1, room)
    cuts = sorted(rng.choice(places, len(facts), replace=False).tolist())
    parts, needed, length = [], 0, 0
    for at, (start, stop) in enumerate(zip([0, *cuts], [*cuts, room], strict=True)):
        parts.append(text[start:stop])
        length += stop - start
        if at < len(facts):
            # where the fact that is needed begins
            needed = length if at == instance.needed else needed
            parts.append(facts[at])
            length += len(facts[at])
    return _question(window, task, [*parts, question], answer, needed)


def _listed(window: Window, tokens: Tokens, task: str, rng: np.random.Generator) -> Question:
    """A list of words as long as fits; the window's text before it, for the tokens that are left."""
    make, least = (_common_words, COMMON * RARE_SHARE) if task == "cwe" else (_frequent_words, 4 * MOST_FREQUENT**2)
    state, length = rng.bit_generator.state, window.ids.shape[1]

    def of(count: int) -> tuple[Tensor, ...]:
        """(list, question, answer) with so many words: the same ones for any number."""
        rng.bit_generator.state = state
        words, wanted, question = make(rng, count)
        return tokens("\n\n" + " ".join(words)), tokens(question), tokens(" " + ", ".join(wanted))

    def over(count: int) -> bool:
        return sum(map(len, of(count))) > length

    if over(least):
        raise SourceError(
            f"window {window.document!r} of {length} tokens is too short for {task}, a list of at least {least} words"
        )
    # the longest list that fits: tokens grow with the number of words
    body, question, answer = of(bisect_left(range(length), True, lo=least, key=over) - 1)
    left = length - len(body) - len(question) - len(answer)
    return _question(window, task, [window.ids[0, :left], body, question], answer, left)


def _common_words(rng: np.random.Generator, count: int) -> tuple[list[str], list[str], str]:
    """(words, those asked for, question): ten words stand ten times as often as the others."""
    # count = 10 · times + the rest; a rare word stands about a tenth as often as a common one
    times = min(COMMON_TIMES, count // (2 * COMMON))
    rare = max(1, times // RARE_SHARE)
    words = made_up_words(rng, COMMON + -(-(count - COMMON * times) // rare))
    listed = np.repeat(words[COMMON:], rare)[: count - COMMON * times].tolist() + words[:COMMON] * times
    listed = [listed[at] for at in rng.permutation(count)]
    common = set(words[:COMMON])
    wanted = [word for word in dict.fromkeys(listed) if word in common]
    return listed, wanted, f"\n\nThe {COMMON} most common words of this list, in the order of their first place, are:"


# share of rank r ∝ r^−α with α = 2, as in RULER's task of frequent words (arXiv:2404.06654)
def _frequent_words(rng: np.random.Generator, count: int) -> tuple[list[str], list[str], str]:
    """(words, those asked for, question): frequencies fall as a power of the rank."""
    share = np.arange(1, count + 1) ** -ZETA
    times = np.floor(count * share / share.sum()).astype(int)
    times = times[times > 0]
    # what rounding down has left goes to the first word
    times[0] += count - times.sum()
    words = made_up_words(rng, len(times))
    listed = np.repeat(words, times)
    question = f"\n\nThe {MOST_FREQUENT} most frequent words of this text, the most frequent first, are:"
    return listed[rng.permutation(count)].tolist(), words[:MOST_FREQUENT], question
