"""The tasks of RULER on a haystack of one's own:
what the question asks for can be read off the text, and nothing else.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from hf_sparse_attn.data.sources import SourceError
from hf_sparse_attn.data.windows import Window
from hf_sparse_attn.experiments.rows.ruler import COMMON, HOPS, LISTS, MOST_FREQUENT, NEEDLES, RULER, TASKS, ruler

N = 6000  # the tokenizer of the tests has one token a character


class Characters:
    """A tokenizer of single characters, which needs no files."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) for c in text]}

    @staticmethod
    def decode(ids):
        return "".join(map(chr, ids.tolist()))


def haystack(length=N):
    text = ("Nothing is said here. Go on\n" * (length // 20))[:length]
    return Window("hay[0]", torch.tensor([[ord(c) for c in text]]))


def asked(task, seed=0, length=N):
    (question,) = ruler([haystack(length)], Characters(), seed, task)
    answer = int((question.labels >= 0).sum())
    assert (
        torch.equal(question.labels[-answer:], question.input_ids[-answer:])
        and (question.labels[:-answer] == -100).all()
    )
    assert len(question.input_ids) == length and question.task == task and question.document == "hay[0]"
    text = Characters.decode(question.input_ids)
    return text[:-answer], text[-answer:], question


@pytest.mark.parametrize("task", [name for name in RULER if name.startswith("niah")])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_asked_for_stand_in_the_text(task, seed):
    text, answer, question = asked(task, seed)
    needles = [(m[1], m[2], m.start()) for m in re.finditer(r"The number of (\w+) is (\d{7})\.", text)]
    body, _, ending = text.rpartition("In the text above")
    names = set(re.findall(r"\w+", ending)) & {name for name, _, _ in needles}
    assert answer == " " + ", ".join(number for name, number, _ in needles if name in names)
    assert len(needles) == (1 if task == "niah_single" else NEEDLES)
    assert len(names) == (NEEDLES if task == "niah_multiquery" else 1)
    assert len({name for name, _, _ in needles}) == (1 if task in ("niah_single", "niah_multivalue") else NEEDLES)
    first = next(at for name, _, at in needles if name in names)
    assert len(text) - question.distance == first - 1  # with the line break before it
    without = re.sub(r"\nThe number of \w+ is \d{7}\.\n", "", body)
    assert without.rstrip("\n") in Characters.decode(haystack().ids[0])


def test_the_chain_of_variables_can_be_followed():
    text, answer, question = asked("vt")
    values, names = {}, []
    wanted = re.search(r"whose value is (\d{7})", text)[1]
    for name, right in re.findall(r"VAR (\w+) = (VAR \w+|\d{7})\.", text):
        values[name] = values[right[4:]] if right.startswith("VAR") else right
        names += [name] * (values[name] == wanted)
    assert answer == " " + ", ".join(names) and len(names) == HOPS + 1 and len(values) == 2 * (HOPS + 1)
    assert text[len(text) - question.distance :].startswith(f"\nVAR {names[0]} = {wanted}.")


def test_the_common_words_are_ten_times_as_common():
    text, answer, _ = asked("cwe")
    words = text.rpartition("\n\n")[0].rpartition("\n\n")[2].split()
    counts = Counter(words)
    common, others = counts.most_common()[:COMMON], counts.most_common()[COMMON:]
    assert min(count for _, count in common) >= 10 * max(count for _, count in others) > 0
    order = dict.fromkeys(word for word in words if word in dict(common))
    assert answer == " " + ", ".join(order)


def test_the_frequent_words_come_first():
    text, answer, _ = asked("fwe")
    counts = Counter(text.rpartition("\n\n")[0].rpartition("\n\n")[2].split()).most_common()
    assert answer == " " + ", ".join(word for word, _ in counts[:MOST_FREQUENT])
    assert all(counts[at][1] > counts[at + 1][1] for at in range(MOST_FREQUENT))


@pytest.mark.parametrize("task", RULER)
def test_the_same_seed_gives_the_same_question(task):
    windows = [haystack(), haystack()]
    one, other, different = (ruler(windows, Characters(), seed, task) for seed in (0, 0, 1))
    for a, b, c in zip(one, other, different, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and not torch.equal(a.input_ids, c.input_ids)
    assert not torch.equal(one[0].input_ids, one[1].input_ids)


@pytest.mark.parametrize("task", LISTS)
def test_a_list_fills_the_window(task):
    text, _, question = asked(task)
    assert question.distance > 0.9 * len(text)


def test_bad_tasks_and_short_windows_are_refused():
    with pytest.raises(ValueError, match=r"the RULER task is 'qa': must be niah_single"):
        ruler([haystack()], Characters(), 0, "qa")
    for task in TASKS:
        with pytest.raises(SourceError, match=f"'hay\\[0\\]' of 100 tokens is too short for {task}: give at least"):
            ruler([haystack(100)], Characters(), 0, task)
    for task in LISTS:
        with pytest.raises(SourceError, match=f"too short for {task}, a list of at least"):
            ruler([haystack(100)], Characters(), 0, task)


def test_real_tokenizers_keep_the_length(llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    window = Window("d[0]", torch.randint(3, 90, (1, 900), generator=torch.Generator().manual_seed(0)))
    for task in TASKS:
        assert len(ruler([window], tokenizer, 0, task)[0].input_ids) == 900
