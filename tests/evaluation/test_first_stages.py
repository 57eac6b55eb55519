"""Other first stages before the router's second: each against its formula, and the ends of what they can be."""

from __future__ import annotations

import pytest
import torch

from hf_sparse_attn.attention.call import learned_selector
from hf_sparse_attn.evaluation.baselines import ScoringCall, make_selectors, selector_names
from hf_sparse_attn.experiments.recipe import Quality
from hf_sparse_attn.router.budget import make_plan

N, SIZE = 250, 16  # the last tile and the last block are partial
WHOLE = N // SIZE
NAMES = tuple(name for name in selector_names(every=True) if name.startswith("stage 1: "))


@pytest.fixture(params=[(N, 16), (40, 16), (5, 1)], ids=["prefill", "chunk", "decode"])
def call(request, make_router, routing_inputs):
    q_len, tile = request.param
    inputs, router = routing_inputs(N, q_len, batch=2), make_router(noise=0.3, candidate_factor=1.5)
    return ScoringCall(router, inputs, make_plan(router.config, inputs.grid(tile, SIZE)))


def selected(call, name):
    [selector] = make_selectors([name]).values()
    return selector(call.router, call.inputs, call.plan.grid.query_tile).indices


def routed(call, **settings):
    router = call.router
    with_settings = router.config.changed(**settings)
    own, router.config = router.config, with_settings
    try:
        return learned_selector(router, call.inputs, call.plan.grid.query_tile).indices
    finally:
        router.config = own


def test_they_are_compared_only_where_they_are_named():
    assert len(NAMES) == 5 and not {*NAMES} & {*selector_names()}
    entry = Quality(4096, 1, (512,), 0, ("oracle", *NAMES, "window + sink"))
    assert {*NAMES} < {*entry.selections} and not {*NAMES} & {*Quality(4096, 1, (512,)).selections}


def test_the_pooled_one_is_the_routers_own_without_retrieval_heads(call):
    assert torch.equal(selected(call, "stage 1: pooled"), routed(call))


def test_none_at_all_is_every_block_as_a_candidate(call):
    every = routed(call, candidate_factor=1e6)
    assert torch.equal(selected(call, "stage 1: all"), every)
    assert call.plan.grid.query_tile == 1 or not torch.equal(every, routed(call))


def parts_of(name, keys):
    """What a block's keys [S, D] are summed up by, [P, D]."""
    if name == "stage 1: means of 4":
        return torch.stack([keys[at : at + 4].mean(0) for at in range(0, SIZE, 4)])
    return torch.stack([key.sign() * key.abs().mean() for key in keys])


@pytest.mark.parametrize("name", ["stage 1: means of 4", "stage 1: sign bits"])
def test_a_block_counts_by_its_largest_part_of_each_querys_softmax(name, make_router, routing_inputs):
    inputs, router = routing_inputs(N), make_router()
    call = ScoringCall(router, inputs, make_plan(router.config, inputs.grid(16, SIZE)))
    [selector] = make_selectors([name]).values()
    tile = 12
    got = selector.candidate_scores(call, torch.tensor([tile]))[0, :, 0]
    reps = router.representatives(call.plan.grid, inputs.q.device)
    eligible = call.plan.eligible_mask(torch.tensor([tile]))[0].nonzero()[:, 0].tolist()
    for group in range(2):
        keys = inputs.k[0, group].double()
        parts = torch.stack([parts_of(name, keys[b * SIZE : (b + 1) * SIZE]) for b in eligible])
        want = torch.zeros(parts.shape[:2], dtype=torch.float64)
        for head in range(2):
            for rep in reps[head].tolist():
                q = inputs.q[0, 2 * group + head, tile * 16 + rep].double() * inputs.scale
                want += (parts @ q).flatten().softmax(0).view_as(want)
        # int8 rounds a mean by 1/254 of its largest value
        torch.testing.assert_close(got[group, eligible].double(), want.amax(-1), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_does_not_depend_on_how_many_tiles_are_scored_at_a_time(name, call, monkeypatch):
    [whole], [single] = (make_selectors([name]).values() for _ in range(2))
    monkeypatch.setattr(single, "tiles_at_a_time", lambda call: 1)
    router, inputs, tile = call.router, call.inputs, call.plan.grid.query_tile
    assert torch.equal(single(router, inputs, tile).indices, whole(router, inputs, tile).indices)


def test_a_single_loud_key_is_found_by_finer_parts_and_by_all_candidates(make_router, routing_inputs):
    """One key of a block answers the last tile, the others of its block point away: the pooled mean hides it."""
    inputs, router = routing_inputs(N), make_router(candidate_factor=1.0)
    router.init_weights()
    block, tile = 5, 14
    q = inputs.q[0, :2, tile * 16 : tile * 16 + 16].mean((0, 1))
    inputs.q[0, :2, tile * 16 : tile * 16 + 16] = q
    inputs.k[0, 0, block * SIZE : (block + 1) * SIZE] = -q
    inputs.k[0, 0, block * SIZE + 7] = 40 * q / q.norm()
    call = ScoringCall(router, inputs, make_plan(router.config, inputs.grid(16, SIZE)))
    kept = {name: block in selected(call, name)[0, 0, tile].tolist() for name in NAMES}
    assert kept["stage 1: all"] and kept["stage 1: means of 4"]
