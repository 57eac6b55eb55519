"""Packed documents, told by position_ids or cu_seq_lens: each is attended as if it were alone."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models
from helpers.agreement import assert_close_to_largest as close
from transformers import DataCollatorWithFlattening, StaticCache

# plain, windows, soft caps, sinks, layers without rotary embedding, bidirectional without and with windows
MODELS = ("llama", "qwen2", "gemma3_text", "gemma2", "gpt_oss", "cohere2", "bert", "modernbert")
TWO_SIDED = ("bert", "modernbert")
LENGTHS = (200, 131, 90)


@pytest.fixture(scope="module", params=["every_block", "real_budget"])
def settings(request):
    return {**request.getfixturevalue(request.param), "candidate_factor": 1.0}


def sparse(model_type, settings):
    """A tiny sparse model; of what a bidirectional layer forces, the budget has room for all."""
    return tiny_models.sparse_tiny_model(
        model_type, {**settings, "min_keys": 112} if model_type in TWO_SIDED else settings
    )


@pytest.fixture(scope="module")
def documents():
    return [torch.randint(3, 95, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture(scope="module")
def packed(documents):
    """What Transformers' collator makes of the documents for padding-free training."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": document[0].tolist()} for document in documents])
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "position_ids"} <= set(batch)
    return {name: batch[name] for name in batch if name != "labels"}


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def separate(model, documents):
    return torch.cat([logits(model, input_ids=document) for document in documents], 1)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_documents_equal_separate_ones(model_type, use_cache, settings, documents, packed):
    model = sparse(model_type, settings)
    want = separate(model, documents)
    close(logits(model, **packed, use_cache=use_cache), want, 1e-5)
    if model_type in TWO_SIDED:
        return  # position_ids do not cut documents in stock bidirectional models either
    close(
        logits(model, input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=use_cache),
        want,
        1e-5,
    )


@pytest.mark.parametrize("model_type", [name for name in MODELS if name != "bert"])
def test_cu_seq_lens_tell_documents_without_position_ids(model_type, every_block, documents, packed):
    """Positions then run through all documents, which a rotary embedding does not mind, but the learned positions of
    bert do.
    """
    model = sparse(model_type, every_block)
    inputs = {name: value for name, value in packed.items() if name != "position_ids"}
    close(logits(model, **inputs), separate(model, documents), 1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_packed_documents_below_dense_below_equal_separate_ones(model_type, use_cache, every_block, documents, packed):
    model = sparse(model_type, {**every_block, "dense_below": 422})
    close(logits(model, **packed, use_cache=use_cache), separate(model, documents), 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_packed_batch_has_the_gradients_of_separate_documents(model_type, settings, documents, packed):
    model = sparse(model_type, settings)

    def gradients(*calls):
        model.zero_grad()
        torch.cat([model(**call).logits for call in calls], 1).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got, want = gradients(packed), gradients(*({"input_ids": document} for document in documents))
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_packed_rows_with_padding_equal_separate_documents(model_type, use_cache, settings, documents):
    """Two documents and padding in each row, at either end and between them."""
    model = sparse(model_type, settings)
    ids, mask, positions = torch.zeros(2, 300).long(), torch.zeros(2, 300).long(), torch.zeros(2, 300).long()
    places = ((0, 0, 3), (0, 2, 205), (1, 1, 0), (1, 2, 150))  # row, document, first slot
    for row, which, first in places:
        at = slice(first, first + LENGTHS[which])
        ids[row, at], mask[row, at], positions[row, at] = documents[which], 1, torch.arange(LENGTHS[which])
    got = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=use_cache)
    for row, which, first in places:
        close(got[row, first : first + LENGTHS[which]], logits(model, input_ids=documents[which])[0], 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_bigcode"])
def test_documents_are_those_that_the_stock_model_sees(model_type, every_block):
    """Without a cache and a mask it also starts one where positions jump ahead, and tells modules that are not told
    positions.
    """
    model, stock = sparse(model_type, every_block), tiny_models.tiny_model(model_type)
    ids = torch.randint(3, 95, (2, 200), generator=torch.Generator().manual_seed(0))
    jumps, falls = (
        torch.cat([torch.arange(90), torch.arange(150, 260)]),
        torch.cat([torch.arange(120), torch.arange(80)]),
    )
    inputs = {"input_ids": ids, "position_ids": torch.stack([jumps, falls]), "use_cache": False}
    close(logits(model, **inputs), logits(stock, **inputs), 1e-5)
    inputs = {
        "input_ids": ids[:1],
        "position_ids": jumps[None],
        "attention_mask": torch.ones(1, 200).long(),
        "use_cache": False,
    }
    close(logits(model, **inputs), logits(stock, **inputs), 1e-5)


def test_cu_seq_lens_count_the_tokens_of_all_rows(every_block, documents):
    model = sparse("llama", every_block)
    rows = [torch.cat([documents[1], documents[2][:, :69]], 1), documents[0]]
    ends = torch.tensor([0, 131, 200, 400], dtype=torch.int32)
    got = logits(model, input_ids=torch.cat(rows), cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    close(got[:1, :131], logits(model, input_ids=documents[1]), 1e-4)
    close(got[:1, 131:], logits(model, input_ids=documents[2][:, :69]), 1e-4)
    close(got[1:], logits(model, input_ids=documents[0]), 1e-4)
    for wrong in ([0, 131, 200], [0, 131, 401]):
        with pytest.raises(ValueError, match=r"must count the 400 tokens of the call, those of all 2 rows together"):
            logits(model, input_ids=torch.cat(rows), cu_seq_lens_q=torch.tensor(wrong))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_packed_documents_that_continue_a_cache_are_refused(model_type, every_block, documents):
    model = sparse(model_type, every_block)
    cache = model(input_ids=documents[0], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"tells of 2 documents in a call with 90 queries.*without a past only"):
        logits(model, input_ids=documents[2], past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 50, 90]))


def test_packed_documents_in_a_static_cache_equal_separate_ones(settings, documents, packed):
    model = sparse("llama", settings)
    cache = StaticCache(config=model.config, max_cache_len=500)
    close(logits(model, **packed, past_key_values=cache), separate(model, documents), 1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_compiled_model_keeps_documents_apart_in_every_layer(use_cache, every_block, documents, packed):
    model = sparse("qwen2", every_block)
    want = separate(model, documents)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for options in ("position_ids", "cu_seq_lens_q"):
        inputs = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"], options: packed[options]}
        close(logits(compiled, **inputs, use_cache=use_cache), want, 1e-5)
