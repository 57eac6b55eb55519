"""Masks [batch, 1, queries, keys] that a user or a model makes:
honoured where they express padding and documents, else refused.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models
from helpers.agreement import assert_close_to_largest as close
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

N = 200
ADDITIVE = (None, -torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4)  # what hides; None: a boolean mask


@pytest.fixture(scope="module", params=["every_block", "real_budget"])
def settings(request):
    return {**request.getfixturevalue(request.param), "candidate_factor": 1.0, "min_keys": 112}


@pytest.fixture(scope="module")
def sparse(settings):
    return tiny_models.sparse_tiny_model("llama", settings)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 95, (2, N), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def causal(real, queries=N):
    """Boolean [B, 1, queries, N] of a padding mask [B, N]."""
    return torch.ones(N, N).bool().tril()[-queries:] & real.bool()[:, None, None]


def padding():
    """Pads before, behind and between the tokens."""
    mask = torch.ones(2, N, dtype=torch.long)
    mask[0, :13] = mask[0, 190:] = mask[1, 60:81] = 0
    return mask


def written(mask, hides):
    """The mask as boolean or as additive one."""
    return mask if hides is None else torch.zeros(mask.shape).masked_fill(~mask, hides)


@pytest.mark.parametrize("hides", ADDITIVE)
def test_a_causal_mask_is_no_mask(sparse, ids, hides):
    for mask in (causal(torch.ones(2, N)), causal(torch.ones(1, N)), causal(torch.ones(1, N)).expand(2, 4, -1, -1)):
        assert torch.equal(logits(sparse, ids, attention_mask=written(mask, hides)), logits(sparse, ids))


@pytest.mark.parametrize("hides", ADDITIVE)
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_causal_mask_with_padding_is_a_padding_mask(sparse, ids, hides, use_cache):
    real = padding()
    got = logits(sparse, ids, attention_mask=written(causal(real), hides), use_cache=use_cache)
    assert torch.equal(got[real.bool()], logits(sparse, ids, attention_mask=real)[real.bool()])


def test_rows_of_padding_may_hold_anything(sparse, ids):
    """Masks are often written so that a query that is padding sees something, to be safe from NaN."""
    real = padding()
    real[0] = 1
    real[0, 150:] = 0
    mask = causal(real)
    mask[0, :, 150:, :70] = ~mask[0, :, 150:, :70]
    got = logits(sparse, ids, attention_mask=mask)
    assert torch.equal(got[real.bool()], logits(sparse, ids, attention_mask=real)[real.bool()])


@pytest.mark.parametrize("hides", ADDITIVE[:3])
@pytest.mark.parametrize("position_ids", [None, "restart"])
def test_blocks_along_the_diagonal_are_packed_documents(sparse, ids, hides, position_ids):
    real, mask = padding(), torch.zeros(2, 1, N, N, dtype=torch.bool)
    # row, first slot, end: row 1 has padding inside the first
    parts = ((0, 13, 150), (0, 150, 190), (1, 0, 110), (1, 110, N))
    positions = torch.zeros(2, N, dtype=torch.long)
    for row, start, stop in parts:
        at = slice(start, stop)
        mask[row, :, at, at] = causal(real)[row, :, at, at]
        positions[row, at] = torch.arange(stop - start)
    got = logits(sparse, ids, attention_mask=written(mask, hides), position_ids=positions)
    for row, start, stop in parts:
        at = slice(start, stop)
        options = {"attention_mask": real[row : row + 1, at], "position_ids": positions[row : row + 1, at]}
        alone = logits(sparse, ids[row : row + 1, at], **options)[0]
        close(got[row, at][real[row, at].bool()], alone[real[row, at].bool()], 1e-5)


@pytest.mark.parametrize("hides", ADDITIVE[:3])
@pytest.mark.parametrize("make", [DynamicCache, lambda: None], ids=["dynamic", "static"])
def test_masks_with_a_past_equal_padding_masks(sparse, ids, hides, make):
    """In calls that continue a cache with a chunk, and with single tokens."""
    real, out = padding(), []
    real[:, 170:] = 1
    for four in (False, True):
        cache = make() or StaticCache(config=sparse.config, max_cache_len=N + 30)
        parts = []
        for start, stop in ((0, 90), (90, 170), *((at, at + 1) for at in range(170, N))):
            mask = real[:, :stop]
            if four:
                mask = written(causal(real)[:, :, start:stop, : stop if isinstance(cache, DynamicCache) else N], hides)
                mask = (
                    mask
                    if isinstance(cache, DynamicCache)
                    else torch.nn.functional.pad(mask, (0, 30), value=hides or 0)
                )
            parts.append(logits(sparse, ids[:, start:stop], attention_mask=mask, past_key_values=cache))
        out.append(torch.cat(parts, 1)[real.bool()])
    close(out[1], out[0], 1e-5)


def test_a_past_document_that_a_mask_hides_is_left_out(sparse, ids):
    cache = DynamicCache()
    logits(sparse, ids[:, :100], past_key_values=cache)
    mask = causal(torch.ones(2, N), 100)
    mask[..., :100] = False
    got = logits(sparse, ids[:, 100:], attention_mask=mask, position_ids=torch.arange(100)[None], past_key_values=cache)
    close(got, logits(sparse, ids[:, 100:]), 1e-5)


@pytest.mark.parametrize("hides", ADDITIVE[:3])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "eurobert"])
def test_bidirectional_masks_with_padding_are_padding_masks(model_type, settings, ids, hides):
    model, real = tiny_models.sparse_tiny_model(model_type, settings), padding()
    mask = real.bool()[:, None, None].expand(2, 1, N, N)
    if model_type == "modernbert":  # its layers with a window take a mask as it is, without the window
        near = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 20
        mask = {"full_attention": written(mask, hides), "sliding_attention": written(mask & near, hides)}
    else:
        mask = written(mask, hides)
    got = logits(model, ids, attention_mask=mask)
    close(got[real.bool()], logits(model, ids, attention_mask=real)[real.bool()], 1e-5)


def test_layers_with_a_window_take_a_mask_as_stock_layers_do(ids, every_block):
    model, stock = tiny_models.sparse_tiny_model("qwen2", every_block), tiny_models.tiny_model("qwen2")
    real = padding()
    got, want = (logits(m, ids, attention_mask=causal(real))[real.bool()] for m in (model, stock))
    close(got, want, 1e-5)


# -- refusals -------------------------------------------------------------------------------------------------------


def prefix_lm():
    mask = causal(torch.ones(2, N))
    mask[..., :40, :40] = True
    return mask


def sees_a_later_token():
    mask = causal(torch.ones(2, N))
    mask[1, 0, 100, 101] = True
    return mask


def hides_an_earlier_token():
    mask = causal(torch.ones(2, N))
    mask[0, 0, 150, 20] = False
    return mask


def window():
    return causal(torch.ones(2, N)) & ~causal(torch.ones(2, N)).tril(-50)


@pytest.mark.parametrize("hides", ADDITIVE[:3])
@pytest.mark.parametrize("make", [prefix_lm, sees_a_later_token, hides_an_earlier_token, window])
def test_other_masks_are_refused_by_name(sparse, ids, make, hides):
    with pytest.raises(
        ValueError, match=r"mask \(2, 1, 200, 200\) is not causal attention with padding and packed documents.*sdpa"
    ):
        logits(sparse, ids, attention_mask=written(make(), hides))


def test_masks_per_head_and_biases_are_refused(sparse, ids):
    mask = causal(torch.ones(2, N)).repeat(1, 4, 1, 1)
    mask[:, 2, 100:, :30] = False
    with pytest.raises(ValueError, match=r"mask \(2, 4, 200, 200\) differs between heads"):
        logits(sparse, ids, attention_mask=mask)
    bias = written(causal(torch.ones(2, N)), -torch.inf)
    for value in (0.5, -3.0, torch.nan):
        bias[1, 0, 120, 5] = value
        with pytest.raises(
            ValueError, match=r"additive attention mask \(2, 1, 200, 200\) holds other values than 0 .* no biases"
        ):
            logits(sparse, ids, attention_mask=bias)


@pytest.mark.parametrize("shape", [(2, 1, 100, N), (2, 1, N, 150), (3, 1, N, N), (2, N, N)])
def test_masks_of_the_wrong_shape_are_refused(sparse, ids, shape):
    with pytest.raises(ValueError, match=r"attention mask \(.*; supported: None, a padding mask"):
        logits(sparse, ids, attention_mask=torch.ones(shape).bool())


@pytest.fixture(scope="module")
def embeddings():
    return torch.zeros(2, N, 64)


def see_each_other(batch, head, query, key):
    """As the tokens of an image do."""
    return (query < 60) & (query >= 40) & (key < 60) & (key >= 40)


def test_masks_laid_over_the_causal_one_are_refused(sparse, ids, embeddings):
    blocks = torch.full((2, N), -1)
    blocks[:, 40:60] = 0
    arguments = {"config": sparse.config, "inputs_embeds": embeddings, "attention_mask": None, "past_key_values": None}
    for overlay in ({"or_mask_function": see_each_other}, {"block_sequence_ids": blocks}):
        mask = create_causal_mask(**arguments, **overlay)
        assert mask.shape == (2, 1, N, N)
        with pytest.raises(ValueError, match="is not causal attention with padding and packed documents"):
            logits(sparse, ids, attention_mask=mask)
    mask = create_causal_mask(**arguments, and_mask_function=lambda b, h, q, k: (q - k) < 50)
    with pytest.raises(ValueError, match="is not causal attention"):
        logits(sparse, ids, attention_mask=mask)


def test_overlays_that_change_nothing_are_honoured(sparse, ids, embeddings):
    real = padding()
    arguments = {"config": sparse.config, "inputs_embeds": embeddings, "attention_mask": real, "past_key_values": None}
    want = logits(sparse, ids, attention_mask=real)[real.bool()]
    for overlay in (
        {"or_mask_function": lambda b, h, q, k: (q == k) & (q < 0)},
        {"block_sequence_ids": torch.full((2, N), -1)},
        {"and_mask_function": lambda b, h, q, k: k <= q},
    ):
        assert torch.equal(
            logits(sparse, ids, attention_mask=create_causal_mask(**arguments, **overlay))[real.bool()], want
        )


NARROW = {"and_mask_function": lambda b, h, q, k: (q - k) < 50}
IMAGES = {
    "or_mask_function": see_each_other,
    "position_ids": torch.cat([torch.arange(90), torch.arange(N - 90)]).expand(2, N),
}


# what torch traces of its own vmap
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("overlay", [NARROW, IMAGES], ids=["narrow", "images"])
def test_a_compiled_model_does_not_take_overlays_for_packed_documents(overlay, sparse, embeddings):
    """Transformers joins some by the function that joins packed documents, which a graph cannot tell apart;
    others come as a 4D mask.
    """
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def mask(inputs_embeds):
        return create_causal_mask(sparse.config, inputs_embeds, None, past_key_values=None, **overlay)

    try:
        result = mask(embeddings)
    except RuntimeError as error:
        assert "another mask lies over that of packed documents" in str(error)
    else:
        assert result.shape == (2, 1, N, N)


def test_overlays_of_a_bidirectional_model_are_refused(settings, ids, embeddings):
    model = tiny_models.sparse_tiny_model("bert", settings)
    mask = create_bidirectional_mask(model.config, embeddings, None, and_mask_function=lambda b, h, q, k: (q - k) < 50)
    with pytest.raises(ValueError, match="is not bidirectional attention with padding"):
        logits(model, ids, attention_mask=mask)
