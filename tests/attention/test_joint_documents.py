"""The documents of a call, packed or padded, are attended in one call of `block_sparse_attention` a layer, each as if
it were alone.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_models
from helpers.agreement import assert_close_to_largest as close
from helpers.calls import Watching
from hf_sparse_attn_kernels import BlockSelection, TileGrid
from transformers import DynamicCache

from hf_sparse_attn import SparseCall
from hf_sparse_attn.attention import layer as layers

LENGTHS = (200, 131, 90)
LAYERS = 3


@pytest.fixture(scope="module")
def documents():
    return [torch.randint(3, 95, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture(scope="module")
def model(real_budget):
    model = tiny_models.sparse_tiny_model("llama", {**real_budget, "candidate_factor": 1.0})
    assert model.config.num_hidden_layers == LAYERS
    return model


@pytest.fixture
def calls(monkeypatch):
    """The selection of every call of `block_sparse_attention`."""
    selections, attend = [], layers.block_sparse_attention

    def counted(q, k, v, selection, **options):
        selections.append(selection)
        return attend(q, k, v, selection, **options)

    monkeypatch.setattr(layers, "block_sparse_attention", counted)
    return selections


def packed(documents, **also):
    return {"input_ids": torch.cat(documents, 1), "use_cache": False, **also}


def padded(documents, left):
    ids, mask = torch.zeros(3, 200, dtype=torch.long), torch.zeros(3, 200, dtype=torch.long)
    for row, document in enumerate(documents):
        n = document.shape[1]
        at = slice(200 - n, None) if left else slice(0, n)
        ids[row, at], mask[row, at] = document[0], 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }


positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
ends = torch.tensor([0, 200, 331, 421], dtype=torch.int32)
numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
WAYS = {
    "position_ids": lambda documents: packed(documents, position_ids=positions),
    "cu_seq_lens": lambda documents: packed(documents, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends),
    "numbers": lambda documents: packed(documents, position_ids=positions, attention_mask=numbers),
    "left": lambda documents: padded(documents, left=True),
    "right": lambda documents: padded(documents, left=False),
}


def real(logits, inputs):
    """The logits of all documents, one after the other: [tokens, vocabulary]."""
    mask = inputs.get("attention_mask", inputs["input_ids"] + 1) > 0
    return logits[mask]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
def test_one_call_a_layer_gives_what_separate_documents_give(way, model, documents, calls):
    """Logits and the gradients of all weights."""
    separate = torch.cat([model(input_ids=document, use_cache=False).logits[0] for document in documents])
    want = gradients(model, separate.square().mean())
    calls.clear()
    inputs = WAYS[way](documents)
    together = real(model(**inputs).logits, inputs)
    assert [len(selection.documents) for selection in calls] == [3] * LAYERS
    close(together, separate, 1e-5)
    got = gradients(model, together.square().mean())
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_observers_and_selectors_see_every_document_by_itself(way, model, documents):
    """The same queries, keys, values and selections, bit for bit, as of documents that are cut out of the tensors by
    hand.
    """
    seen = []
    inputs = WAYS[way](documents)
    call = Watching(
        document=lambda router, of: seen.append((router.layer, of, None)),
        selection=lambda *all: seen.append((all[0].layer, *all[1:])),
    )
    model(**inputs, sparse_call=call)
    assert len(seen) == 2 * LAYERS * len(LENGTHS)
    for i, (layer, of, selection) in enumerate(seen):
        length = LENGTHS[i // 2 % 3]
        assert layer == i // 6 and of.q.shape[2] == of.k.shape[2] == of.v.shape[2] == of.positions.shape[1] == length
        assert of.q.shape[0] == 1 and (selection is None) == (i % 2 == 0)
        if selection is not None:
            assert (
                selection.grid == TileGrid(length, length, 16, 16)
                and selection.documents is None
                and selection.scores is not None
            )


@torch.no_grad()
def test_a_decode_step_of_padded_rows_is_one_call_a_layer(model, documents, calls):
    inputs, cache = WAYS["left"](documents), DynamicCache(config=model.config)
    model(**{**inputs, "use_cache": True}, past_key_values=cache)
    calls.clear()
    token = torch.tensor([[5], [6], [7]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    got = model(
        input_ids=token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache
    ).logits
    assert [(len(selection.documents), selection.grid.query_tile) for selection in calls] == [(3, 1)] * LAYERS
    for row, document in enumerate(documents):
        whole = torch.cat([document, token[row : row + 1]], 1)
        call = SparseCall(decode_from=document.shape[1])
        close(got[row, -1], model(input_ids=whole, use_cache=False, sparse_call=call).logits[0, -1], 1e-5)


@torch.no_grad()
def test_rows_with_holes_and_spans_of_another_tile_are_attended_by_themselves(model, documents, calls):
    """Beside the others, and with the same result."""
    inputs = WAYS["right"](documents)
    inputs["attention_mask"][0, 50:70] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = model(**inputs).logits
    assert [None if selection.documents is None else len(selection.documents) for selection in calls] == [
        None,
        2,
    ] * LAYERS
    whole = torch.cat([documents[0][:, :50], documents[0][:, 70:]], 1)
    close(torch.cat([got[:1, :50], got[:1, 70:]], 1), model(input_ids=whole, use_cache=False).logits, 1e-5)
    close(got[1:2, :131], model(input_ids=documents[1], use_cache=False).logits, 1e-5)
    calls.clear()
    call = SparseCall(decode_from=100)
    got = model(**WAYS["right"](documents), sparse_call=call).logits
    # 90 tokens have one span
    assert [selection.documents is None for selection in calls] == [True, True, True, True, False] * LAYERS
    for row, document in enumerate(documents):
        close(
            got[row : row + 1, : document.shape[1]],
            model(input_ids=document, use_cache=False, sparse_call=call).logits,
            1e-5,
        )


def routed(*lengths, tile=64):
    places = torch.tensor([[0, 1000 * i, 1000 * i + n] for i, n in enumerate(lengths)])
    grids = [TileGrid(n, n, tile, 16) for n in lengths]
    lists = [torch.arange(-1, g.tiles - 1, dtype=torch.int32).clamp(max=0)[None, None, :, None] for g in grids]
    return [(place, BlockSelection(x, grid)) for place, x, grid in zip(places, lists, grids, strict=True)]


def test_lists_padded_to_a_much_longer_document_are_joined_apart(monkeypatch):
    """A selection of all would take memory for as many lists as documents times tiles of the longest."""
    parts = routed(640, *[64] * 7, 70) + routed(3, tile=1)
    monkeypatch.setattr(layers, "PADDED_TILES", 20)
    joined = list(layers.joint_selections(parts, 9000, 9000))
    shapes = [(tuple(selection.indices.shape[::2]), selection.grid.query_tile) for selection in joined]
    assert shapes == [((6, 10), 64), ((3, 1), 64), ((1, 3), 1)]
    rows = [tuple(place) for selection in joined for place in selection.documents.tolist()]
    assert sorted(rows) == sorted(tuple(place.tolist()) for place, _ in parts)
    monkeypatch.undo()
    assert [len(selection.documents) for selection in layers.joint_selections(parts, 9000, 9000)] == [9, 1]
    assert not list(layers.joint_selections([], 9000, 9000))
