"""KV heads without stage 1: what they keep, on every implementation; the other heads keep what they kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.router.selection import select_blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERYTHING = 1000.0  # as a candidate_factor: stage 1 passes all blocks on


@pytest.fixture(params=["torch", "cpp"])
def select(request):
    return partial(select_blocks, impl=request.param)


def with_settings(router, **changes):
    """A router of the same weights."""
    other = copy.copy(router)
    other.config = router.config.changed(**changes)
    return other


def parts(selection, head):
    return selection.kept()[:, head], selection.scores.nan_to_num(-1)[:, head]


@pytest.mark.parametrize("query_tile", [16, 1])
@pytest.mark.parametrize(("q_len", "kv_len"), [(430, 430), (100, 430), (1, 431)])
@pytest.mark.parametrize("index_dim", [16, 4])
def test_all_blocks_are_candidates_of_these_heads_only(
    select, make_router, routing_inputs, query_tile, q_len, kv_len, index_dim
):
    router = make_router(rotary=True, noise=0.3, candidate_factor=1.0, index_dim=index_dim)
    inputs = routing_inputs(kv_len, q_len, batch=2)
    plain, whole = (select(r, inputs, query_tile) for r in (router, with_settings(router, candidate_factor=EVERYTHING)))
    assert not torch.equal(plain.kept()[:, 1], whole.kept()[:, 1])
    got = select(with_settings(router, retrieval_heads=((0, 1), (3, 0))), inputs, query_tile)
    for head, want in ((0, plain), (1, whole)):
        for mine, wanted in zip(parts(got, head), parts(want, head), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("query_tile", [16, 1])
def test_a_threshold_keeps_as_many_of_them_as_of_others_at_most(select, make_router, routing_inputs, query_tile):
    router, inputs = make_router(noise=0.3, candidate_factor=1.5), routing_inputs(430, batch=2)
    whole = select(with_settings(router, candidate_factor=EVERYTHING, mass_threshold=1e-30), inputs, query_tile)
    got = select(with_settings(router, retrieval_heads=((0, 0), (0, 1)), mass_threshold=0.03), inputs, query_tile)
    plan = make_plan(router.config, got.grid)
    every = whole.scores.nan_to_num(-1) * whole.kept().gather(-1, whole.indices.clamp(min=0).long())
    mass = torch.zeros(whole.kept().shape).scatter_(-1, whole.indices.clamp(min=0).long(), every)
    for tile in plan.open.nonzero()[:, 0].tolist():
        eligible = plan.eligible_mask(torch.tensor([tile]))[0]
        for row in mass[:, :, tile].flatten(0, 1).masked_fill(~eligible, -1):
            best = row.topk(int(plan.candidates[tile]))
            wanted = set(best.indices[best.values >= 0.03].tolist())
            assert wanted
        kept = got.kept()[:, :, tile] & eligible
        want = (mass[:, :, tile] >= 0.03) & eligible
        fits = want.sum(-1) <= plan.candidates[tile]
        assert torch.equal(kept[fits], want[fits])
        assert int(kept.sum(-1).max()) <= int(plan.candidates[tile])


@pytest.mark.parametrize("length", [208, 205])
def test_bidirectional_calls_have_them_too(make_router, routing_inputs, length):
    router = make_router(min_keys=112, candidate_factor=1.0, noise=0.3)
    inputs = replace(routing_inputs(length, batch=2), causal=False)
    whole = select_blocks(with_settings(router, candidate_factor=EVERYTHING), inputs)
    got = select_blocks(with_settings(router, retrieval_heads=((0, 0), (0, 1))), inputs)
    assert torch.equal(got.indices, whole.indices)
    torch.testing.assert_close(got.scores.nan_to_num(-1), whole.scores.nan_to_num(-1))


def test_one_token_that_pooling_hides_is_found(make_router, routing_inputs):
    """A key that one query is made for, in a block whose other keys cancel it in the mean."""
    router, inputs = make_router(query_samples=16, candidate_factor=1.0), routing_inputs(430)
    q, k = inputs.q.clone(), inputs.k.clone()
    needle = 30 * torch.nn.functional.normalize(q[0, 2, 400], dim=0)
    k[0, 1, 160:176] = -needle / 15
    k[0, 1, 165] = needle
    inputs = replace(inputs, q=q, k=k)
    assert not bool(select_blocks(router, inputs, 16).kept()[0, 1, 25, 10])
    assert bool(select_blocks(with_settings(router, retrieval_heads=((0, 1),)), inputs, 16).kept()[0, 1, 25, 10])
