"""generate(): the stock model's tokens with every block kept, and at a real budget the logits of the
uncached forward.
"""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from helpers.agreement import assert_close_to_largest as close
from helpers.summaries import assert_summaries_are_those_of_the_keys, fed, summaries_checked
from transformers import DynamicCache, GenerationMixin

from hf_sparse_attn import SparseCall
from hf_sparse_attn.attention.cache import GrowingLayerMixin
from hf_sparse_attn.models import generate_hooks
from hf_sparse_attn.models.generate_hooks import chunk_lengths

NEW = 20
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 30}


@pytest.fixture(scope="module")
def stock(stock_llama):
    return stock_llama()


@pytest.fixture(scope="module")
def complete(sparse_llama, every_block):
    """Every block kept, through the sparse path."""
    return sparse_llama(every_block, noise=0.1)


@pytest.fixture(scope="module")
def sparse(sparse_llama, real_budget):
    """A real budget, routers away from their untrained start; stage 1 passes no more than the budget on."""
    return sparse_llama({**real_budget, "candidate_factor": 1.0}, noise=0.1)


@pytest.fixture(scope="module")
def assistants(stock_llama, sparse_llama, every_block):
    """Two smaller models, with other weights: a stock and a sparse one."""
    small = {"seed": 5, "num_hidden_layers": 1}
    return {"stock": stock_llama(**small), "sparse": sparse_llama(every_block, **small)}


@pytest.fixture
def crops(monkeypatch):
    """How many tokens were taken away from cache layers, and when."""
    seen, crop = [], GrowingLayerMixin.crop
    monkeypatch.setattr(GrowingLayerMixin, "crop", lambda self, n: seen.append(n) or crop(self, n))
    return seen


def generated(model, ids, seed=0, **options):
    """Tokens, with every summary that was read held against a recomputed one."""
    torch.manual_seed(seed)
    with summaries_checked():
        return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


def assert_logits_of_the_uncached_forward(model, ids, mask=None, **options):
    """Each row of what is generated, token by token, against one uncached call:
    the prompt in tiles, the rest singly.
    """
    arguments = {} if mask is None else {"attention_mask": mask}
    out = generated(model, ids, output_logits=True, return_dict_in_generate=True, **arguments, **options)
    prompt = ids.shape[1]
    assert out.sequences.shape[1] == prompt + NEW
    for row, tokens in enumerate(out.sequences):
        skip = 0 if mask is None else int((mask[row] == 0).sum())
        with torch.no_grad():
            want = model(tokens[None, skip:], sparse_call=SparseCall(decode_from=prompt - skip)).logits[0]
            dense = model(tokens[None, skip:], sparse_call=SparseCall(dense=True)).logits[0]
        got = torch.stack([logits[row] for logits in out.logits])
        close(got, want[prompt - skip - 1 : -1], 1e-4)
        assert (got - dense[prompt - skip - 1 : -1]).abs().max() > 0.05, (
            "the budget cuts nothing: this test would prove nothing"
        )


STRATEGIES = {
    "greedy": {},
    "sampling": SAMPLING,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, **SAMPLING},
    "several sequences": {"num_return_sequences": 3, **SAMPLING},
    "chunks": {"prefill_chunk_size": 32},
    "odd chunks": {"prefill_chunk_size": 13},
    "no cache": {"use_cache": False},
    "stops": {"eos_token_id": list(range(3, 20)), "pad_token_id": 0},  # rows end at different steps
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_tokens_are_those_of_the_stock_model(stock, complete, token_ids, left_padded, options, padded):
    ids, mask = left_padded([token_ids(1, n, seed=n)[0] for n in ((140, 97, 33) if padded else (140, 140))])
    arguments = {"attention_mask": mask, **options} if padded else options
    assert torch.equal(generated(complete, ids, **arguments), generated(stock, ids, **arguments))


@pytest.mark.parametrize("name", ["greedy", "sampling", "several sequences", "chunks", "repetition penalty"])
def test_logits_at_a_real_budget_are_those_of_the_uncached_forward(sparse, token_ids, name):
    assert_logits_of_the_uncached_forward(sparse, token_ids(2, 150), **STRATEGIES[name])


@pytest.mark.parametrize(
    ("size", "length"), [(40, 150), (32, 150), (17, 150), (5, 40), (100, 150), (33, 161), (149, 150)]
)
@pytest.mark.parametrize("offset", [0, 5, 21])
def test_chunks_end_with_query_tiles(sparse, token_ids, size, length, offset):
    """So a prompt in chunks selects what the uncut one does;
    a last chunk of less than a tile would be routed as decoding is.
    """
    ids, options = token_ids(1, length), {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    if offset:
        ids = torch.cat([torch.zeros(1, offset, dtype=torch.long), ids], 1)
        options["attention_mask"] = ids.ne(0).long()
    whole, chunks = generated(sparse, ids, **options), generated(sparse, ids, prefill_chunk_size=size, **options)
    for a, b in zip(whole.logits, chunks.logits, strict=True):
        close(b, a, 1e-5)
    for a, b in zip(whole.past_key_values.layers, chunks.past_key_values.layers, strict=True):
        close(b.keys, a.keys, 1e-5)


@pytest.mark.skipif(
    "prefill_ids" not in inspect.unwrap(GenerationMixin._prefill).__code__.co_varnames,
    reason="this Transformers reads what is cached again where it reads in chunks, stock models, too",
)
def test_a_continued_chat_is_read_in_chunks_that_end_with_query_tiles(sparse, token_ids):
    ids, options = token_ids(1, 200), {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    out = []
    for size in (None, 40):
        cache = DynamicCache(config=sparse.config)
        with torch.no_grad():
            sparse(ids[:, :75], past_key_values=cache)
        out.append(generated(sparse, ids, past_key_values=cache, prefill_chunk_size=size, **options))
    close(out[1].logits[0], out[0].logits[0], 1e-5)


def test_chunk_lengths():
    for start, end, size, tile, offset in itertools.product(
        (0, 7, 32, 75), (80, 81, 95, 150, 161), (1, 15, 16, 40, 64, 200), (16, 32), (0, 5)
    ):
        lengths = chunk_lengths(start, end, size, tile, offset)
        cuts = list(itertools.accumulate(lengths, initial=start))
        assert cuts[-1] == end and all((cut - offset) % tile == 0 for cut in cuts[1:-1])
        assert all(length >= tile for length in lengths[1:]) or end - start < tile
        assert all(length <= max(size, 2 * tile) + tile for length in lengths)
    assert chunk_lengths(0, 256, 64, 64) == [64] * 4 and chunk_lengths(0, 150, 200, 64) == [150]
    assert chunk_lengths(0, 300, 128, 64) == [128, 64, 108]


def test_rows_of_other_lengths_are_said_to_be_cut(sparse, token_ids, left_padded, caplog):
    generate_hooks._say_rows_differ.cache_clear()
    ids, mask = left_padded([token_ids(1, n, seed=n)[0] for n in (170, 131)])
    generated(sparse, ids, attention_mask=mask, prefill_chunk_size=64, max_new_tokens=1)
    assert "chunks cannot end with the tiles of all rows" in caplog.text


def test_a_padded_row_decodes_at_a_real_budget_as_if_it_were_alone(sparse, token_ids, left_padded):
    ids, mask = left_padded([token_ids(1, n, seed=n)[0] for n in (170, 131)])
    assert_logits_of_the_uncached_forward(sparse, ids, mask)


def test_the_scores_of_beams_at_a_real_budget_are_those_of_the_uncached_forward(sparse, token_ids):
    ids = token_ids(2, 150, seed=1)
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "length_penalty": 0.0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    out = generated(sparse, ids, **options)
    for tokens, score in zip(out.sequences, out.sequences_scores, strict=True):
        with torch.no_grad():
            logits = sparse(tokens[None], sparse_call=SparseCall(decode_from=150)).logits[0]
        close(logits[149:-1].log_softmax(-1).gather(1, tokens[150:, None]).sum(), score, 1e-4)


def test_generation_that_crosses_dense_below_gives_the_tokens_of_the_stock_model(
    stock, sparse_llama, every_block, token_ids, left_padded
):
    model = sparse_llama({**every_block, "dense_below": 150}, noise=0.1)
    ids, mask = left_padded([token_ids(1, n, seed=n)[0] for n in (140, 97)])
    assert torch.equal(generated(model, ids, attention_mask=mask), generated(stock, ids, attention_mask=mask))


# -- guesses that are checked several at once -----------------------------------------------------------------------


def guessing(kind, assistants):
    return {"prompt_lookup_num_tokens": 5} if kind == "prompt lookup" else {"assistant_model": assistants[kind]}


@pytest.mark.parametrize("kind", ["prompt lookup", "stock", "sparse"])
@pytest.mark.parametrize("sampled", [False, True])
def test_guesses_do_not_change_the_tokens(stock, complete, assistants, token_ids, crops, kind, sampled):
    """Whenever a guess was wrong, the cache is cropped."""
    ids, options = token_ids(1, 30, seed=2).repeat(1, 4), SAMPLING if sampled else {}
    options = {**options, **guessing(kind, assistants)}
    assert torch.equal(generated(complete, ids, **options), generated(stock, ids, **options))
    assert any(n < 0 for n in crops)
    if not sampled:
        assert torch.equal(generated(complete, ids, **options), generated(stock, ids))


@pytest.mark.parametrize("kind", ["prompt lookup", "stock", "sparse"])
def test_guesses_do_not_change_the_logits_at_a_real_budget(sparse, assistants, token_ids, crops, kind):
    """The first guesses come in one call with the prompt, in whose last tile they would have a say:
    here it is full, and they are wrong.
    """
    ids = token_ids(1, 32, seed=2).repeat(1, 5)
    assert_logits_of_the_uncached_forward(sparse, ids, **guessing(kind, assistants))
    assert any(n < 0 for n in crops)


def test_a_sparse_assistant_does_not_change_the_tokens_of_a_stock_model(stock, assistants, token_ids):
    ids = token_ids(1, 120, seed=3)
    assert torch.equal(generated(stock, ids, assistant_model=assistants["sparse"]), generated(stock, ids))


# -- caches that are passed back ------------------------------------------------------------------------------------


def said(model, turns, cache, edit):
    """Tokens of a chat of which every turn is answered through one cache, which ``edit`` changes between turns."""
    ids = turns[0]
    for turn in (*turns[1:], None):
        ids = generated(model, ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
        if turn is not None:
            ids = torch.cat([edit(ids, cache), turn], 1)
    return ids


def keep(ids, cache):
    return ids


def take_back(ids, cache):
    """The last ten tokens of the answer are to be said anew, one of which is not in the cache."""
    cache.crop(-9)
    return ids[:, :-10]


@pytest.mark.parametrize("edit", [keep, take_back])
def test_a_chat_through_one_cache_has_the_tokens_of_the_stock_model(stock, complete, token_ids, edit):
    turns = [token_ids(2, n, seed=n) for n in (90, 31, 7, 50)]
    cache = DynamicCache()
    got = said(complete, turns, cache, edit)
    assert torch.equal(got, said(stock, turns, DynamicCache(), edit))
    assert_summaries_are_those_of_the_keys(complete, cache)


@pytest.mark.parametrize("edit", [keep, take_back])
def test_a_chat_at_a_real_budget_reads_the_summaries_of_a_fresh_cache(sparse, token_ids, edit):
    """The next call equals that of a cache which was filled with the same tokens in the same pieces."""
    ids, cache = token_ids(2, 144, seed=7), DynamicCache()
    ids = edit(generated(sparse, ids, past_key_values=cache), cache)
    fresh, length = DynamicCache(), cache.get_seq_length()
    fed(sparse, ids[:, :144], fresh)
    for at in range(144, length):
        fed(sparse, ids[:, at : at + 1], fresh)
    more = torch.cat([ids[:, length:], token_ids(2, 40, seed=8)], 1)
    close(fed(sparse, more, cache), fed(sparse, more, fresh), 1e-5)
    assert_summaries_are_those_of_the_keys(sparse, cache)


def test_one_prompt_is_cached_once_and_continued_in_several_ways(stock, complete, token_ids):
    prompt, ends = token_ids(1, 133, seed=9), [token_ids(1, n, seed=n) for n in (5, 20, 40)]
    filled = {model: DynamicCache() for model in (stock, complete)}
    for model, cache in filled.items():
        fed(model, prompt, cache)
    for end in ends:
        ids = torch.cat([prompt, end], 1)
        got, want = (generated(model, ids, past_key_values=copy.deepcopy(filled[model])) for model in (complete, stock))
        assert torch.equal(got, want) and torch.equal(got, generated(stock, ids))
    assert filled[complete].get_seq_length() == 133


@pytest.mark.parametrize("model", ["complete", "sparse"])
def test_a_cached_prompt_is_expanded_to_several_rows(request, model, token_ids, left_padded):
    """Rows of a batch continue one prompt each in its own way, padded between the prompt and the end."""
    model = request.getfixturevalue(model)
    prompt, ends = token_ids(1, 144, seed=10), [token_ids(1, n, seed=n)[0] for n in (25, 7, 16)]
    cache = DynamicCache()
    fed(model, prompt, cache)
    cache.batch_repeat_interleave(3)
    end, mask = left_padded(ends)
    mask = torch.cat([torch.ones(3, 144, dtype=torch.long), mask], 1)
    got = generated(model, torch.cat([prompt.expand(3, -1), end], 1), attention_mask=mask, past_key_values=cache)
    for row, mine in enumerate(ends):
        alone = DynamicCache()
        fed(model, prompt, alone)
        want = generated(model, torch.cat([prompt[0], mine])[None], past_key_values=alone)
        assert torch.equal(got[row, -NEW:], want[0, -NEW:])
