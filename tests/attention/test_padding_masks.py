"""Padding: before, behind and between the tokens of a row, in calls with and without a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny_models
from helpers.agreement import assert_close_to_largest as close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import create_causal_mask

from hf_sparse_attn import SparseCall
from hf_sparse_attn.attention.documents import Layout
from hf_sparse_attn.config import ATTN_IMPLEMENTATION

MODELS = (
    "llama",
    "qwen2",
    "gemma2",
    "gpt_oss",
    "modernbert",
    "bert",
)  # plain, windows, soft caps, sinks, bidirectional with and without windows
TWO_SIDED = ("modernbert", "bert")
ROWS = {"left": (24, 0), "right": (0, 61), "both": (30, 25), "none": (0, 0)}  # pads before and behind
WIDTH = 205


@pytest.fixture(scope="module", params=["every_block", "real_budget"])
def settings(request):
    """Stage 1 passes no more than the budget on, so that its summaries matter."""
    return {**request.getfixturevalue(request.param), "candidate_factor": 1.0}


def sparse(model_type, settings):
    """A tiny sparse model; of what a bidirectional layer forces, the budget has room for all."""
    return tiny_models.sparse_tiny_model(
        model_type, {**settings, "min_keys": 112} if model_type in TWO_SIDED else settings
    )


def padded(rows, width=WIDTH, seed=0):
    """(ids, mask, content positions) of rows with (before, behind) pads; the pads' ids are random, too."""
    ids = torch.randint(3, 95, (len(rows), width), generator=torch.Generator().manual_seed(seed))
    slot = torch.arange(width)
    mask = torch.stack([(slot >= before) & (slot < width - behind) for before, behind in rows]).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("model_type", MODELS)
def test_padded_rows_equal_unpadded_ones(model_type, settings):
    model = sparse(model_type, settings)
    # the attention modules of modernbert are not told position_ids: pads in front turn what its routers see
    ids, mask, positions = padded([ROWS[name] for name in (("right", "none") if model_type == "modernbert" else ROWS)])
    got = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, real in enumerate(mask.bool()):
        close(got[row][real], logits(model, ids[row : row + 1, real])[0], 1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_padding_below_dense_below_is_bit_for_bit_that_of_the_stock_model(model_type, settings):
    model = sparse(model_type, {**settings, "dense_below": WIDTH + 1})
    stock = tiny_models.tiny_model(model_type)
    if not stock._supports_sdpa:
        stock.set_attn_implementation("eager")
    ids, mask, positions = padded(ROWS.values())
    for options in ({}, {"position_ids": positions}):
        assert torch.equal(*(logits(m, ids, attention_mask=mask, **options)[mask.bool()] for m in (model, stock)))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_row_of_padding_only_gives_no_nan(model_type, settings):
    model = sparse(model_type, settings)
    ids, mask, _ = padded([(0, 0), (WIDTH, 0), (40, 40)])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embeddings, attention_mask=mask).logits
    assert bool(out.isfinite().all())
    out[mask.bool()].square().mean().backward()
    assert bool(embeddings.grad.isfinite().all()) and embeddings.grad[0].abs().max() > 0
    assert not bool(embeddings.grad[1].any()) and not bool(embeddings.grad[mask == 0].any())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()  # a loss that reads the padding
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "modernbert"])
def test_padding_between_tokens_equals_stock(model_type, every_block):
    """A window counts slots, those of padding too."""
    model = sparse(model_type, every_block)
    stock = tiny_models.tiny_model(model_type)
    ids, mask, _ = padded([(0, 0), (10, 5)])
    mask[0, 50:71] = mask[1, 100:101] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got, want = (logits(m, ids, **options)[mask.bool()] for m in (model, stock))
    close(got, want, 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_decoder_that_is_asked_to_see_both_sides_equals_stock(model_type, every_block):
    model, stock = sparse(model_type, every_block), tiny_models.tiny_model(model_type)
    ids, mask, positions = padded(ROWS.values())
    options = {"attention_mask": mask, "position_ids": positions, "is_causal": False, "use_cache": False}
    got, want = (logits(m, ids, **options)[mask.bool()] for m in (model, stock))
    close(got, want, 1e-5)
    assert (
        want - logits(stock, ids, **{**options, "is_causal": True})[mask.bool()]
    ).abs().max() > 0.1 * want.abs().max()


def test_the_implementation_has_a_mask_function_and_a_name_that_means_nothing_else():
    """Without a mask function Transformers drops padding silently;
    parts of other names would call for their kernels.
    """
    assert (
        ATTN_IMPLEMENTATION in AttentionInterface._global_mapping
        and ATTN_IMPLEMENTATION in AttentionMaskInterface._global_mapping
    )
    assert not any(
        word in ATTN_IMPLEMENTATION for word in ("flash", "sdpa", "flex", "eager", "paged", "/", "@", ":", "|")
    )


def test_the_mask_function_gives_back_its_own_masks(every_block):
    """generate() asks for a mask, and the model asks again with what it got."""
    config = sparse("llama", every_block).config
    _, mask, _ = padded(ROWS.values())
    arguments = {"config": config, "inputs_embeds": torch.zeros(4, WIDTH, 1), "past_key_values": None}
    created = create_causal_mask(attention_mask=mask, **arguments)
    assert torch.equal(created, mask.bool()) and torch.equal(
        create_causal_mask(attention_mask=created, **arguments), created
    )
    assert create_causal_mask(attention_mask=torch.ones_like(mask), **arguments) is None


# -- chats of several turns in one batch: each turn is padded to the longest ----------------------------------------

TURNS = (((3, 90), (0, 93)), ((21, 40), (0, 61)), ((0, 17), (5, 12)))  # of each turn and row: pads before, tokens


def chats(side):
    """(ids, mask, where each turn ends) of two chats whose turns are padded on one side, and of 20 single tokens, some
    of one chat only.
    """
    ids = torch.randint(3, 95, (2, 191), generator=torch.Generator().manual_seed(4))
    turns = [
        torch.stack([torch.cat([torch.zeros(pads), torch.ones(tokens)]) for pads, tokens in turn]) for turn in TURNS
    ]
    mask = torch.cat([*(turn if side == "left" else turn.flip(1) for turn in turns), torch.ones(2, 20)], 1).long()
    mask[1, 180:185] = 0
    return ids, mask, torch.tensor([turn.shape[1] for turn in turns]).cumsum(0).tolist()


def said_in_turns(model, ids, mask, ends, cache):
    """Logits of a batch fed turn by turn through a cache, then singly from the last end on."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [*ends, *range(ends[-1] + 1, ids.shape[1] + 1)]
    options = {"past_key_values": cache, "use_cache": True}
    return torch.cat(
        [
            logits(model, ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **options)
            for a, b in zip([0, *ends], ends, strict=False)
        ],
        1,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_chats_with_padding_between_turns_equal_stock(model_type, side, every_block):
    model, stock = sparse(model_type, every_block), tiny_models.tiny_model(model_type)
    ids, mask, ends = chats(side)
    got, want = (said_in_turns(m, ids, mask, ends, DynamicCache(config=m.config))[mask.bool()] for m in (model, stock))
    close(got, want, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_chats_with_padding_between_turns_equal_chats_without(side, settings):
    """At a real budget, too: turns shorter than a tile, and single tokens, are routed singly."""
    model = sparse("llama", settings)
    ids, mask, ends = chats(side)
    got = said_in_turns(model, ids, mask, ends, DynamicCache())
    for row, real in enumerate(mask.bool()):
        cuts = real.cumsum(0)[torch.tensor(ends) - 1].tolist()  # single tokens follow
        alone = ids[row : row + 1, real]
        close(got[row][real], said_in_turns(model, alone, torch.ones_like(alone), cuts, DynamicCache())[0], 1e-5)


def test_a_padded_prompt_decodes_like_the_uncached_forward(settings):
    model = sparse("llama", settings)
    ids, mask, _ = padded([(20, 0), (0, 29), (11, 24)], width=200)
    mask[:, 180:] = 1
    got = said_in_turns(model, ids, mask, [180], DynamicCache())
    for row, real in enumerate(mask.bool()):
        call = SparseCall(decode_from=int(real[:180].sum()))
        close(got[row][real], logits(model, ids[row : row + 1, real], sparse_call=call)[0], 1e-4)


def test_a_past_that_is_masked_differently_is_summarised_anew(settings):
    """Of one cached prompt, two parts of the same length are hidden in turn: as many tokens are left, but others."""
    model = sparse("llama", settings)
    ids, more = padded([(0, 0)])[0][:, :192], padded([(0, 0)], seed=1)[0][:, :2]
    cache = DynamicCache()
    logits(model, ids, past_key_values=cache)
    for step, hidden in enumerate((slice(32, 48), slice(64, 80))):
        mask = torch.ones(1, 193, dtype=torch.long)
        mask[:, hidden] = 0
        got = logits(model, more[:, step : step + 1], attention_mask=mask, past_key_values=cache)
        cache.crop(-1)
        fresh = copy.deepcopy(cache)
        for layer in fresh.layers:
            layer.summarised, layer.summarised_slots = [0], [-1]
        close(got, logits(model, more[:, step : step + 1], attention_mask=mask, past_key_values=fresh), 1e-5)


def test_a_mask_that_is_changed_in_place_is_read_anew():
    """Layers share what was read of a mask, by its contents."""
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :10] = False
    first = Layout(2, 50, 50, mask).segments()
    assert Layout(2, 50, 50, mask.clone()).segments() is first
    mask[1, :20] = False
    assert [len(segment.slots) for segment in Layout(2, 50, 50, mask).segments()] == [50, 30]
    assert Layout(2, 1, 50, mask).segments()[1].queries == 1
