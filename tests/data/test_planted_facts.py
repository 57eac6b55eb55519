"""Texts with facts: where they stand, how they are asked for, and which tokenizers and texts are refused."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.finding_model import byte_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_sparse_attn.data.planted_facts import THINGS, FactTokenizer, haystacks
from hf_sparse_attn.data.sources import SourceError

TEXT = "Nothing is said here. Go on and on\n" * 200


def decoded(ids):
    return byte_tokenizer().decode(ids.tolist())


@pytest.mark.parametrize("count", [1, 4])
def test_facts_stand_evenly_spread_between_sentences_and_each_has_its_question(count):
    (made,) = haystacks(TEXT, byte_tokenizer(), [3000], count, 0)
    text = decoded(made.ids)
    told = re.findall(r"\nThe number of (\w+) is (\d{7})\.\n", text)
    assert len(told) == count + 1 == len(dict(told)) and len(made.facts) == count
    example = next((word, number) for word, number in told if word not in {fact.word for fact in made.facts})
    for fact in made.facts:
        assert (fact.word, fact.number) in told
        assert text[fact.start :].startswith(f"\nThe number of {fact.word} is {fact.number}.\n")
        assert text[fact.start + fact.number_at :].startswith(f" {fact.number}")
        # behind the end of a sentence or line
        assert text[fact.start - 1] in ".\n"
        want = f"\n\nThe number of {example[0]} is {example[1]}.\nThe number of {fact.word} is"
        assert (decoded(fact.question), decoded(fact.answer)) == (want, f" {fact.number}")
    depths = sorted(text.index(f" of {word} is") / len(text) for word, _ in told)
    assert depths == pytest.approx([(at + 0.5) / (count + 1) for at in range(count + 1)], abs=0.03)
    longest = max(len(fact.question) + len(fact.answer) for fact in made.facts)
    assert len(made.ids) + longest == made.length == 3000
    without = re.sub(r"\nThe number of \w+ is \d{7}\.\n", "", text)
    assert without == TEXT[: len(without)]


def test_the_same_seed_gives_the_same_facts_and_each_length_its_own():
    one, other = (haystacks(TEXT, byte_tokenizer(), [1500, 3000], 3, 0) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.ids, b.ids)
    (different,) = haystacks(TEXT, byte_tokenizer(), [1500], 3, 1)
    assert not torch.equal(different.ids, one[0].ids)
    assert {fact.number for fact in one[0].facts}.isdisjoint(fact.number for fact in one[1].facts)


def test_special_tokens_before_a_text_stand_before_a_haystack():
    tokenizer = byte_tokenizer()
    plain = haystacks(TEXT, tokenizer, [1500], 2, 0)[0].ids
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>")
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    with_bos = haystacks(TEXT, tokenizer, [1500], 2, 0)[0].ids
    assert with_bos[0] == bos and len(with_bos) == len(plain) and bos not in with_bos[1:]


def test_a_tokenizer_that_puts_a_blank_before_every_text_tells_facts_all_the_same():
    tokenizer = Tokenizer(
        BPE({letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fact = FactTokenizer(fast).fact("apple", "1234567", "The number of river is 7654321.")
    assert fast.decode(fact.answer.tolist()) == " 1234567" and fast.decode(fact.sentence.tolist())[0] == "\n"


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_text_or_a_length_that_is_too_short_is_refused():
    with pytest.raises(SourceError, match=r"the text has 700 tokens, but a length of 3000 needs \d+ of them beside"):
        haystacks(TEXT[:700], byte_tokenizer(), [3000], 4, 0)
    with pytest.raises(
        SourceError, match=r"a length of 300 tokens is too short for 4 facts .*: give at least \d+"
    ) as e:
        haystacks(TEXT, byte_tokenizer(), [300], 4, 0)
    least = int(re.search(r"at least (\d+)", str(e.value))[1])
    haystacks(TEXT, byte_tokenizer(), [least], 4, 0)
    with pytest.raises(ValueError, match=f"the number of facts is 99: must be 1 to {len(THINGS) - 1}"):
        haystacks(TEXT, byte_tokenizer(), [3000], 99, 0)


def test_a_tokenizer_without_numbers_or_words_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match=r"gives '.*' back where 'apple' was written.*hf-sparse-attn eval"):
        FactTokenizer(word_tokenizer).fact("apple", "1234567", "The number of river is 7654321.")


def test_a_tokenizer_that_splits_the_number_otherwise_in_the_fact_is_refused():
    """With its full stop it is one token, as a tokenizer may have it that splits at blanks only."""
    words = "<unk> a The number of apple river is 1234567 1234567. 7654321."
    vocabulary = {word: at for at, word in enumerate(words.split(" "))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    split = FactTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    with pytest.raises(ValueError, match=r"splits the number 1234567 into \['1234567'\] .* '1234567\.'\]: the answer"):
        split.fact("apple", "1234567", "The number of river is 7654321.")


def test_a_tokenizer_that_joins_question_and_answer_is_refused():
    tokenizer = byte_tokenizer()
    # what stands before a number changes with it
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("is 1", "IS 1")
    with pytest.raises(ValueError, match=r"splits '.* is' in another way when ' 1234567' follows"):
        FactTokenizer(tokenizer).fact("apple", "1234567", "The number of river is 7654321.")
