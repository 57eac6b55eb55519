"""Texts become tokens that know their characters, and no text becomes a control token."""

from __future__ import annotations

import pytest
from helpers.event_folders import CONTROL, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from hf_sparse_attn.industry.errors import PlantDataError
from hf_sparse_attn.industry.representation.text_tokens import TextEncoder


@given(st.lists(st.sampled_from([CONTROL, "<s>", "<|im", "_end|>", "<", ">", " ", "é", "x", "<pad>"]), max_size=12))
def test_no_text_ever_holds_a_control_token(parts):
    tokenizer = byte_tokenizer()
    text = "".join(parts)
    ((ids, spans),) = TextEncoder(tokenizer)([text])
    assert not {0, 1, 2} & set(ids.tolist())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert sorted({at for begin, end in spans.tolist() for at in range(begin, end)}) == list(range(len(text)))


def test_a_vocabulary_of_words_holds_control_tokens_too_and_they_are_cut():
    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "alarm": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")
    ((ids, spans),) = TextEncoder(tokenizer)(["alarm <s> alarm"])
    assert ids.tolist() == [3, 1, 1, 3] and spans.tolist() == [[0, 5], [6, 7], [7, 9], [10, 15]]


def test_added_tokens_in_brackets_are_control_tokens_and_added_words_are_not():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", special=False), AddedToken("MPa", special=False)])
    ((ids, _),) = TextEncoder(tokenizer)(["3 MPa <|user|> [x]"])
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in ids
    assert tokenizer.convert_tokens_to_ids("MPa") in ids


def test_thousands_of_control_tokens_in_one_line_are_cut():
    tokenizer = byte_tokenizer()
    ((ids, _),) = TextEncoder(tokenizer)([CONTROL * 3000])
    assert 2 not in ids and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == CONTROL * 3000


def test_a_control_token_of_one_character_is_refused_with_what_to_do():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "€"})
    ids = TextEncoder(tokenizer)(["a € b"])[0][0]
    assert tokenizer.convert_tokens_to_ids("€") not in ids
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "§": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="§", unk_token="<unk>")
    with pytest.raises(PlantDataError, match="the character '§' alone is a control token"):
        TextEncoder(words)(["a § b"])


def test_a_tokenizer_that_tells_no_places_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(PlantDataError, match="Slow does not say which characters"):
        TextEncoder(Slow())
