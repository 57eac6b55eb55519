"""The two-stage router: what it selects, what it may look at, and what must not change a selection."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hf_sparse_attn_kernels import TileGrid, block_mass, routing, stage_one_scores, to_tiles

from hf_sparse_attn.router import selection
from hf_sparse_attn.router.budget import make_plan, select_by_scores
from hf_sparse_attn.router.selection import FeatureMaker, select_blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "cpp"])
def select(request):
    """`select_blocks` by each implementation that runs on a CPU."""
    return partial(select_blocks, impl=request.param)


def features_of(router, inputs, query_tile=16):
    """(features of all tiles of a call, its plan, the tiles)."""
    grid = inputs.grid(query_tile, 16)
    tiles = torch.arange(grid.tiles)
    return FeatureMaker(router, inputs, grid).features(tiles), make_plan(router.config, grid), tiles


@pytest.mark.parametrize("query_tile", [16, 1])
@pytest.mark.parametrize("rotary", [False, True])
def test_selection_is_the_same_on_repeat_and_for_equal_routers(select, make_router, routing_inputs, query_tile, rotary):
    inputs = routing_inputs(230, batch=2)
    one, two = make_router(rotary, noise=0.1), make_router(rotary, noise=0.1)
    first = select(one, inputs, query_tile)
    for again in (select(one, inputs, query_tile), select(two, inputs, query_tile)):
        assert torch.equal(first.indices, again.indices)
        assert torch.equal(first.scores.nan_to_num(-1), again.scores.nan_to_num(-1))


@pytest.mark.parametrize("query_tile", [16, 1])
@pytest.mark.parametrize(("q_len", "kv_len"), [(230, 230), (100, 230), (37, 256)])
def test_forced_links_are_kept_and_the_budget_is_filled_but_never_exceeded(
    select, make_router, routing_inputs, query_tile, q_len, kv_len
):
    router, inputs = make_router(rotary=True, noise=0.1), routing_inputs(kv_len, q_len, batch=2)
    selection = select(router, inputs, query_tile)
    plan, kept = make_plan(router.config, selection.grid), selection.kept()
    for tile, forced in enumerate(plan.forced_blocks(torch.arange(selection.grid.tiles))):
        assert bool(kept[:, :, tile, forced[forced >= 0]].all())
    visible = plan.last + 1
    budget = torch.tensor([router.config.budget_blocks(p + 1) for p in selection.grid.last_positions().tolist()])
    assert torch.equal(kept.sum(-1), torch.minimum(visible, budget).expand(2, 2, -1))
    assert not bool((kept & (torch.arange(selection.grid.blocks) > plan.last[:, None])).any())


def mean_pool_scores(q, k, grid, scale):
    """Log-sum-exp over eight runs of a tile's tokens of (mean query · mean key of a block), heads of a
    group averaged.
    """
    batch, groups = k.shape[:2]
    blocks = k[:, :, : k.shape[2] // 16 * 16].unflatten(2, (-1, 16)).mean(3)
    queries = to_tiles(q, grid, groups).mean(2).unflatten(2, (min(8, grid.query_tile), -1)).mean(3)  # [B·G, n, runs, D]
    return (
        torch.einsum("xnrd,xbd->xnrb", queries, blocks.flatten(0, 1))
        .mul(scale)
        .logsumexp(2)
        .unflatten(0, (batch, groups))
    )


@pytest.mark.parametrize("query_tile", [16, 1])
def test_the_untrained_coarse_score_is_mean_pooled_qk(make_router, routing_inputs, query_tile):
    inputs = routing_inputs(224, batch=2)
    features, plan, tiles = features_of(make_router(), inputs, query_tile)
    want = mean_pool_scores(inputs.q, inputs.k, plan.grid, inputs.scale)[..., : int(plan.near.max())]
    torch.testing.assert_close(stage_one_scores(features, plan, tiles), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 3])  # consecutive positions are pooled by one product, others one by one
@pytest.mark.parametrize("query_tile", [16, 1])
def test_with_rotary_the_means_are_unrotated_and_rotated_at_the_centres(
    make_router, routing_inputs, query_tile, stride
):
    router, inputs = make_router(rotary=True), replace(routing_inputs(224), positions=torch.arange(224)[None] * stride)
    features, plan, tiles = features_of(router, inputs, query_tile)
    rotary, grid, position = router.rotary, plan.grid, torch.arange(224) * stride
    keys = rotary.unrotate(inputs.k, position).unflatten(2, (-1, 16)).mean(3)
    keys = rotary.rotate(keys, (torch.arange(14) * 16) * stride + 7.5)  # the centre of tokens 0 to 15
    runs = min(8, query_tile)
    queries = (
        rotary.unrotate(inputs.q, position).unflatten(1, (2, 2)).mean(2).unflatten(2, (grid.tiles, runs, -1)).mean(4)
    )
    centres = position.float().unflatten(0, (grid.tiles, runs, -1)).mean(-1)
    queries = rotary.rotate(queries, centres)
    want = torch.einsum("bgnrd,bgmd->bgnrm", queries, keys).mul(inputs.scale).logsumexp(3)
    torch.testing.assert_close(
        stage_one_scores(features, plan, tiles), want[..., : int(plan.near.max())], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("query_tile", [16, 1])
@pytest.mark.parametrize("sink", [16, 0, 48])
def test_exact_fine_scores_are_the_exact_block_mass(select, make_router, routing_inputs, query_tile, sink):
    """Full rank, every query, every block a candidate: the scores of all links are the dense softmax mass."""
    router = make_router(index_dim=16, query_samples=16, candidate_factor=100.0, sink=sink, min_keys=112, noise=0.0)
    inputs = routing_inputs(230, batch=2)
    selection = select(router, inputs, query_tile)
    tiles = torch.arange(selection.grid.tiles)
    mass = block_mass(inputs.q, inputs.k, selection.grid, tiles, inputs.scale)
    plan = make_plan(router.config, selection.grid)
    assert torch.equal(selection.kept(), select_by_scores(plan, mass).kept())
    scored = ~selection.scores.isnan()
    assert bool(scored[:, :, plan.open].eq(selection.indices[:, :, plan.open] >= 0).all())
    want = mass.gather(-1, selection.indices.clamp(min=0).long())
    torch.testing.assert_close(selection.scores[scored], want[scored], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_exact_fine_scores_are_the_softmax_over_the_candidates_and_the_forced_keys(make_router, routing_inputs):
    router = make_router(index_dim=16, query_samples=16, candidate_factor=1.0)
    inputs = routing_inputs(400)
    _, plan, _ = features_of(router, inputs)
    tiles = torch.arange(25)[plan.open]
    features = FeatureMaker(router, inputs, plan.grid).features(tiles)
    coarse = stage_one_scores(features, plan, tiles)
    estimate = routing.stage_two_mass(features, plan, tiles, coarse)
    candidates = plan.best(coarse, tiles, plan.candidates[tiles])
    forced = plan.forced_blocks(tiles)
    for group in range(2):
        for i, tile in enumerate(tiles.tolist()):
            passed = set(candidates[0, group, i].tolist()) - {-1}
            assert len(passed) == plan.candidates[tile]
            read = passed | set(forced[i].tolist()) - {-1}
            assert set(torch.isfinite(estimate[0, group, i]).nonzero()[:, 0].tolist()) == read
            position = torch.arange(tile * 16, tile * 16 + 16)
            scores = inputs.q[0, 2 * group : 2 * group + 2, position] @ inputs.k[0, group].T * inputs.scale
            visible = torch.isin(torch.arange(400) // 16, torch.tensor(sorted(read))) & (
                torch.arange(400) <= position[:, None]
            )
            mass = (
                torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).mean((0, 1)).unflatten(0, (-1, 16)).sum(-1)
            )
            torch.testing.assert_close(estimate[0, group, i, sorted(read)], mass[sorted(read)], rtol=1e-4, atol=1e-6)
            chosen = sorted(passed, key=lambda b: -float(mass[b]))[: int(plan.free[tile])]
            kept = plan.best(estimate[:, :, i : i + 1], tiles[i : i + 1], plan.free[tiles[i : i + 1]])[0, group, 0]
            assert set(kept.tolist()) - {-1} == set(chosen)


@pytest.mark.parametrize("query_tile", [16, 1])
@pytest.mark.parametrize(
    ("run", "coarse", "fine"), [(1, 1, 1), (1 << 14, 1, 1 << 21), (1 << 22, 1 << 20, 1), (1 << 16, 1 << 13, 1 << 15)]
)
def test_chunk_sizes_do_not_change_the_selection(
    select, make_router, routing_inputs, monkeypatch, query_tile, run, coarse, fine
):
    router, inputs = make_router(rotary=True, noise=0.1), routing_inputs(230, batch=2)
    want = select(router, inputs, query_tile)
    monkeypatch.setattr(selection, "FEATURE_BYTES", run)
    monkeypatch.setattr(routing, "COARSE_SCORES", coarse)
    monkeypatch.setattr(routing, "FINE_BYTES", fine)
    got = select(router, inputs, query_tile)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("query_tile", [16, 1])
def test_cached_router_keys_give_the_same_selection(select, make_router, routing_inputs, query_tile):
    router, inputs = make_router(rotary=True, noise=0.1), routing_inputs(230, 60, batch=2)
    pieces = [
        router.router_keys(inputs.k[:, :, a:b], inputs.positions[:, a:b]) for a, b in ((0, 64), (64, 160), (160, 230))
    ]
    room = torch.full((2, 2, 40, pieces[0].shape[-1]), torch.nan)  # more room than is filled, as in a cache
    room[:, :, :14] = torch.cat(pieces, 2)
    cached = select(router, replace(inputs, router_keys=room), query_tile)
    assert torch.equal(cached.indices, select(router, inputs, query_tile).indices)
    room[:, :, :14] = room[:, :, :14].flip(2)  # they are really used
    assert not torch.equal(select(router, replace(inputs, router_keys=room), query_tile).indices, cached.indices)


@pytest.mark.parametrize("value", [torch.nan, 100.0])
@pytest.mark.parametrize("query_tile", [16, 1])
@pytest.mark.parametrize("sink", [16, 48])
def test_a_tile_never_depends_on_later_tiles(select, make_router, routing_inputs, value, query_tile, sink):
    """Indices and scores of a tile stay when every query and key after the tile changes, even to NaN."""
    router, inputs = make_router(rotary=True, noise=0.1, sink=sink, min_keys=112), routing_inputs(240)
    want = select(router, inputs, query_tile)
    for end in (16, 32, 40, 48, 112, 155, 224):
        q, k = inputs.q.clone(), inputs.k.clone()
        end = end // query_tile * query_tile
        q[:, :, end:], k[:, :, end:] = value, value
        got = select(router, replace(inputs, q=q, k=k), query_tile)
        tiles = end // query_tile
        kept, before = got.kept()[:, :, :tiles], want.kept()[:, :, :tiles]
        assert torch.equal(kept, before)
        width = min(got.indices.shape[-1], want.indices.shape[-1])
        scores, expected = (s.scores[:, :, :tiles, -width:] for s in (got, want))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_calls_that_continue_a_cache_select_like_the_whole(select, make_router, routing_inputs):
    router, inputs = make_router(rotary=True, noise=0.1), routing_inputs(230)
    whole = select(router, inputs, 16).kept()
    for start in (64, 112, 208):
        part = select(router, inputs.span(start, 230), 16).kept()
        assert torch.equal(part, whole[:, :, start // 16 :])
    singly = select(router, inputs, 1).kept()
    for position in (17, 100, 200, 229):
        one = select(router, inputs.span(position, position + 1), 1).kept()
        assert torch.equal(one[:, :, 0], singly[:, :, position, : one.shape[-1]])


def test_a_rotary_shift_of_all_positions_does_not_change_the_selection(select, make_router, routing_inputs):
    """Content decides, and distance: rotating everything further by the same angle is no change."""
    router, inputs = make_router(rotary=True, noise=0.1, index_dim=16), routing_inputs(230)
    # the index maps rotated dimensions, so only the exact index is free of absolute positions
    router.init_weights()
    shift = torch.arange(230) + 1000.0
    q, k = (router.rotary.rotate(router.rotary.unrotate(x, torch.arange(230)), shift) for x in (inputs.q, inputs.k))
    moved = select(router, replace(inputs, q=q, k=k, positions=inputs.positions + 1000))
    agree = (moved.kept() == select(router, inputs).kept()).float().mean()
    assert agree > 0.995


def test_each_group_and_row_has_its_own_selection(select, make_router, routing_inputs):
    router, inputs = make_router(noise=0.1), routing_inputs(230, batch=2)
    kept = select(router, inputs).kept()
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])
    for row in range(2):
        alone = select(router, replace(inputs, q=inputs.q[row : row + 1], k=inputs.k[row : row + 1]))
        assert torch.equal(alone.kept()[0], kept[row])
    # one selection collapsed over all queries would be the same in every tile
    tiles = kept[:, :, -6:, 1:-7].flatten(0, 1)
    assert not torch.equal(tiles[:, 0], tiles[:, -1])


def test_the_router_starts_alike_for_every_layout_of_heads(make_router, routing_inputs):
    for heads, groups in ((2, 2), (6, 2), (8, 1)):
        router, inputs = make_router(heads=heads, groups=groups), routing_inputs(224, heads=heads, groups=groups)
        features, plan, tiles = features_of(router, inputs)
        want = mean_pool_scores(inputs.q, inputs.k, TileGrid(224, 224, 16, 16), inputs.scale)[
            ..., : int(plan.near.max())
        ]
        torch.testing.assert_close(stage_one_scores(features, plan, tiles), want, rtol=1e-4, atol=1e-4)
        reps = router.representatives(plan.grid, torch.device("cpu"))
        assert reps.shape == (heads // groups, 8) and int(reps.max()) < 16
        assert all(len(set(row)) == 8 for row in reps.tolist())


# -- one query per row ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sink": 0, "local": 0, "min_keys": 48}, {"density": 0.5}, {"index_dim": 16, "candidate_factor": 1.0}],
)
@pytest.mark.parametrize("kv_len", [1, 15, 16, 79, 97, 224, 230])
def test_one_query_is_routed_like_a_tile_of_one(select, make_router, routing_inputs, rotary, changes, kv_len):
    """The decode step's own code gives the general code's selection and scores, rows at different positions
    included.
    """
    router = make_router(rotary, noise=0.1, **changes)
    inputs = routing_inputs(kv_len, 1, batch=2)
    inputs = replace(inputs, positions=torch.stack([inputs.positions[0], inputs.positions[0] + 37]))
    got = select(router, inputs, 1)
    features, plan, tiles = features_of(router, inputs, 1)
    if not plan.any_open:
        assert bool(got.kept().all())
        return
    indices, scores = routing._select_tiles(features, plan, tiles, "torch")
    assert got.indices.dtype == torch.int32 and torch.equal(got.indices, indices)
    torch.testing.assert_close(got.scores, scores, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_the_decode_step_does_not_depend_on_memory_behind_the_keys(select, make_router, routing_inputs):
    """A cache with room to grow holds anything behind its last key; the partial last block must not show it."""
    router, inputs = make_router(rotary=True, noise=0.1), routing_inputs(230, 1, batch=2)
    room = torch.full((2, 2, 256, 16), torch.nan)
    room[:, :, :230] = inputs.k
    grown = replace(inputs, k=room[:, :, :230])
    got, want = select(router, grown, 1), select(router, inputs, 1)
    assert torch.equal(got.indices, want.indices) and torch.equal(got.scores, want.scores)
